"""A client of a pool that runs elsewhere hears of its workers, and finds the scheduler again after it was killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from cryptography import x509
from tests.process.pools import DEADLINE_S, PoolHome, wait_for

from modelops.cluster import connected
from modelops.cluster.announce import MEMBERSHIP, WORKERS_TOPIC
from modelops.cluster.connected import ConnectedCluster, _Connection
from modelops.cluster.run_folder import SCHEDULER
from modelops.cluster.tls import ensure_certificates
from modelops.cluster.versions import VERSIONS, ours
from modelops.errors import ClusterError
from modelops.study.pools import Membership

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

COMMAND = str(Path(sys.executable).with_name("modelops"))
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def test_a_client_that_is_connected_misses_no_worker_that_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of workers and the subscription to those who join there is no gap, however slow that is."""
    send: Any = _Connection._send_to_scheduler

    def slowly(self: _Connection, message: dict[str, Any]) -> None:
        if message["op"] == "subscribe-topic":
            loop: Any = self.loop
            loop.add_callback(loop.call_later, 3.0, lambda: send(self, message))
        else:
            send(self, message)

    monkeypatch.setattr(_Connection, "_send_to_scheduler", slowly)

    def subscribed(dask_scheduler: Any) -> bool:
        return bool(dask_scheduler._broker._topics[WORKERS_TOPIC].subscribers)

    with a_scheduler(tmp_path) as cluster, cluster:
        wait_for(lambda: cluster.connected, "it is connected")
        assert cluster.client.run_on_scheduler(subscribed)


