"""The driver's writes: in order, each done once, whatever the store does before or after it has written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.loop import DriverLoop
from modelops.driver.machine import Machine
from modelops.driver.writer import RecordUse, Write, Writer
from modelops.errors import InternalError, StorageError
from modelops.states import JobEvent, JobState, ReplicateStatus
from modelops.store.rows import LeaseLostError
from modelops.study.ids import JobId, attempt_id
from modelops.study.index_line import IndexLine
from modelops.study.ranges import Ranges
from modelops.study.spec import JobSpec
from modelops.worker.messages import AggregateRef, SegmentRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


def segment(n: int) -> SegmentRef:
    return SegmentRef(
        attempt=attempt_id(1, n), name="s", digest="d", n_bytes=1, ranges=((n, n + 1),),
        counts={ReplicateStatus.SUCCEEDED: 1},
    )  # fmt: skip


class NoPool:
    """No worker is connected, and nobody asks for one."""


class FakeLedger:
    """Notes what was written; ``faults`` says of each call whether it is done, and whether its answer is lost."""

    def __init__(self, faults: Iterable[str] = ()) -> None:
        self.written: list[object] = []
        self.again: list[bool] = []
        self._faults = iter(faults)

    def _call(self, write: object, again: bool = False) -> None:
        fault = next(self._faults, "")
        if fault == "before":
            raise StorageError("away")
        if fault == "lease":
            raise LeaseLostError(JobId("job_1"), 1)
        if write not in self.written:  # every real write is idempotent
            self.written.append(write)
        self.again.append(again)
        if fault == "after":
            raise StorageError("away")

    def commit_segments(self, segments: Sequence[SegmentRef]) -> list[bool]:
        for x in segments[:-1]:
            self.written.append(c.CommitSegment(x))
        self._call(c.CommitSegment(segments[-1]))
        return [True] * len(segments)

    def commit_not_needed(self, command: c.CommitNotNeeded) -> tuple[bool, SegmentRef]:
        raise NotImplementedError

    def commit_synthetic(self, command: c.CommitSynthetic) -> tuple[bool, SegmentRef]:
        raise NotImplementedError

    def commit_synthetic_aggregates(self, command: c.CommitSyntheticAggregates) -> bool:
        raise NotImplementedError

    def commit_aggregates(self, stored: AggregateRef) -> bool:
        raise NotImplementedError

    def change_state(self, command: c.ChangeState) -> None:
        self._call(command)

    def record_retry(self, command: c.RecordRetry, *, again: bool) -> None:
        self._call(command, again)

    def note(self, command: c.Note, *, again: bool) -> None:
        self._call(command, again)

    def record_use(self, used_s: float, *, lasting: bool) -> None:
        self._call(RecordUse(used_s, lasting))

    def cancel_asked_by(self) -> str | None:
        return None

    def finalize(self) -> e.Finalized:
        self._call(c.Finalize())
        return e.Finalized()


STARTED = c.ChangeState(JobEvent.STARTED, JobState.PREPARING)
ENDED = c.ChangeState(JobEvent.ALL_SUCCEEDED, JobState.SUCCEEDED)
RETRY = c.RecordRetry(Ranges([(0, 2)]), 2)


def drain(writer: Writer, answer: Callable[[e.Event], Iterable[Write]] = lambda _: ()) -> list[e.Event]:
    """Write until all is written, as the loop does; ``answer``: what the machine then orders."""
    now, told = 0.0, list[e.Event]()
    while not writer.is_idle:
        assert now < 1000
        now = max(now, writer.retry_at) if writer.away else now
        assert writer.can_write(now)
        for event in writer.step(now):
            told.append(event)
            for write in answer(event):
                writer.add(write)
    return told


def test_commits_that_follow_each_other_share_a_transaction_and_are_answered_each() -> None:
    ledger = FakeLedger()
    writer = Writer(ledger)
    for write in (c.CommitSegment(segment(1)), c.CommitSegment(segment(2)), STARTED):
        writer.add(write)
    assert writer.step(0.0) == [e.Committed(attempt_id(1, 1)), e.Committed(attempt_id(1, 2))]
    assert writer.step(0.0) == []
    assert writer.is_idle
    assert ledger.written == [c.CommitSegment(segment(1)), c.CommitSegment(segment(2)), STARTED]


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_state_change_whose_answer_was_lost_is_repeated_before_anything_else(fault: str) -> None:
    ledger = FakeLedger([fault, fault, fault])
    writer = Writer(ledger)
    for write in (STARTED, RETRY, c.Note("note", "x")):
        writer.add(write)
    assert drain(writer) == [e.StoreLost("away"), e.StoreBack()]
    assert ledger.written == [STARTED, RETRY, c.Note("note", "x")]


def test_pauses_grow_and_never_exceed_two_seconds() -> None:
    writer = Writer(FakeLedger(["before"] * 12))
    writer.add(STARTED)
    now, pauses = 100.0, []
    while not writer.is_idle:
        writer.step(now)
        if writer.away:
            assert not writer.can_write(writer.retry_at - 0.001)
            pauses.append(writer.retry_at - now)
            now = writer.retry_at
    assert pauses == sorted(pauses)
    assert pauses[0] == pytest.approx(0.1)
    assert pauses[-1] == pytest.approx(2.0)


def test_what_the_machine_gives_again_is_not_kept() -> None:
    """It gives every commit without an answer, and Finalize, again after StoreBack."""
    ledger = FakeLedger(["before"])
    writer = Writer(ledger)
    for write in (STARTED, c.CommitSegment(segment(1)), RETRY, c.CommitSegment(segment(2))):
        writer.add(write)
    assert drain(writer) == [e.StoreLost("away"), e.StoreBack()]
    assert ledger.written == [STARTED, RETRY]


def test_result_files_that_were_written_are_not_written_again() -> None:
    ledger = FakeLedger(["before"])
    writer = Writer(ledger)
    writer.add(c.Finalize())
    told = drain(writer, lambda event: [c.Finalize()] if isinstance(event, e.StoreBack) else [])
    assert told == [e.StoreLost("away"), e.StoreBack(), e.Finalized()]
    assert ledger.written == [c.Finalize()]


def test_a_lost_lease_ends_all_writing() -> None:
    ledger = FakeLedger(["lease"])
    writer = Writer(ledger)
    for write in (STARTED, c.Note("note", "x"), c.Finish(JobState.SUCCEEDED)):
        writer.add(write)
    assert writer.step(0.0) == [e.LeaseLost()]
    assert writer.is_idle
    assert ledger.written == []
    assert writer.finished is None


def test_an_error_that_is_not_the_stores_is_not_hidden() -> None:
    class Broken(FakeLedger):
        def change_state(self, command: c.ChangeState) -> None:
            raise InternalError("illegal")

    writer = Writer(Broken())
    writer.add(STARTED)
    with pytest.raises(InternalError, match="illegal"):
        writer.step(0.0)


@given(st.lists(st.sampled_from(["", "before", "after"]), max_size=30))
def test_however_the_store_comes_and_goes_everything_is_written_once_and_in_order(faults: list[str]) -> None:
    ledger = FakeLedger(faults)
    writer = Writer(ledger)
    unanswered = {attempt_id(1, n): c.CommitSegment(segment(n)) for n in (1, 2)}
    order: list[Write] = [
        STARTED, *unanswered.values(), RETRY, RecordUse(5.0), c.Note("note", "x"), ENDED, c.Finish(JobState.SUCCEEDED)
    ]  # fmt: skip

    def answer(event: e.Event) -> list[Write]:
        if isinstance(event, e.Committed):
            unanswered.pop(event.attempt, None)
        return list(unanswered.values()) if isinstance(event, e.StoreBack) else []

    for write in order:
        writer.add(write)
    told = drain(writer, answer)
    assert not unanswered
    assert writer.finished == JobState.SUCCEEDED
    kept = [x for x in ledger.written if not isinstance(x, c.CommitSegment)]
    assert kept == [x for x in order if not isinstance(x, c.CommitSegment | c.Finish)]
    lost, back = (sum(isinstance(x, kind) for x in told) for kind in (e.StoreLost, e.StoreBack))
    assert lost == back


def test_workers_are_told_that_they_need_not_keep_a_receipt_only_once_it_is_recorded() -> None:
    spec = JobSpec(name="j", bundle="b", bundle_name="b", model="m:f", line=IndexLine.of(1, 1))
    ledger, now = FakeLedger(["before"]), [0.0]
    machine = Machine(spec, JobId("job_1"))
    loop = DriverLoop(
        JobId("job_1"), machine, ledger, NoPool(), lambda: None, clock=lambda: now[0]  # type: ignore[arg-type]
    )  # fmt: skip
    loop.hands.workers.add("w0")
    loop.hands._received.append(("w0", attempt_id(1, 1)))
    loop._perform([c.CommitSegment(segment(1))])
    assert loop.waits_for.startswith("away")
    assert loop.hands._acknowledged == {}
    now[0] = 10.0
    loop._perform([])
    assert ledger.written[0] == c.CommitSegment(segment(1))
    assert loop.hands._acknowledged == {"w0": {attempt_id(1, 1)}}


def test_what_earlier_drivers_used_of_the_timeout_is_added_to_what_this_one_uses() -> None:
    spec = JobSpec(
        name="j", bundle="b", bundle_name="b", model="m:f", line=IndexLine.of(1, 1), timeout_s=100.0
    )
    ledger = FakeLedger()
    loop = DriverLoop(
        JobId("job_1"), Machine(spec, JobId("job_1"), used_s=40.0), ledger, NoPool(), lambda: None,  # type: ignore[arg-type]
        clock=lambda: 10.0, used_s=40.0,
    )  # fmt: skip
    loop._began_at = 7.0
    loop._record_use_at_the_end()
    assert ledger.written == [RecordUse(43.0)]
