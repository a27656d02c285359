"""How the workers of a crew are, over plain HTTP: for probes and for Prometheus. Nothing here is a secret, or an order.

``/health``: the process that keeps the workers does its work. ``/ready``: a worker of it has joined a scheduler.
``/metrics``: how many there are, and how often they ended.
"""

from __future__ import annotations

import contextlib
import http.server
import logging
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

from modelops.errors import ClusterError
from modelops.metrics_text import PROMETHEUS, family, of_processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.cluster.crew import Crew

HUNG_S: Final = 30.0  # it looks at its workers five times a second
REQUEST_S: Final = 10.0
log = logging.getLogger(__name__)


@contextlib.contextmanager
def answering(crew: Crew, host: str, port: int) -> Iterator[int]:
    """Answer on a thread within this block; gives the port.

    Raises
    ------
    ClusterError
        The port is taken, or the host is not of this machine.
    """
    try:
        server = _server(host, port, crew)
    except OSError as error:
        raise ClusterError(
            f"the worker cannot listen on {host or 'any address'} port {port}: {error.strerror}; choose another with "
            "--http-port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="modelops-crew-http", daemon=True)
    with server:
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def _server(host: str, port: int, crew: Crew) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = REQUEST_S
        server_version, sys_version = "modelops", ""

        def do_GET(self) -> None:
            status, kind, text = _answer(crew, self.path)
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            log.debug(format, *args)

    family, _, _, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]

    class Server(http.server.ThreadingHTTPServer):
        address_family = family
        daemon_threads = True

    return Server(address[:2], Handler)  # type: ignore[arg-type]  # a host and a port


def _answer(crew: Crew, path: str) -> tuple[int, str, str]:
    match path.partition("?")[0]:
        case "/health":
            alive = crew.idle_s() < HUNG_S
            return (
                (200, "text/plain", "ok\n") if alive else (503, "text/plain", "it does not look any more\n")
            )
        case "/ready":
            ready = crew.n_ready() > 0
            return (200, "text/plain", "ready\n") if ready else (503, "text/plain", "no worker has joined\n")
        case "/metrics":
            return 200, PROMETHEUS, _metrics(crew)
        case _:
            return 404, "text/plain", "there are /health, /ready and /metrics\n"


def _metrics(crew: Crew) -> str:
    return "".join(
        (
            family(
                "modelops_worker_processes", "gauge", "Worker processes that shall run.", [({}, crew.n_wanted())]
            ),
            family(
                "modelops_worker_processes_joined", "gauge", "Worker processes that have joined the scheduler.",
                [({}, crew.n_ready())],
            ),
            family(
                "modelops_worker_process_starts_total", "counter", "Worker processes that were started.",
                [({}, crew.n_starts)],
            ),
            family(
                "modelops_worker_process_ends_total", "counter",
                "Worker processes that ended: as they were told, because the scheduler went away, or unasked.",
                [({"how": how}, n) for how, n in crew.ends.items()],
            ),
            of_processes(crew.totals(), "these workers have stored"),
        )
    )  # fmt: skip
