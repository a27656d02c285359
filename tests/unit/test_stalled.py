"""A job that stands still is flagged, with the reason, when its own replicates do not explain it; later unflagged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_job import StoredJob

from modelops.errors import StorageError
from modelops.server.live import LiveView, Progress
from modelops.server.stall_watch import StallWatch
from modelops.server.stalled import (
    PATIENCE_S,
    PREPARING_S,
    STOPPING_S,
    TIMES_LONGEST,
    UNMEASURED_S,
    Seen,
    Watched,
    look,
)
from modelops.states import JobEvent, JobState
from modelops.study.ranges import Ranges
from modelops.study.spec import RetryPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.study.ids import JobId

RUNNING: dict[str, Any] = {"state": JobState.RUNNING, "n_workers": 2, "n_running": 2}


def told(idle_s: float, longest_s: float | None = None, **what: Any) -> str:
    seen = Seen(mark="same", **what)
    _, stall = look(Watched("same", 0.0, longest_s, 9), seen, idle_s)
    return "" if stall is None else stall.reason


@pytest.mark.parametrize(
    ("what", "longest_s", "explained_s", "says"),
    [
        ({"n_workers": 0, "n_running": 0}, 1.0, PATIENCE_S, "no worker is connected"),
        (
            {"n_workers": 0, "n_lost_with_worker": 2},
            1.0,
            PATIENCE_S,
            "; 2 attempts of this job ended as their",
        ),
        ({"n_workers": 0, "n_refused": 3}, 1.0, PATIENCE_S, "3 workers of versions that do not fit"),
        ({"waiting_for": "the volume is full"}, 1.0, PATIENCE_S, "the volume is full"),
        ({"n_running": 0, "n_running_of_others": 5}, 1.0, PATIENCE_S, "busy with other jobs"),
        ({"n_running": 0, "retry_delay_s": 1000.0}, 1.0, 1000.0, "nothing of it runs on them"),
        ({"state": JobState.PREPARING}, None, PREPARING_S, "its environment is still being prepared"),
        ({"state": JobState.FINALIZING}, None, 1800.0, "result files are still being written"),
        ({"state": JobState.CANCELLING}, 1.0, STOPPING_S, "workers have not stopped 2 replicates of it"),
        ({"state": JobState.CANCELLING, "n_running": 0}, 1.0, 1800.0, "what is kept of it is still being"),
        ({}, None, UNMEASURED_S, "nothing has shown yet how long its replicates take; a `replicate_timeout`"),
        ({"replicate_timeout_s": 7200.0}, 1.0, 7200.0, "longer than their limit of 2 h"),
        ({}, 100.0, TIMES_LONGEST * 100.0, "no step took longer than 100 s"),
        ({"longest_chunk_s": (0.01, None)}, None, PATIENCE_S, "no step took longer than 1 s"),
        ({"longest_chunk_s": (100.0, None)}, 20.0, TIMES_LONGEST * 100.0, "no step took longer than 100 s"),
        (
            {"n_running": 0, "n_aggregating": 1, "longest_chunk_s": (1.0, None)},
            1.0,
            UNMEASURED_S,
            "nothing has shown yet how long its aggregates take",
        ),
        (
            {"n_running": 0, "n_aggregating": 1, "longest_chunk_s": (1.0, 50.0), "replicate_timeout_s": 1.0},
            9.0,
            TIMES_LONGEST * 50.0,
            "no aggregates took longer than 50 s",
        ),
        ({"n_aggregating": 1, "longest_chunk_s": (1.0, 50.0)}, 90.0, 900.0, "no step took longer than 90 s"),
    ],
)
def test_a_job_is_called_stalled_only_after_what_is_explained(
    what: dict[str, Any], longest_s: float | None, explained_s: float, says: str
) -> None:
    assert told(explained_s - 1, longest_s, **{**RUNNING, **what}) == ""
    assert says in told(explained_s, longest_s, **{**RUNNING, **what})


WAITS: dict[str, Any] = {
    "state": JobState.RUNNING,
    "is_driven": False,
    "waiting_for": "no worker of its pools",
}


@pytest.mark.parametrize(
    "phases",
    [
        [{"state": JobState.QUEUED, "is_driven": False}, {"state": JobState.PREPARING}, RUNNING],
        [{"state": JobState.PREPARING}, WAITS, RUNNING],
        [RUNNING, WAITS, RUNNING, WAITS, RUNNING],
    ],
)
def test_how_long_a_job_was_queued_prepared_or_waiting_is_no_measure_of_its_replicates(
    phases: list[dict[str, Any]],
) -> None:
    watched = None
    for mark, phase in enumerate(phases):
        watched, _ = look(watched, Seen(mark=mark, **phase), 10.0 * mark)
    _, stall = look(watched, Seen(mark=len(phases) - 1, **RUNNING), UNMEASURED_S)
    assert stall is None


def test_the_first_step_that_is_seen_has_the_start_in_it_and_is_no_measure() -> None:
    watched = None
    for now in (0.0, 5.0):
        watched, _ = look(watched, Seen(mark=now, **RUNNING), now)
    assert look(watched, Seen(mark=5.0, **RUNNING), UNMEASURED_S)[1] is None
    watched, _ = look(watched, Seen(mark=6.0, **RUNNING), 6.0)
    assert look(watched, Seen(mark=6.0, **RUNNING), 1e7)[1] is not None


@given(st.lists(st.floats(0.1, 1000), min_size=3, max_size=20))
def test_a_job_that_goes_on_as_it_did_is_never_called_stalled(gaps: list[float]) -> None:
    now, watched = 0.0, None
    for mark, gap in enumerate(gaps):
        watched, stall = look(watched, Seen(mark=mark, **RUNNING), now)
        assert stall is None
        now += gap
        if mark >= 2 and gap < max(PATIENCE_S, TIMES_LONGEST * max(gaps[1:mark])):
            _, stall = look(watched, Seen(mark=mark, **RUNNING), now)
            assert stall is None


@dataclass
class Drivers:
    """Drivers that say what the test wants."""

    views: dict[JobId, LiveView] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=lambda: {"w": 1})
    is_connected: bool = True
    is_full: bool = False
    flags: dict[JobId, str] = field(default_factory=dict)

    def flag(self, job: JobId, stalled: str) -> None:
        self.flags[job] = stalled

    def driven(self) -> list[JobId]:
        return list(self.views)

    def view(self, job: JobId) -> LiveView | None:
        return self.views.get(job)

    def workers(self) -> dict[str, int]:
        return self.slots

    def refused(self) -> dict[str, str]:
        return {}

    def connected(self) -> bool:
        return self.is_connected


def test_the_flag_comes_with_an_event_once_and_goes_when_the_job_goes_on(tmp_path: Path) -> None:
    job, now, drivers = StoredJob(tmp_path, [{"a": 1}], 4), [0.0], Drivers()
    watch = StallWatch(job.records, drivers, "server", clock=lambda: now[0])

    def seen(at: float, n: int, **more: Any) -> str:
        now[0] = at
        drivers.views = {job.job: LiveView(JobState.RUNNING, counts={"succeeded": n}, **more)}
        watch.look()
        return job.records.job(job.job).stalled

    drivers.slots = {}
    assert seen(0, 1) == ""
    assert seen(200, 1) == "no worker is connected"
    assert seen(260, 1) == "no worker is connected"
    drivers.slots = {"w": 1}
    assert seen(300, 2, running=Ranges([(2, 3)])) == ""
    story = [(e.kind, e.text) for e in job.records.events(job.job)[1:]]
    assert story == [
        ("stalled", "no progress for 3 min: no worker is connected"),
        ("going_on", "it goes on"),
    ]


def test_a_job_that_ends_while_it_is_looked_at_is_not_called_stalled(tmp_path: Path) -> None:
    job, now, drivers = StoredJob(tmp_path, [{"a": 1}], 4), [0.0], Drivers()
    watch = StallWatch(job.records, drivers, "server", clock=lambda: now[0])
    drivers.views, drivers.slots = {job.job: LiveView(JobState.RUNNING, counts={"succeeded": 1})}, {}
    watch.look()
    read = job.records.jobs

    def and_then_it_ends(**which: Any) -> Any:
        rows = read(**which)
        job.run()
        return rows

    now[0] = 500.0
    job.records.jobs = and_then_it_ends  # type: ignore[method-assign]
    watch.look()
    row = job.records.job(job.job)
    assert (row.state, row.stalled) == (JobState.SUCCEEDED, "")
    assert "stalled" not in [event.kind for event in job.records.events(job.job)]


def test_a_job_is_flagged_while_the_database_is_away_and_that_is_recorded_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, now, drivers = StoredJob(tmp_path, [{"a": 1}], 4), [0.0], Drivers()
    watch = StallWatch(job.records, drivers, "server", clock=lambda: now[0])
    drivers.views = {job.job: LiveView(JobState.RUNNING, counts={"succeeded": 1}, waiting_for="no answer")}
    watch.look()
    with monkeypatch.context() as patch:
        for name in ("jobs", "record_stalled"):
            patch.setattr(job.records, name, refuse)
        for at, flag in ((100.0, ""), (200.0, "no answer"), (300.0, "no answer")):
            now[0] = at
            with pytest.raises(StorageError):
                watch.look()
            assert drivers.flags == {job.job: flag}
        patch.undo()
        patch.setattr(job.records, "record_stalled", refuse)
        with pytest.raises(StorageError):
            watch.look()
    assert job.records.job(job.job).stalled == ""
    watch.look()
    assert job.records.job(job.job).stalled == "no answer"
    drivers.views = {job.job: LiveView(JobState.RUNNING, counts={"succeeded": 2})}
    watch.look()
    assert (job.records.job(job.job).stalled, drivers.flags) == ("", {job.job: ""})


def test_a_report_is_a_step_and_a_retry_may_wait_as_long_as_the_last_of_the_policy(tmp_path: Path) -> None:
    retry = RetryPolicy(max_retries=3, initial_delay=300.0, backoff=2.0)
    job, now, drivers = StoredJob(tmp_path, [{"a": 1}], 4, retry=retry), [0.0], Drivers()
    watch = StallWatch(job.records, drivers, "server", clock=lambda: now[0])

    def flag(at: float, **view: Any) -> str:
        now[0] = at
        drivers.views = {job.job: LiveView(JobState.RUNNING, counts={"succeeded": 1}, **view)}
        watch.look()
        return drivers.flags[job.job]

    for n in range(20):
        running = {"running": Ranges([(2, 3)]), "progress": (Progress(2, n / 20, {}),)}
        assert flag(100.0 * n, **running) == ""
    assert flag(2890.0, **running) == ""
    assert "no step took longer than 100 s" in flag(2900.0, **running)
    assert flag(3000.0, running=Ranges([(2, 3)]), progress=(Progress(2, 1.0, {}),)) == ""
    assert flag(3000.0) == ""
    assert flag(3000.0 + 1199.0) == ""  # the third retry waits for 1200 s
    assert "nothing of it runs" in flag(3000.0 + 1200.0)


def refuse(*_: object, **__: object) -> None:
    raise StorageError("away")


def test_a_job_that_waits_for_its_turn_or_for_the_scheduler_is_told_so(tmp_path: Path) -> None:
    job, now = StoredJob(tmp_path, [{"a": 1}], 4), [0.0]
    drivers = Drivers(is_full=True)
    watch = StallWatch(job.records, drivers, "server", clock=lambda: now[0])
    for at in (0.0, 500.0):
        now[0] = at
        watch.look()
    assert "as many other jobs as it may, which were there first" in job.records.job(job.job).stalled
    drivers.is_connected = False
    watch.look()
    assert job.records.job(job.job).stalled == "the scheduler does not answer"
    job.records.change_state(job.job, JobEvent.STARTED, who="test")
    assert job.records.job(job.job).stalled == "", "that was a step"
    drivers.is_connected, drivers.is_full = True, False
    now[0] = 5000.0
    watch.look()
    assert job.records.job(job.job).stalled == "", "somebody else drives it, and knows better"
