"""Whom a driver asks whether an attempt has begun: never those that its own other attempts explain."""

from __future__ import annotations

from itertools import pairwise

from modelops.driver.begins import BEGUN_WITHIN_S, FIRST_BEGUN_WITHIN_S, Begins
from modelops.study.ids import AttemptId

RUNS, WAITS, THIRD = AttemptId("runs"), AttemptId("waits"), AttemptId("third")


def begins(slots: int = 1) -> Begins:
    found = Begins()
    found.joined("w", slots)
    return found


def test_a_worker_that_has_ended_nothing_yet_is_asked_soon_and_then_later_and_later() -> None:
    asked = begins()
    asked.submitted(WAITS, "w", 0.0)
    times = [t / 10 for t in range(600) if asked.due(t / 10)]
    assert times[0] == FIRST_BEGUN_WITHIN_S
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps == sorted(gaps)
    assert len(times) < 10


def test_nobody_asks_after_an_attempt_that_has_begun_or_ended_or_whose_worker_left() -> None:
    asked = begins()
    for attempt in (RUNS, WAITS):
        asked.submitted(attempt, "w", 0.0)
    asked.begun(RUNS)
    asked.ended(WAITS, 0.1)
    assert asked.due(100.0) == []
    asked.submitted(THIRD, "w", 100.0)
    asked.left("w")
    assert asked.due(200.0) == []


def test_what_waits_behind_this_jobs_own_chunk_is_not_asked_after_until_it_could_have_said_so() -> None:
    asked = begins()
    asked.submitted(RUNS, "w", 0.0)
    asked.begun(RUNS)
    asked.submitted(WAITS, "w", 0.1)
    assert not any(asked.due(float(t)) for t in range(100))
    asked.ended(RUNS, 100.0)
    assert asked.due(100.0 + BEGUN_WITHIN_S - 0.1) == []
    assert asked.due(105.0) == [(WAITS, "w")]


def test_steady_chunks_of_two_seconds_are_never_asked_after() -> None:
    asked, n_asked = begins(), 0
    chunks = [AttemptId(f"chunk-{i}") for i in range(50)]
    asked.submitted(chunks[0], "w", 0.0)
    asked.begun(chunks[0])
    for i in range(49):  # each is sent while the one before runs, and says after 1.2 s that it does
        asked.submitted(chunks[i + 1], "w", 2.1 * i + 0.05)
        n_asked += len(asked.due(2.1 * i + 1.1))
        asked.begun(chunks[i])
        n_asked += len(asked.due(2.1 * i + 2.08))
        asked.ended(chunks[i], 2.1 * (i + 1))
    assert n_asked == 0


def test_what_waits_on_a_worker_with_a_slot_that_others_have_is_asked_after() -> None:
    asked = begins(slots=2)
    asked.submitted(RUNS, "w", 0.0)
    asked.begun(RUNS)
    asked.submitted(WAITS, "w", 0.0)
    assert asked.due(10.0) == [(WAITS, "w")]
    asked.begun(WAITS)
    asked.submitted(THIRD, "w", 10.0)
    assert asked.due(20.0) == []  # both slots run this job by now
