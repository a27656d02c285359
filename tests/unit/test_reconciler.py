"""The reconciler around its decisions: whose jobs it touches, and what it removes, without any worker."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from stored_job import StoredJob
from test_reconcile import SETS, N, damage, names

from modelops.errors import ClusterError, NotFoundError
from modelops.server.reconcile import Mismatch
from modelops.server.reconciler import Reconciler
from modelops.states import JobState
from modelops.store.overview import page_of_jobs, picture
from modelops.store.segments import job_folder
from modelops.study.ids import JobId
from modelops.study.pools import NO_POOL, Membership

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from distributed import Client

    from modelops.study.ids import AttemptId


class NoPool:
    """No scheduler answers."""

    @property
    def client(self) -> Client:
        raise ClusterError("there is no scheduler")

    def workers(self) -> dict[str, int]:
        return {}

    def membership(self, worker: str) -> Membership:
        return NO_POOL

    def refused(self) -> dict[str, str]:
        return {}

    def on_workers(self, joined: Any, left: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def on_topic(self, topic: str, heard: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Nobody:
    """Drivers of a process that drives nothing. ``elsewhere``: a live driver of another has every job."""

    def __init__(self, stored: StoredJob, *, elsewhere: bool = False) -> None:
        self.stored, self.elsewhere = stored, elsewhere
        self.asked: list[JobId] = []

    def driven(self) -> list[JobId]:
        return []

    def attempts(self, job: JobId) -> Mapping[AttemptId, str]:
        raise AssertionError(job)

    def lost(self, job: JobId, attempt: AttemptId) -> None:
        raise AssertionError(job, attempt)

    @contextlib.contextmanager
    def apart(self, job: JobId) -> Iterator[int | None]:
        self.asked.append(job)
        yield None if self.elsewhere else self.stored.take()


@pytest.fixture
def stored(tmp_path: Path) -> StoredJob:
    job = StoredJob(tmp_path, SETS, N)
    job.run()
    return job


def reconciler(stored: StoredJob, driving: Nobody, **more: Any) -> Reconciler:
    return Reconciler(stored.records, stored.objects, driving, NoPool(), "reconciler", **more)


def test_a_job_that_is_as_recorded_is_not_touched(stored: StoredJob) -> None:
    before, driving = stored.records.events(stored.job), Nobody(stored)
    assert reconciler(stored, driving).run() == []
    assert driving.asked == []
    assert stored.records.events(stored.job) == before


def test_of_a_job_that_somebody_else_drives_nothing_is_changed(stored: StoredJob) -> None:
    damage(stored, names(stored, "segments")[0], "remove")
    before, driving = stored.records.events(stored.job), Nobody(stored, elsewhere=True)
    assert reconciler(stored, driving).run() == []
    assert driving.asked == [stored.job]
    assert stored.records.events(stored.job) == before


def test_damage_is_repaired_whether_one_job_or_all_are_looked_at(stored: StoredJob) -> None:
    ours = reconciler(stored, Nobody(stored))
    for job in (None, stored.job):
        damage(stored, names(stored, "aggregates")[0], "flip")
        assert [f.kind for f in ours.run(job)] == [Mismatch.AGGREGATE_DAMAGED]
        assert stored.records.job(stored.job).state is JobState.QUEUED
        assert ours.run(job) == []
        stored.run()
        used = {f"{job_folder(stored.job)}/{ref.name}" for ref in stored.records.aggregates(stored.job)}
        for name in set(names(stored, "aggregates")) - used:  # or it may be that which is damaged next
            stored.objects.delete(name)
    assert stored.records.mismatches() == {"aggregate_damaged": 2}


@pytest.mark.parametrize("wrong", sorted(set(JobState) - {JobState.SUCCEEDED}))
def test_a_state_that_the_story_does_not_tell_is_put_right_and_said_once(
    stored: StoredJob, wrong: JobState
) -> None:
    ours, before = reconciler(stored, Nobody(stored)), stored.records.job(stored.job)
    with stored.records.database.writing() as sql:
        sql.exec_driver_sql("UPDATE jobs SET state = ? WHERE job = ?", (wrong, stored.job))
    assert [f.kind for f in ours.run(stored.job)] == [Mismatch.STATE_DIFFERS]
    after = stored.records.job(stored.job)
    assert after == msgspec.structs.replace(before, n_events=before.n_events + 1)
    event = stored.records.events(stored.job)[-1]
    assert (event.kind, event.text) == (
        "mismatch",
        f"the record says {wrong}, and the story succeeded; it is succeeded",
    )
    assert ours.run() == []
    assert stored.records.mismatches() == {"state_differs": 1}


def test_the_story_names_each_of_a_few_damaged_objects_by_its_name_in_the_job(stored: StoredJob) -> None:
    damaged = sorted(names(stored, "segments"))[:2]
    assert len(damaged) == 2
    for name in damaged:
        damage(stored, name, "flip")
    reconciler(stored, Nobody(stored)).run()
    (event,) = [e for e in stored.records.events(stored.job) if "segment" in e.data.get("kind", "")]
    short = [name.removeprefix(f"{job_folder(stored.job)}/") for name in damaged]
    assert sorted(event.data["what"]) == short
    assert all(name in event.text for name in short)
    assert job_folder(stored.job) not in event.text


def by_hand(folder: Path, statement: str, *values: Any) -> None:
    """Change the database as its own command line does: keys that point to nothing are not looked at."""
    with contextlib.closing(sqlite3.connect(folder / "modelops.db")) as sql, sql:
        assert sql.execute(statement, values).rowcount


@pytest.mark.parametrize("gone", [False, True], ids=["stored", "gone"])
def test_ranges_that_a_deleted_record_left_behind_keep_no_outcome_from_counting(
    stored: StoredJob, tmp_path: Path, gone: bool
) -> None:
    before, first = picture(stored.records, stored.job), stored.records.segments(stored.job)[0]
    by_hand(tmp_path, "DELETE FROM segments WHERE job = ? AND attempt = ?", stored.job, first.attempt)
    if gone:
        damage(stored, f"{job_folder(stored.job)}/{first.name}", "remove")
    ours = reconciler(stored, Nobody(stored))
    assert ours.run(stored.job)
    if stored.records.job(stored.job).state is JobState.QUEUED:
        stored.run()
    after = picture(stored.records, stored.job)
    assert (after.row.state, after.counts) == (JobState.SUCCEEDED, before.counts)
    assert ours.run(stored.job) == []


@pytest.mark.parametrize("text", ["{", "[1]", '{"succeeded": "x"}', '{"odd": 4}', "17"])
def test_counts_that_cannot_be_read_stop_no_list_and_are_counted_again(
    stored: StoredJob, tmp_path: Path, text: str
) -> None:
    before, first = picture(stored.records, stored.job), stored.records.segments(stored.job)[0]
    by_hand(tmp_path, "UPDATE segments SET counts = ? WHERE attempt = ?", text, first.attempt)
    assert [one.row.job for one in page_of_jobs(stored.records, limit=9)] == [stored.job]
    ours = reconciler(stored, Nobody(stored))
    assert ours.run() != []
    assert picture(stored.records, stored.job).counts == before.counts
    assert ours.run(stored.job) == []


def test_a_segment_of_another_job_never_counts_even_if_the_record_fits_it(
    stored: StoredJob, tmp_path: Path
) -> None:
    other = StoredJob(tmp_path, [{"p": 0.9, **one} for one in SETS], N)
    other.run()
    theirs, ours = (of.records.segments(of.job)[0] for of in (other, stored))
    data = other.objects.get(f"{job_folder(other.job)}/{theirs.name}")
    stored.objects.put(f"{job_folder(stored.job)}/{ours.name}", data)
    by_hand(
        tmp_path, "UPDATE segments SET digest = ?, n_bytes = ? WHERE job = ? AND attempt = ?",
        theirs.digest, len(data), stored.job, ours.attempt,
    )  # fmt: skip
    found = reconciler(stored, Nobody(stored)).run(stored.job)
    assert Mismatch.SEGMENT_DAMAGED in [f.kind for f in found]
    assert other.job in next(f.text for f in found if f.kind is Mismatch.SEGMENT_DAMAGED)


def test_a_job_that_does_not_exist_is_not_found(stored: StoredJob) -> None:
    with pytest.raises(NotFoundError):
        reconciler(stored, Nobody(stored)).run(JobId("job_none"))


def test_what_counts_for_nothing_is_removed_once_it_was_seen_for_long_enough(stored: StoredJob) -> None:
    useless = f"{job_folder(stored.job)}/{stored.write(1, range(3)).name}"
    patient = reconciler(stored, Nobody(stored), grace_s=3600)
    patient.run()
    patient.run()
    assert stored.objects.exists(useless)
    before = set(stored.objects.list(job_folder(stored.job)))
    reconciler(stored, Nobody(stored), grace_s=0).run()
    gone = before - set(stored.objects.list(job_folder(stored.job)))
    assert useless in gone
    assert all(name.split("/")[3] in ("segments", "packs") for name in gone)
    assert reconciler(stored, Nobody(stored)).run() == []


def test_the_thread_looks_at_once_and_ends_when_told(stored: StoredJob) -> None:
    damage(stored, names(stored, "segments")[0], "remove")
    ours = reconciler(stored, Nobody(stored))
    ours.start()
    deadline = time.monotonic() + 60
    while stored.records.job(stored.job).run == 1:
        assert time.monotonic() < deadline, "the thread did not look"
        threading.Event().wait(0.02)
    ours.stop()
    assert ours.run() == []
