"""Records and storage made to agree again: exactly what was damaged is run again, and each index counts once."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from stored_job import OK, StoredJob

from modelops.driver.events import CancelAsked
from modelops.errors import StorageError
from modelops.server.drive import JobDriver
from modelops.server.extend import extend_job, resume_job
from modelops.server.facts import facts_of
from modelops.server.mend import mend_job, needs_mending
from modelops.server.reconcile import Held, Mismatch, never_counts, nobody_runs, runs_after_end
from modelops.states import FINAL_JOB_STATES, JobEvent, JobState
from modelops.store import LeaseLostError, SegmentWriter
from modelops.store.contents import JobContents
from modelops.store.results import finalize, replicates_table
from modelops.store.segments import job_folder
from modelops.store.withdrawal import NOTHING, Withdrawal
from modelops.study.ids import AttemptId, JobId, attempt_id, epoch_of
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from modelops.server.reconcile import Finding

SETS: list[dict[str, Any]] = [{"a": 1}, {"a": 2, "bad": True}, {"a": 0.5}, {"a": 7}]
N = 6


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the result files of the job when nothing happens to it."""
    job = StoredJob(tmp_path_factory.mktemp("fresh"), SETS, N)
    job.run()
    return job.files()


@pytest.fixture
def stored(tmp_path: Path) -> StoredJob:
    job = StoredJob(tmp_path, SETS, N)
    job.run()
    return job


def names(job: StoredJob, *folders: str) -> list[str]:
    return [n for n in job.objects.list(job_folder(job.job)) if n.split("/")[3] in folders]


def damage(job: StoredJob, name: str, how: str, at: float = 0.5) -> None:
    data = job.objects.get(name)
    k = int(at * (len(data) - 1))
    match how:
        case "remove":
            job.objects.delete(name)
        case "cut":
            job.objects.put(name, data[:k])
        case "zero":
            job.objects.put(name, data[:k] + bytes(len(data) - k))
        case "flip" if data:
            job.objects.put(name, data[:k] + bytes([data[k] ^ 0x55]) + data[k + 1 :])
        case _:
            pass


def mend(job: StoredJob, *, deep: bool = True, **more: Any) -> list[Finding]:
    return mend_job(job.records, job.objects, job.job, job.take(), "reconciler", deep=deep, **more)


def kinds(found: list[Finding]) -> set[Mismatch]:
    return {finding.kind for finding in found}


def forget_row(job: StoredJob, attempt: str) -> None:
    with job.records.database.writing() as sql:
        for table in ("segment_ranges", "segments"):
            sql.exec_driver_sql(f"DELETE FROM {table} WHERE job = ? AND attempt = ?", (job.job, attempt))


def test_a_whole_job_needs_nothing(stored: StoredJob) -> None:
    before = stored.records.job(stored.job)
    _, plan = needs_mending(stored.records, stored.objects, stored.job, deep=True)
    assert not plan
    assert stored.records.job(stored.job) == before
    assert mend(stored) == []
    assert stored.records.mismatches() == {}


@pytest.mark.parametrize("how", ["remove", "cut", "zero", "flip"])
@pytest.mark.parametrize("folder", ["segments", "packs", "aggregates"])
def test_what_is_damaged_is_run_again_and_nothing_else(
    stored: StoredJob, fresh: dict[str, bytes], folder: str, how: str
) -> None:
    name = names(stored, folder)[1]
    short = name.removeprefix(f"{job_folder(stored.job)}/")
    lost = [ref for ref in stored.records.segments(stored.job) if short in (ref.name, ref.pack)]
    damage(stored, name, how)
    ran = stored.n_ran
    assert (mend(stored, deep=False) != []) == (how in ("remove", "cut"))
    found = mend(stored)
    assert kinds(found) <= {Mismatch.SEGMENT_DAMAGED, Mismatch.AGGREGATE_DAMAGED}
    row = stored.records.job(stored.job)
    assert (row.state, row.run) == (JobState.QUEUED, 2)
    indices = Ranges(pair for ref in lost for pair in ref.ranges)
    assert stored.missing() == indices
    assert stored.records.scope(stored.job).only == indices
    assert mend(stored) == [], "a second look finds nothing"
    stored.run()
    assert stored.n_ran - ran == len(indices)
    assert stored.files() == fresh
    assert sum(stored.records.mismatches().values()) == 1
    assert mend(stored) == []
    (said,) = [event for event in stored.records.events(stored.job) if event.kind == "mismatch"]
    assert short in said.text


