"""Why the drivers of a job failed or were put off, and how long the job is not taken up for that. Pure.

A driver that failed is tried again soon, then later and later; after several in a row the job is to be given up. One
that lacks something that is away has not failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from modelops.errors import IntegrityError, NotFoundError

MAX_FAILURES: Final = 5  # of the drivers of one job in a row, before the job is ended
GOOD_RUN_S: Final = 300.0  # a driver that lived so long did not fail in a row with the one before
LONGEST_DELAY_S: Final = 60.0
LOST_DELAY_S: Final = 2.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 8.0  # for what a driver needs and is away


@dataclass(frozen=True)
class Setback:
    """What is known of a job's drivers until now. ``not_before``: of the clock that `put_off` and `failed` were told.

    ``count``: how many failed in a row, some of them counted for more. ``said``: by the last. ``wait_s``: the last
    wait, if what it needs was away.
    """

    count: int = 0
    not_before: float = 0.0
    said: str = ""
    wait_s: float = 0.0

    @property
    def is_hopeless(self) -> bool:
        """Whether so many have failed that the job is to be ended."""
        return self.count >= MAX_FAILURES

    def once_more(self) -> Setback:
        """Allow one more try."""
        return Setback(self.count - 1, self.not_before, self.said, self.wait_s)

    def put_off(self, why: str, now: float, wait_s: float | None = None) -> Setback:
        """Return it after a driver could not begin; ``wait_s``: how long to wait, by default twice the last wait."""
        wait_s = wait_s or min(LONGEST_WAIT_S, 2 * self.wait_s or FIRST_WAIT_S)
        return Setback(self.count, now + wait_s, why, wait_s)

    def failed(self, error: Exception, text: str, began: float, now: float) -> Setback:
        """Return it after a driver failed that had begun at ``began``."""
        # What a driver found damaged or gone it has tried to mend: once more, in case somebody just puts it back.
        lost = isinstance(error, IntegrityError | NotFoundError)
        weight = MAX_FAILURES // 2 + 1 if lost else 1
        count = weight + (self.count if now - began < GOOD_RUN_S else 0)
        delay_s = LOST_DELAY_S if lost else min(LONGEST_DELAY_S, 0.5 * 2.0**count)
        return Setback(count, now + delay_s, text)
