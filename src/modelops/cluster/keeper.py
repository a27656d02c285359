"""The keeper of a pool: starts server, scheduler and workers, and again when they die; ends them all when told.

It decides nothing, see `modelops.cluster.upkeep`. What it knows it can find out anew: a keeper that takes the place
of a killed one finds the running processes by their locks, and how many workers there shall be in ``wanted.json``.
It also owns the port of the server: it listens and hands the socket on, so that while the server is started anew
nobody is refused and nobody else can take the port.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, assert_never

from modelops.cluster import handles, spawn
from modelops.cluster.handles import Handle
from modelops.cluster.run_folder import LISTENER, SERVER, RunFolder
from modelops.cluster.tls import ensure_certificates
from modelops.cluster.upkeep import UNSEEN, Finish, Kill, Life, Start, Tell, Upkeep
from modelops.errors import ModelOpsError, RequestError, describe_exit
from modelops.settings import Settings

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

    from modelops.home import Home

TICK_S: Final = 0.5
LOOK_S: Final = 5.0
LEFT_BEHIND_S: Final = 10.0
BACKLOG: Final = 512
STATUS: Final = "keeper.json"
WANTED: Final = "wanted.json"
NOT_STARTED: Final = "could not be started"
log = logging.getLogger(__name__)


@dataclass
class Charge:
    """A process that the keeper looks after: one it started, or one it found."""

    handle: Handle
    popen: subprocess.Popen[bytes] | None = None


class Keeper:
    """One per home. `work` returns when the pool has ended."""

    def __init__(self, home: Home, run: RunFolder, *, environ: Mapping[str, str]) -> None:
        self.home, self.run, self.environ = home, run, environ
        self.charges: dict[str, Charge] = {}
        self.starting: dict[str, subprocess.Popen[bytes]] = {}
        self.below: set[handles.Born] = set()  # runners and their reapers, while the pool ends
        self.listener: socket.socket | None = None
        self.began_at = datetime.now(UTC)
        self._wanted_mtime = 0
        self._looked_at = 0.0
        self._written: dict[str, Any] = {}
        self._stop_asked = ""
        self.mind = Upkeep(self._wanted_workers(), began=time.monotonic())

    def work(self) -> int:
        """Keep the pool until it shall end and has ended."""
        ensure_certificates(self.run.path / "tls")
        log.info("the keeper of %s begins, with %s workers", self.home.state, self.mind.n_workers)
        with self._waking_on_signals() as woken:
            self._adopt()
            while not self._step():
                self._wait(woken)
        if self.listener is not None:
            self.listener.close()
        self._tidy()
        log.info("the pool has ended: %s", self.mind.stopping)
        return 0

    def end_all(self, why: str) -> None:
        """End a pool that has lost its keeper."""
        self.mind.stop(why, time.monotonic())
        self._adopt()
        while not self._step():
            self._wait(None)
        self._tidy()

    def _tidy(self) -> None:
        self.run.remove(WANTED, STATUS, LISTENER, *(f"{role}.json" for role in self.run.roles()))

    def _step(self) -> bool:
        """Hear what happened, do what is to be done; True when all has ended."""
        now = time.monotonic()
        if self._stop_asked and not self.mind.stopping:
            log.info("the pool shall end: %s", self._stop_asked)
            self.mind.stop(self._stop_asked, now)
        self._reread_wanted()
        self._hear_of_starts()
        self._hear_of_ends(now)
        self._hear_of_readiness()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            for role, charge in self.charges.items():
                self.mind.looked(role, stopped=handles.is_stopped(charge.handle.pid), now=now)
        finished = self._act(now)
        self._write_status()
        return finished

    def _act(self, now: float) -> bool:
        for action in self.mind.actions(now):
            match action:
                case Start(role):
                    if not self._adopt_one(role):
                        self._try_to_start(role, now)
                case Tell(role):
                    self.below |= handles.offspring([self._pid(role)])
                    self._signal(role, signal.SIGCONT)  # one that is stopped would not hear
                    self._signal(role, signal.SIGTERM)
                case Kill(role, why):
                    log.warning("%s (process %s) is killed: %s", role, self._pid(role), why)
                    self.below |= handles.offspring([self._pid(role)])
                    self._signal(role, signal.SIGKILL)
                case Finish():
                    self._see_off()
                    return True
                case _:
                    assert_never(action)
        return False

    def _see_off(self) -> None:
        """Wait until what the workers had started has ended too; their reapers see to that."""
        deadline = time.monotonic() + LEFT_BEHIND_S
        while left := handles.still_there(self.below):
            if time.monotonic() > deadline:
                log.warning("processes %s were left behind and are killed", sorted(b.pid for b in left))
                handles.kill_all(left)
                return
            select.select([], [], [], 0.02)

    def _try_to_start(self, role: str, now: float) -> None:
        try:
            self._start(role)
        except (OSError, ModelOpsError) as error:
            # Its port is taken, the disk is full, no process can be made, a setting was made wrong: later, perhaps.
            log.error("%s %s: %s", role, NOT_STARTED, error)  # noqa: TRY400  the traceback says no more
            self.mind.started(role, now)
            self.mind.ended(role, None, f"{NOT_STARTED}: {error}", now)
        else:
            self.mind.started(role, now)

    def _start(self, role: str) -> None:
        arguments: list[str] = []
        fds: list[int] = []
        if role == SERVER:
            self.listener = self.listener or self._listen()
            fds = [self.listener.fileno()]
            arguments = [str(self.listener.fileno())]
        popen = spawn.start(self.home, role, arguments, environ=self.environ, pass_fds=fds)
        log.info("%s is started as process %s", role, popen.pid)
        self.starting[role] = popen

    def _hear_of_starts(self) -> None:
        """Say go to those that hold their roles. From here on the lock tells of them, should the keeper die."""
        for role, popen in list(self.starting.items()):
            assert popen.stdout is not None
            assert popen.stdin is not None
            if popen.stdout.closed or not select.select([popen.stdout], [], [], 0)[0]:
                continue
            with popen.stdout, popen.stdin:
                if os.read(popen.stdout.fileno(), len(spawn.HELD)) != spawn.HELD:
                    continue  # it ends; `_hear_of_ends` learns how
                handle = Handle.of_role(self.run, role)
                if handle is not None and handle.pid == popen.pid:
                    self.charges[role] = Charge(handle, popen)
                    del self.starting[role]
                    with contextlib.suppress(BrokenPipeError):
                        popen.stdin.write(spawn.GO)
                        popen.stdin.flush()

    def _hear_of_ends(self, now: float) -> None:
        for role, popen in list(self.starting.items()):
            if popen.poll() is not None:
                del self.starting[role]
                self._ended(role, popen.pid, popen.returncode, now)
        for role, charge in list(self.charges.items()):
            if charge.popen is not None and charge.popen.poll() is None:
                continue
            if charge.popen is None and charge.handle.alive:
                continue
            code = charge.popen.returncode if charge.popen is not None else None
            charge.handle.close()
            del self.charges[role]
            self._ended(role, charge.handle.pid, code, now)

    def _ended(self, role: str, pid: int, code: int | None, now: float) -> None:
        how = UNSEEN if code is None else describe_exit(code)
        self.mind.ended(role, code, how, now)
        life = self.mind.lives.get(role)
        expected = self.mind.stopping or life is None
        log.log(logging.INFO if expected else logging.WARNING, "%s (process %s) ended: %s", role, pid, how)
        if life is not None and life.failing and not self.mind.stopping:
            log.error(
                "%s has died at once %s times in a row; it is started again in %.1f s. Its last words are in %s",
                role, life.n_quick, life.not_before - now, spawn.log_of(self.home, role),
            )  # fmt: skip

    def _hear_of_readiness(self) -> None:
        for role, life in self.mind.lives.items():
            if life.alive and not life.ready and role in self.charges:
                said = self.run.read(f"{role}.json")
                if said.get("pid") == self.charges[role].handle.pid:
                    self.mind.is_ready(role)

    def _adopt(self) -> None:
        for role in dict.fromkeys([*self.mind.lives, *self.run.roles()]):
            self._adopt_one(role)

    def _adopt_one(self, role: str) -> bool:
        """Look after a process that runs already; False if there is none."""
        if role in self.charges or role in self.starting:
            return True
        handle = Handle.of_role(self.run, role)
        if handle is None:
            return False
        log.info("%s runs as process %s; the keeper looks after it", role, handle.pid)
        self.charges[role] = Charge(handle)
        self.mind.started(role, time.monotonic())
        return True

    def _pid(self, role: str) -> int:
        return self.charges[role].handle.pid if role in self.charges else self.starting[role].pid

    def _signal(self, role: str, number: int) -> None:
        if role in self.charges:
            self.charges[role].handle.signal(number)
        elif role in self.starting:
            self.starting[role].send_signal(number)

    def _listen(self) -> socket.socket:
        """Listen for the server: on the port it had before, if that is free, so that clients find it again."""
        wanted = Settings.read(self.environ).port
        before = self.run.read("ports.json").get(SERVER, 0)
        for port in (wanted,) if wanted else (before, 0):
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
                listener.listen(BACKLOG)
            except (OSError, OverflowError, TypeError) as error:
                listener.close()
                refused = error
                continue
            port = listener.getsockname()[1]
            self.run.write("ports.json", {**self.run.read("ports.json"), SERVER: port})
            self.run.write(LISTENER, {"pid": os.getpid(), "port": port})
            return listener
        raise refused

    def _wanted_workers(self) -> int:
        said = self.run.read(WANTED).get("workers")
        return said if isinstance(said, int) and said > 0 else Settings.read(self.environ).workers

    def _reread_wanted(self) -> None:
        try:
            mtime = (self.run.path / WANTED).stat().st_mtime_ns
        except FileNotFoundError:
            return
        if mtime != self._wanted_mtime:
            self._wanted_mtime = mtime
            try:
                n = self._wanted_workers()
            except RequestError as error:
                log.error("the number of workers stays as it is: %s", error)  # noqa: TRY400
                return
            if n != self.mind.n_workers:
                log.info("there shall be %s workers", n)
                self.mind.resize(n)

    def _write_status(self) -> None:
        status = {
            "pid": os.getpid(),
            "version": version("modelops"),
            "since": self.began_at.isoformat(),
            "stopping": self.mind.stopping,
            "roles": {role: self._shown(role, life) for role, life in self.mind.lives.items()},
        }
        if status != self._written:
            self._written = status
            with contextlib.suppress(OSError):  # a full disk must not end the pool; the next change is told
                self.run.write(STATUS, status)

    def _shown(self, role: str, life: Life) -> dict[str, Any]:
        return {
            "pid": self._pid(role) if life.alive else None,
            "ready": life.ready,
            "starts": life.n_starts,
            "died_at_once": life.n_quick,
            "failing": life.failing,
            "last_end": life.last_end,
        }

    @contextlib.contextmanager
    def _waking_on_signals(self) -> Any:
        """SIGTERM and SIGINT end the pool, SIGHUP says that ``wanted.json`` has changed; all of them wake `_wait`."""
        woken, waker = socket.socketpair()
        waker.setblocking(False)
        woken.setblocking(False)

        def stop(number: int, _frame: object) -> None:
            self._stop_asked = f"told by {signal.Signals(number).name}"

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGHUP, lambda *_: None)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            with woken, waker:
                yield woken
        finally:
            signal.set_wakeup_fd(-1)

    def _wait(self, woken: socket.socket | None) -> None:
        """Wait until a process ends, one that is starting says something, a signal comes, or some time has passed."""
        poll = select.poll()
        if woken is not None:
            poll.register(woken, select.POLLIN)
        for popen in self.starting.values():
            if popen.stdout is not None and not popen.stdout.closed:
                poll.register(popen.stdout, select.POLLIN)
        for charge in self.charges.values():
            if charge.handle.fd is not None:
                poll.register(charge.handle.fd, select.POLLIN)
        quick = self.mind.stopping or not all(
            life.ready for life in map(self.mind.lives.get, (SERVER,)) if life
        )
        poll.poll(1000 * (TICK_S / 5 if quick else TICK_S))
        if woken is not None:
            with contextlib.suppress(BlockingIOError):
                woken.recv(4096)
