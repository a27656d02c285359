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
from modelops.server import reconciler as reconciling
from modelops.server.reconcile import Held, Mismatch
from modelops.server.reconciler import Reconciler
from modelops.states import JobEvent, JobState
from modelops.store.objects import FolderObjects
from modelops.store.overview import page_of_jobs, picture
from modelops.store.segments import job_folder
from modelops.study.ids import AttemptId, JobId
from modelops.study.pools import NO_POOL, Membership
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from distributed import Client


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


class Drives(Nobody):
    """The driver of one job, and the workers. ``waits_for``, ``has``: attempts, at one look after another.

    ``has`` is what the one worker answers, None if it does not.
    """

    def __init__(self, stored: StoredJob, waits_for: Any, has: Any) -> None:
        super().__init__(stored)
        self._waits_for, self._has = iter(waits_for), iter(has)
        self.told: list[AttemptId] = []

    def driven(self) -> list[JobId]:
        return [self.stored.job]

    def attempts(self, job: JobId) -> Mapping[AttemptId, str]:
        return dict.fromkeys(map(AttemptId, next(self._waits_for)), "w")

    def lost(self, job: JobId, attempt: AttemptId) -> None:
        self.told.append(attempt)

    def answer(self, _pool: Any) -> dict[str, list[Held] | None]:
        found = next(self._has)
        held = None if found is None else [Held(self.stored.job, AttemptId(a), "w", live=True) for a in found]
        return {"w": held}


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


class Forgetful(FolderObjects):
    """Lists nothing but the parameters, or old sizes; whatever is asked for by its name is there."""

    old = False

    def sizes(self, prefix: str) -> dict[str, int]:
        """Leave most out, or say what was true before."""
        listed = super().sizes(prefix)
        return {name: 1 if self.old else n for name, n in listed.items() if self.old or "parameters" in name}


@pytest.mark.parametrize("old", [False, True])
def test_what_a_listing_leaves_out_is_not_gone_if_it_can_be_read(stored: StoredJob, old: bool) -> None:
    folder = stored.objects.local_path("v1")
    assert folder is not None
    stored.objects = forgetful = Forgetful(folder.parent)
    forgetful.old = old
    before = stored.records.events(stored.job)
    assert reconciler(stored, Nobody(stored)).run(stored.job) == []
    assert stored.records.events(stored.job) == before
    damage(stored, names(stored, "segments")[0], "remove")
    found = reconciler(stored, Nobody(stored)).run(stored.job)
    assert [f.kind for f in found if f.kind is not Mismatch.AGGREGATE_DAMAGED] == [Mismatch.SEGMENT_DAMAGED]


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


@pytest.mark.parametrize(
    ("waits_for", "has", "told"),
    [
        ([["9-1"], ["9-1"]], [["9-2"], ["9-2"]], ["9-1"]),
        ([["9-1"]], [["9-1"]], []),
        ([["9-1"], ["9-2"]], [[], []], []),  # its receipt was under way, and another one is now
        ([["9-1"], ["9-1"]], [[], ["9-1"]], []),  # it was on its way to the worker
        ([["9-1"], ["9-1"]], [[], None], []),
        ([["9-1"]], [None], []),
    ],
)
def test_an_attempt_is_given_up_when_its_worker_says_twice_that_it_has_no_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits_for: Any, has: Any, told: list[str]
) -> None:
    stored = StoredJob(tmp_path, SETS, N)
    epoch = stored.take()
    stored.records.change_state(stored.job, JobEvent.STARTED, who="test", epoch=epoch)
    driving = Drives(stored, waits_for, has)
    monkeypatch.setattr(reconciling, "ask_workers", driving.answer)
    found = reconciler(stored, driving, settle_s=0.0).run(stored.job)
    assert driving.told == told
    assert [(f.kind, f.what) for f in found] == [(Mismatch.NOBODY_RUNS, attempt) for attempt in told]
    assert stored.records.mismatches() == ({"nobody_runs": 1} if told else {})


@pytest.mark.parametrize(("has", "stopped"), [([["9-1"], ["9-1"]], ["9-1"]), ([["9-1"], ["9-2"]], [])])
def test_what_runs_after_the_end_of_its_job_is_stopped_when_it_is_seen_twice(
    stored: StoredJob, monkeypatch: pytest.MonkeyPatch, has: Any, stopped: list[str]
) -> None:
    driving, orders = Drives(stored, iter(list, None), has), list[Any]()
    monkeypatch.setattr(reconciling, "ask_workers", driving.answer)
    monkeypatch.setattr(reconciling, "stop_attempt", lambda _pool, *order: orders.append(order))
    found = reconciler(stored, driving, settle_s=0.0).run(stored.job)
    assert orders == [(stored.job, attempt, "w") for attempt in stopped]
    assert [(f.kind, f.what) for f in found] == [(Mismatch.RUNS_AFTER_END, attempt) for attempt in stopped]
    assert driving.told == []


@pytest.mark.parametrize("answers", [True, False])
def test_a_segment_without_a_row_is_adopted_only_if_every_worker_says_that_it_has_it_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    stored = StoredJob(tmp_path, SETS, N)
    epoch = stored.take()
    for event in (JobEvent.STARTED, JobEvent.ENVIRONMENT_READY):
        stored.records.change_state(stored.job, event, who="test", epoch=epoch)
    stored.write(epoch, range(4))
    driving, lost = Nobody(stored), stored.write(epoch, range(4, 8))
    assert stored.records.commit_segment(stored.job, epoch, lost)
    damage(stored, f"{job_folder(stored.job)}/{lost.name}", "remove")  # so that there is something to mend
    monkeypatch.setattr(reconciling, "ask_workers", lambda _pool: {"v": [], "w": [] if answers else None})
    reconciler(stored, driving, settle_s=0.0).run(stored.job)
    assert (stored.records.covered(stored.job) == Ranges([(0, 4)])) is answers
