"""Strike a random process of the pool every little while: kill it, or stop it and let it go on later."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

KINDS = ("runner", "worker", "server", "client", "postgres")


@dataclass(frozen=True)
class Strike:
    """What was done to which process, and the jobs whose live work it hit."""

    at: float
    kind: str
    pid: int
    how: str
    jobs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.at:8.2f} s  {self.how} {self.kind} {self.pid}, hit {', '.join(self.jobs) or 'no live work'}"


@dataclass
class Killer:
    """Strikes until it is told to stop.

    ``targets`` returns the pids of each kind; ``hit`` the jobs whose live work is in a process of that kind;
    ``crash_postgres`` kills that server as a whole and starts it again.
    """

    seed: int
    every_s: float
    targets: Callable[[], Mapping[str, Sequence[int]]]
    hit: Callable[[str, int], tuple[str, ...]]
    crash_postgres: Callable[[], None]
    strikes: list[Strike] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _stopped: list[tuple[float, int]] = field(default_factory=list)

    def run(self) -> None:
        """Strike; the thread's whole work."""
        rng, began = random.Random(self.seed), time.monotonic()
        while not self._ended.wait(self.every_s * (0.5 + rng.random())):
            self._let_go_on(time.monotonic())
            targets = self.targets()
            kind = rng.choice(KINDS)
            pids = targets.get(kind, ())
            if not pids:
                continue
            pid = rng.choice(list(pids))
            how = "SIGSTOP" if rng.random() < 0.3 and kind != "postgres" else "SIGKILL"
            jobs = self.hit(kind, pid)
            if kind == "postgres":
                self.crash_postgres()
            else:
                try:
                    os.kill(pid, getattr(signal, how))
                except ProcessLookupError:
                    continue  # it ended while we looked
                if how == "SIGSTOP":
                    self._stopped.append((time.monotonic() + 0.5 + 4 * rng.random(), pid))
            self.strikes.append(Strike(time.monotonic() - began, kind, pid, how, jobs))
        self._let_go_on(float("inf"))

    def end(self) -> None:
        """Strike no more, and let all that is stopped go on."""
        self._ended.set()

    def _let_go_on(self, now: float) -> None:
        for due, pid in list(self._stopped):
            if due <= now:
                self._stopped.remove((due, pid))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
