"""Take back what waits on a worker while another is idle.

Other jobs use the same workers, and a replicate may take longer than anybody thought. So an attempt may wait where this
job thought that it runs; its worker says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.driver import commands as c

if TYPE_CHECKING:
    from modelops.driver.backlog import Backlog, Kind
    from modelops.driver.outbox import Outbox
    from modelops.driver.places import Places
    from modelops.driver.roster import Roster
    from modelops.study.ids import AttemptId


class Recall:
    """Takes in what workers say of attempts that take their time, and asks for some back."""

    def __init__(
        self, *, roster: Roster, places: Places, backlogs: dict[Kind, Backlog], outbox: Outbox
    ) -> None:
        self._roster, self._places, self._backlogs, self._outbox = roster, places, backlogs, outbox

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
        attempt = self._roster.remove(attempt_id)
        if attempt is not None:
            self._roster.taken(attempt.worker, now)
            self._places.requeue(self._places.give_up(attempt))

    def order(self) -> None:
        """Ask for what waits, if workers are idle and nothing else is left to give them."""
        if not self._roster.has_waiting or any(backlog.n_ready for backlog in self._backlogs.values()):
            return
        for attempt in self._roster.recallable():
            attempt.recalled = True
            self._outbox.order(c.RecallAttempt(attempt.id, attempt.worker))
