"""Who works for the job, what each worker holds, and which of that is likely running.

The machine pins every attempt to a worker, so it knows: a worker runs as many attempts as it has slots,
aggregates before chunks and the older before the younger, and the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from modelops.driver.backlog import Kind, Work

if TYPE_CHECKING:
    from modelops.study.ids import AttemptId
    from modelops.study.ranges import Ranges

TAKEN_S: Final = 5.0  # after that, a worker that others had may be free again


@dataclass(slots=True, eq=False)
class Attempt:
    """One try at some work, on one worker.

    ``begun``, ``waits``: its worker said so. ``queued``: others of this job have its slot. ``recalled``: its worker was
    asked to give it back if it still waits. ``placed_at``: when it was given a free slot; None if it had to wait.
    """

    id: AttemptId
    work: Work
    worker: str
    stopping: bool = False
    begun: bool = False
    waits: bool = False
    recalled: bool = False
    placed_at: float | None = None
    queued: bool = False

    @property
    def stands(self) -> bool:
        """Whether it is known, or to be expected, that nothing of it runs."""
        return not self.begun and (self.waits or self.queued)


@dataclass(slots=True, eq=False)
class Worker:
    """A worker and its attempts. ``reserved``: only for suspects, one at a time. ``fit``: it can be given work.

    ``taken_until``: other jobs are thought to have it till then, as something of this one waited there.
    """

    name: str
    slots: int
    running: dict[AttemptId, Attempt] = field(default_factory=dict)
    waiting: dict[AttemptId, Attempt] = field(default_factory=dict)
    reserved: bool = False
    fit: bool = True
    taken_until: float = 0.0
    among: dict[str, Worker] | None = None  # those of the roster that have as much room

    @property
    def load(self) -> int:
        """How many attempts it holds."""
        return len(self.running) + len(self.waiting)


class Roster:
    """The workers and their attempts. All choices depend only on the order of events."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.attempts: dict[AttemptId, Attempt] = {}
        self.slots = 0
        self.n_live = {Kind.SIMULATE: 0, Kind.AGGREGATE: 0}  # items held by attempts
        self._reserved: dict[str, Worker] = {}
        self.n_standing = 0  # indices of attempts that stand
        self._waits: dict[AttemptId, Attempt] = {}
        self._unasked: dict[AttemptId, Attempt] = {}  # plain chunks, the youngest last; see `with_queues`
        self._idle: dict[str, Worker] = {}  # a slot is free
        self._taken: dict[str, Worker] = {}  # likewise, but others are thought to have it
        self._roomy: dict[str, Worker] = {}  # all slots run something, and there is room to wait
        self._depth = 1  # how many may wait for each slot

    def join(self, name: str, slots: int) -> None:
        """Note a worker, or its new number of slots."""
        worker = self.workers.get(name)
        if worker is None:
            worker = self.workers[name] = Worker(name, slots)
            self.slots += slots
        else:
            self.slots += slots - worker.slots if worker.fit else 0
            worker.slots = slots
        self._promote(worker)
        self._sort_in(worker)

    def leave(self, name: str) -> Worker | None:
        """Forget a worker and its attempts, and return them."""
        worker = self.workers.pop(name, None)
        if worker is not None:
            self.slots -= worker.slots if worker.fit else 0
            self._reserved.pop(name, None)
            if worker.among is not None:
                del worker.among[name]
                worker.among = None
            for attempts in (worker.running, worker.waiting):
                for attempt in attempts.values():
                    del self.attempts[attempt.id]
                    self._unasked.pop(attempt.id, None)
                    self._waits_no_more(attempt)
                    self._set_queued(attempt, False)
                    self.n_live[attempt.work.kind] -= len(attempt.work.ranges)
        return worker

    def set_fit(self, name: str, fit: bool) -> None:
        """Give a worker nothing more, or again; what it has, it keeps."""
        worker = self.workers.get(name)
        if worker is None or worker.fit == fit:
            return
        worker.fit = fit
        self.slots += worker.slots if fit else -worker.slots
        if self._reserved.pop(name, None) is not None:
            worker.reserved = False
        self._sort_in(worker)

    def place(self, attempt: Attempt, now: float | None = None) -> None:
        """Note an attempt that was submitted, ``now`` if by this driver."""
        worker = self.workers[attempt.worker]
        self.attempts[attempt.id] = attempt
        self.n_live[attempt.work.kind] += len(attempt.work.ranges)
        has_slot = len(worker.running) < worker.slots
        attempt.placed_at = now if has_slot else None
        if not has_slot:
            self._set_queued(attempt, True)
        (worker.running if has_slot else worker.waiting)[attempt.id] = attempt
        if attempt.work.kind is Kind.SIMULATE and not attempt.work.suspect:
            self._unasked[attempt.id] = attempt
        self._sort_in(worker)

    def remove(self, attempt_id: AttemptId) -> Attempt | None:
        """Note that an attempt ended; the next one on its worker runs now."""
        attempt = self.attempts.pop(attempt_id, None)
        if attempt is None:
            return None
        self.n_live[attempt.work.kind] -= len(attempt.work.ranges)
        if attempt.waits:
            self._waits_no_more(attempt)
        self._unasked.pop(attempt_id, None)
        worker = self.workers[attempt.worker]
        worker.taken_until = 0.0
        if worker.running.pop(attempt_id, None) is None:
            del worker.waiting[attempt_id]
            self._set_queued(attempt, False)
        elif worker.waiting:
            self._promote(worker)
        self._sort_in(worker)
        return attempt

    def shrink(self, attempt: Attempt, done: Ranges) -> None:
        """Note that an attempt goes on without these items."""
        before = self._standing(attempt)
        self.n_live[attempt.work.kind] -= len(done)
        attempt.work = attempt.work._replace(ranges=attempt.work.ranges - done)
        self.n_standing += self._standing(attempt) - before

    # What workers said of attempts that take their time.

    def begun(self, attempt: Attempt) -> None:
        """Note that an attempt runs."""
        self._waits_no_more(attempt)
        before = self._standing(attempt)
        attempt.begun = True
        self.n_standing += self._standing(attempt) - before
        worker = self.workers[attempt.worker]
        worker.taken_until = 0.0
        self._sort_in(worker)

    def waits(self, attempt: Attempt, now: float) -> None:
        """Note that an attempt waits: its worker is busy with something else."""
        for worker in [w for w in self._taken.values() if w.taken_until <= now]:
            self._sort_in(worker, now)
        self._waits_no_more(attempt)
        self._wait(attempt)
        attempt.recalled = False
        self.taken(attempt.worker, now)

    @property
    def has_waiting(self) -> bool:
        """Whether an attempt is known to wait."""
        return bool(self._waits)

    def taken(self, name: str, now: float) -> None:
        """Note that a worker is busy with something else."""
        worker = self.workers[name]
        worker.taken_until = now + TAKEN_S
        self._sort_in(worker, now)

    def recallable(self) -> list[Attempt]:
        """Return attempts that wait while a slot is free elsewhere, one for each such slot at most."""
        n_free = sum(w.slots - w.load for w in self._idle.values())
        found = [a for a in self._waits.values() if not (a.recalled or a.stopping or a.work.suspect)]
        return found[:n_free]

    @property
    def has_queues(self) -> bool:
        """Whether `with_queues` may have any."""
        return bool(self._unasked)

    @property
    def n_idle(self) -> int:
        """How many workers have a free slot."""
        return len(self._idle)

    def with_queues(self, n: int, *, worth: int) -> list[Attempt]:
        """Return up to ``n`` attempts that hold what others could do, each only once, the youngest first.

        Those that wait, and those that run and have ``worth`` items or more. Costs nothing but for what it returns and
        for what can be returned never again.
        """
        found: list[Attempt] = []
        while self._unasked and len(found) < n:
            _, attempt = self._unasked.popitem()
            waits = attempt.id in self.workers[attempt.worker].waiting
            if not (attempt.recalled or attempt.stopping) and (waits or len(attempt.work.ranges) >= worth):
                found.append(attempt)
        return found

    @staticmethod
    def _standing(attempt: Attempt) -> int:
        """Return how many indices of an attempt stand."""
        stands = attempt.stands and attempt.work.kind is Kind.SIMULATE
        return len(attempt.work.ranges) if stands else 0

    def _set_queued(self, attempt: Attempt, queued: bool) -> None:
        before = self._standing(attempt)
        attempt.queued = queued
        self.n_standing += self._standing(attempt) - before

    def _wait(self, attempt: Attempt) -> None:
        before = self._standing(attempt)
        attempt.waits = True
        self._waits[attempt.id] = attempt
        self.n_standing += self._standing(attempt) - before

    def _waits_no_more(self, attempt: Attempt) -> None:
        if attempt.waits:
            before = self._standing(attempt)
            attempt.waits = False
            del self._waits[attempt.id]
            self.n_standing += self._standing(attempt) - before

    def idle(self) -> Worker | None:
        """Return a worker with a free slot, the one that was served longest ago; one that others have comes last."""
        for worker in self._idle.values():
            return worker
        for worker in self._taken.values():
            return worker
        return None

    def let_wait(self, depth: int) -> None:
        """Let so many attempts wait for each slot."""
        if depth != self._depth:
            self._depth = depth
            for worker in self.workers.values():
                if worker.load >= worker.slots:
                    self._sort_in(worker)

    def roomy(self) -> Worker | None:
        """Return a worker on which one more chunk may wait."""
        for worker in self._roomy.values():
            return worker
        return None

    @property
    def has_room(self) -> bool:
        """Whether a worker can be given more: `idle` or `roomy` has one."""
        return bool(self._idle or self._roomy or self._taken)

    @property
    def has_reserved(self) -> bool:
        """Whether workers are kept for suspects."""
        return bool(self._reserved)

    def reserve(self, n: int) -> list[Worker]:
        """Keep ``n`` workers (one or more, at most half) for suspects; return those that are empty."""
        n = min(n, max(1, len(self.workers) // 2))
        if len(self._reserved) < n:
            free = sorted(
                (w for w in self.workers.values() if w.fit and not w.reserved and w.slots), key=_load
            )
            for worker in free[: n - len(self._reserved)]:
                worker.reserved = True
                self._reserved[worker.name] = worker
                self._sort_in(worker)
        return [w for w in self._reserved.values() if not w.load]

    def suspects_beside(self, name: str) -> list[Attempt]:
        """Return the suspects that other workers of this one's host hold."""
        others = [w for w in self._reserved.values() if w.name != name and host_of(w.name) == host_of(name)]
        return [attempt for w in others for attempt in (*w.running.values(), *w.waiting.values())]

    def release_reserved(self) -> None:
        """Let empty reserved workers take plain work again."""
        if not self._reserved:
            return
        for worker in [w for w in self._reserved.values() if not w.load]:
            worker.reserved = False
            del self._reserved[worker.name]
            self._sort_in(worker)

    def _promote(self, worker: Worker) -> None:
        while worker.waiting and len(worker.running) < worker.slots:
            chosen = next(iter(worker.waiting.values()))
            for attempt in worker.waiting.values():
                if attempt.work.kind is Kind.AGGREGATE:
                    chosen = attempt
                    break
            del worker.waiting[chosen.id]
            worker.running[chosen.id] = chosen
            self._set_queued(chosen, False)

    def _sort_in(self, worker: Worker, now: float = 0.0) -> None:
        if worker.among is not None:
            del worker.among[worker.name]
        load, among = len(worker.running) + len(worker.waiting), None
        if worker.fit and not worker.reserved:
            if load < worker.slots:
                among = self._taken if worker.taken_until > now else self._idle
            elif load < (1 + self._depth) * worker.slots:
                among = self._roomy
        worker.among = among
        if among is not None:
            among[worker.name] = worker


def _load(worker: Worker) -> int:
    return worker.load


def host_of(name: str) -> str:
    """Return where a worker is, by its address; workers of one pod have one."""
    return name.rpartition(":")[0] or name