def test_a_repaired_run_runs_what_is_found_damaged_meanwhile_too(
    stored: StoredJob, fresh: dict[str, bytes]
) -> None:
    """A look of every minute sees that a segment is gone; that another one is damaged sees who reads it."""
    gone, flipped = stored.records.segments(stored.job)[:2]
    ran = stored.n_ran
    damage(stored, f"{job_folder(stored.job)}/{gone.name}", "remove")
    damage(stored, f"{job_folder(stored.job)}/{flipped.name}", "flip")
    mend(stored, deep=False)
    assert stored.records.scope(stored.job).only == Ranges(gone.ranges)
    assert kinds(mend(stored)) == {Mismatch.SEGMENT_DAMAGED}
    assert stored.records.scope(stored.job).only == Ranges((*gone.ranges, *flipped.ranges))
    stored.run()
    assert stored.n_ran - ran == len(Ranges((*gone.ranges, *flipped.ranges)))
    assert stored.files() == fresh
    assert mend(stored) == []


def test_a_repaired_run_leaves_alone_what_the_user_did_not_want(stored: StoredJob, tmp_path: Path) -> None:
    cancelled = StoredJob(tmp_path / "cancelled", SETS, N)
    cancelled.run(limit=14)
    lost = cancelled.records.segments(cancelled.job)[0]
    damage(cancelled, f"{job_folder(cancelled.job)}/{lost.name}", "flip")
    assert kinds(mend(cancelled)) == {Mismatch.SEGMENT_DAMAGED}
    assert cancelled.missing() == Ranges(lost.ranges)


def test_what_did_not_run_keeps_its_reason_through_a_repair(stored: StoredJob) -> None:
    records, job = stored.records, stored.job
    epoch = stored.take()
    records.begin_run(job, JobEvent.EXTENDED, who="me", why="more")
    for event, why in (
        (JobEvent.STARTED, ""), (JobEvent.ENVIRONMENT_READY, ""),
        (JobEvent.STOPPED_EARLY, "max_failures"), (JobEvent.SOME_SUCCEEDED, "4 failed, more than max_failures"),
    ):  # fmt: skip
        records.change_state(job, event, who="driver", why=why, epoch=epoch)
    assert records.last_end(job) == "4 failed, more than max_failures"
    records.begin_run(job, JobEvent.REPAIRED, who="me", why="a segment is gone", only=Ranges(((0, 2),)))
    driver = JobDriver(
        job, epoch, leases=None, records=records, objects=stored.objects, cache=Path(), who="me",  # type: ignore[arg-type]
    )  # fmt: skip
    row, scope = records.job(job), records.scope(job)
    assert driver._reason(row, scope, Ranges(((0, 5),))) == "4 failed, more than max_failures"
    assert driver._reason(row, scope, Ranges(((0, 2),))) == "", "all that is missing runs now"


def test_a_cancel_is_not_lost_when_a_driver_begins_anew(stored: StoredJob) -> None:
    leases: Any = SimpleNamespace(take=stored.records.take_lease)
    driver = JobDriver(
        stored.job, 1, leases=leases, records=stored.records, objects=stored.objects, cache=Path(), who="me",
    )  # fmt: skip
    driver.cancel("somebody")
    driver.lose(attempt_id(1, 1))
    driver._take_again()
    assert driver.epoch == stored.records.job(stored.job).epoch
    assert [driver._inbox.get_nowait() for _ in range(driver._inbox.qsize())] == [CancelAsked("somebody")]


