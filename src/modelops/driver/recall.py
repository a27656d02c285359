"""Take back what waits on a worker while another is idle.

Towards the end of a job a worker is idle while another has a chunk waiting, or one of which much has not begun, since
replicates take longer than anybody thought. And other jobs use the same workers. So an attempt may wait where this job
thought that it runs; its worker says so.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c

if TYPE_CHECKING:
    from modelops.driver.backlog import Backlog, Kind
    from modelops.driver.chunking import Meter
    from modelops.driver.outbox import Outbox
    from modelops.driver.places import Places
    from modelops.driver.roster import Attempt, Roster
    from modelops.study.ids import AttemptId

WORTH_ASKING_S: Final = 0.1  # of expected work that has not begun; less is done before it could be elsewhere


class Recall:
    """Takes in what workers say of attempts that take their time, and asks for some back."""

    def __init__(
        self,
        *,
        roster: Roster,
        places: Places,
        backlogs: dict[Kind, Backlog],
        meter: Meter,
        outbox: Outbox,
    ) -> None:
        self._roster, self._places, self._backlogs, self._outbox = roster, places, backlogs, outbox
        self._meter = meter
        self._asked: dict[AttemptId, Attempt] = {}  # without waiting for its worker to say that it waits

    def begun(self, attempt_id: AttemptId) -> None:
        """Note that an attempt runs."""
        attempt = self._roster.attempts.get(attempt_id)
        if attempt is not None:
            self._roster.begun(attempt)

    def waits(self, attempt_id: AttemptId, now: float) -> None:
        """Note that an attempt waits, unless it is known to have begun since."""
        attempt = self._roster.attempts.get(attempt_id)
        if attempt is not None and not attempt.begun:
            self._roster.waits(attempt, now)

    def recalled(self, attempt_id: AttemptId, now: float) -> None:
        """Put work back that a worker has given back."""
        attempt = self._roster.attempts.get(attempt_id)
        if attempt is not None:
            behind_others = attempt.waits
            self._roster.remove(attempt_id)
            if behind_others:
                self._roster.taken(attempt.worker, now)
            self._places.requeue(self._places.give_up(attempt))

    def order(self) -> None:
        """Ask for what waits, if workers are idle and nothing else is left to give them."""
        roster = self._roster
        if not roster.n_idle or not (roster.has_waiting or roster.has_queues or self._asked):
            return
        for backlog in self._backlogs.values():
            if backlog.n_ready:
                return
        if roster.has_waiting:
            self._ask(roster.recallable())
        cost = self._meter.seconds_per_item
        if cost is not None and (self._asked or roster.has_queues):
            self._asked = {
                i: a for i, a in self._asked.items() if i in roster.attempts and len(a.work.ranges) > 1
            }
            found = roster.with_queues(
                roster.n_idle - len(self._asked),
                worth=1 + ceil(max(WORTH_ASKING_S, self._meter.handover_s) / cost),
            )
            self._asked.update((a.id, a) for a in found)
            self._ask(found)

    def _ask(self, attempts: list[Attempt]) -> None:
        for attempt in attempts:
            attempt.recalled = True
            self._outbox.order(c.RecallAttempt(attempt.id, attempt.worker))
