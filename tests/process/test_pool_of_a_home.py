"""The pool of a home: exactly one, whatever was left behind; what is killed comes back; nothing stays after its end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from tests.process.pools import ALL, PoolHome, wait_for

from modelops.cluster import launch
from modelops.cluster.launch import find_server, is_healthy
from modelops.cluster.run_folder import KEEPER, SCHEDULER, SERVER
from modelops.cluster.status import pool_status
from modelops.errors import ClusterError
from modelops.home import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")

ENSURE = """
import os
from modelops.cluster.launch import ensure_server
from modelops.home import Home
address = ensure_server(Home.from_environ(os.environ))
print(address.url, address.token)
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PoolHome]:
    with contextlib.closing(PoolHome.at(tmp_path / "home")) as pool:
        yield pool


def test_sixteen_that_ask_at_once_get_one_pool(pool: PoolHome) -> None:
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", ENSURE], env=pool.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(16)
    ]
    said = [p.communicate(timeout=90) for p in asking]
    assert [p.returncode for p in asking] == [0] * 16, said
    assert len({out for out, _ in said}) == 1
    begun = (pool.home.logs / "keeper.log").read_text().splitlines()
    assert [json.loads(line)["message"] for line in begun if "begins" in line] == [
        f"the keeper of {pool.home.state} begins, with 1 workers"
    ]


def test_a_home_named_from_the_current_folder_is_that_of_its_pool(
    pool: PoolHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = {**pool.environ, "MODELOPS_HOME": pool.home.data.name}
    address = launch.ensure_server(Home.from_environ(there), environ=there)
    assert address == find_server(pool.home)
    pool.wait_until_up()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; .*'ulimit -n'"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "unavailable; .*'ulimit -u'"),
        (
            OSError(errno.ENOENT, "No such file or directory", "/a/python"),
            "as /a/python cannot be used: No such",
        ),
    ],
)
def test_a_pool_that_the_system_does_not_let_start_says_why_and_leaves_nothing(
    pool: PoolHome, monkeypatch: pytest.MonkeyPatch, error: OSError, says: str
) -> None:
    def refused(_run: object) -> None:
        raise error

    monkeypatch.setattr(launch, "_wait_for_server", refused)  # its keeper runs already
    with pytest.raises(ClusterError, match=f"the server of this home cannot be started.*{says}"):
        launch.ensure_server(pool.home, environ=pool.environ)
    assert not pool_status(pool.home).running