@pytest.mark.parametrize("how", ["remove", "cut", "zero", "flip"])
def test_result_files_are_made_again_without_a_new_run(
    stored: StoredJob, fresh: dict[str, bytes], how: str
) -> None:
    for name in names(stored, "results"):
        damage(stored, name, how)
    assert kinds(mend(stored)) == {Mismatch.RESULTS_DAMAGED}
    assert stored.files() == fresh
    assert stored.records.job(stored.job).run == 1
    assert mend(stored) == []


def test_result_files_over_damaged_segments_are_made_after_these(
    stored: StoredJob, fresh: dict[str, bytes]
) -> None:
    damage(stored, names(stored, "results")[2], "remove")
    damage(stored, names(stored, "segments")[0], "flip")
    assert kinds(mend(stored, deep=False)) == {Mismatch.RESULTS_DAMAGED, Mismatch.SEGMENT_DAMAGED}
    assert stored.records.job(stored.job).state is JobState.QUEUED
    stored.run()
    assert stored.files() == fresh


@pytest.mark.parametrize("how", ["remove", "cut", "flip"])
def test_the_study_that_workers_read_is_stored_again_as_recorded(stored: StoredJob, how: str) -> None:
    name = f"{job_folder(stored.job)}/study.json"
    damage(stored, name, how)
    assert kinds(mend(stored)) == {Mismatch.STUDY_DAMAGED}
    assert stored.objects.get(name) == stored.records.job(stored.job).spec
    assert mend(stored) == []


@pytest.mark.parametrize("how", ["remove", "cut"])
def test_lost_execution_data_takes_no_outcome_with_it(
    stored: StoredJob, fresh: dict[str, bytes], how: str
) -> None:
    damage(stored, names(stored, "executions")[0], how)
    assert kinds(mend(stored)) == {Mismatch.EXECUTION_DAMAGED}
    assert mend(stored) == []
    assert stored.records.job(stored.job).run == 1
    damage(stored, names(stored, "results")[0], "remove")
    mend(stored)
    assert stored.files() == fresh


def test_a_segment_without_a_row_is_adopted_when_it_is_whole(
    stored: StoredJob, fresh: dict[str, bytes]
) -> None:
    ran = stored.n_ran
    refs = {ref.attempt: ref for ref in stored.records.segments(stored.job)}
    for attempt in list(refs)[:2]:
        forget_row(stored, attempt)
    found = mend(stored)
    assert kinds(found) == {Mismatch.SEGMENT_UNRECORDED, Mismatch.AGGREGATE_DAMAGED}, (
        "it had nothing to stand on"
    )
    assert {ref.attempt: ref for ref in stored.records.segments(stored.job)} == refs
    assert mend(stored) == []
    stored.run()
    assert (stored.n_ran, stored.files()) == (ran, fresh)


def test_a_segment_without_a_row_is_adopted_without_execution_data_that_are_damaged(
    stored: StoredJob, fresh: dict[str, bytes]
) -> None:
    ref = stored.records.segments(stored.job)[0]
    forget_row(stored, ref.attempt)
    damage(stored, f"{job_folder(stored.job)}/{ref.execution}", "cut")
    assert kinds(mend(stored)) >= {Mismatch.SEGMENT_UNRECORDED, Mismatch.EXECUTION_DAMAGED}
    (adopted,) = [x for x in stored.records.segments(stored.job) if x.attempt == ref.attempt]
    assert adopted == msgspec.structs.replace(ref, execution=None)
    assert mend(stored) == [], "a second look finds nothing"
    stored.run()
    assert stored.files() == fresh


