"""Workers that a person or a container runs in the foreground: one process for each slot, started again when it ends.

They end with the one that runs here, however it ends: each watches a pipe from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final, assert_never

import msgspec

from modelops.cluster.upkeep import ExitCode, Finish, Kill, Start, Tell, Upkeep
from modelops.counters import Totals
from modelops.errors import ClusterError, describe_exit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelops.cluster.place import Place

PROGRAM: Final = "modelops.cli.crew_worker"
TICK_S: Final = 0.2
# For what has ended and is being stored: outputs are large, or storage is far. Less than whoever keeps this one gives
# it (terminationGracePeriodSeconds of k8s/base/worker, TimeoutStopSec of systemd).
GRACE_S: Final = 50.0
log = logging.getLogger(__name__)


class Crew:
    """``place.slots`` workers. `work` returns when all have ended because somebody asked for it.

    Raises
    ------
    ClusterError
        A worker says that its settings are wrong; its log says which.
    """

    def __init__(self, place: Place, *, environ: Mapping[str, str]) -> None:
        self._place, self._environ = place, environ
        self._mind = Upkeep(place.slots, began=time.monotonic(), grace_s=GRACE_S, only_workers=True)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._asked = ""
        self._wrong = ""
        self._said: dict[str, int] = {}  # where a process says that it has joined, and what it has counted
        self._unread: dict[str, bytes] = {}
        self._totals: dict[str, Totals] = {}  # of those that run
        self._before = Totals()  # of those that have ended
        self._looked_at = time.monotonic()
        self.n_starts = 0
        self.ends = {"told": 0, "scheduler_gone": 0, "unasked": 0}

    def idle_s(self) -> float:
        """Return how long ago it looked at its workers."""
        return time.monotonic() - self._looked_at

    def n_wanted(self) -> int:
        """Return how many workers shall run; none any more when it was told to end."""
        return 0 if self._asked else self._place.slots

    def n_ready(self) -> int:
        """Return how many have joined a scheduler, and were not told to end."""
        return 0 if self._asked else sum(life.ready for life in tuple(self._mind.lives.values()))

    def work(self) -> None:
        """Keep the workers until SIGTERM or SIGINT."""
        woken, waker = socket.socketpair()
        waker.setblocking(False)
        with woken, waker:
            woken.settimeout(TICK_S)
            signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
            before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
            before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
            try:
                while not self._step():
                    with contextlib.suppress(TimeoutError):
                        woken.recv(4096)
            finally:
                signal.set_wakeup_fd(-1)
                for number, handler in before.items():
                    signal.signal(number, handler)
        if self._wrong:
            raise ClusterError(self._wrong)

    def _stop(self, number: int, _frame: object) -> None:
        self._asked = f"told by {signal.Signals(number).name}"

    def _step(self) -> bool:
        self._looked_at = now = time.monotonic()
        for role, fd in self._said.items():
            self._listen(role, fd)
        if self._asked and not self._mind.stopping:
            log.info("the workers end: %s", self._asked)
            self._mind.stop(self._asked, now)
        for role, process in list(self._running.items()):
            if process.poll() is not None:
                del self._running[role]
                self._ended(role, process, now)
        for action in self._mind.actions(now):
            match action:
                case Start(role):
                    self._start(role)
                    self._mind.started(role, now)
                case Tell(role):
                    self._running[role].send_signal(signal.SIGTERM)
                case Kill(role, why):
                    log.warning("%s is killed: %s", role, why)
                    self._running[role].kill()
                case Finish():
                    return True
                case _:
                    assert_never(action)
        return False

    def totals(self) -> Totals:
        """Return what the workers have counted since this began, also those that have ended."""
        total = self._before
        for one in tuple(self._totals.values()):
            total += one
        return total

    def _listen(self, role: str, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(fd, 65_536):
                self._unread[role] = self._unread.get(role, b"") + data
        *lines, self._unread[role] = self._unread.get(role, b"").split(b"\n")
        for line in lines:
            if line == b"joined":
                self._mind.is_ready(role)
            else:
                self._totals[role] = msgspec.json.decode(line, type=Totals)

    def _start(self, role: str) -> None:
        place = self._place
        joined, says = os.pipe()
        os.set_blocking(joined, False)
        arguments = [place.scheduler, str(place.tls or ""), place.host or "", str(says)]
        arguments.append(msgspec.json.encode(place.membership).decode())
        try:
            self._running[role] = subprocess.Popen(
                [sys.executable, "-P", "-m", PROGRAM, *arguments],
                stdin=subprocess.PIPE,
                env=self._environ,
                pass_fds=(says,),
                start_new_session=True,  # Ctrl-C is for us; we tell them
            )
        except BaseException:
            os.close(joined)
            raise
        finally:
            os.close(says)
        self._said[role] = joined
        self.n_starts += 1

    def _ended(self, role: str, process: subprocess.Popen[bytes], now: float) -> None:
        if process.stdin is not None:
            process.stdin.close()
        fd = self._said.pop(role)
        self._listen(role, fd)
        os.close(fd)
        self._unread.pop(role, None)
        self._before += self._totals.pop(role, Totals())
        gone = process.returncode == ExitCode.SCHEDULER_GONE
        self.ends["told" if self._asked else "scheduler_gone" if gone else "unasked"] += 1
        how = describe_exit(process.returncode)
        self._mind.ended(role, process.returncode, how, now)
        if process.returncode == ExitCode.WRONG_SETTINGS:
            self._wrong = "the settings of the workers are wrong, see above"
            self._asked = self._asked or "their settings are wrong"
        if not self._mind.stopping:
            log.warning("%s (process %s) ended: %s; it is started again", role, process.pid, how)
