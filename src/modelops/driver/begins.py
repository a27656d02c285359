"""Whom to ask whether an attempt has begun: who has not said so in time, if it is not this job that is in front of it.

An attempt may wait on its worker behind those of other jobs, and then it should run elsewhere. A worker tells of what
has run for a while. So what is not heard of is asked after, which costs a message through the scheduler and back; but
not while all slots of the worker are known to run this job, nor at once when one of these has become free.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from modelops.study.ids import AttemptId

BEGUN_WITHIN_S: Final = 2.0  # after it could begin; who has not said so by then is asked
FIRST_BEGUN_WITHIN_S: Final = (
    0.3  # the same, of a worker that has ended nothing of this job: others may have it
)
ASK_AGAIN_S: Final = 2.0  # whether an attempt still waits; later and later
LONGEST_ASK_AGAIN_S: Final = 15.0


class Begins:
    """What is known of the attempts that one driver has submitted: where they are, and which have begun."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._workers: dict[AttemptId, str] = {}  # of every attempt that has not ended
        self._unbegun: dict[AttemptId, float] = {}  # how long to wait between asking
        self._begun: dict[str, set[AttemptId]] = {}
        self._ended_at: dict[str, float] = {}  # when a worker last ended something of this job
        self._asks: list[tuple[float, AttemptId]] = []  # a heap: when to ask after which attempt

    def joined(self, worker: str, slots: int) -> None:
        """Note a worker, or its new number of slots."""
        self._slots[worker] = slots

    def left(self, worker: str) -> None:
        """Forget a worker and its attempts."""
        self._slots.pop(worker, None)
        self._begun.pop(worker, None)
        self._ended_at.pop(worker, None)
        for attempt in [a for a, name in self._workers.items() if name == worker]:
            del self._workers[attempt]
            self._unbegun.pop(attempt, None)

    def submitted(self, attempt: AttemptId, worker: str, now: float) -> None:
        """Note an attempt that was sent to a worker."""
        self._workers[attempt] = worker
        self._unbegun[attempt] = ASK_AGAIN_S
        within_s = BEGUN_WITHIN_S if worker in self._ended_at else FIRST_BEGUN_WITHIN_S
        heapq.heappush(self._asks, (now + within_s, attempt))

    def begun(self, attempt: AttemptId) -> None:
        """Note that an attempt runs."""
        if self._unbegun.pop(attempt, None) is not None:
            self._begun.setdefault(self._workers[attempt], set()).add(attempt)

    def ended(self, attempt: AttemptId, now: float) -> None:
        """Note that nothing more comes of an attempt."""
        self._unbegun.pop(attempt, None)
        worker = self._workers.pop(attempt, None)
        if worker is not None:
            self._begun.get(worker, set()).discard(attempt)
            self._ended_at[worker] = now

    def due(self, now: float) -> list[tuple[AttemptId, str]]:
        """Return the attempts that are to be asked after now, each with its worker."""
        found = []
        while self._asks and self._asks[0][0] <= now:
            _, attempt = heapq.heappop(self._asks)
            wait_s, worker = self._unbegun.get(attempt), self._workers.get(attempt)
            if wait_s is None or worker not in self._slots:
                continue
            free_at = self._ended_at.get(worker)
            if len(self._begun.get(worker, ())) >= max(1, self._slots[worker]):
                again = now + wait_s
            elif free_at is not None and now < free_at + BEGUN_WITHIN_S:
                again = free_at + BEGUN_WITHIN_S
            else:
                again = now + wait_s
                self._unbegun[attempt] = min(1.5 * wait_s, LONGEST_ASK_AGAIN_S)
                found.append((attempt, worker))
            heapq.heappush(self._asks, (again, attempt))
        return found