def test_a_damaged_segment_without_a_row_is_not_adopted(stored: StoredJob, fresh: dict[str, bytes]) -> None:
    lost = stored.records.segments(stored.job)[0]
    forget_row(stored, lost.attempt)
    damage(stored, f"{job_folder(stored.job)}/{lost.name}", "flip", 0.9)
    assert kinds(mend(stored)) == {Mismatch.OUTCOMES_MISSING, Mismatch.AGGREGATE_DAMAGED}
    stored.run()
    assert stored.files() == fresh


def test_a_segment_without_a_row_is_not_adopted_when_its_large_outputs_are_damaged(
    stored: StoredJob, fresh: dict[str, bytes]
) -> None:
    lost = next(ref for ref in stored.records.segments(stored.job) if ref.pack)
    forget_row(stored, lost.attempt)
    damage(stored, f"{job_folder(stored.job)}/{lost.pack}", "flip", 0.9)
    assert Mismatch.SEGMENT_UNRECORDED not in kinds(mend(stored))
    assert stored.missing() == Ranges(lost.ranges)
    stored.run()
    assert stored.files() == fresh


def test_a_volume_that_is_not_mounted_is_no_reason_for_a_driver_to_run_everything_again(
    stored: StoredJob, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "objects" / "v1")  # what a server that was started meanwhile has made is there
    before, events = stored.records.segments(stored.job), stored.records.events(stored.job)
    for deep in (False, True):
        with pytest.raises(StorageError, match="is its volume mounted"):
            mend_job(
                stored.records,
                stored.objects,
                stored.job,
                stored.records.job(stored.job).epoch,
                "me",
                deep=deep,
            )
    assert (stored.records.segments(stored.job), stored.records.events(stored.job)) == (before, events)


def open_job(folder: Path) -> tuple[StoredJob, int]:
    """Return a running job with one committed segment, and the epoch of its driver."""
    job = StoredJob(folder, SETS, N)
    epoch = job.take()
    for event in (JobEvent.STARTED, JobEvent.ENVIRONMENT_READY):
        job.records.change_state(job.job, event, who="test", epoch=epoch)
    assert job.records.commit_segment(job.job, epoch, job.write(epoch, range(7)))
    return job, epoch


def test_of_a_segment_without_a_row_only_what_nobody_else_has_is_adopted(tmp_path: Path) -> None:
    job, epoch = open_job(tmp_path)
    orphan = job.write(epoch, range(4, 12))
    assert kinds(mend(job)) == {Mismatch.SEGMENT_UNRECORDED}
    (ref,) = [ref for ref in job.records.segments(job.job) if ref.attempt == orphan.attempt]
    assert Ranges(ref.ranges) == Ranges([(7, 12)])
    assert sum(ref.counts.values()) == 5
    contents = JobContents.of(job.objects, job.records, job.job)
    assert sum(status != "pending" for status in replicates_table(contents)["status"].to_pylist()) == 12
    assert mend(job) == []


def test_of_two_segments_without_a_row_the_older_counts_where_both_say_something(tmp_path: Path) -> None:
    job, epoch = open_job(tmp_path)
    older, younger = job.write(epoch, range(7, 12)), job.write(epoch, range(9, 14))
    assert [f.what for f in mend(job)] == [older.name, younger.name]
    found = {ref.attempt: Ranges(ref.ranges) for ref in job.records.segments(job.job)}
    assert found[older.attempt] == Ranges([(7, 12)])
    assert found[younger.attempt] == Ranges([(12, 14)])


def test_what_a_worker_still_holds_or_may_hold_is_left_to_it(tmp_path: Path) -> None:
    job, epoch = open_job(tmp_path)
    orphan = job.write(epoch, range(7, 12))
    assert mend(job, held=lambda: frozenset({orphan.attempt})) == []
    assert mend(job, held=lambda: None) == []
    assert kinds(mend(job, held=frozenset)) == {Mismatch.SEGMENT_UNRECORDED}


