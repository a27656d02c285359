"""What waits to be run: what a new driver knows of attempts that failed under an earlier one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelops.driver.backlog import DELAY_PARTS, next_attempts
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