def test_whoever_is_killed_comes_back_and_the_others_go_on(pool: PoolHome) -> None:
    address = pool.ensure()
    before = pool.wait_until_up()

    os.kill(before[SERVER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(SERVER) not in (None, before[SERVER]), "another server runs")
    assert pool.ensure() == address
    after = pool.wait_until_up()
    assert {r: after[r] for r in ALL if r != SERVER} == {r: before[r] for r in ALL if r != SERVER}

    os.kill(after["worker-0"], signal.SIGKILL)
    wait_for(lambda: pool.run.holder("worker-0") not in (None, after["worker-0"]), "another worker runs")
    now = pool.wait_until_up()
    assert {r: now[r] for r in ALL if r != "worker-0"} == {r: after[r] for r in ALL if r != "worker-0"}

    # A new keeper takes over those that run; also those which it must start again later.
    os.kill(now[KEEPER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(KEEPER) is None, "the keeper is dead")
    assert find_server(pool.home) is None or is_healthy(address.url)
    assert pool.ensure() == address
    adopted = pool.wait_until_up()
    assert {r: adopted[r] for r in ALL if r != KEEPER} == {r: now[r] for r in ALL if r != KEEPER}

    port = pool.run.read("scheduler.json")["address"]
    os.kill(adopted[SCHEDULER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(SCHEDULER) not in (None, adopted[SCHEDULER]), "another scheduler runs")
    wait_for(
        lambda: pool.run.holder("worker-0") not in (None, adopted["worker-0"]),
        "the worker was started again, because a worker cannot come back to another scheduler",
    )
    last = pool.wait_until_up()
    assert last[SERVER] == adopted[SERVER]
    assert pool.run.read("scheduler.json")["address"] == port

    # A keeper that was stopped starts nothing anew, until whoever needs a server lets it go on.
    os.kill(last[KEEPER], signal.SIGSTOP)
    wait_for(lambda: pool_status(pool.home).roles[0].state == "stopped", "the status says that it is stopped")
    os.kill(last[SERVER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(SERVER) is None, "the server is dead")
    assert pool.ensure() == address
    assert pool.wait_until_up()[KEEPER] == last[KEEPER]

    os.kill(last[KEEPER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(KEEPER) is None, "the keeper is dead")
    assert pool.stop()
    assert pool.pids() == dict.fromkeys(ALL)


def test_a_port_that_somebody_else_may_have_by_now_is_told_no_token(pool: PoolHome) -> None:
    address = pool.ensure()
    pids = pool.wait_until_up()
    os.kill(pids[KEEPER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(KEEPER) is None, "the keeper is dead")
    os.kill(pids[SERVER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(SERVER) is None, "the server is dead")
    with contextlib.ExitStack() as stack:

        def taken() -> bool:
            with contextlib.suppress(OSError):  # the kernel is still ending the server
                stack.enter_context(socket.create_server(("127.0.0.1", urlsplit(address.url).port or 0)))
                return True
            return False

        wait_for(taken, "somebody else has its port")
        beginning = pool.run.hold(KEEPER)  # as one does that has not begun to listen yet
        assert beginning is not None
        found = find_server(pool.home)
        beginning.release()
        assert found is None
        elsewhere = pool.ensure()
        assert elsewhere.url != address.url
    pids = pool.wait_until_up()

    # Its own port a keeper has until the server listens there again.
    os.kill(pids[SERVER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(SERVER) != pids[SERVER], "the server is dead")
    assert find_server(pool.home) == elsewhere
    pool.wait_until_up()

    # One that took over a server does not have it.
    os.kill(pids[KEEPER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(KEEPER) is None, "the keeper is dead")
    assert pool.ensure() == elsewhere
    pids = pool.wait_until_up()
    os.kill(pids[KEEPER], signal.SIGSTOP)
    wait_for(lambda: pool_status(pool.home).roles[0].state == "stopped", "the keeper is stopped")
    os.kill(pids[SERVER], signal.SIGKILL)
    wait_for(lambda: pool.run.holder(SERVER) is None, "the server is dead")
    assert find_server(pool.home) is None
    os.kill(pids[KEEPER], signal.SIGCONT)


def test_what_killed_processes_left_behind_misleads_nobody(pool: PoolHome) -> None:
    folder = pool.run.path
    sleeper = subprocess.Popen(["sleep", "600"], env={"PATH": os.environ["PATH"]})
    try:
        for role in ALL:
            (folder / f"{role}.lock").write_text(str(sleeper.pid))
        said = {"url": "http://127.0.0.1:9", "pid": sleeper.pid, "version": "0.0.1", "kept": True}
        (folder / "server.json").write_text(json.dumps(said))
        (folder / "scheduler.json").write_text('{"address": "tls://127.0')
        (folder / "keeper.json").write_text(
            '{"roles": {"server": {"failing": true, "last_end": "exit code 1"}}}'
        )
        (folder / "wanted.json").write_bytes(b"\xff\x00")
        (folder / "ports.json").write_text('["a", 99999999]')
        (folder / "token").write_text("")
        (folder / "tls").mkdir()
        (folder / "tls" / "ca.pem").write_text("-----BEGIN")
        assert find_server(pool.home) is None
        assert not pool_status(pool.home).running
        assert not pool.stop()
        address = pool.ensure()
        assert address.url != "http://127.0.0.1:9"
        assert len(address.token) > 30
        pool.wait_until_up()
        assert sleeper.poll() is None
        pool.stop()
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_pool_that_cannot_start_is_an_error_with_its_last_words_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    with contextlib.closing(PoolHome.at(tmp_path / "first")) as first:
        port = first.ensure().url.rpartition(":")[2]
        with contextlib.closing(PoolHome.at(tmp_path / "second", MODELOPS_PORT=port)) as second:
            with pytest.raises(ClusterError, match="Address already in use") as refused:
                second.ensure()
            assert str(second.home.logs / "keeper.log") in str(refused.value)
            wait_for(lambda: not second.processes(), "nothing is left of what did not start")


def test_two_homes_have_two_pools_and_each_ends_its_own(tmp_path: Path) -> None:
    with (
        contextlib.closing(PoolHome.at(tmp_path / "a")) as a,
        contextlib.closing(PoolHome.at(tmp_path / "b")) as b,
    ):
        at_a, at_b = a.ensure(), b.ensure()
        assert (at_a.url, at_a.token) != (at_b.url, at_b.token)
        assert a.stop()
        assert b.ensure() == at_b