def test_what_was_withdrawn_or_voided_is_never_adopted(tmp_path: Path) -> None:
    job, epoch = open_job(tmp_path)
    (ref,) = job.records.segments(job.job)
    job.records.withdraw(job.job, epoch, Withdrawal(segments={ref.attempt: NOTHING}), who="me", why="because")
    assert mend(job) == []
    epoch = job.take()
    late = job.write(epoch, range(3))
    job.records.void_results(job.job, epoch, "me", "the bundle was changed")
    assert mend(job) == [], "what came of the changed bundle does not count, whenever it comes"
    later = job.write(job.take(), range(3))
    assert [f.what for f in mend(job)] == [later.name]
    assert late.name != later.name


def test_failures_that_are_to_be_tried_again_do_not_come_back_from_what_nobody_recorded(
    stored: StoredJob,
) -> None:
    table = replicates_table(JobContents.of(stored.objects, stored.records, stored.job))
    failed = [k for k, status in enumerate(table["status"].to_pylist()) if status == "failed"]
    assert failed
    stored.write(stored.records.job(stored.job).epoch, failed)
    resume_job(stored.records, stored.objects, stored.job, "me", failed=True)
    assert stored.missing() == Ranges.of(failed)
    assert mend(stored) == []
    assert stored.missing() == Ranges.of(failed)


def test_nothing_is_stored_under_an_epoch_that_storage_knows_and_the_records_do_not(tmp_path: Path) -> None:
    """The records come from a backup: drivers after it had epochs that would be given again."""
    job, epoch = open_job(tmp_path)
    later = job.write(epoch + 3, range(7, 12))
    for name in ("segments/20260101-1.arrow", "packs/x.pack"):  # of nobody
        job.objects.put_new(f"{job_folder(job.job)}/{name}", b"")
    asked: list[int] = []

    def above(stored: int) -> int:
        asked.append(stored)
        return max(job.take() for _ in range(stored))

    assert [f.what for f in mend(job, above=above)] == [later.name], "and what they did counts"
    assert asked == [epoch + 3]
    assert job.records.job(job.job).epoch > epoch + 3
    assert mend(job, above=above) == []
    assert asked == [epoch + 3]


def test_a_job_that_was_cancelled_is_left_so_whatever_its_workers_have_stored_since(tmp_path: Path) -> None:
    job = StoredJob(tmp_path, SETS, N)
    job.run(limit=14)
    job.write(1, range(20, 23))
    before = job.records.job(job.job)
    assert before.state is JobState.CANCELLED
    assert job.records.result_files(job.job)
    assert mend(job) == []
    assert (job.records.job(job.job).state, job.records.job(job.job).run) == (JobState.CANCELLED, before.run)


def test_what_an_earlier_run_settled_is_no_reason_to_run_what_a_later_one_was_not_to(tmp_path: Path) -> None:
    job = StoredJob(tmp_path, SETS, N)
    job.run()
    extend_job(job.records, job.objects, job.job, "me", replicates=N + 2)
    job.run(limit=3)
    assert job.records.job(job.job).state is JobState.CANCELLED
    assert len(job.missing()) == 5
    assert mend(job) == []
    assert (job.records.job(job.job).state, job.records.job(job.job).run) == (JobState.CANCELLED, 2)


def test_nothing_is_adopted_while_result_files_are_written(tmp_path: Path) -> None:
    job, epoch = open_job(tmp_path)
    job.records.change_state(job.job, JobEvent.STOPPED_EARLY, who="test", why="max_failures", epoch=epoch)
    orphan = job.write(epoch, range(7, 12))
    assert mend(job) == []
    assert job.records.covered(job.job) == Ranges([(0, 7)])
    files = finalize(JobContents.of(job.objects, job.records, job.job))
    epoch = job.records.job(job.job).epoch
    job.records.record_results(job.job, "test", files, epoch=epoch)
    job.records.change_state(job.job, JobEvent.SOME_SUCCEEDED, who="test", epoch=epoch)
    assert mend(job) == [], "nor afterwards: it was stopped"
    resume_job(job.records, job.objects, job.job, "me")
    assert [f.what for f in mend(job)] == [orphan.name]


