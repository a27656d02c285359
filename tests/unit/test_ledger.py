"""What the driver holds of what is recorded: enough for the aggregates to come, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from modelops.driver.ledger import Ledger
from modelops.states import AggregateStatus, ReplicateStatus
from modelops.study.ids import attempt_id
from modelops.study.index_line import Block, IndexLine
from modelops.study.ranges import Ranges
from modelops.study.spec import JobSpec
from modelops.worker.messages import AggregateRef, SegmentRef

if TYPE_CHECKING:
    import random

LINES = [
    IndexLine.of(6, 4),
    IndexLine((Block(0, 0, 4, 0, 3), Block(12, 0, 4, 3, 2), Block(20, 4, 2, 0, 5))),
]


def spec(line: IndexLine) -> JobSpec:
    return JobSpec(name="j", bundle="b", bundle_name="b", model="m:f", line=line, aggregates=("m:g",))


def segments_of_a_job(line: IndexLine, chance: random.Random) -> list[SegmentRef]:
    """Return segments that cover the line, some of them with gaps, in any order."""
    indices, found = list(line.all()), list[SegmentRef]()
    while indices:
        n = chance.randint(1, 5)
        mine = set(indices[:n] if chance.random() < 0.7 else chance.sample(indices, min(n, len(indices))))
        indices = [k for k in indices if k not in mine]
        name = attempt_id(1, len(found))
        counts = {ReplicateStatus.SUCCEEDED: len(mine)}
        found.append(
            SegmentRef(
                attempt=name, name="s", digest=name, n_bytes=1, ranges=Ranges.of(mine).pairs, counts=counts
            )
        )
    return found


def over(line: IndexLine, segments: list[SegmentRef], params: set[int]) -> set[str]:
    wanted = Ranges(pair for p in params for pair in line.of_param(p).pairs)
    return {ref.digest for ref in segments if not wanted.isdisjoint(Ranges(ref.ranges))}


def aggregate(line: IndexLine, segments: list[SegmentRef], params: set[int], *, stale: bool) -> AggregateRef:
    inputs = sorted(over(line, segments, params))[stale:]
    return AggregateRef(
        attempt=attempt_id(2, min(params)), name="a", digest="d", n_bytes=1, params=Ranges.of(params).pairs,
        counts={AggregateStatus.SUCCEEDED: len(params)}, inputs=tuple(inputs),
    )  # fmt: skip


@given(st.sampled_from(LINES), st.randoms(use_true_random=False))
def test_segments_are_held_exactly_as_long_as_a_parameter_set_of_theirs_lacks_its_aggregate(
    line: IndexLine, chance: random.Random
) -> None:
    ledger, segments, open_sets = Ledger(spec(line)), segments_of_a_job(line, chance), set(range(6))
    for ref in segments:
        ledger.add_outcomes(Ranges(ref.ranges), ref.counts, ref)
    while open_sets:
        params = set(chance.sample(sorted(open_sets), chance.randint(1, len(open_sets))))
        found = {ref.digest for ref in ledger.segments_of(Ranges.of(params))}
        assert found == over(line, segments, params)
        ledger.add_aggregates(Ranges.of(params), {"succeeded": len(params)})
        open_sets -= params
        assert {ref.digest for ref in ledger.segments_of(Ranges.of(range(6)))} == over(
            line, segments, open_sets
        )


@given(st.sampled_from(LINES), st.randoms(use_true_random=False))
def test_a_new_driver_holds_what_the_aggregates_that_are_missing_or_stale_need(
    line: IndexLine, chance: random.Random
) -> None:
    segments = segments_of_a_job(line, chance)
    kept = [ref for ref in segments if chance.random() < 0.9]
    covered = Ranges(pair for ref in kept for pair in ref.ranges)
    settled = {p for p in range(6) if not (line.of_param(p) - covered).pairs}
    made, fresh = [], set()
    for params in ({0, 3}, {1}, {2, 4}):
        stale = chance.random() < 0.3
        made.append(aggregate(line, segments, params, stale=stale))
        fresh |= params if params <= settled and not stale else set()
    ledger = Ledger(spec(line))
    assert set(ledger.adopt(kept, made)) == settled - fresh
    assert ledger.n_open_params == 6 - len(fresh)
    assert {ref.digest for ref in ledger.segments_of(line.params_of(line.all()))} == over(
        line, kept, set(range(6)) - fresh
    )
