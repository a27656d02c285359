"""A worker's own table of attempts: what it keeps, for whom, and for how long."""

from __future__ import annotations

import threading

from modelops.errors import ResolutionError, StorageError
from modelops.states import ReplicateStatus
from modelops.study.ids import AttemptId, JobId, attempt_id, part_id
from modelops.worker.attempts import Attempt, AttemptTable, task_error
from modelops.worker.messages import HeldAttempt, Receipt

JOB, OTHER = JobId("job_1"), JobId("job_2")


def attempt(n: int = 1, *, epoch: int = 1, job: JobId = JOB) -> Attempt:
    return Attempt(job, attempt_id(epoch, n), epoch, ((n, n + 1),))


def receipt(of: Attempt, note: str = "") -> Receipt:
    return Receipt(job=of.job, attempt=of.attempt, worker="w", host="h", notes=(note,))


def names(held: list[HeldAttempt]) -> list[AttemptId]:
    return [h.attempt for h in held]


def test_a_receipt_is_kept_until_it_is_acknowledged() -> None:
    table, one, two = AttemptTable(), attempt(1), attempt(2)
    for x in (one, two):
        assert table.enter(x)
        assert table.keep(x, receipt(x), None).receipt == receipt(x)
    assert list(table) == []
    assert names(table.of_job(JOB, 2)) == [one.attempt, two.attempt]
    table.acknowledge(JOB, [one.attempt])
    (left,) = table.of_job(JOB, 2)
    assert left.attempt == two.attempt
    assert left.receipt == receipt(two)
    assert left.state == "ended"


def test_a_new_driver_finds_what_runs_what_waits_for_storage_and_what_has_failed() -> None:
    table, runs, stores, failed = AttemptTable(), attempt(1), attempt(2), attempt(3)
    for x in (runs, stores, failed):
        assert table.enter(x)
    stores.storing = True
    table.keep(failed, None, task_error(StorageError("full")))
    found = {h.attempt: h for h in table.of_job(JOB, 2)}
    assert found[runs.attempt].state == "running"
    assert found[stores.attempt].state == "storing"
    error = found[failed.attempt].error
    assert error is not None
    assert (error.error_type, error.message, error.final) == ("StorageError", "full", False)
    assert task_error(ResolutionError("x", "no such package")).final


def test_nothing_of_an_older_driver_begins_once_a_newer_one_has_asked() -> None:
    table = AttemptTable()
    table.of_job(JOB, 2)
    assert not table.enter(attempt(1, epoch=1))
    assert table.enter(attempt(1, epoch=2))
    assert table.enter(attempt(1, epoch=1, job=OTHER))
    table.of_job(JOB, 1)  # an older driver that woke up: it cannot turn time back
    assert not table.enter(attempt(2, epoch=1))


def test_the_receipt_of_what_an_older_driver_began_is_to_be_announced() -> None:
    table, one = AttemptTable(), attempt(1, epoch=1)
    table.enter(one)
    table.of_job(JOB, 2)
    held = table.keep(one, receipt(one), None)
    assert held.receipt == receipt(one)


def test_a_stop_that_comes_first_keeps_an_attempt_from_beginning() -> None:
    table, one, other = AttemptTable(), attempt(1), attempt(2)
    assert table.stop(JOB, one.attempt)
    assert not table.enter(one)
    assert table.enter(other)
    assert not table.stop(JOB, other.attempt)


def test_a_job_that_has_ended_leaves_nothing() -> None:
    table, one, other = AttemptTable(), attempt(1), attempt(1, job=OTHER)
    for x in (one, other):
        table.enter(x)
        table.keep(x, receipt(x), None)
    late, running = attempt(7), attempt(8)
    table.enter(running)
    table.forget(JOB, 1)
    assert running.stop.stopped
    assert not table.enter(late)
    table.keep(running, receipt(running), None)  # it had finished something when it was stopped
    assert table.of_job(JOB, 2) == []
    assert table.enter(attempt(1, epoch=2))  # it was resumed
    assert not other.stop.stopped
    assert names(table.of_job(OTHER, 1)) == [other.attempt]