def test_who_hears_of_a_worker_can_use_the_client_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of workers that come and go before the list of all workers is there."""
    wait = connected._wait_until_subscribed
    versions = msgspec.to_builtins(ours())

    def while_one_joins(client: Client) -> None:
        wait(client)
        for worker in ("tls://one", "tls://two"):
            message = {"event": "joined", "worker": worker, "slots": 1, VERSIONS: versions}
            client.log_event(WORKERS_TOPIC, message)
        client.log_event(WORKERS_TOPIC, {"event": "left", "worker": "tls://two", "died": True})
        wait(client)  # what came before it is heard

    monkeypatch.setattr(connected, "_wait_until_subscribed", while_one_joins)
    with a_scheduler(tmp_path) as cluster:
        heard: list[tuple[str, str, bool]] = []
        with (
            cluster.on_workers(
                joined=lambda worker, _slots: heard.append(("joined", worker, cluster.connected)),
                left=lambda worker, _died: heard.append(("left", worker, cluster.connected)),
            ),
            cluster,
        ):
            wait_for(lambda: len(heard) == 3, "all is heard")
            assert list(cluster.workers()) == ["tls://one"]
        told = [("joined", "tls://one"), ("joined", "tls://two"), ("left", "tls://two")]
        assert heard[:3] == [(*each, True) for each in told]


OTHER_DASK = """
import importlib.metadata as packages
version = packages.version
packages.version = lambda name: "1.0" if name == "distributed" else version(name)
"""


@pytest.mark.filterwarnings("ignore::distributed.versions.VersionMismatchWarning")
def test_while_the_scheduler_has_another_dask_workers_get_nothing_and_its_versions_are_in_the_table(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(OTHER_DASK)
    with a_scheduler(tmp_path, PYTHONPATH=str(tmp_path)) as cluster, cluster:
        wait_for(lambda: cluster.connected, "it is connected")
        message = {
            "event": "joined", "worker": "tls://one", "slots": 1, VERSIONS: msgspec.to_builtins(ours()),
            MEMBERSHIP: {"pool": "eu-west"},
        }  # fmt: skip
        cluster.client.log_event(WORKERS_TOPIC, message)
        wait_for(lambda: bool(cluster.refused()), "the worker is refused")
        rows = {row.split()[0]: row.split()[1:] for row in cluster.refused()["tls://one"].splitlines()[1:]}
        same = ours().distributed
        assert rows["distributed"] == [same, "1.0", same, "must", "be", "the", "same"]
        assert rows["modelops"] == [ours().modelops] * 3
        assert cluster.membership("tls://one") == Membership("eu-west")
        assert cluster.workers() == {}


@pytest.mark.parametrize("mixed", [False, True], ids=["all of another", "its own of another"])
def test_which_certificate_is_of_a_wrong_authority_is_said(
    tmp_path: Path, warned: list[str], mixed: bool
) -> None:
    """By the server and by a worker, each in one sentence, and before they would give up."""
    with a_scheduler(tmp_path) as cluster:
        address, right = cluster._find(), cluster._tls
        assert right is not None
        tls = tmp_path / "tls"
        ensure_certificates(tls)
        if mixed:  # what the scheduler shows is accepted, and what it is shown is not
            shutil.copy(right / "ca.pem", tls)
        crew = subprocess.Popen(
            [COMMAND, "worker", "--scheduler", str(address), "--slots", "1", "--host", "127.0.0.1", "--tls", tls],
            env=PoolHome.at(tmp_path / "worker").environ, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            with ConnectedCluster(lambda: address, tls) as stranger:
                wait_for(lambda: any("certificate" in text for text in warned), "the server says it")
                assert not stranger.connected
            assert crew.stderr is not None
            said = next(line for line in crew.stderr if "certificate" in line)
            for text, who in (("\n".join(warned), "server"), (json.loads(said)["message"], "worker")):
                if mixed:
                    assert f"does not accept the certificate of this {who}" in text
                    assert f"in {tls / 'cert.pem'}. All parts of a pool need" in text
                else:
                    assert f"the certificate of the scheduler {address} is not accepted here" in text
                    assert f"this {who} trusts 'CN=ModelOps pool authority' ({_key_of(tls)}...)" in text
                    assert f"of the authority 'CN=ModelOps pool authority' ({_key_of(right)}...)" in text
        finally:
            crew.terminate()
            crew.communicate()
        assert crew.returncode == 0


def _key_of(folder: Path) -> str:
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    key = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    return f"key {key[:6].hex(':').upper()}"


@contextlib.contextmanager
def a_scheduler(folder: Path, **environ: str) -> Iterator[ConnectedCluster]:
    """Run a scheduler; yield what connects to it."""
    pool = PoolHome.at(folder / "home")
    tls = pool.run.path / "tls"
    ensure_certificates(tls)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [COMMAND, "scheduler", "--port", str(port)]
    scheduler = subprocess.Popen(command, env={**pool.environ, **environ}, stderr=subprocess.PIPE)
    try:
        yield ConnectedCluster(lambda: f"tls://127.0.0.1:{port}", tls)
    finally:
        scheduler.terminate()
        scheduler.communicate()


def test_workers_come_and_go_and_the_scheduler_is_found_again(tmp_path: Path) -> None:
    heard: list[tuple[str, str, object]] = []
    said: list[object] = []
    with contextlib.ExitStack() as stack:
        pool = PoolHome.at(tmp_path / "home")
        stack.callback(pool.close)
        pool.ensure()

        def address() -> str | None:
            found = pool.run.read("scheduler.json").get("address")
            return str(found) if found else None

        cluster = stack.enter_context(ConnectedCluster(address, pool.home.run / "tls"))
        stack.enter_context(
            cluster.on_workers(
                joined=lambda worker, slots: heard.append(("joined", worker, slots)),
                left=lambda worker, died: heard.append(("left", worker, died)),
            )
        )
        stack.enter_context(cluster.on_topic("test", said.append))
        assert cluster.workers() == {}
        with pytest.raises(ClusterError, match="not reachable just now"):
            _ = cluster.client
        assert cluster.wait_for_workers(1, DEADLINE_S)
        (first,) = cluster.workers()
        assert heard == [("joined", first, 1)]
        assert cluster.client.submit(os.getpid).result(DEADLINE_S) == pool.pid("worker-0")

        os.kill(pool.pid("worker-0"), signal.SIGKILL)
        wait_for(lambda: len(heard) == 3, "it left and another joined")
        second = str(heard[2][1])
        assert heard[1:] == [("left", first, True), ("joined", second, 1)]

        before = cluster.client
        waiting = before.submit(signal.pause)
        os.kill(pool.pid(SCHEDULER), signal.SIGKILL)
        wait_for(lambda: len(heard) == 5, "all left and another joined")
        third = str(heard[4][1])
        assert heard[3:] == [("left", second, False), ("joined", third, 1)]
        assert waiting.status == "cancelled"
        assert cluster.client is not before
        assert cluster.client.submit(os.getpid).result(DEADLINE_S) == pool.pid("worker-0")
        cluster.client.log_event("test", {"x": 1})
        wait_for(lambda: said == [{"x": 1}], "the topic is listened to at the new scheduler")

        os.kill(pool.pid("worker-0"), signal.SIGTERM)
        wait_for(lambda: len(heard) > 6 and heard[-1][2] == 1, "the worker has left and was started again")
        # Its last word, that it takes nothing more, may be passed over: it can reach us after its end.
        assert [x for x in heard[5:-1] if x != ("joined", third, 0)] == [("left", third, False)]
