"""Connections that ask for nothing: they are closed after a while, and there are never so many that files run out.

Who connects has shown no token yet, and may send half a request and wait, or a head without end. Each such connection
costs an open file, and the memory of what it has sent; without any left the server could answer nobody, nor read its
database.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from modelops.server.http.problems import MalformedRequestError, problem_response

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    from uvicorn.server import ServerState

HEAD_WITHIN_S: Final = 30.0  # from the connection, or the answer before, to the end of a request's head
SILENT_SHARE: Final = 1 / 4  # of the files that may be open
SHARE: Final = 3 / 4  # likewise, of all connections
MOST_SILENT: Final = 2_000
MAX_HEAD_BYTES: Final = 64 << 10

_silent: WeakKeyDictionary[ServerState, dict[Connection, None]] = WeakKeyDictionary()


class Connection(HttpToolsProtocol):
    """One connection of a client. *Silent* while no request of it is being answered; then it is not waited for long."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._others = _silent.setdefault(self.server_state, {})  # that are silent, the longest first
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of a request whose head has not ended
        self._in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin, if there is room; the one that has been silent for longest makes some."""
        super().connection_made(transport)
        n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(self.connections) > n_files * SHARE:
            transport.abort()
            return
        self._look()
        if len(self._others) > min(MOST_SILENT, n_files * SILENT_SHARE):
            next(iter(self._others)).give_up()

    def data_received(self, data: bytes) -> None:
        """Take in what came."""
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the head of a request has at most {MAX_HEAD_BYTES:,} bytes")
        self._look()

    def on_message_begin(self) -> None:
        """Take in the first bytes of a request."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Begin to answer a request."""
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, as a problem; what came behind a whole request takes nothing from its answer."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not (cycle.more_body or cycle.response_complete):
            cycle.keep_alive = False  # then the connection is closed
            self.flow.pause_reading()  # until then nothing more is taken in
            return
        refusal = problem_response(MalformedRequestError(msg))
        head = [b"%s: %s\r\n" % header for header in refusal.raw_headers]
        self.transport.write(
            b"".join([b"HTTP/1.1 400 Bad Request\r\n", *head, b"connection: close\r\n\r\n", refusal.body])
        )
        self.transport.close()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._forget()
        super().connection_lost(exc)

    def give_up(self) -> None:
        """Close it, as no request has come."""
        self._forget()
        self.transport.abort()

    def _look(self) -> None:
        """Begin to wait for a request, or stop to."""
        is_silent = self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]  # None at first
        if not is_silent or self.transport.is_closing():
            self._forget()
        elif self._timer is None:
            self._others[self] = None
            self._timer = self.loop.call_later(HEAD_WITHIN_S, self.give_up)

    def _forget(self) -> None:
        self._others.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