def test_a_foreign_or_impossible_segment_is_not_adopted(tmp_path: Path) -> None:
    job, epoch = open_job(tmp_path)
    other = StoredJob(tmp_path / "other", SETS, N + 4)
    foreign = other.write(epoch, range(7, 9))
    job.objects.put_new(
        f"{job_folder(job.job)}/{foreign.name}", other.objects.get(f"{job_folder(other.job)}/{foreign.name}")
    )
    beyond = SegmentWriter(job.objects, job.job, attempt_id(epoch, 90))
    beyond.add(job.spec.line.size, OK, True, [])
    beyond.finish()
    of_the_future = SegmentWriter(job.objects, job.job, attempt_id(epoch + 9, 1))
    of_the_future.add(20, OK, True, [])
    of_the_future.finish()
    assert mend(job) == []
    assert epoch_of(AttemptId("nonsense")) == 0
    assert epoch_of(AttemptId("0012-000003")) == 12


def test_what_is_lost_when_result_files_are_written_is_owed_a_run(
    tmp_path: Path, fresh: dict[str, bytes]
) -> None:
    job = StoredJob(tmp_path, SETS, N)
    job.run()
    resumable = job.records.segments(job.job)[0]
    extend_job(job.records, job.objects, job.job, "me", replicates=N + 1)
    epoch = job.take()
    for event in (JobEvent.STARTED, JobEvent.ENVIRONMENT_READY):
        job.records.change_state(job.job, event, who="test", epoch=epoch)
    assert job.records.commit_segment(job.job, epoch, job.write(epoch, job.missing()))
    job.records.change_state(job.job, JobEvent.SETTLED, who="test", epoch=epoch)
    damage(job, f"{job_folder(job.job)}/{resumable.name}", "flip")
    assert kinds(mend(job)) == {Mismatch.SEGMENT_DAMAGED}
    assert job.records.job(job.job).state is JobState.FINALIZING
    job.records.change_state(
        job.job, JobEvent.SOME_SUCCEEDED, who="test", epoch=job.records.job(job.job).epoch
    )
    assert mend(job) == [], "that was found before, and is counted once"
    assert job.records.job(job.job).state is JobState.QUEUED
    assert job.missing() == Ranges(resumable.ranges)
    assert job.records.mismatches() == {"segment_damaged": 1}


@pytest.mark.parametrize("wrong", [{"failed": 7}, {"succeeded": 1}, {}, {"succeeded": 70}])
def test_a_record_that_counts_otherwise_than_its_segment_is_put_right_and_nothing_runs_again(
    stored: StoredJob, fresh: dict[str, bytes], wrong: dict[str, int]
) -> None:
    before, ran = stored.records.segments(stored.job), stored.n_ran
    with stored.records.database.writing() as sql:
        sql.exec_driver_sql(
            "UPDATE segments SET counts = ? WHERE job = ? AND attempt = ?",
            (json.dumps(wrong), stored.job, before[1].attempt),
        )
    assert kinds(mend(stored, deep=sum(wrong.values()) == 7)) == {Mismatch.COUNTS_DIFFER}
    assert stored.records.segments(stored.job) == before
    assert not stored.missing()
    assert mend(stored) == []
    assert stored.records.job(stored.job).state is JobState.QUEUED, "how it ended is decided anew"
    stored.run()
    assert stored.records.job(stored.job).state is JobState.SUCCEEDED
    assert (stored.files(), stored.n_ran) == (fresh, ran)
    assert stored.records.mismatches() == {"counts_differ": 1}


def test_only_who_holds_the_lease_mends(stored: StoredJob) -> None:
    damage(stored, names(stored, "segments")[0], "remove")
    epoch = stored.take()
    stored.take()
    with pytest.raises(LeaseLostError):
        mend_job(stored.records, stored.objects, stored.job, epoch, "late")
    assert stored.records.mismatches() == {}


