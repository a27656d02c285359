"""What the keeper decides: whom to start, to tell to end, to kill. Pure: no clock, no process.

- A process that ends is started again: at once if it had lived for a while, otherwise after a pause that doubles.
- The server is started first and given a head start, because somebody waits for its answer.
- To stop, the workers are told first, while the server can still commit what they finish; then the server, then
  the scheduler. Whoever is not gone after its grace is killed.
- A process that somebody has stopped (SIGSTOP) does nothing and ends nothing; after a while it is killed, and so
  started anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from modelops.cluster.run_folder import SCHEDULER, SERVER

# How a process ended that this keeper has not started: its predecessor did, and only a parent is told.
UNSEEN: Final = "nobody saw how the last one ended: its keeper was started again meanwhile"
STEADY_S: Final = 5.0  # who lived so long did not die at once
FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 30.0
LONGEST_SEARCH_PAUSE_S: Final = 4.0  # of a worker that finds no scheduler
STRANGER_PAUSE_S: Final = (
    10.0  # certificates are replaced by a person, or by a volume that is brought up to date
)
FAILING_AFTER: Final = 3  # deaths at once, in a row
HEAD_START_S: Final = 4.0
STOPPED_S: Final = 20.0
WORKER_GRACE_S: Final = 10.0
SERVER_GRACE_S: Final = 12.0
SCHEDULER_GRACE_S: Final = 5.0


class ExitCode(IntEnum):
    """How processes of a pool tell their keeper why they ended."""

    ALREADY_RUNNING = 73  # somebody else holds the role
    SCHEDULER_GONE = 75  # a worker whose scheduler went away: start it again
    IDLE = 76  # a server that nobody has needed for a while: end the pool
    STRANGER = (
        77  # a worker whose certificate, or the scheduler's, is not accepted: start it again in a while
    )
    WRONG_SETTINGS = 78  # starting again will not help until a person has done something


@dataclass(frozen=True)
class Start:
    """Start the process of a role."""

    role: str


@dataclass(frozen=True)
class Tell:
    """Ask it to end: SIGTERM."""

    role: str


@dataclass(frozen=True)
class Kill:
    """End it: SIGKILL."""

    role: str
    why: str


@dataclass(frozen=True)
class Finish:
    """Nothing runs and nothing shall: the keeper ends."""


Action = Start | Tell | Kill | Finish


@dataclass
class Life:
    """What is known of one role. Times are of the keeper's own clock, in seconds."""

    alive: bool = False
    ready: bool = False
    since: float = 0.0
    n_starts: int = 0
    n_quick: int = 0
    n_searches: int = 0  # in a row that found no scheduler
    not_before: float = 0.0
    last_end: str = ""
    told_at: float | None = None
    killed: bool = False
    stopped_at: float | None = None

    @property
    def failing(self) -> bool:
        """Whether it dies at once, again and again."""
        return self.n_quick >= FAILING_AFTER


def pause_s(n: int, longest: float) -> float:
    """Return how long to wait before a process is started again that ended at once ``n`` times in a row."""
    return min(FIRST_PAUSE_S * 2.0 ** min(n - 1, 30), longest)


