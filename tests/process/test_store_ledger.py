"""What a driver writes, on real records: each write once, however often it is given, and under its lease only."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import msgspec
import pytest

from modelops.counters import Counted, counted
from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.ledger import Ledger
from modelops.driver.writer import Writer
from modelops.errors import StorageError
from modelops.server.store_ledger import StoreLedger
from modelops.states import JobEvent, JobState, ReplicateStatus
from modelops.store import LeaseLostError, Objects, Records, SegmentWriter
from modelops.store.segments import job_folder
from modelops.study.ids import attempt_id, new_job_id
from modelops.study.index_line import Block, IndexLine
from modelops.study.ranges import Ranges
from modelops.study.spec import JobSpec
from modelops.worker.messages import ErrorExample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SPEC = JobSpec(
    name="x", bundle="0" * 64, bundle_name="x", model="m:f", line=IndexLine((Block(0, 0, 1, 0, 4),))
)
STARTED = c.ChangeState(JobEvent.STARTED, JobState.PREPARING)
READY = c.ChangeState(JobEvent.ENVIRONMENT_READY, JobState.RUNNING, "go")
RETRY = c.RecordRetry(Ranges([(0, 2)]), 2)
NOTE = c.Note("note", "something")


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with closing(Records.open(f"sqlite:///{tmp_path}/modelops.db")) as records:
        yield records


@pytest.fixture
def ledger(records: Records, tmp_path: Path) -> StoreLedger:
    job = new_job_id()
    records.create_job(job, msgspec.json.encode(SPEC))
    epoch = records.take_lease(job, "one")
    return StoreLedger(job, SPEC, records, Objects.open(str(tmp_path / "objects")), epoch, "one", 1)


def kinds(ledger: StoreLedger) -> list[str]:
    return [event.kind for event in ledger.records.events(ledger.job)][2:]


def test_every_write_whose_answer_is_lost_is_written_once(
    ledger: StoreLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database does its part each time, and the answer to every first try is lost."""
    lost: list[str] = []
    for name in ("change_state", "add_event"):
        real = getattr(ledger.records, name)

        def flaky(*args: object, real: object = real, **kwargs: object) -> object:
            answer = real(*args, **kwargs)  # type: ignore[operator]
            key = repr((args, {k: v for k, v in kwargs.items() if k != "unless_there"}))
            if key not in lost:
                lost.append(key)
                raise StorageError("the answer was lost")
            return answer

        monkeypatch.setattr(ledger.records, name, flaky)
    writer = Writer(ledger)
    for write in (STARTED, NOTE, RETRY, READY, NOTE, c.Finish(JobState.RUNNING)):
        writer.add(write)
    now = 0.0
    while not writer.is_idle:
        now = max(now, writer.retry_at) if writer.away else now
        writer.step(now)
    assert len(lost) == 3  # both notes are alike
    assert kinds(ledger) == ["started", "note", "retry", "environment_ready", "note"]
    (retry,) = (event for event in ledger.records.events(ledger.job) if event.kind == "retry")
    assert retry.text == "2 replicates will be tried again, as attempt 2"
    row = ledger.records.job(ledger.job)
    assert (row.state, row.reason, row.version) == (JobState.RUNNING, "go", 3)
    assert [entry[:2] for entry in ledger.records.retried(ledger.job)] == [(Ranges([(0, 2)]), 2)]


def test_a_worker_that_cannot_prepare_an_environment_is_counted(ledger: StoreLedger) -> None:
    before = counted(Counted.WORKERS_UNFIT)
    ledger.note(c.Note("worker_unfit", "w1 gets no work of this job for now: no index"))
    ledger.note(NOTE)
    assert counted(Counted.WORKERS_UNFIT) == before + 1


def test_a_driver_that_was_replaced_writes_nothing(ledger: StoreLedger, records: Records) -> None:
    ledger.change_state(STARTED)
    records.take_lease(ledger.job, "two")
    before = records.job(ledger.job), records.events(ledger.job)
    for write in (
        lambda: ledger.change_state(READY),
        lambda: ledger.note(NOTE),
        lambda: ledger.record_retry(RETRY),
        lambda: ledger.record_use(5.0),
        lambda: ledger.finalize(),
        lambda: ledger.commit_segments([]),
    ):
        with pytest.raises(LeaseLostError):
            write()
    assert (records.job(ledger.job), records.events(ledger.job)) == before
    assert list(ledger.objects.list("v1")) == []


