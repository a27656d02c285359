"""Every port on which a process of a pool listens refuses who has neither certificate nor token, except for health."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import sys
from pathlib import Path

import pytest
from tests.process.pools import DEADLINE_S, PoolHome

from modelops.cluster.connected import ConnectedCluster

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


def test_every_port_refuses_strangers_and_only_health_answers(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        pool = PoolHome.at(tmp_path / "home")
        stack.callback(pool.close)
        address = pool.ensure()
        pool.wait_until_up()
        ports = listening(pool.processes())
        server_port = int(address.url.rpartition(":")[2])
        scheduler_port = int(str(pool.run.scheduler_address()).rpartition(":")[2])
        assert {server_port, scheduler_port} <= {port for _, port in ports}
        assert len(ports) >= 5, "server, scheduler and worker, and the health of the latter two"
        loopback = "0100007F"
        assert {host for host, _ in ports} == {loopback}
        healthy = set()
        for _, port in ports:
            for route in ROUTES:
                assert http_status(port, route) in (None, 400, 401, 404), (port, route)
                assert http_status(port, route, Authorization="Bearer wrong") in (None, 400, 401, 404)
            if http_status(port, "/health") == 200:
                healthy.add(port)
            else:
                assert not talks_tls_without_a_certificate(port)
        assert server_port in healthy
        assert len(healthy) == 3
        assert http_status(server_port, "/v1/server") == 401
        assert http_status(server_port, "/v1/server", Authorization=f"Bearer {address.token}") == 200
        assert http_status(
            server_port, "/v1/server", Authorization=f"Bearer {address.token}", Host="evil.example"
        ) in (400, 421)

        # The certificates of another pool open nothing here.
        other = PoolHome.at(tmp_path / "other")
        from modelops.cluster.tls import ensure_certificates

        ensure_certificates(other.run.path / "tls")
        stranger = stack.enter_context(
            ConnectedCluster(lambda: pool.run.scheduler_address(), other.run.path / "tls")
        )
        assert not stranger.wait_for_workers(1, 2.0)
        assert not stranger.connected
