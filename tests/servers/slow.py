"""A way to a service that is slow: a TCP proxy on the loopback with so many bytes in a second, each way."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

PIECE = 64 * 1024


class SlowWay:
    """Hands everything on to a port of the loopback, slowly; ``bytes_per_s`` 0: nothing at all. A context manager."""

    def __init__(self, to_port: int, bytes_per_s: float) -> None:
        self._to, self._bytes_per_s = to_port, bytes_per_s
        self._listener = socket.socket()
        self._listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * PIECE
        )  # what waits has not gone through
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port = int(self._listener.getsockname()[1])
        self._over = threading.Event()
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for s in self._sockets:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for s in self._sockets:
            s.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed when the block ends
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += (here, there)
                for pair in ((here, there), (there, here)):
                    self._threads.append(threading.Thread(target=self._hand_on, args=pair))
                    self._threads[-1].start()

    def _hand_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                wait_s = len(data) / self._bytes_per_s if self._bytes_per_s else None
                if self._over.wait(wait_s):
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
