"""Running a job with ``until``: what `needs` decides, put into the backlog, ordered from the store, and stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.driver import commands as c
from modelops.driver.backlog import Kind, Work
from modelops.driver.needs import Watched
from modelops.driver.places import Commit
from modelops.errors import InternalError
from modelops.states import FAILURES
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from modelops.driver.backlog import Backlog
    from modelops.driver.ledger import Ledger
    from modelops.driver.needs import Decision, Needs
    from modelops.driver.outbox import Outbox
    from modelops.driver.places import Places
    from modelops.states import ReplicateStatus
    from modelops.study.ids import AttemptId
    from modelops.study.stopping import Until
    from modelops.worker.messages import SegmentRef

MAX_REFUSED = 10
MAX_AT_ONCE = (
    1_000_000  # replicates in one segment that says what is not needed, if more than one set is in it
)


class Plan:
    """What is done about the decisions of `Needs`.

    ``stop_surplus`` stops the attempts that have any of these indices.
    """

    def __init__(
        self,
        needs: Needs,
        until: Until,
        *,
        ledger: Ledger,
        places: Places,
        backlog: Backlog,
        outbox: Outbox,
        next_attempt: Callable[[], AttemptId],
        stop_surplus: Callable[[Ranges], None],
    ) -> None:
        self.needs, self._until = needs, until
        self._ledger, self._places, self._backlog, self._outbox = ledger, places, backlog, outbox
        self._next_attempt, self._stop_surplus = next_attempt, stop_surplus
        self._n_refused = 0
        self._due: list[Decision] = []  # found before the job goes on

    def adopt(self, segments: Sequence[SegmentRef]) -> None:
        """Take in what earlier drivers left."""
        self._due = self.needs.adopt(segments)

    def begin(self, missing: Ranges, left: Ranges) -> Ranges:
        """Return what of the missing indices may be run at first; the others when they are found to be needed.

        ``left``: what is not to be run now, whatever is found.
        """
        return self.needs.initial(missing, left)

    def start(self) -> None:
        """Order what follows from what earlier drivers left."""
        due, self._due = self._due, []
        self._order(due)

    def settle(
        self, indices: Ranges, counts: Mapping[ReplicateStatus, int], segment: SegmentRef | None
    ) -> Ranges:
        """Take in committed outcomes; return the parameter sets that have all that they need, and nothing else."""
        if segment is not None and segment.watched is not None:
            watched = Watched.of(segment.watched)
            self.needs.say(segment.no_numbers)
        else:  # written by the driver: they took their worker down
            if not counts.keys() <= FAILURES:
                raise InternalError(
                    f"outcomes were committed without the output that until goes by: {counts}"
                )
            watched = Watched.failed(next(iter(counts)), len(indices))
        decided = self.needs.add(indices, watched)
        more = self.needs.release(self.needs.params_of(indices))
        if more:
            self._backlog.add(Work(Kind.SIMULATE, more))
        self._order(decided)
        if beyond := self.needs.beyond():
            self._backlog.withdraw(beyond)
        return Ranges((d.param, d.param + 1) for d in decided if not d.dropped)

    def undecidable(self) -> str:
        """Say which replicate it is that the rule cannot go by, once it is certain which one is the first."""
        found = self.needs.undecidable()
        if found is None:
            return ""
        param, replicate, said = found
        of = self._until.of
        return (
            f"until goes by {of!r}, and replicate {replicate} of parameter set {param} {said}. Return a number as "
            f"{of!r} from every replicate (nan where there is none), and submit the study again; what has run is kept"
        )

    def run_ahead(self) -> Ranges:
        """Return what to run as slots are free."""
        return self.needs.run_ahead()

    def dropped(self, indices: Ranges, segment: SegmentRef) -> Ranges:
        """Note that the store has that these are not needed; return their parameter sets."""
        params, displaced = self.needs.close(indices)
        self._ledger.drop(indices, displaced, segment)
        return params

    def _order(self, decided: Iterable[Decision]) -> None:
        pairs: list[tuple[int, int]] = []
        n = 0
        for decision in decided:
            if pairs and n + len(decision.dropped) > MAX_AT_ONCE:
                self._commit(Ranges(pairs))
                pairs, n = [], 0
            pairs += decision.dropped.pairs
            n += len(decision.dropped)
        if pairs:
            self._commit(Ranges(pairs))

    def _commit(self, indices: Ranges) -> None:
        in_commits = Ranges(
            pair
            for commit in self._places.commits.values()
            if commit.work.kind is Kind.SIMULATE
            for pair in commit.work.ranges.pairs
        )
        covered = indices - self._ledger.lacks(Kind.SIMULATE, indices)
        self._write(indices, covered | (in_commits & indices))
        self._backlog.withdraw(indices)
        self._stop_surplus(indices)

    def _write(self, indices: Ranges, displaced: Ranges) -> None:
        attempt = self._next_attempt()
        command = c.CommitNotNeeded(attempt, indices, displaced)
        self._places.commits[attempt] = Commit(Work(Kind.SIMULATE, indices), command, [])
        if not self._outbox.paused:
            self._outbox.order(command)

    def try_again(self, command: c.CommitNotNeeded) -> bool:
        """Order it once more, as the store refused it, in place of whatever counts; False: that was often enough."""
        self._n_refused += 1
        if self._n_refused <= MAX_REFUSED:
            self._write(command.indices, command.indices)
        return self._n_refused <= MAX_REFUSED
