"""The server process: records and objects, HTTP in front of them, drivers beside it, until it is told to end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from modelops.cluster.run_folder import SERVER
from modelops.cluster.upkeep import ExitCode
from modelops.errors import ClusterError, StorageError
from modelops.server.door import Door
from modelops.server.drivers import Drivers
from modelops.server.http import make_app
from modelops.server.http.connections import Connection
from modelops.server.https import LOOK_EVERY_S, Certificate
from modelops.server.idle import Attendance
from modelops.server.service import JobService
from modelops.store import Objects, Records
from modelops.study.pools import NO_ALIASES
from modelops.volumes import volume_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from modelops.cluster.run_folder import RunFolder
    from modelops.home import Home
    from modelops.settings import Settings
    from modelops.study.pools import Aliases

LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
GRACE_S: Final = 2  # for requests that are being answered, and long polls
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 5.0
IDLE_LOOK_S: Final = 15.0
ANNOUNCE_PAUSE_S: Final = 1.0
log = logging.getLogger(__name__)


def serve_kept(settings: Settings, home: Home, run: RunFolder, *, fd: int) -> int:
    """Be the server of a pool on this machine, on the socket that its keeper holds; return the exit code."""
    listener = socket.socket(fileno=fd)
    server = Server(
        home=home, run=run, token=run.token(), allowed_hosts=(*LOCAL_HOSTS, *settings.allowed_hosts),
        tls=run.path / "tls", find_scheduler=run.scheduler_address, kept=True,
        aliases=settings.pool_aliases,
    )  # fmt: skip
    return server.serve(listener, f"http://127.0.0.1:{listener.getsockname()[1]}")


@dataclass
class Server:
    """Everything of one server.

    ``kept``: it belongs to a pool, whose ``wanted.json`` says when it may end. ``aliases``: of names of pools.
    ``https``: the files of its certificate and key.
    """

    home: Home
    run: RunFolder
    token: str
    allowed_hosts: Collection[str]
    tls: Path | None
    find_scheduler: Callable[[], str | None]
    kept: bool
    aliases: Aliases = NO_ALIASES
    https: tuple[Path, Path] | None = None

    def serve(self, listener: socket.socket, url: str) -> int:
        """Answer at a socket until SIGTERM, SIGINT, or, for a kept one, until nobody needs it; return the exit code.

        Raises
        ------
        ModelOpsError
            The database is of a newer version, or the settings cannot be.
        """
        self._code = 0
        self._ended = threading.Event()
        self._stack = contextlib.ExitStack()
        self._records: Records | None = None
        self._door = Door(self.token, self.allowed_hosts)
        self._attendance = Attendance(self._door)
        certificate = None if self.https is None else Certificate(*self.https)
        https: dict[str, Any] = {}
        if certificate is not None:
            https["ssl_context_factory"] = lambda _config, _default: certificate.context
        config = uvicorn.Config(
            self._attendance, lifespan="off", ws="none", http=Connection, loop="uvloop", log_config=None,
            access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S, backlog=512, **https,
        )  # fmt: skip
        self._uvicorn = uvicorn.Server(config)
        with self._stack:
            if not self._let_in():
                self._beside("modelops-store", self._let_in_later)
            if certificate is not None:
                self._beside("modelops-certificate", partial(self._watch, certificate))
            if self.kept:
                self._beside("modelops-idle", self._end_when_idle)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self._end(0))  # uvicorn's own raise them again at its end
            if not self._announce(url):
                self._beside("modelops-announce", partial(self._announce_later, url))
            log.info("the server listens at %s", url)
            self._uvicorn.run(sockets=[listener])
            log.info("the server ends")
        return self._code

    def _announce(self, url: str) -> bool:
        """Say in the run folder where the server listens; False if that cannot be written now."""
        try:
            self.run.write(
                f"{SERVER}.json",
                {"url": url, "pid": os.getpid(), "version": version("modelops")},
            )
        except OSError as error:  # a full disk; whoever knows its port from before finds it all the same
            log.warning(
                "%s.json cannot be written: %s (%s)", SERVER, error.strerror, volume_of(self.run.path)
            )
            return False
        return True

    def _announce_later(self, url: str) -> None:
        while not self._ended.wait(ANNOUNCE_PAUSE_S):
            if self._announce(url):
                return

    def _let_in(self) -> bool:
        """Open the store and let requests in; False if the store does not answer now."""
        with contextlib.ExitStack() as opened:
            try:
                records = Records.open(self.home.database_url)
                opened.callback(records.close)
                objects = Objects.open(self.home.storage)
                records.database.look_through()  # last: it takes longest, and all of this is tried again
            except StorageError as error:
                log.warning("no request can be answered yet: %s", error)
                self._door.explain(str(error))
                return False
            self._stack.push(opened.pop_all())
        drivers = Drivers(
            records, objects, self.home, self.find_scheduler, self.tls, self._failed, self.aliases
        )
        service = JobService(records, objects, self.home, drivers, reconciler=drivers)
        self._door.open(make_app(service, token=self.token, allowed_hosts=self.allowed_hosts))
        self._records = records
        drivers.start()
        self._stack.callback(drivers.stop)
        return True

    def _let_in_later(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._ended.wait(pause_s):
            if self._let_in():
                log.info("the store answers")
                return
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _watch(self, certificate: Certificate) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            certificate.look()

    def _end_when_idle(self) -> None:
        while True:
            limit_s = self._idle_limit_s()
            if self._ended.wait(IDLE_LOOK_S if limit_s is None else min(IDLE_LOOK_S, limit_s / 4)):
                return
            if self._records is None or limit_s is None:
                continue
            # While the database is away nobody knows whether a job is unfinished.
            with contextlib.suppress(ClusterError):
                if self._records.open_jobs():
                    self._attendance.somebody_was_here()
                elif self._attendance.idle_s >= limit_s:
                    log.info("nobody has needed the server for %.0f s", limit_s)
                    self._end(ExitCode.IDLE)
                    return

    def _idle_limit_s(self) -> float | None:
        said = self.run.read("wanted.json").get("idle_s")
        return float(said) if isinstance(said, int | float) else None

    def _beside(self, name: str, act: Callable[[], None]) -> None:
        """Do something in a thread; the server ends if it fails."""

        def whole() -> None:
            try:
                act()
            except BaseException as error:  # noqa: BLE001  the top of a thread: the server ends with it
                self._failed(error)

        thread = threading.Thread(target=whole, name=name, daemon=True)
        thread.start()
        self._stack.callback(self._join, thread)

    def _join(self, thread: threading.Thread) -> None:
        """Wait for a thread, which is to end now: also when `serve` ends by an exception."""
        self._ended.set()
        thread.join()

    def _failed(self, error: BaseException) -> None:
        log.critical("the server cannot go on: %s", error, exc_info=error)
        self._end(1)

    def _end(self, code: int) -> None:
        self._code = self._code or code
        self._uvicorn.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """Bind a socket for a server that a person starts.

    Raises
    ------
    ClusterError
        The port is taken, or the host is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ClusterError(f"the server cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def url_of(listener: socket.socket, host: str, scheme: str = "http") -> str:
    """Return the URL by which clients call a server."""
    port: Any = listener.getsockname()[1]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