def test_what_never_counts_is_told_from_what_may_be_needed(tmp_path: Path) -> None:
    job = StoredJob(tmp_path, SETS, N)
    job.run(limit=14)
    useful, useless = job.write(1, range(20, 23)), job.write(1, range(2))
    damage(job, f"{job_folder(job.job)}/{job.write(1, range(16, 18)).name}", "flip")
    facts = facts_of(job.records, job.objects, job.job, orphans=True)
    gone = never_counts(facts)
    assert useless.name in gone
    assert useful.name not in gone
    assert len([name for name in gone if name.startswith("segments/")]) == 2
    assert not set(gone) & {ref.name for ref in job.records.segments(job.job)}
    resume_job(job.records, job.objects, job.job, "me")
    assert [f.what for f in mend(job)] == [useful.name]


# Whatever happens


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 2**32),
    blows=st.lists(
        st.tuples(
            st.sampled_from(
                ["segments", "packs", "aggregates", "executions", "results", "study.json", "row"]
            ),
            st.sampled_from(["remove", "cut", "zero", "flip"]),
            st.floats(0, 1),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_after_any_damage_every_index_counts_once_and_the_results_are_the_same(
    fresh: dict[str, bytes], seed: int, blows: list[tuple[str, str, float]]
) -> None:
    rng = random.Random(seed)
    with TemporaryDirectory() as folder:
        job = StoredJob(Path(folder), SETS, N)
        job.run(chunk=rng.randint(2, 9))
        for where, how, at in blows:
            if where == "row":
                if refs := job.records.segments(job.job):
                    forget_row(job, rng.choice(refs).attempt)
            elif there := names(job, where):
                damage(job, rng.choice(there), how, at)
        for _ in range(3):
            mend(job)
            if job.records.job(job.job).state in FINAL_JOB_STATES:
                break
            assert mend(job) == []
            job.run()
        assert job.files() == fresh
        assert mend(job) == []
        refs = job.records.segments(job.job)
        assert Ranges(pair for ref in refs for pair in ref.ranges) == job.spec.line.all()
        assert sum(hi - lo for ref in refs for lo, hi in ref.ranges) == job.spec.line.size
        assert job.records.counts(job.job)[OK] == 24 - fresh_failures(job)
        job.records.close()


def fresh_failures(job: StoredJob) -> int:
    table = replicates_table(JobContents.of(job.objects, job.records, job.job))
    return sum(status == "failed" for status in table["status"].to_pylist())


# What runs


def held(job: str, attempt: str, worker: str, *, live: bool = True) -> Held:
    return Held(JobId(job), AttemptId(attempt), worker, live)


def test_an_attempt_that_its_worker_does_not_have_is_lost_unless_the_worker_did_not_answer() -> None:
    submitted = {AttemptId(a): w for a, w in (("1", "x"), ("2", "x"), ("3", "y"), ("4", "z"))}
    answers = {"x": [held("j", "1", "x"), held("k", "2", "x")], "y": [held("j", "3", "y", live=False)]}
    found = nobody_runs(JobId("j"), submitted, answers)
    assert [(f.kind, f.what) for f in found] == [(Mismatch.NOBODY_RUNS, "2")]


def test_what_runs_for_a_job_that_has_ended_is_found_and_what_waits_to_be_read_is_not() -> None:
    everything = [
        held("j", "1", "x"),
        held("j", "2", "x", live=False),
        held("k", "3", "x"),
        held("l", "4", "x"),
    ]
    found = runs_after_end(everything, {JobId("j"): JobState.CANCELLED, JobId("l"): JobState.SUCCEEDED})
    assert [(f.job, f.what) for f in found] == [("j", "1"), ("l", "4")]
    assert (
        msgspec.json.decode(msgspec.json.encode(found), type=list[dict[str, str]])[0]["kind"]
        == "runs_after_end"
    )
