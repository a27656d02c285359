"""How much goes out at a time: by the clock, and by how far away workers are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.driver.chunking import (
    SURE_AFTER,
    TARGET_S,
    WORTH_SHARING_S,
    Meter,
    chunk_size,
    queue_depth,
    queue_size,
)


def meter(cost_s: float, handovers: tuple[float, ...] = (), n: int = SURE_AFTER) -> Meter:
    made = Meter()
    made.record(n, n * cost_s)
    for seconds in handovers:
        made.handed_over(seconds)
    return made


COSTS = st.floats(1e-6, 100)
HANDOVERS = st.lists(st.floats(-1, 100), max_size=12).map(tuple)
COUNTS = st.integers(1, 100_000)
SLOTS = st.integers(1, 1_000)


@given(COSTS, HANDOVERS, COUNTS, SLOTS)
def test_who_is_far_gets_no_less_at_a_time_and_never_more_than_a_share(
    cost: float, handovers: tuple[float, ...], n: int, slots: int
) -> None:
    near, far = meter(cost), meter(cost, handovers)
    sizes = chunk_size(near, n, slots), chunk_size(far, n, slots)
    assert 1 <= sizes[0] <= sizes[1]
    assert sizes[1] <= max(sizes[0], -(-n // slots))
    assert queue_size(near, n, slots) <= queue_size(far, n, slots) or sizes[0] < sizes[1]


@given(COSTS, COUNTS, SLOTS)
def test_a_quick_handover_changes_nothing(cost: float, n: int, slots: int) -> None:
    near = meter(cost, (0.01, 0.5))
    assert queue_size(near, n, slots) == queue_size(meter(cost), n, slots)
    assert near.handover_s == 0.01


def test_a_far_worker_has_work_until_the_next_chunk_arrives_also_near_the_end() -> None:
    near, far = meter(0.1), meter(0.1, (0.43, 0.6, 0.43))
    for left in range(100, 4, -1):
        assert queue_size(near, left, 4) == 0
        assert queue_size(far, left, 4) * 0.1 >= min(0.43, 0.1 * chunk_size(far, left, 4))
    assert queue_size(far, 1, 4) == 1
    assert chunk_size(meter(0.1, (0.43,), n=1), 1_000, 4) == 4  # not one at a time until it is sure


def test_long_replicates_do_not_wait_where_they_run_because_it_is_far() -> None:
    assert queue_size(meter(10.0, (0.4,)), 50, 4) == 0
    assert queue_size(meter(0.9, (0.43,)), 5, 4) == 0


@pytest.mark.parametrize("handovers", [(9.0,), (9.0, 0.2), (-3.0,)])
def test_of_the_last_handovers_the_shortest_counts(handovers: tuple[float, ...]) -> None:
    made = meter(0.1, handovers)
    assert made.handover_s == min(TARGET_S, max(0.0, min(handovers)))
    for _ in range(8):
        made.handed_over(0.3)
    assert made.handover_s == pytest.approx(0.3)
    assert made.handover_s > WORTH_SHARING_S


def test_with_very_many_slots_chunks_are_longer_but_outcomes_are_not_seen_late() -> None:
    sure = meter(0.01, n=SURE_AFTER)
    seconds = [chunk_size(sure, 10**9, slots) * 0.01 for slots in (10, 1_000, 3_000, 10_000, 100_000)]
    assert seconds == pytest.approx([2.5, 2.5, 3.0, 4.0, 4.0], rel=0.02)


@pytest.mark.parametrize(
    ("megabytes", "seconds", "depth"), [(0, 0.05, 1), (1, 0.05, 1), (50, 0.05, 2), (10, 0.1, 2), (50, 5.0, 1)]
)
def test_two_chunks_wait_only_where_storing_one_may_take_as_long_as_running_it(
    megabytes: int, seconds: float, depth: int
) -> None:
    meter = Meter()
    assert queue_depth(meter) == 1
    meter.record(4, 4 * seconds, 4 * megabytes * 1_000_000)
    assert queue_depth(meter) == depth


def test_a_segment_holds_no_more_than_who_reads_it_can_hold_easily() -> None:
    for large, small, size in ((0, 100, 50_000), (0, 600, 10_485), (0, 10**9, 1), (10**6, 600, 33)):
        measured = Meter()
        measured.record(1_000, 1_000 * 50e-6, 1_000 * large, 1_000 * small)
        assert chunk_size(measured, 100_000, 2) == min(size, chunk_size(meter(50e-6), 100_000, 2))


@pytest.mark.parametrize(("n_measured", "slots", "size"), [(1, 2, 1), (8, 2, 4), (24, 2, 12), (24, 100, 1)])
def test_before_it_is_sure_a_chunk_takes_at_most_what_each_slot_has_done(
    n_measured: int, slots: int, size: int
) -> None:
    meter = Meter()
    meter.record(n_measured, n_measured * 0.1)
    assert n_measured < SURE_AFTER
    assert chunk_size(meter, 10_000, slots) == size


def test_the_end_of_a_job_takes_few_chunks_and_leaves_none_with_much_more_than_the_others() -> None:
    sure, left, seconds = meter(0.01), 1_600, []  # what two slots do in 8 s
    while left:
        seconds.append(0.01 * chunk_size(sure, left, 2))
        left -= chunk_size(sure, left, 2)
    assert len(seconds) < 16
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] <= 0.05


def test_where_handing_over_takes_long_the_end_of_a_job_takes_few_chunks_as_well() -> None:
    far, left, n_chunks = meter(0.05, (0.3,)), 320, 0  # what two slots do in 8 s
    while left and (size := queue_size(far, left, 2)):
        left, n_chunks = left - size, n_chunks + 1
    assert left <= 1
    assert n_chunks < 22
