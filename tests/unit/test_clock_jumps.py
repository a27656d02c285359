"""A clock that jumps by days, both ways, while a job runs: nothing is lost, and the story stays in order."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from stored_job import StoredJob

from modelops.states import JobEvent, JobState
from modelops.store.contents import JobContents
from modelops.store.results import replicates_table

if TYPE_CHECKING:
    from pathlib import Path

SETS = [{"a": a} for a in range(3)]


def test_a_clock_that_jumps_changes_neither_results_nor_the_order_of_events(tmp_path: Path) -> None:
    steady = StoredJob(tmp_path / "steady", SETS, 8)
    steady.run()
    jumps = random.Random(1)

    def clock() -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=jumps.uniform(-900, 900))

    job = StoredJob(tmp_path / "jumping", SETS, 8)
    job.records._clock = clock
    job.run(limit=11)
    assert job.records.job(job.job).state is JobState.CANCELLED
    job.records.change_state(job.job, JobEvent.RESUMED, who="test")
    job.run()
    assert job.records.job(job.job).state is JobState.SUCCEEDED
    assert job.files() == steady.files()
    events = job.records.events(job.job)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert (events[0].kind, events[-1].kind) == ("created", "all_succeeded")
    assert any(later.at < earlier.at for earlier, later in itertools.pairwise(events)), "it did jump"
    assert job.records.settled(job.job)
    assert job.n_ran == job.spec.line.size
    table = replicates_table(JobContents.of(job.objects, job.records, job.job))
    assert set(table["status"].to_pylist()) == {"succeeded"}
