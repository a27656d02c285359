"""A pool from outside: every port refuses strangers, every file is for its user only, each client is told the truth."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import descendants
from tests.process.pools import DEADLINE_S, PoolHome, wait_for

from modelops.cluster.connected import ConnectedCluster
from modelops.cluster.embedded import EmbeddedCluster
from modelops.cluster.launch import find_server, start_pool
from modelops.cluster.status import pool_status
from modelops.cluster.tls import ensure_certificates
from modelops.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.home import Home

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
LISTENING = "0A"


def listening(pids: set[int]) -> dict[tuple[str, int], int]:
    """Return the pid behind each TCP address on which these processes listen."""
    owners: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(fd.readlink())
                    if target.startswith("socket:["):
                        owners[target[8:-1]] = pid
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in owners:
                host, _, port = fields[1].partition(":")
                found[host, int(port, 16)] = owners[fields[9]]
    return found


def http_status(port: int, path: str, **headers: str) -> int | None:
    """Return what plain HTTP gets, None if nothing that is HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def talks_tls_without_a_certificate(port: int) -> bool:
    """Whether a client that shows no certificate gets an answer, or is at least not shown out."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as raw,
            context.wrap_socket(raw) as tls,
        ):
            tls.sendall(b"\x00" * 64)
            return tls.recv(1) != b""
    except (ssl.SSLError, ConnectionError):
        return False


ROUTES = ("/", "/info/main/workers.html", "/info/logs.html", "/json/counts.json", "/metrics", "/sitemap.json",
          "/api/v1/retire_workers", "/status", "/v1/jobs", "/v1/server", "/v1/openapi.json", "/sysmon")  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolHome]:
    """One pool for tests that leave it as it was."""
    with contextlib.closing(PoolHome.at(tmp_path_factory.mktemp("pool") / "home")) as pool:
        yield pool


def only_health_answers(port: int) -> bool:
    """Return whether health answers at a port; fail if anything else does to who has neither certificate nor token."""
    for route in ROUTES:
        assert http_status(port, route) in (None, 400, 401, 404), (port, route)
        assert http_status(port, route, Authorization="Bearer wrong") in (None, 400, 401, 404)
    if http_status(port, "/health") == 200:
        return True
    assert not talks_tls_without_a_certificate(port), port
    return False


def test_every_port_of_a_cluster_in_a_process_refuses_strangers(home: Home) -> None:
    """Its scheduler, nannies and workers."""
    mine = {os.getpid()}
    before = listening(mine | descendants(os.getpid()))
    with EmbeddedCluster(home, n_workers=2):
        ports = listening(mine | descendants(os.getpid())).keys() - before.keys()
        assert len(ports) >= 5, "a scheduler, two nannies and two workers"
        assert {host for host, _ in ports} == {"0100007F"}
        for _, port in ports:
            only_health_answers(port)


def test_every_port_refuses_strangers_and_only_health_answers(pool: PoolHome, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        address = pool.ensure()
        pool.wait_until_up()
        ports = listening(pool.processes())
        server_port = int(address.url.rpartition(":")[2])
        scheduler_port = int(str(pool.run.scheduler_address()).rpartition(":")[2])
        assert {server_port, scheduler_port} <= {port for _, port in ports}
        assert len(ports) >= 5, "server, scheduler and worker, and the health of the latter two"
        loopback = "0100007F"
        assert {host for host, _ in ports} == {loopback}
        healthy = {port for _, port in ports if only_health_answers(port)}
        assert server_port in healthy
        assert len(healthy) == 3
        assert http_status(server_port, "/v1/server") == 401
        assert http_status(server_port, "/v1/server", Authorization=f"Bearer {address.token}") == 200
        assert http_status(
            server_port, "/v1/server", Authorization=f"Bearer {address.token}", Host="evil.example"
        ) in (400, 421)

        # The certificates of another pool open nothing here.
        other = PoolHome.at(tmp_path / "other")
        ensure_certificates(other.run.path / "tls")
        stranger = stack.enter_context(
            ConnectedCluster(lambda: pool.run.scheduler_address(), other.run.path / "tls")
        )
        assert not stranger.wait_for_workers(1, 2.0)
        assert not stranger.connected


def test_a_server_of_another_version_is_named_with_what_to_do(pool: PoolHome) -> None:
    pool.ensure()
    said = pool.run.read("server.json")
    pool.run.write("server.json", {**said, "version": "9.9.9"})
    try:
        with pytest.raises(ClusterError, match=r"ModelOps 9\.9\.9, and this is .*'modelops down'"):
            pool.ensure()
        with pytest.raises(ClusterError, match=r"9\.9\.9"):
            find_server(pool.home)
    finally:
        pool.run.write("server.json", said)
    assert find_server(pool.home) == pool.ensure()


def test_up_changes_the_number_of_workers_and_lets_a_pool_stay(pool: PoolHome) -> None:
    pool.ensure()
    assert not pool_status(pool.home).stays
    pool.wait_until_up()
    start_pool(pool.home, n_workers=2, environ=pool.environ)
    assert pool_status(pool.home).stays
    wait_for(lambda: pool.run.holder("worker-1") is not None, "a second worker runs")
    start_pool(pool.home, n_workers=1, environ=pool.environ)
    wait_for(lambda: pool.run.holder("worker-1") is None, "the second worker has ended")
    assert pool.ensure().url
    assert pool_status(pool.home).stays


def test_all_that_is_written_is_for_its_user_only(pool: PoolHome) -> None:
    pool.ensure()
    pool.wait_until_up()
    for folder in (pool.home.run, pool.home.logs):
        assert folder.stat().st_mode & 0o777 == 0o700
        for path in folder.rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
    token = pool.run.token()
    for pid in pool.processes():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert token.encode() not in command
    for log in pool.home.logs.iterdir():
        assert token not in log.read_text()
