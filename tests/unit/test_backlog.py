"""What waits to be run: what a new driver knows of attempts that failed under an earlier one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelops.driver.backlog import next_attempts
from modelops.study.ranges import Ranges

SETS = st.builds(Ranges.of, st.sets(st.integers(0, 30)))


@given(st.lists(st.tuples(SETS, st.integers(2, 5)), max_size=12), SETS)
def test_of_what_was_retried_the_highest_number_counts(
    retried: list[tuple[Ranges, int]], missing: Ranges
) -> None:
    highest: dict[int, int] = {}
    for indices, number in retried:
        highest.update((k, max(number, highest.get(k, 0))) for k in indices)
    found, others = next_attempts(iter(retried), missing)
    assert {k: number for number, indices in found.items() for k in indices} == {
        k: number for k, number in highest.items() if k in missing
    }
    assert all(found.values())
    assert set(others) == set(missing) - highest.keys()
