"""Workers in the foreground find their scheduler again, and end with the command that started them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import yaml  # type: ignore[import-untyped]  # it has no types
from distributed import Scheduler, Worker
from tests.process.pools import DEADLINE_S, PoolHome, wait_for

from modelops.cluster import crew as crew_module
from modelops.cluster.certificates import create_certificates
from modelops.cluster.connected import ConnectedCluster
from modelops.cluster.crew import Crew
from modelops.cluster.place import Place
from modelops.cluster.tls import ensure_certificates
from modelops.cluster.worker import _leave
from modelops.study.pools import Membership
from modelops.worker.plugin import ModelOpsWorker
from modelops.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
COMMAND = Path(sys.executable).parent / "modelops"
POD = Path(__file__).parents[2] / "k8s/base/worker/worker.yaml"
STORES_FOR_LONG = """
import os, signal, sys

signal.signal(signal.SIGTERM, lambda *_: None)
os.write(int(sys.argv[4]), b"joined\\n")
while True:
    signal.pause()
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[PoolHome]:
    home = PoolHome.at(tmp_path / "home")
    ensure_certificates(home.run.path / "tls")
    with contextlib.closing(home):
        yield home


def run(home: PoolHome, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([COMMAND, *arguments], env=home.environ, stderr=subprocess.PIPE)


def asked(port: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""


def test_workers_find_their_scheduler_again_and_end_with_their_command(home: PoolHome) -> None:
    with contextlib.ExitStack() as free:
        ports = [
            free.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)
        ]
    port, scheduler_http, crew_http = map(str, ports)
    address = f"tls://127.0.0.1:{port}"
    begin = ("scheduler", "--port", port, "--http-port", scheduler_http)
    scheduler = run(home, *begin)
    crew = run(
        home,
        "worker",
        "--scheduler",
        address,
        "--slots",
        "2",
        "--host",
        "127.0.0.1",
        "--http-port",
        crew_http,
        *("--pool", "EU_West", "--pool-label", "region=eu", "--pool-label", "kind=gpu"),
    )
    try:
        wait_for(lambda: asked(scheduler_http, "/health")[0] == 200, "the scheduler says that it lives")
        assert asked(scheduler_http, "/json/counts.json")[0] == 404
        wait_for(lambda: asked(crew_http, "/ready")[0] == 200, "the crew says that a worker has joined")
        with ConnectedCluster(lambda: address, home.home.run / "tls") as cluster:
            assert cluster.wait_for_workers(2, DEADLINE_S)
            first = set(cluster.workers())
            of = Membership("EU_West", {"region": "eu", "kind": "gpu"})
            assert [cluster.membership(worker) for worker in first] == [of, of]
            assert len(set(cluster.client.run(os.getpid).values())) == 2

            wait_for(lambda: "processes_joined 2" in asked(crew_http, "/metrics")[1], "both have joined")
            scheduler.kill()
            scheduler.communicate()
            wait_for(lambda: not cluster.connected, "the scheduler is gone")
            wait_for(lambda: asked(crew_http, "/ready")[0] == 503, "the crew says that none has joined")
            assert asked(crew_http, "/health")[0] == 200
            scheduler = run(home, *begin)
            assert cluster.wait_for_workers(2, DEADLINE_S)
            assert not first & set(cluster.workers())
            assert [cluster.membership(worker) for worker in cluster.workers()] == [of, of]

            (one, _) = pids = sorted(cluster.client.run(os.getpid).values())
            os.kill(one, signal.SIGKILL)
            wait_for(lambda: len(cluster.workers()) == 1, "one is dead")
            assert cluster.wait_for_workers(2, DEADLINE_S)
            assert set(cluster.client.run(os.getpid).values()) - set(pids)
            metrics = asked(crew_http, "/metrics")[1]
            assert 'modelops_worker_process_ends_total{how="unasked"} 1' in metrics
            assert 'modelops_worker_process_ends_total{how="scheduler_gone"} 2' in metrics
            assert "modelops_worker_process_starts_total 5" in metrics
            page = (Path(__file__).parents[2] / "docs/reference/http-api.md").read_text("utf-8")
            names = re.findall(r"^# TYPE (\S+)", metrics, re.MULTILINE)
            assert names
            assert [name for name in names if f"`{name}`" not in page] == []
            assert asked(crew_http, "/nothing")[0] == 404

            crew.kill()
            wait_for(lambda: not cluster.workers(), "the workers have ended with their command")
    finally:
        for process in (crew, scheduler):
            process.terminate()
            process.communicate()


def test_a_worker_that_is_told_to_end_when_its_scheduler_has_closed_it_has_no_more_to_do(
    home: PoolHome,
) -> None:
    """As when all parts are told at once: `kubectl scale deployment --all --replicas=0`."""

    async def end() -> None:
        async with (
            Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler,
            Worker(
                scheduler.address, host="127.0.0.1", dashboard=False,
                plugins=(ModelOpsWorker(WorkerSettings.of_home(home.home)),),
            ) as worker,
        ):  # fmt: skip
            await worker.close()
            await _leave(worker)

    asyncio.run(end())


def test_a_worker_may_store_what_has_ended_for_nearly_as_long_as_its_pod_may_take_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod_s = yaml.safe_load(POD.read_text("utf-8"))["spec"]["template"]["spec"][
        "terminationGracePeriodSeconds"
    ]
    (tmp_path / "stores_for_long.py").write_text(STORES_FOR_LONG)
    now_s = [0.0]
    monkeypatch.setattr(crew_module, "PROGRAM", "stores_for_long")
    monkeypatch.setattr(crew_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    crew = Crew(Place("tls://127.0.0.1:1", None, 1), environ={**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        wait_for(lambda: crew._step() or crew.n_ready() == 1, "it has joined")
        (life,) = crew._mind.lives.values()
        crew._stop(signal.SIGTERM, None)
        assert not crew._step()
        assert life.told_at == 0.0
        now_s[0] = pod_s - 15.0
        assert not crew._step()
        assert not life.killed, "what it stores would be lost"
        now_s[0] = pod_s - 5.0
        wait_for(crew._step, "it has ended, and the command with it")
    finally:
        for process in crew._running.values():
            process.kill()
            process.communicate()


def test_a_scheduler_that_is_not_known_or_no_address_is_refused(home: PoolHome) -> None:
    there = ("--scheduler", "tls://127.0.0.1:1")
    for arguments, why in [
        ((), b"no scheduler is known"),
        (("--scheduler", "tcp://127.0.0.1:1"), b"--scheduler is 'tcp://127.0.0.1:1': it must be an address"),
        (("--scheduler", "tls://127.0.0.1:1", "--tls", "/nowhere"), b"has no ca.pem"),
        ((*there, "--pool", "eu west"), b"--pool is 'eu west': 'eu west' is no name of a pool"),
        ((*there, "--pool-label", "region"), b"must be KEY=VALUE, as in region=eu"),
        (
            ("--scheduler", "tls://192.0.2.77:8786"),
            b"set MODELOPS_STORAGE, or --storage, to the storage that",
        ),
    ]:
        process = run(home, "worker", *arguments)
        _, said = process.communicate()
        assert process.returncode == 2
        assert why in said
        assert b"Traceback" not in said


def test_a_server_in_the_foreground_speaks_https_is_found_and_not_started_twice(home: PoolHome) -> None:
    certs = home.home.state / "certs"
    create_certificates(certs, [])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    files = ("--tls-cert", str(certs / "server" / "cert.pem"), "--tls-key", str(certs / "server" / "key.pem"))
    server = run(home, "server", "--port", str(port), "--scheduler", "tls://127.0.0.1:1", *files)
    try:
        wait_for(lambda: home.run.read("server.json").get("pid") == server.pid, "it listens")
        url = f"https://127.0.0.1:{port}"
        assert home.ensure().url == url
        second = run(home, "server")
        _, said = second.communicate()
        assert second.returncode == 1
        assert b"runs already, as process" in said

        def jobs(**environ: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [COMMAND, "jobs", "list", "--json"], env={**home.environ, **environ},
                capture_output=True, text=True, check=False,
            )  # fmt: skip

        trusted = {"MODELOPS_CA": str(certs / "client" / "ca.pem")}
        elsewhere = {"MODELOPS_SERVER": url, "MODELOPS_TOKEN": home.run.token(), "MODELOPS_HOME": str(certs)}
        for environ in (trusted, {**trusted, **elsewhere}):
            assert (jobs(**environ).returncode, json.loads(jobs(**environ).stdout)["jobs"]) == (0, [])
        status = subprocess.run(
            [COMMAND, "status"], env={**home.environ, **trusted}, capture_output=True, check=False
        )
        assert b"scheduler  away, 0 workers\n" in status.stdout
        stranger = jobs(**elsewhere)
        assert stranger.returncode == 5
        assert "MODELOPS_CA names the file of the authority that signed its certificate" in stranger.stderr
        assert asked(str(port), "/health")[0] == 0  # plain HTTP
    finally:
        server.terminate()
        server.communicate()
    assert server.returncode == 0
    assert home.run.holder("keeper") is None
    other = ("--tls-cert", files[1], "--tls-key", str(certs / "worker" / "key.pem"))
    for arguments, why in ((files[:2], b"needs tls_key as well"), (other, b"are no certificate and its key")):
        wrong = run(home, "server", "--port", str(port), *arguments)
        assert why in wrong.communicate()[1]
        assert wrong.returncode == 2