@dataclass
class Upkeep:
    """The keeper's mind. Events go in by methods; `actions` says what to do at a time, each thing once.

    ``only_workers``: server and scheduler are elsewhere.
    """

    n_workers: int
    began: float
    grace_s: float = WORKER_GRACE_S
    only_workers: bool = False
    lives: dict[str, Life] = field(default_factory=dict)
    stopping: str = ""  # why

    def __post_init__(self) -> None:
        for role in self._wanted():
            self.lives[role] = Life()

    def started(self, role: str, now: float) -> None:
        """Hear that a process was started, or found running."""
        life = self.lives.setdefault(role, Life())
        life.alive, life.ready, life.since = True, False, now
        life.told_at, life.killed, life.stopped_at = None, False, None
        life.n_starts += 1

    def is_ready(self, role: str) -> None:
        """Hear that it does its work."""
        self.lives[role].ready = True

    def ended(self, role: str, code: int | None, how: str, now: float) -> None:
        """Hear that it ended; ``code`` as `Popen` says it, None if that is not known."""
        life = self.lives[role]
        was_ready, gone = life.ready, code == ExitCode.SCHEDULER_GONE
        life.alive = life.ready = False
        life.last_end = how
        if code == ExitCode.IDLE:
            self.stop("nobody needed it", now)
        if code == ExitCode.STRANGER:
            life.n_quick, life.not_before = life.n_quick + 1, now + STRANGER_PAUSE_S
        elif life.killed or now - life.since >= STEADY_S or (gone and was_ready):
            life.n_quick, life.n_searches, life.not_before = 0, 0, now
        elif gone:  # it never found its scheduler, whose name may stay unknown for long; nobody is to blame
            life.n_quick, life.n_searches = 0, life.n_searches + 1
            life.not_before = now + pause_s(life.n_searches, LONGEST_SEARCH_PAUSE_S)
        else:
            life.n_quick += 1
            life.not_before = now + pause_s(life.n_quick, LONGEST_PAUSE_S)
        if role not in self._wanted():
            del self.lives[role]

    def looked(self, role: str, *, stopped: bool, now: float) -> None:
        """Hear whether a process is stopped."""
        life = self.lives[role]
        life.stopped_at = (now if life.stopped_at is None else life.stopped_at) if stopped else None

    def resize(self, n_workers: int) -> None:
        """Hear how many workers there shall be."""
        self.n_workers = n_workers
        for role in self._wanted():
            self.lives.setdefault(role, Life())
        for role in [r for r, life in self.lives.items() if not life.alive and r not in self._wanted()]:
            del self.lives[role]

    def stop(self, why: str, now: float) -> None:
        """Hear that all shall end."""
        del now
        self.stopping = self.stopping or why

    def actions(self, now: float) -> list[Action]:
        """Return what to do now. Whoever asks does it, and tells what came of it."""
        if self.stopping:
            return self._endings(now)
        return [*self._beginnings(now), *self._surplus(now), *self._stopped(now)]

    def _wanted(self) -> list[str]:
        first = [] if self.only_workers else [SERVER, SCHEDULER]
        return [*first, *(f"worker-{n}" for n in range(self.n_workers))]

    def _beginnings(self, now: float) -> list[Action]:
        server = self.lives.get(SERVER)
        others_too = server is None or server.ready or server.n_starts > 1 or now - self.began >= HEAD_START_S
        due = [r for r in self._wanted() if not self.lives[r].alive and self.lives[r].not_before <= now]
        return [Start(r) for r in due if others_too or r == SERVER]

    def _surplus(self, now: float) -> list[Action]:
        surplus = [r for r, life in self.lives.items() if life.alive and r not in self._wanted()]
        return self._end(surplus, self.grace_s, now)

    def _stopped(self, now: float) -> list[Action]:
        hung = [
            (role, life)
            for role, life in self.lives.items()
            if life.alive
            and not life.killed
            and life.stopped_at is not None
            and now - life.stopped_at >= STOPPED_S
        ]
        for _, life in hung:
            life.killed = True
        return [Kill(role, f"it was stopped (SIGSTOP) for {STOPPED_S:g} s") for role, _ in hung]

    def _endings(self, now: float) -> list[Action]:
        alive = [role for role, life in self.lives.items() if life.alive]
        workers = [r for r in alive if r not in (SERVER, SCHEDULER)]
        stages = [(workers, self.grace_s), ([SERVER], SERVER_GRACE_S), ([SCHEDULER], SCHEDULER_GRACE_S)]
        for roles, grace_s in stages:
            if present := [r for r in roles if r in alive]:
                return self._end(present, grace_s, now)
        return [Finish()]

    def _end(self, roles: list[str], grace_s: float, now: float) -> list[Action]:
        actions: list[Action] = []
        for role in roles:
            life = self.lives[role]
            if life.told_at is None:
                life.told_at = now
                actions.append(Tell(role))
            elif now - life.told_at >= grace_s and not life.killed:
                life.killed = True
                actions.append(Kill(role, f"it had not ended after {grace_s:g} s"))
        return actions
