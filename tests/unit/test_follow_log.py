"""Following the log of a job: each section once, and reading it takes a tenth of the time, however long it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from modelops.client.logs import new_text
from modelops.client.status import JobStatus
from modelops.states import JobState

if TYPE_CHECKING:
    from modelops.client.job import Job

RUNNING = JobStatus(JobState.RUNNING, {}, {}, "")


@dataclass
class Talking:
    """A job that has printed more whenever one looks; reading takes a second for each section there is."""

    id: str = "job_1"
    now: float = 0.0
    reading: float = 0.0
    n: int = 0
    waits: list[float] = field(default_factory=list)

    @property
    def source(self) -> Talking:
        return self

    def status(self) -> JobStatus:
        self.n += 1
        return RUNNING if self.n < 20 else replace(RUNNING, state=JobState.SUCCEEDED)

    def log(self, param: Any, replicate: Any) -> str:
        self.now += self.n
        self.reading += self.n
        places = sorted(range(self.n), key=lambda i: i * 7 % 20)  # in the order of replicates, not of time
        return "".join(f"--- parameter set 0, replicate {i}\nsays {i}\n" for i in places)

    def wait_for_change(self, job: str, since: JobStatus, wait_s: float) -> JobStatus:
        return RUNNING  # something has changed already

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_what_is_new_is_told_once_and_a_tenth_of_the_time_is_spent_on_reading() -> None:
    job = Talking()
    told = list(new_text(cast("Job", job), None, None, follow=True, sleep=job.sleep, clock=lambda: job.now))
    for i in range(20):
        assert "".join(told).count(f"says {i}\n") == 1
    assert len(told) == 20
    before_the_last = job.now - job.n
    assert (job.reading - job.n) / before_the_last <= 0.1 + 1e-9


def test_who_does_not_follow_is_told_what_there_is_at_once() -> None:
    job = Talking()
    assert len(list(new_text(cast("Job", job), None, None, follow=False, sleep=job.sleep))) == 1
