"""How long a job is left alone after its drivers failed, and when it is given up."""

from __future__ import annotations

from modelops.errors import IntegrityError
from modelops.server.setbacks import (
    FIRST_WAIT_S,
    GOOD_RUN_S,
    LONGEST_DELAY_S,
    LONGEST_WAIT_S,
    LOST_DELAY_S,
    MAX_FAILURES,
    Setback,
)


def failed(before: Setback, error: Exception | None = None, *, lived_s: float = 0.0) -> Setback:
    return before.failed(error or RuntimeError("a bug"), "a bug", 1000.0 - lived_s, 1000.0)


def test_each_failure_in_a_row_waits_longer_until_the_job_is_hopeless_and_is_tried_once_more() -> None:
    found = [Setback()]
    for _ in range(20):
        found.append(failed(found[-1]))
    delays = [x.not_before - 1000.0 for x in found[1:]]
    assert delays[:3] == [1.0, 2.0, 4.0]
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY_S
    assert [x.is_hopeless for x in found] == [n >= MAX_FAILURES for n in range(21)]
    again = found[MAX_FAILURES].once_more()
    assert (again.is_hopeless, failed(again).is_hopeless, again.said) == (False, True, "a bug")


def test_a_driver_that_lived_long_did_not_fail_in_a_row_with_the_one_before() -> None:
    before = failed(failed(Setback()))
    assert failed(before, lived_s=GOOD_RUN_S - 1).count == 3
    assert failed(before, lived_s=GOOD_RUN_S).count == 1


def test_what_is_damaged_is_tried_once_more_soon() -> None:
    once = failed(Setback(), IntegrityError("it is damaged"))
    assert (once.is_hopeless, once.not_before) == (False, 1000.0 + LOST_DELAY_S)
    assert failed(once, IntegrityError("it is damaged")).is_hopeless


def test_to_be_put_off_is_no_failure_and_takes_longer_each_time() -> None:
    found = [failed(failed(Setback()))]
    for _ in range(5):
        found.append(found[-1].put_off("the scheduler is away", 1000.0))
    waits = [x.not_before - 1000.0 for x in found[1:]]
    assert waits == [FIRST_WAIT_S, 2.0, 4.0, LONGEST_WAIT_S, LONGEST_WAIT_S]
    assert {x.count for x in found} == {2}
    assert found[-1].said == "the scheduler is away"
    assert found[-1].put_off("no thread", 1000.0, 60.0).not_before == 1060.0
    assert failed(found[-1]).put_off("it is away", 1000.0).wait_s == FIRST_WAIT_S
