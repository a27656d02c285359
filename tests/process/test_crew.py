"""Workers in the foreground find their scheduler again, and end with the command that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.process.pools import DEADLINE_S, PoolHome, wait_for

from modelops.cluster.connected import ConnectedCluster
from modelops.cluster.tls import ensure_certificates

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
COMMAND = Path(sys.executable).parent / "modelops"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[PoolHome]:
    home = PoolHome.at(tmp_path / "home")
    ensure_certificates(home.run.path / "tls")
    with contextlib.closing(home):
        yield home


def run(home: PoolHome, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([COMMAND, *arguments], env=home.environ, stderr=subprocess.PIPE)


def test_workers_find_their_scheduler_again_and_end_with_their_command(home: PoolHome) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"tls://127.0.0.1:{port}"
    scheduler = run(home, "scheduler", "--port", str(port))
    crew = run(home, "worker", "--scheduler", address, "--slots", "2", "--host", "127.0.0.1")
    try:
        with ConnectedCluster(lambda: address, home.home.run / "tls") as cluster:
            assert cluster.wait_for_workers(2, DEADLINE_S)
            first = set(cluster.workers())
            assert len(set(cluster.client.run(os.getpid).values())) == 2

            scheduler.kill()
            scheduler.communicate()
            wait_for(lambda: not cluster.connected, "the scheduler is gone")
            scheduler = run(home, "scheduler", "--port", str(port))
            assert cluster.wait_for_workers(2, DEADLINE_S)
            assert not first & set(cluster.workers())

            (one, _) = pids = sorted(cluster.client.run(os.getpid).values())
            os.kill(one, signal.SIGKILL)
            wait_for(lambda: len(cluster.workers()) == 1, "one is dead")
            assert cluster.wait_for_workers(2, DEADLINE_S)
            assert set(cluster.client.run(os.getpid).values()) - set(pids)

            crew.kill()
            wait_for(lambda: not cluster.workers(), "the workers have ended with their command")
    finally:
        for process in (crew, scheduler):
            process.terminate()
            process.communicate()


def test_a_scheduler_that_is_not_known_or_no_address_is_refused(home: PoolHome) -> None:
    for arguments, why in [
        ((), b"no scheduler is known"),
        (("--scheduler", "tcp://127.0.0.1:1"), b"--scheduler is 'tcp://127.0.0.1:1': it must be an address"),
        (("--scheduler", "tls://127.0.0.1:1", "--tls", "/nowhere"), b"has no ca.pem"),
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


def test_a_server_in_the_foreground_is_found_and_not_started_twice(home: PoolHome) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = run(home, "server", "--port", str(port), "--scheduler", "tls://127.0.0.1:1")
    try:
        wait_for(lambda: home.run.read("server.json").get("pid") == server.pid, "it listens")
        assert home.ensure().url == f"http://127.0.0.1:{port}"
        second = run(home, "server")
        _, said = second.communicate()
        assert second.returncode == 1
        assert b"runs already, as process" in said
    finally:
        server.terminate()
        server.communicate()
    assert server.returncode == 0
    assert home.run.holder("keeper") is None