def test_the_end_of_a_run_that_is_heard_late_takes_nothing_from_the_run_after_it() -> None:
    table, ended, runs, waits = AttemptTable(), *(attempt(n, epoch=2) for n in (1, 2, 3))
    for x in (ended, runs):
        assert table.enter(x)
    table.keep(ended, receipt(ended), None)
    table.forget(JOB, 1)
    assert not runs.stop.stopped
    assert table.enter(waits)
    table.keep(runs, receipt(runs), None)
    assert names(table.of_job(JOB, 2)) == [waits.attempt, ended.attempt, runs.attempt]


def test_what_is_kept_has_a_bound_and_the_oldest_makes_room() -> None:
    table = AttemptTable(max_kept_bytes=10_000)
    for n in range(1, 100):
        x = attempt(n)
        table.enter(x)
        table.keep(x, receipt(x, "x" * 1000), None)
    kept = names(table.of_job(JOB, 1))
    assert 5 < len(kept) < 10
    assert kept[-1] == attempt_id(1, 99)
    table.acknowledge(JOB, kept)
    big = attempt(100)
    table.enter(big)
    table.keep(big, receipt(big, "x" * 100_000), None)
    assert names(table.of_job(JOB, 1)) == [big.attempt]  # never thrown away for being large


def test_a_task_that_dask_runs_again_finds_its_receipt() -> None:
    table, one = AttemptTable(), attempt(1)
    assert table.receipt(JOB, one.attempt) is None
    table.enter(one)
    table.keep(one, receipt(one), None)
    assert table.receipt(JOB, one.attempt) == receipt(one)


def test_what_must_be_alone_waits_for_the_others_and_they_for_it() -> None:
    table, plain, suspect, later = AttemptTable(), attempt(1), attempt(2, job=OTHER), attempt(3)
    suspect.alone = True
    table.enter(plain)
    order: list[str] = []
    began = threading.Event()

    def run(name: str, one: Attempt) -> None:
        assert table.enter(one)
        order.append(name)
        if one.alone:
            assert [x.attempt for x in table] == [one.attempt]
            began.set()
        table.leave(one)

    first = threading.Thread(target=run, args=("suspect", suspect))
    first.start()
    while not table.waiting_alone():
        pass
    second = threading.Thread(target=run, args=("later", later))
    second.start()
    assert not began.is_set()
    table.leave(plain)
    first.join()
    second.join()
    assert order == ["suspect", "later"]


def test_a_stop_reaches_what_waits_to_be_alone() -> None:
    table, plain, suspect = AttemptTable(), attempt(1), attempt(2)
    suspect.alone = True
    table.enter(plain)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(table.enter(suspect)))
    waiting.start()
    while not table.waiting_alone():
        pass
    table.stop(JOB, suspect.attempt)
    waiting.join()
    assert answers == [False]
    assert table.enter(attempt(3))


def part_of(whole: Attempt, unstarted: tuple[tuple[int, int], ...]) -> Receipt:
    return Receipt(
        job=whole.job,
        attempt=part_id(whole.attempt),
        worker="w",
        host="h",
        part_of=whole.attempt,
        retry=((ReplicateStatus.CRASHED, ((0, 2),)),),
        unstarted=unstarted,
    )


def test_an_attempt_that_has_handed_in_a_part_is_left_with_the_rest_and_both_are_in_the_table() -> None:
    table, one = AttemptTable(), attempt(1)
    one.ranges = ((0, 10),)
    table.enter(one)
    part = part_of(one, ((3, 10),))
    held = table.hand_in(one, part)
    assert (held.attempt, held.state, held.ranges) == (part_id(one.attempt), "ended", ((0, 2), (3, 10)))
    assert (one.ranges, one.parts) == (((2, 3),), (part,))
    found = {h.attempt: h for h in table.of_job(JOB, 2)}
    assert found[one.attempt].ranges == ((2, 3),)
    assert found[one.attempt].state == "running"
    assert found[held.attempt].receipt == part
    table.acknowledge(JOB, [held.attempt])
    assert names(table.of_job(JOB, 2)) == [one.attempt]