def test_a_job_that_somebody_else_has_moved_is_looked_at_again(ledger: StoreLedger, records: Records) -> None:
    records.change_state(ledger.job, JobEvent.CANCEL_ASKED, who="somebody")
    with pytest.raises(LeaseLostError):
        ledger.change_state(STARTED)
    assert records.job(ledger.job).state == JobState.CANCELLING


def test_retries_of_an_earlier_run_do_not_count(ledger: StoreLedger, records: Records) -> None:
    ledger.record_retry(RETRY)
    records.ask_cancel(ledger.job, "somebody")
    assert ledger.cancel_asked_by() == "somebody"
    ledger.record_use(5.0)
    for event in (JobEvent.CANCEL_ASKED, JobEvent.STOPPED, JobEvent.RESUMED):
        records.change_state(ledger.job, event, who="somebody")
    assert records.retried(ledger.job) == []
    assert ledger.cancel_asked_by() is None
    assert records.job(ledger.job).used_s == 0.0
    ledger.record_retry(c.RecordRetry(Ranges([(3, 4)]), 3))
    assert [entry[:2] for entry in records.retried(ledger.job)] == [(Ranges([(3, 4)]), 3)]


def test_open_jobs_are_listed_oldest_first_with_who_wants_their_end(records: Records) -> None:
    jobs = [new_job_id() for _ in range(3)]
    for job in jobs:
        records.create_job(job, msgspec.json.encode(SPEC))
    assert records.ask_cancel(jobs[1], "me")
    assert records.ask_cancel(jobs[1], "another")  # the first one counts, and the story says it once
    for event in (JobEvent.CANCEL_ASKED, JobEvent.STOPPED):
        records.change_state(jobs[0], event, who="me")
    assert not records.ask_cancel(jobs[0], "me")
    assert [(x.job, x.state, x.cancel_by) for x in records.open_jobs()] == [
        (jobs[1], JobState.QUEUED, "me"),
        (jobs[2], JobState.QUEUED, None),
    ]
    assert [e.kind for e in records.events(jobs[1])] == ["created", "cancel_wanted"]


def test_aggregates_that_took_their_worker_down_name_the_segments_they_would_have_read(
    ledger: StoreLedger, records: Records
) -> None:
    """Otherwise a later driver would take them for stale, and let them take its workers down."""
    error = ErrorExample(
        fingerprint="f", status=ReplicateStatus.CRASHED, error_type="WorkerDied", message="m"
    )
    ledger.spec = msgspec.structs.replace(SPEC, aggregates=("m:g",))
    for n, indices in enumerate([Ranges([(0, 3)]), Ranges([(3, 4)])]):
        ledger.commit_synthetic(c.CommitSynthetic(attempt_id(1, n), indices, ReplicateStatus.CRASHED, error))
    assert ledger.commit_synthetic_aggregates(
        c.CommitSyntheticAggregates(attempt_id(1, 9), Ranges([(0, 1)]), error)
    )
    segments, aggregates = records.segments(ledger.job), records.aggregates(ledger.job)
    assert set(aggregates[0].inputs) == {ref.digest for ref in segments}
    known = Ledger(ledger.spec)
    assert not known.adopt(segments, aggregates)
    assert not known.n_open_params


def test_results_of_a_bundle_that_was_changed_count_no_more_and_leave_no_checkpoint(
    ledger: StoreLedger,
) -> None:
    writer = SegmentWriter(ledger.objects, ledger.job, attempt_id(ledger.epoch, 1), worker="w")
    writer.add(0, ReplicateStatus.SUCCEEDED, True, [], None)
    ref = writer.finish()
    assert ref is not None
    assert ledger.commit_segments([ref]) == [True]
    checkpoint = f"{job_folder(ledger.job)}/checkpoints/1/0001-000001/1/manifest"
    ledger.objects.put_new(checkpoint, b"made by what was changed")
    ledger.bundle_changes = lambda: ["model.py was changed"]
    voided = ledger.finalize()
    assert isinstance(voided, e.ResultsVoided)
    assert "model.py was changed" in voided.reason
    assert ledger.records.segments(ledger.job) == []
    assert not list(ledger.objects.list(f"{job_folder(ledger.job)}/checkpoints"))
