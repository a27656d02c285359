"""What the store has accepted: outcomes, aggregates, their counts, and the segments that hold them.

Nothing enters it before the store said so.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from modelops.driver.backlog import Kind
from modelops.driver.coverage import Coverage, SegmentMap
from modelops.driver.range_sets import RangeSet
from modelops.states import FAILURES, AggregateStatus, ReplicateStatus
from modelops.study.ranges import EMPTY, Ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from modelops.study.spec import JobSpec
    from modelops.worker.messages import AggregateRef, SegmentRef

_NO_OUTCOMES: Final = dict.fromkeys(
    (ReplicateStatus.SUCCEEDED, *sorted(FAILURES), ReplicateStatus.NOT_NEEDED), 0
)
JUDGED_AT_ONCE: Final = 1_000  # segments that are taken in before it is looked which aggregates count
_NO_AGGREGATES: Final = dict.fromkeys(AggregateStatus, 0)


class Ledger:
    """The outcomes and aggregates of one job that count."""

    def __init__(self, spec: JobSpec) -> None:
        self._line, self._size = spec.line, spec.line.size
        self._n_targets = len(spec.aggregates)
        self._n_params = len(spec.line.params_of(spec.line.all())) if spec.aggregates else 0
        self._coverage = Coverage(spec.line)
        self._segments = SegmentMap()
        self._aggregated = RangeSet()
        self.n_open = self._size  # replicates without a final outcome
        self.n_open_params = self._n_params  # parameter sets that lack their aggregates
        self.counts = _NO_OUTCOMES.copy()
        self.aggregate_counts = _NO_AGGREGATES.copy()

    def adopt(self, segments: Iterable[SegmentRef], aggregates: Iterable[AggregateRef]) -> Ranges:
        """Take in what earlier runs left, and return the parameter sets that lack only their aggregate.

        An aggregate is stale, and left out, when it lacks a segment that its parameter sets have by now. Segments are
        best given in order of their indices: then few of them are held at a time.
        """
        waiting = (
            sorted(aggregates, key=lambda stored: stored.params, reverse=True) if self._n_targets else []
        )
        settled, rest = RangeSet(), iter(segments)
        while some := list(islice(rest, JUDGED_AT_ONCE)):
            for segment in some:
                self._count(segment.counts, segment)
            for lo, hi in self._cover(Ranges(pair for segment in some for pair in segment.ranges)).pairs:
                settled.add(lo, hi)
            while waiting and not settled.lacks(Ranges(waiting[-1].params)).pairs:
                self._judge(waiting.pop())
        for stored in waiting:
            if not settled.lacks(Ranges(stored.params)).pairs:
                self._judge(stored)
        return self._aggregated.lacks(settled.ranges)

    def _judge(self, stored: AggregateRef) -> None:
        """Take in an aggregate of parameter sets that have settled, unless it is stale."""
        params = Ranges(stored.params)
        segments = self.segments_of(params)
        inputs = set(stored.inputs)
        if all(segment.digest in inputs for segment in segments):
            self._add_aggregates(params, stored.counts, segments)

    def add_outcomes(
        self, indices: Ranges, counts: Mapping[ReplicateStatus, int], segment: SegmentRef | None
    ) -> Ranges:
        """Take in a committed segment; return the parameter sets to aggregate, as they settled by it."""
        self._count(counts, segment)
        return self._cover(indices)

    def drop(self, indices: Ranges, displaced: Mapping[ReplicateStatus, int], segment: SegmentRef) -> None:
        """Take in that these are not needed. ``displaced``: how those of them ended that have outcomes; no more."""
        for status, n in displaced.items():
            self.counts[status] -= n
        if displaced and self._n_targets:
            self._segments.trim(indices)
        self._count({ReplicateStatus.NOT_NEEDED: len(indices)}, segment)
        self._cover(self._coverage.lacks(indices))

    def _count(self, counts: Mapping[ReplicateStatus, int], segment: SegmentRef | None) -> None:
        for status, n in counts.items():
            self.counts[status] += n
        if segment is not None and self._n_targets:
            self._segments.add(segment)

    def _cover(self, indices: Ranges) -> Ranges:
        self.n_open -= len(indices)
        if self._n_targets:
            return self._coverage.add(indices)
        self._coverage.cover(indices)
        return EMPTY

    def add_aggregates(self, params: Ranges, counts: Mapping[str, int]) -> None:
        """Take in a committed aggregate segment; ``counts`` are of rows, by status."""
        self._add_aggregates(params, counts)

    def _add_aggregates(
        self, params: Ranges, counts: Mapping[str, int], segments: tuple[SegmentRef, ...] | None = None
    ) -> None:
        for lo, hi in params.pairs:
            self._aggregated.add(lo, hi)
            self.n_open_params -= hi - lo
        for status, n in counts.items():
            self.aggregate_counts[AggregateStatus(status)] += n
        if not self.n_open_params:
            self._segments.clear()
            return
        for segment in self.segments_of(params) if segments is None else segments:
            if not self._aggregated.lacks(self._line.params_of(Ranges(segment.ranges))).pairs:
                self._segments.remove(segment)  # nobody asks for it again

    def lacks(self, kind: Kind, items: Ranges) -> Ranges:
        """Return those indices (or parameter sets) that have no outcome (or aggregate)."""
        return (self._coverage if kind is Kind.SIMULATE else self._aggregated).lacks(items)

    def segments_of(self, params: Ranges) -> tuple[SegmentRef, ...]:
        """Return the segments that hold replicates of these parameter sets, of which some lack their aggregate."""
        indices = (pair for lo, hi in params.pairs for pair in self._line.of_params(lo, hi).pairs)
        return self._segments.over(Ranges(indices))

    @property
    def n_outcomes(self) -> int:
        """How many replicates have a final outcome."""
        return self._size - self.n_open

    @property
    def n_failed(self) -> int:
        """How many replicates ended in a failure."""
        return sum(self.counts[status] for status in FAILURES)

    @property
    def n_aggregates(self) -> int:
        """How many aggregates the job has: parameter sets times entry points."""
        return self._n_params * self._n_targets

    def is_settled_but(self, n_left: int, n_left_params: int) -> bool:
        """Say whether all but so many replicates have their outcome, all but so many parameter sets their aggregate."""
        return self.n_open <= n_left and self.n_open_params <= n_left_params

    @property
    def is_success(self) -> bool:
        """Whether all replicates that are needed and all aggregates succeeded."""
        return (
            self.counts[ReplicateStatus.SUCCEEDED] + self.counts[ReplicateStatus.NOT_NEEDED] == self._size
            and self.aggregate_counts[AggregateStatus.SUCCEEDED] == self.n_aggregates
        )