def test_an_attempt_that_runs_gives_back_what_has_not_begun_when_it_is_recalled() -> None:
    table, runs = AttemptTable(), attempt()
    table.enter(runs)
    assert not runs.stop.gives_back
    assert not table.recall(JOB, runs.attempt)
    assert runs.recalled
    assert runs.stop.gives_back
    assert not runs.stop.stopped


def test_a_driver_that_was_replaced_stops_and_recalls_nothing_whether_it_runs_or_waits() -> None:
    table, runs, waits = AttemptTable(), attempt(1, epoch=1), attempt(2, epoch=2)
    table.enter(runs)
    table.of_job(JOB, 2)  # the driver that has adopted it
    for x in (runs, waits):
        assert not table.stop(JOB, x.attempt, epoch=1)
        assert not table.recall(JOB, x.attempt, epoch=1)
    assert not runs.stop.stopped
    assert not runs.stop.gives_back
    assert table.enter(waits)
    assert not table.stop(JOB, runs.attempt, epoch=2)
    assert runs.stop.stopped
    assert not table.recall(JOB, waits.attempt)  # whoever looks after records has no epoch
    assert waits.stop.gives_back


def begins(table: AttemptTable, one: Attempt) -> threading.Event:
    """Let an attempt begin in a thread of its own; the event says that it has."""
    begun = threading.Event()

    def enter() -> None:
        assert table.enter(one)
        begun.set()

    threading.Thread(target=enter, daemon=True).start()
    return begun


def test_while_an_attempt_is_stored_another_has_its_slot_unless_storage_is_away() -> None:
    table = AttemptTable(slots=1)
    one, two, three = attempt(1), attempt(2), attempt(3)
    assert table.enter(one)
    second = begins(table, two)
    assert not second.wait(0.05)
    table.step_aside(one)
    assert second.wait(60)
    one.storing = True  # and storage does not take it
    table.step_aside(two)
    third = begins(table, three)
    assert not third.wait(0.05)
    table.leave(one)
    assert third.wait(60)


def test_no_more_attempts_are_stored_at_once_than_there_are_slots() -> None:
    table, (one, two, three) = AttemptTable(slots=1), (attempt(n) for n in (1, 2, 3))
    for x in (one, two):
        assert begins(table, x).wait(60)
        table.step_aside(x)
    third = begins(table, three)
    assert not third.wait(0.05)
    table.leave(two)
    assert third.wait(60)


def test_only_an_attempt_that_has_not_begun_is_recalled_and_then_it_never_begins() -> None:
    table, runs, ended, waits = AttemptTable(), attempt(1), attempt(2), attempt(3)
    table.enter(runs)
    table.enter(ended)
    table.keep(ended, receipt(ended), None)
    assert [table.has_begun(JOB, x.attempt) for x in (runs, ended, waits)] == [True, True, False]
    assert [table.recall(JOB, x.attempt) for x in (runs, ended, waits)] == [False, False, True]
    assert not table.enter(waits)


def test_a_stop_that_comes_when_an_attempt_has_ended_does_not_say_that_it_never_began() -> None:
    table, ended, waits = AttemptTable(), attempt(1), attempt(2)
    table.enter(ended)
    table.keep(ended, receipt(ended), None)
    assert [table.stop(JOB, x.attempt) for x in (ended, waits)] == [False, True]


def test_an_attempt_whose_storage_goes_away_after_it_stepped_aside_has_its_slot_again() -> None:
    table, one, two = AttemptTable(slots=1), attempt(1), attempt(2)
    assert table.enter(one)
    table.step_aside(one)
    one.storing = True
    second = begins(table, two)
    assert not second.wait(0.05)
    table.leave(one)
    assert second.wait(60)
