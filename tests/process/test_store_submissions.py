"""Submissions and pictures of jobs, by one contract on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from modelops.errors import ConflictError, NotFoundError, QueueFullError
from modelops.states import JobEvent, JobState, ReplicateStatus
from modelops.store import AlreadyExistsError, Records, overview
from modelops.store.rows import Submission, new_row
from modelops.store.submissions import record_submission, refuse_when_full, submitted
from modelops.study.ids import AttemptId, JobId, new_job_id
from modelops.worker.messages import AggregateRef, SegmentRef

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from services import Postgres

    from modelops.store import JobRow


@pytest.fixture(params=["sqlite", "postgres"])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Records]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/modelops.db"
    else:
        server: Postgres = request.getfixturevalue("postgres")
        url = server.new_database()
    opened = Records.open(url)
    yield opened
    opened.close()


def fresh(job: JobId | None = None) -> JobRow:
    return new_row(job or new_job_id(), b"{}", name="n", bundle="b", at=datetime.now(UTC))


def submit(records: Records, key: str | None, digest: str = "d", limit: int = 100) -> JobRow:
    asked = Submission(key, digest) if key is not None else None
    return record_submission(records, fresh(), asked, who="me", why="a reason", limit=limit)


def test_one_key_from_sixteen_threads_is_one_job(records: Records) -> None:
    together, jobs = threading.Barrier(16), []

    def run() -> None:
        together.wait()
        jobs.append(submit(records, "key").job)

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs) == 16
    assert {row.job for row in records.jobs()} == set(jobs)
    assert len(set(jobs)) == 1
    (event,) = records.events(jobs[0])
    assert (event.who, event.kind, event.text) == ("me", "created", "a reason")


def test_a_key_stands_for_one_request_and_no_key_for_none(records: Records) -> None:
    first = submit(records, "key")
    assert submit(records, "key") == first
    assert submitted(records, Submission("key", "d")) == first
    assert submitted(records, Submission("another", "d")) is None
    with pytest.raises(ConflictError, match="'key' was used for another request"):
        submit(records, "key", "another digest")
    assert submit(records, None).job != submit(records, None).job
    assert len(records.jobs()) == 3


def test_an_id_that_is_taken_is_no_repeat(records: Records) -> None:
    row = submit(records, None)
    with pytest.raises(AlreadyExistsError, match=row.job):
        record_submission(records, fresh(row.job), None, who="me", why="", limit=100)


def test_jobs_that_have_ended_leave_room_in_the_queue(records: Records) -> None:
    rows = [submit(records, None, limit=2) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 jobs have not ended"):
        submit(records, None, limit=2)
    with pytest.raises(QueueFullError):
        refuse_when_full(records, 2)
    for event in (JobEvent.CANCEL_ASKED, JobEvent.STOPPED):
        records.change_state(rows[0].job, event, who="me")
    submit(records, None, limit=2)
    assert overview.n_unfinished(records) == 2
    assert overview.jobs_by_state(records) == {JobState.QUEUED: 2, JobState.CANCELLED: 1}


def test_a_picture_adds_up_what_is_committed(records: Records) -> None:
    job = submit(records, None).job
    epoch = records.take_lease(job, "d")
    for n in range(40):
        counts = {ReplicateStatus.SUCCEEDED: 2, ReplicateStatus.FAILED: n % 2, ReplicateStatus.CRASHED: 0}
        lo = 3 * n
        ref = SegmentRef(
            attempt=AttemptId(f"a{n}"), name=f"segments/a{n}.arrow", digest=f"{n:064x}", n_bytes=n,
            ranges=((lo, lo + 2 + n % 2),), counts=counts, pack=f"packs/a{n}.pack" if n == 7 else None, pack_bytes=70,
        )  # fmt: skip
        assert records.commit_segment(job, epoch, ref)
    stored = AggregateRef(
        attempt=AttemptId("g"), name="aggregates/g.arrow", digest="g", n_bytes=1, params=((0, 3),),
        counts={"succeeded": 2, "skipped": 1}, inputs=(),
    )  # fmt: skip
    assert records.commit_aggregates(job, epoch, stored)
    found = overview.picture(records, job)
    assert found.counts == {"failed": 20, "succeeded": 80}
    assert found.aggregates == {"skipped": 1, "succeeded": 2}
    assert found.row == records.job(job)
    assert overview.replicates_by_status(records) == {"failed": 20, "succeeded": 80}
    files = overview.committed_files(records, job)
    assert [f.name for f in files] == sorted(f.name for f in files)
    assert len(files) == 42
    assert overview.committed_file(records, job, "packs/a7.pack") == overview.StoredFile("packs/a7.pack", 70)
    assert overview.committed_file(records, job, "segments/a8.arrow") == overview.StoredFile(
        "segments/a8.arrow", 8, f"{8:064x}"
    )
    assert overview.committed_file(records, job, "segments/other") is None
    with pytest.raises(NotFoundError, match="no job job_none"):
        overview.picture(records, JobId("job_none"))


def test_pages_go_on_where_the_last_one_ended(records: Records) -> None:
    jobs = sorted((submit(records, None).job for _ in range(7)), reverse=True)
    seen: list[str] = []
    while page := overview.page_of_jobs(records, before=seen[-1] if seen else "", limit=3):
        seen += [picture.row.job for picture in page]
        submit(records, None)  # a new job is on no later page
    assert seen == jobs
    assert overview.page_of_jobs(records, states=[JobState.RUNNING], limit=10) == []
    found = overview.page_of_jobs(records, match=jobs[3].removeprefix("job_"), limit=10)
    assert [picture.row.job for picture in found] == [jobs[3]]
    assert overview.page_of_jobs(records, match="%", limit=10) == []
