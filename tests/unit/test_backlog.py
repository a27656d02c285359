"""What waits to be run: what a new driver knows of attempts that failed under an earlier one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelops.driver.backlog import DELAY_PARTS, Backlog, Kind, Work, next_attempts
from modelops.study.ranges import Ranges
from modelops.study.spec import RetryPolicy

SETS = st.builds(Ranges.of, st.sets(st.integers(0, 30)))


@given(st.lists(st.tuples(SETS, st.integers(2, 5), st.floats(-10, 100)), max_size=12), SETS)
def test_of_what_was_retried_the_highest_number_counts_and_it_waits_as_long_as_it_would_have(
    retried: list[tuple[Ranges, int, float]], missing: Ranges
) -> None:
    policy = RetryPolicy(initial_delay=8.0, backoff=2.0)
    highest: dict[int, tuple[int, float]] = {}
    for indices, number, waited_s in retried:
        left = max(0.0, policy.delay_s(number - 1) - max(0.0, waited_s))
        highest.update((k, max((number, left), highest.get(k, (0, 0.0)))) for k in indices)
    found, others = next_attempts(iter(retried), missing, policy)
    waits = {k: (number, in_s) for indices, number, in_s in found for k in indices}
    assert waits.keys() == highest.keys() & set(missing)
    for k, (number, in_s) in waits.items():
        delay_s = policy.delay_s(number - 1)
        assert number == highest[k][0]
        assert highest[k][1] <= in_s + 1e-9  # never too early
        assert in_s <= highest[k][1] + delay_s / DELAY_PARTS + 1e-9
    assert all(indices for indices, _, _ in found)
    assert set(others) == set(missing) - highest.keys()


def test_what_waits_for_no_time_is_due_at_once() -> None:
    found, _ = next_attempts([(Ranges([(0, 3)]), 2, 0.0)], Ranges([(1, 5)]), RetryPolicy(initial_delay=0.0))
    assert found == [(Ranges([(1, 3)]), 2, 0.0)]


def test_what_could_go_out_is_counted_right_whatever_is_taken_out_of_it() -> None:
    backlog = Backlog(Kind.SIMULATE)
    for work in (
        Work(Kind.SIMULATE, Ranges([(0, 9)])), Work(Kind.SIMULATE, Ranges([(10, 14)]), deaths=1),
        Work(Kind.SIMULATE, Ranges([(20, 22)]), number=2, errors=1),
    ):  # fmt: skip
        backlog.add(work)
    assert backlog.n_ready == 15
    backlog.withdraw(Ranges([(5, 13)]))
    assert backlog.n_ready == 7, "of the last that is left after a death none but a reserved worker may take"
    taken: list[int] = []
    while (part := backlog.take(100)) is not None:
        taken += list(part.ranges)
    assert sorted(taken) == [0, 1, 2, 3, 4, 20, 21]
    assert backlog.n_ready == 0
    assert [list(work.ranges) for work in backlog.suspects] == [[13]]
