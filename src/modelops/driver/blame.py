"""Which replicate took its worker down: narrow down, isolate, and at the third death alone, condemn.

A worker's process died while it ran some work. What ran is cut into eighths; what has been there at two deaths (or at
one, if it is a single item) is suspect and runs alone (`backlog`, `roster`); what was alone at three is condemned. Jobs
share workers, so "alone" is what the worker itself says (`AttemptBegun`): what this job has placed there is not all
that can be to blame.

All workers of a pod die at once when it runs out of memory, and with them suspects each of which was alone on its own
worker. Nobody is blamed for that; from then on each of these runs with no other suspect of its job on its host.

A replicate that has kept a checkpoint since it was begun made progress, so that death is not its fault as it seems:
only a long row of such deaths condemns it, so that it cannot keep a job alive for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c
from modelops.driver.backlog import Kind, Work
from modelops.driver.places import Commit
from modelops.states import ReplicateStatus
from modelops.worker.messages import ErrorExample

if TYPE_CHECKING:
    from modelops.study.ids import AttemptId

DEADLY: Final = 3  # worker deaths of a replicate that ran alone
DEADLY_AT_LAST: Final = 30  # of one that keeps checkpoints in between
AT_ONCE_S: Final = 2.0  # workers of one pod are told to have died one after the other


class Blame:
    """Counts the deaths of workers at which an item was running alone.

    ``n_lost``: attempts that began and ended with the death of their worker, alone or not.
    """

    def __init__(self) -> None:
        self._strikes: dict[tuple[Kind, int], int] = {}
        self.n_lost = 0
        self._deaths: dict[tuple[Kind, int], int] = {}  # the same, whatever checkpoints it kept
        self._died_at: dict[str, float] = {}  # by host, when a worker last died that had a suspect

    def in_company(self, host: str, now: float, *, beside: bool) -> bool:
        """Note that a worker with a suspect died; say whether another suspect was on that host, or died there just now.

        ``beside``: one is there now.
        """
        before = self._died_at.get(host)
        self._died_at[host] = now
        return beside or (before is not None and now - before <= AT_ONCE_S)

    def parts(self, work: Work, *, alone: bool) -> list[Work]:
        """Return what to run again after a worker died while it ran this; nothing if it is condemned."""
        self.n_lost += 1
        work = work._replace(deaths=work.deaths + 1)
        if len(work.ranges) != 1:
            return work.split()
        item = (work.kind, work.ranges.pairs[0][0])
        if alone:
            self._strikes[item] = self._strikes.get(item, 0) + 1
            self._deaths[item] = self._deaths.get(item, 0) + 1
        condemned = self._strikes.get(item, 0) >= DEADLY or self._deaths.get(item, 0) >= DEADLY_AT_LAST
        return [] if condemned else [work]

    def made_progress(self, index: int) -> None:
        """Forget the deaths of a replicate that has kept a checkpoint since it was begun."""
        self._strikes.pop((Kind.SIMULATE, index), None)

    def deaths(self, work: Work) -> int:
        """Return at how many deaths this work was running alone."""
        return self._deaths.get((work.kind, work.ranges.pairs[0][0]), 0)


def condemnation(work: Work, attempt: AttemptId, n_deaths: int) -> Commit:
    """Return the commit that says of this work what no worker could."""
    error = ErrorExample(
        fingerprint="worker died",
        status=ReplicateStatus.CRASHED,
        error_type="WorkerDied",
        message=f"took its worker down {n_deaths} times",
        index=work.ranges.pairs[0][0] if work.kind is Kind.SIMULATE else -1,
    )
    if work.kind is Kind.SIMULATE:
        return Commit(work, c.CommitSynthetic(attempt, work.ranges, ReplicateStatus.CRASHED, error), [error])
    return Commit(work, c.CommitSyntheticAggregates(attempt, work.ranges, error), [error])
