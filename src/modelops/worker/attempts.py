"""The worker's own table of attempts, outside Dask: what runs here, since when, and what was told to stop.

A driver may die, and Dask then throws away what its tasks return. So receipts stay here until the job's driver has
made them count (``acknowledged`` in one of its next chunks) or the job is forgotten. A new driver asks for the table
of its job; from then on nothing of an earlier driver begins any more.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from modelops.errors import (
    BundleEnvironmentError,
    BundleError,
    HandshakeError,
    IntegrityError,
    ModelOpsError,
    RemoteError,
    RequestError,
    RetryableError,
    StartFailedError,
)
from modelops.processes import StopSignal
from modelops.study.ranges import Ranges
from modelops.worker.messages import HeldAttempt, Receipt, TaskError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from modelops.study.ids import AttemptId, JobId
    from modelops.study.ranges import Range

NO_HOPE: Final = (
    RequestError,
    BundleError,
    BundleEnvironmentError,
    IntegrityError,
    HandshakeError,
    RemoteError,
    StartFailedError,
)
MAX_REMEMBERED: Final = 10_000  # stops of attempts that have not begun; jobs whose drivers are known
SOON_S: Final = 1.0  # until a replicate that nobody needs is killed
MAX_KEPT_BYTES: Final = 64 * 1024 * 1024  # of receipts that nobody has acknowledged


@dataclass
class Attempt:
    """One attempt while it runs on this worker.

    ``ranges``: shrinks when a part is handed in, which is in ``parts`` then. ``alone``: nothing may run beside it.
    ``storing``: it is done, and storage does not take it. ``recalled``: its driver wants back what has not begun.
    ``preparing``: nothing of it runs yet; the job's environment is being looked at, or built, which no stop ends.
    ``aside``: its replicates have ended, and the next attempt may begin in its slot while it stores.
    ``forgotten``: its job has ended, and nobody will ask for what it hands in.
    """

    job: JobId
    attempt: AttemptId
    epoch: int
    ranges: tuple[Range, ...]
    number: int = 1
    alone: bool = False
    started_at: float = field(default_factory=time.time)
    stop: StopSignal = field(default_factory=StopSignal)
    storing: bool = False
    recalled: bool = False
    preparing: bool = False
    aside: bool = False
    forgotten: bool = False
    parts: tuple[Receipt, ...] = ()

    def held(self, receipt: Receipt | None = None, error: TaskError | None = None) -> HeldAttempt:
        """Return its line of the table; with a receipt or an error it has ended."""
        ended = receipt is not None or error is not None
        return HeldAttempt(
            job=self.job,
            attempt=self.attempt,
            epoch=self.epoch,
            ranges=self.ranges,
            attempt_number=self.number,
            state="ended" if ended else "storing" if self.storing else "running",
            started_at=self.started_at,
            receipt=receipt,
            error=error,
        )


class AttemptTable:
    """Thread-safe: tasks enter and leave on worker threads, all else comes from the event loop."""

    def __init__(self, *, slots: int | None = None, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        self._slots = slots
        self._lock = threading.Condition()
        self._n_waiting_alone = 0
        self._running: dict[tuple[JobId, AttemptId], Attempt] = {}
        self._stopped_before_start: OrderedDict[tuple[JobId, AttemptId], None] = OrderedDict()
        self._kept: OrderedDict[tuple[JobId, AttemptId], HeldAttempt] = OrderedDict()
        self._kept_bytes, self._max_kept_bytes = 0, max_kept_bytes
        self._epochs: OrderedDict[JobId, int] = OrderedDict()  # of the newest driver that asked

    def enter(self, attempt: Attempt) -> bool:
        """Record that an attempt begins; False if it was stopped before it began, or its driver was replaced.

        Waits while it, or what runs already, must be alone, and while too much is being stored.
        """
        with self._lock:
            self._n_waiting_alone += attempt.alone
            try:
                self._lock.wait_for(lambda: not self._may_begin(attempt) or self._has_room(attempt))
            finally:
                self._n_waiting_alone -= attempt.alone
                self._lock.notify_all()
            if not self._may_begin(attempt):
                return False
            self._running[attempt.job, attempt.attempt] = attempt
            return True

    def waiting_alone(self) -> int:
        """Return how many attempts wait until nothing else runs."""
        with self._lock:
            return self._n_waiting_alone

    def _may_begin(self, attempt: Attempt) -> bool:
        stopped = (attempt.job, attempt.attempt) in self._stopped_before_start
        return not stopped and not self._is_replaced(attempt.job, attempt.epoch)

    def _has_room(self, attempt: Attempt) -> bool:
        if attempt.alone:
            return not self._running
        others = self._running.values()
        if self._n_waiting_alone or any(other.alone for other in others):
            return False
        if self._slots is None or len(others) < self._slots:
            return True
        # Those that have stepped aside store what they have. While storage is away they keep their slots.
        n_busy = sum(not other.aside or other.storing for other in others)
        return n_busy < self._slots and len(others) < 2 * self._slots

    def step_aside(self, attempt: Attempt) -> None:
        """Let another attempt begin while this one stores what it has."""
        with self._lock:
            attempt.aside = True
            self._lock.notify_all()

    def leave(self, attempt: Attempt) -> None:
        """Record that an attempt is over."""
        with self._lock:
            self._running.pop((attempt.job, attempt.attempt), None)
            self._lock.notify_all()

    def keep(self, attempt: Attempt, receipt: Receipt | None, error: TaskError | None) -> HeldAttempt:
        """Keep how an attempt ended until it is acknowledged; the oldest make room when it is too much.

        Returns
        -------
            What to announce to the job's driver.
        """
        held = attempt.held(receipt, error)
        with self._lock:
            key = (attempt.job, attempt.attempt)
            self._running.pop(key, None)
            self._lock.notify_all()
            if not attempt.forgotten:
                self._keep(held)
        return held

    def _keep(self, held: HeldAttempt) -> None:
        key = (held.job, held.attempt)
        self._drop(key)
        self._kept[key] = held
        self._kept_bytes += _n_bytes(held)
        while self._kept_bytes > self._max_kept_bytes and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))

    def hand_in(self, attempt: Attempt, part: Receipt) -> HeldAttempt:
        """Keep what an attempt has finished, or gives back, under an id of its own; the attempt is left with the rest.

        Returns
        -------
            What to announce to the job's driver.
        """
        indices = part.indices
        with self._lock:
            held = msgspec.structs.replace(attempt.held(part), attempt=part.attempt, ranges=indices.pairs)
            attempt.ranges = (Ranges(attempt.ranges) - indices).pairs
            attempt.parts = (*attempt.parts, part)
            if not attempt.forgotten:
                self._keep(held)
            return held

    def acknowledge(self, job: JobId, attempts: Iterable[AttemptId]) -> None:
        """Keep these receipts no longer: what they say is recorded."""
        with self._lock:
            for attempt in attempts:
                self._drop((job, attempt))

    def forget(self, job: JobId, epoch: int) -> None:
        """Keep nothing of a job that its driver of this epoch has ended, stop what runs of it, begin nothing more."""
        with self._lock:
            for key in [key for key, kept in self._kept.items() if key[0] == job and kept.epoch <= epoch]:
                self._drop(key)
            self._fence(job, epoch + 1)  # a run that begins later has a higher one
            running = [x for x in self._running.values() if x.job == job and x.epoch <= epoch]
            for attempt in running:
                attempt.forgotten = True
        for attempt in running:
            attempt.stop.stop()

    def _fence(self, job: JobId, epoch: int) -> None:
        self._epochs[job] = max(epoch, self._epochs.get(job, 0))
        self._epochs.move_to_end(job)
        while len(self._epochs) > MAX_REMEMBERED:
            self._epochs.popitem(last=False)
        self._lock.notify_all()

    def of_job(self, job: JobId, epoch: int) -> list[HeldAttempt]:
        """Return what runs and what has ended of a job, and let nothing of drivers before ``epoch`` begin."""
        with self._lock:
            self._fence(job, epoch)
            return [
                *(attempt.held() for attempt in self._running.values() if attempt.job == job),
                *(held for held in self._kept.values() if held.job == job),
            ]

    def stop(self, job: JobId, attempt: AttemptId, *, epoch: int | None = None, soon: bool = False) -> bool:
        """Stop it now; True if it has not begun: then it never will. ``soon``: what runs has little time to end.

        ``epoch``: of the driver that wants it. One that slept past its lease does not know yet that another one has
        adopted what runs here; it changes nothing. None: not a driver.
        """
        with self._lock:
            if self._is_replaced(job, epoch):
                return False
            running = self._running.get((job, attempt))
            if running is None and (job, attempt) not in self._kept:
                self._not_to_begin((job, attempt))
                return True
        if running is not None:
            running.stop.stop(grace_s=SOON_S if soon else None)
        return False

    def has_begun(self, job: JobId, attempt: AttemptId) -> bool:
        """Say whether an attempt runs here or has ended here; otherwise it waits, or never came."""
        with self._lock:
            return (job, attempt) in self._running or (job, attempt) in self._kept

    def recall(self, job: JobId, attempt: AttemptId, *, epoch: int | None = None) -> bool:
        """Make sure that an attempt does not begin here; False if it has: what of it has not is given back soon.

        ``epoch``: as of `stop`.
        """
        with self._lock:
            if self._is_replaced(job, epoch):
                return False
            running = self._running.get((job, attempt))
            if running is None and (job, attempt) not in self._kept:
                self._not_to_begin((job, attempt))
                return True
        if running is not None:
            running.recalled = True
            running.stop.give_back()
        return False

    def _is_replaced(self, job: JobId, epoch: int | None) -> bool:
        return epoch is not None and epoch < self._epochs.get(job, 0)

    def _not_to_begin(self, key: tuple[JobId, AttemptId]) -> None:
        self._stopped_before_start[key] = None
        self._lock.notify_all()
        while len(self._stopped_before_start) > MAX_REMEMBERED:
            self._stopped_before_start.popitem(last=False)

    def stop_all(self) -> None:
        """Stop everything that runs."""
        for attempt in self:
            attempt.stop.stop(hard=True)

    def __iter__(self) -> Iterator[Attempt]:
        with self._lock:
            return iter(list(self._running.values()))

    def receipt(self, job: JobId, attempt: AttemptId) -> Receipt | None:
        """Return the receipt of an attempt that has ended, if it is kept."""
        with self._lock:
            held = self._kept.get((job, attempt))
            return None if held is None else held.receipt

    def kept(self) -> list[HeldAttempt]:
        """Return the attempts that have ended and that nobody has acknowledged."""
        with self._lock:
            return list(self._kept.values())

    def _drop(self, key: tuple[JobId, AttemptId]) -> None:
        held = self._kept.pop(key, None)
        if held is not None:
            self._kept_bytes -= _n_bytes(held)


def task_error(error: Exception) -> TaskError:
    """Return what a task raised as a value; only an error of ModelOps can say that there is no hope."""
    text = str(error) if isinstance(error, ModelOpsError) else str(error) or repr(error)
    text = "".join(f"{note}: " for note in getattr(error, "__notes__", ())) + text
    # The driver of the job has the environment: if a worker cannot have it, it is that worker.
    unfit = isinstance(error, BundleEnvironmentError)
    final = isinstance(error, NO_HOPE) and not isinstance(error, RetryableError)
    return TaskError(error_type=type(error).__name__, message=text, final=final, unfit=unfit)


def _n_bytes(held: HeldAttempt) -> int:
    return 200 + len(msgspec.msgpack.encode(held))
