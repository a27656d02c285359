"""Strike a random process of the pool every little while: kill it, or stop it and let it go on later.

A kind that was struck is left alone until it is back and the jobs go on, however long that takes here: so a slow
machine makes a slower killer and not another outcome. Only live work is struck.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from processes import process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from journal import Replicate
    from plans import Plan

KINDS: Final = ("runner", "worker", "server", "client", "postgres")
OF_THE_POOL: Final = ("runner", "worker", "server", "postgres")  # a client only looks on
DEADLY: Final = ("runner", "worker")  # to the replicate that is in it
STOP_FIRST_S: Final = 5.0
LONG_ENOUGH_S: Final = 10.0
MOST_STOPS: Final = 2  # of a replicate that is long without them
# How long it takes until what was struck is let go on, or started again: at least, and how much more at most.
STOPPED_S: Final = {"postgres": (3.0, 11.0)}  # longer than an answer of it is waited for, too
A_WHILE_S: Final = (0.5, 3.0)


@dataclass(frozen=True)
class Flight:
    """A replicate that runs now. ``pid``: the process it runs in. ``plan``: of its job. ``seconds``: for how long."""

    job: str
    replicate: Replicate
    pid: int
    plan: Plan
    seconds: float


@dataclass(frozen=True)
class Strike:
    """What was done to which process, and the live work that was hit. ``at``: seconds since the first moment."""

    at: float
    kind: str
    pid: int
    how: str
    hit: tuple[Flight, ...]

    @property
    def jobs(self) -> frozenset[str]:
        """The jobs whose live work it hit."""
        return frozenset(flight.job for flight in self.hit)

    def __str__(self) -> str:
        hit = ", ".join(f"{f.job[-6:]}/{f.replicate[0]}.{f.replicate[1]}" for f in self.hit)
        return f"{self.at:7.1f} s  {self.how} {self.kind} {self.pid}: hit {hit}"


class Ground(Protocol):
    """Where the killer goes about."""

    def flights(self, kind: str, pid: int | None = None) -> dict[int, list[Flight]]:
        """Return the processes of a kind (or that one) and the live work in each."""

    def is_back(self, kind: str, struck_at: float) -> bool:
        """Whether a kind that was struck at a time of `time.monotonic` does its work again."""

    def strike_postgres(self, how: str) -> Callable[[], None]:
        """Kill or stop the database server as a whole; return what starts it again, or lets it go on."""

    def struck(self, strike: Strike) -> None:
        """Hear of a strike."""


@dataclass
class Killer:
    """Strikes, in a thread, from `start` until `end`."""

    seed: int
    every_s: float
    ground: Ground
    strikes: list[Strike] = field(default_factory=list)
    error: BaseException | None = None  # what ended it before its time
    _began: float = field(default_factory=time.monotonic)
    _ended: threading.Event = field(default_factory=threading.Event)
    _away: list[tuple[float, str, Callable[[], None]]] = field(
        default_factory=list
    )  # until when, kind, what brings it back
    _struck_at: dict[str, float] = field(default_factory=dict)
    _died_of: Counter[tuple[str, str, Replicate]] = field(default_factory=Counter)

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name="killer")
        self._thread.start()

    def end(self) -> None:
        """Strike no more, and let all that is stopped go on."""
        self._ended.set()
        self._thread.join()

    def kills(self, job: str, *kinds: str) -> int:
        """Return how many kills of these kinds hit live work of a job."""
        return sum(s.how == "SIGKILL" and s.kind in kinds and job in s.jobs for s in list(self.strikes))

    def killed(self, kind: str) -> frozenset[int]:
        """Return the pids of the processes of a kind that were killed."""
        return frozenset(s.pid for s in self.strikes if s.how == "SIGKILL" and s.kind == kind)

    def deaths(self, job: str, replicate: Replicate, *kinds: str) -> int:
        """Return how many processes of these kinds were killed while they ran this replicate."""
        return sum(self._died_of[kind, job, replicate] for kind in kinds)

    def stops(self, job: str, replicate: Replicate, *kinds: str) -> int:
        """Return how often processes of these kinds were stopped while they ran this replicate."""
        stops = [s.hit for s in self.strikes if s.how == "SIGSTOP" and s.kind in kinds]
        return sum((flight.job, flight.replicate) == (job, replicate) for hit in stops for flight in hit)

    def _run(self) -> None:
        rng = random.Random(self.seed)
        try:
            while self._waited(self.every_s * (0.5 + rng.random())):
                away = {kind for _, kind, _ in self._away}
                free = [kind for kind in KINDS if kind not in away and self._is_back(kind)]
                if free:
                    self._strike(rng.choice(free), rng)
        except BaseException as error:  # noqa: BLE001  the top of a thread; whoever waits for the jobs raises it
            self.error = error
        finally:
            self._let_go_on(float("inf"))

    def _waited(self, seconds: float) -> bool:
        """Let pass so much time, and go on what was stopped for long enough; False if it is the end."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            self._let_go_on(now)
            if self._ended.wait(min([until, *(due for due, _, _ in self._away)]) - now):
                return False
        return not self._ended.is_set()

    def _is_back(self, kind: str) -> bool:
        return kind not in self._struck_at or self.ground.is_back(kind, self._struck_at[kind])

    def _strike(self, kind: str, rng: random.Random) -> None:
        how = "SIGSTOP" if self._is_to_stop(kind, rng) else "SIGKILL"
        found = self.ground.flights(kind)
        pids = [pid for pid, hit in found.items() if hit and not self._spared(kind, how, hit)]
        # A replicate of a minute would seldom be chosen by chance, and is to meet one death.
        eager = [pid for pid in pids if kind == "runner" and any(f.plan.is_long for f in found[pid])]
        if not pids:
            return
        pid = rng.choice(eager or pids)
        try:
            hit, bring_back = self._hit(kind, pid, how)
        except ProcessLookupError:
            return  # it ended while we looked
        if not hit:
            return
        now = time.monotonic()
        self._struck_at[kind] = now
        if bring_back is not None:
            least, more = STOPPED_S.get(kind, A_WHILE_S) if how == "SIGSTOP" else A_WHILE_S
            until = now + least + more * rng.random()
            self._away.append((until, kind, bring_back))
            self._struck_at[kind] = until
        if how == "SIGKILL" and kind in DEADLY:
            self._died_of.update((kind, flight.job, flight.replicate) for flight in hit)
        self.strikes.append(strike := Strike(now - self._began, kind, pid, how, tuple(hit)))
        self.ground.struck(strike)

    def _is_to_stop(self, kind: str, rng: random.Random) -> bool:
        by_chance = rng.random() < 0.25
        if kind != "postgres":
            return by_chance
        # It is struck seldom, since all must be back before: so the second time, the fifth, and so on.
        return sum(strike.kind == kind for strike in self.strikes) % 3 == 1

    def _hit(self, kind: str, pid: int, how: str) -> tuple[Sequence[Flight], Callable[[], None] | None]:
        """Do it; return the live work that was hit (nothing if it was not done) and what brings it back."""
        bring_back = partial(os.kill, pid, signal.SIGCONT) if how == "SIGSTOP" else None
        if kind == "postgres":
            hit = self.ground.flights(kind, pid)[pid]
            return (hit, self.ground.strike_postgres(how)) if hit else ([], None)
        if kind != "runner":
            hit = self.ground.flights(kind, pid).get(pid, [])
            if hit and not self._spared(kind, how, hit):
                os.kill(pid, getattr(signal, how))
                return hit, bring_back
            return [], None
        # It goes from one replicate to the next in no time: look only when it holds still.
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + STOP_FIRST_S
        while (found := process(pid)) is not None and found.state != "T" and time.monotonic() < deadline:
            threading.Event().wait(0.001)
        hit = self.ground.flights(kind, pid).get(pid, [])
        if not hit or self._spared(kind, how, hit):
            os.kill(pid, signal.SIGCONT)
            return [], None
        if how == "SIGKILL":
            os.kill(pid, signal.SIGKILL)
        return hit, bring_back

    def _spared(self, kind: str, how: str, hit: Sequence[Flight]) -> bool:
        """Whether a replicate in it has had its share: workers die of it, retries end, a minute is long."""
        if kind not in DEADLY:
            return False
        if how == "SIGSTOP":
            return any(f.plan.is_long and self.stops(f.job, f.replicate, *DEADLY) >= MOST_STOPS for f in hit)
        return any(self._has_had_its_share(kind, flight) for flight in hit)

    def _has_had_its_share(self, kind: str, flight: Flight) -> bool:
        if self.deaths(flight.job, flight.replicate, *DEADLY) >= flight.plan.bearable:
            return True
        if (
            flight.plan.is_long
        ):  # the first death in its job is to be that of a runner which has done something
            return flight.seconds < LONG_ENOUGH_S or (
                kind == "worker" and not self.kills(flight.job, "runner")
            )
        return kind == "worker" and self.deaths(flight.job, flight.replicate, "worker") > 0

    def _let_go_on(self, now: float) -> None:
        for due in [one for one in self._away if one[0] <= now]:
            self._away.remove(due)
            with contextlib.suppress(ProcessLookupError):
                due[2]()
