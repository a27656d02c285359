"""Workers that cannot prepare the job's environment: they get no work of it for a while, and its story says why.

The environment can be had: whoever drives the job has it. So it is the worker, which reaches no index, say, or lacks an
interpreter, and others may do. It is tried again after a while, later each time. A job is given up only if none of its
workers can, and one that says so finally: that the index is away for all of them may end any moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c

if TYPE_CHECKING:
    from modelops.driver.course import Course
    from modelops.driver.outbox import Outbox
    from modelops.driver.roster import Roster

TRY_AGAIN_S: Final = 30.0  # twice as long each time
TRY_AGAIN_AT_MOST_S: Final = 600.0
UNFIT, FIT = "worker_unfit", "worker_fit"  # kinds of events
TIMER: Final = "unfit"


class Fitness:
    """Which workers are put aside, until when. It knows of those only that have failed."""

    def __init__(self, roster: Roster, course: Course, outbox: Outbox) -> None:
        self._roster, self._course, self._outbox = roster, course, outbox
        self._failures: dict[str, int] = {}  # of workers that have not worked since
        self._until: dict[str, float] = {}

    def failed(self, worker: str, reason: str, now: float) -> None:
        """Put a worker aside, as it says itself that it cannot."""
        n = self._failures.get(worker, 0)
        if worker in self._until:
            return  # what waited there behind the first says the same
        if not n:
            self._outbox.write(c.Note(UNFIT, f"{worker} gets no work of this job for now: {reason}"))
        self._failures[worker] = n + 1
        self._until[worker] = now + min(TRY_AGAIN_S * 2.0**n, TRY_AGAIN_AT_MOST_S)
        self._roster.set_fit(worker, False)
        self._set_timer()

    def worked(self, worker: str) -> None:
        """Note that a worker has handed something in."""
        if self._failures.pop(worker, 0):
            self._outbox.write(c.Note(FIT, f"{worker} works for this job"))
            self._try_again(worker)

    def left(self, worker: str) -> None:
        """Forget a worker that is gone."""
        self._failures.pop(worker, None)
        self._until.pop(worker, None)

    def look(self, now: float) -> None:
        """Try those again whose time it is."""
        for worker in [worker for worker, until in self._until.items() if until <= now]:
            self._try_again(worker)
        self._set_timer()

    def nobody_is(self) -> bool:
        """Say whether every worker is put aside."""
        return bool(self._until) and not any(w.fit and w.slots for w in self._roster.workers.values())

    def _try_again(self, worker: str) -> None:
        if self._until.pop(worker, None) is not None:
            self._roster.set_fit(worker, True)

    def _set_timer(self) -> None:
        if self._until and not self._course.is_ending:
            self._outbox.set_timer(TIMER, min(self._until.values()))
