"""A table of a job whose segment is damaged: the server repairs and answers, with a status for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from stored_job import StoredJob
from test_reconcile import SETS, N, damage, names
from test_reconciler import Nobody, reconciler

from modelops.errors import IntegrityError
from modelops.home import Home
from modelops.server.service import JobService
from modelops.store.results import replicates_table

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.server.views import Live
    from modelops.study.ids import JobId


class Idle(Nobody):
    """Drivers as a service sees them."""

    def wake(self) -> None:
        pass

    def abandon(self, job: JobId, who: str) -> None:
        pass

    def view(self, job: JobId) -> Live | None:
        return None

    def workers(self) -> dict[str, int]:
        return {}

    def connected(self) -> bool:
        return True


def test_a_damaged_segment_is_repaired_and_what_is_left_is_told(tmp_path: Path) -> None:
    job = StoredJob(tmp_path, SETS, N)
    job.run()
    (lost, *_) = job.records.segments(job.job)
    n_lost = sum(hi - lo for lo, hi in lost.ranges)
    damage(job, names(job, "segments")[0], "flip")
    driving = Idle(job)
    service = JobService(job.records, job.objects, Home.at(tmp_path), driving)
    with pytest.raises(IntegrityError):
        service.answer(job.job, replicates_table)
    service.reconciler = reconciler(job, driving)
    statuses = service.answer(job.job, replicates_table)["status"].to_pylist()
    assert statuses.count("pending") == n_lost
    assert len(statuses) == job.spec.line.size
    assert [e.kind for e in job.records.events(job.job)].count("mismatch") == 1
