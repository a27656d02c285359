"""Following the log of a job: each section once, a tenth of the time, and through times when its server is away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from typer.testing import CliRunner

from modelops.cli.jobs import jobs_app
from modelops.client.following import Following, Outages, job_to_follow
from modelops.client.http import Answer
from modelops.client.logs import new_text
from modelops.client.status import JobStatus
from modelops.errors import ServerUnreachableError
from modelops.states import JobState

if TYPE_CHECKING:
    from modelops.client.job import Job

RUNNING = JobStatus(JobState.RUNNING, {}, {}, "")
AWAY = JobStatus("unknown", {}, {}, "unknown since then", unknown_since=datetime(2026, 1, 1, tzinfo=UTC))


@dataclass
class Talking:
    """A job that has printed more whenever one looks; reading takes a second for each section there is."""

    id: str = "job_1"
    now: float = 0.0
    reading: float = 0.0
    n: int = 0

    @property
    def source(self) -> Talking:
        return self

    def log(self, param: Any, replicate: Any) -> str:
        self.now += self.n
        self.reading += self.n
        places = sorted(range(self.n), key=lambda i: i * 7 % 20)  # in the order of replicates, not of time
        return "".join(f"--- parameter set 0, replicate {i}\nsays {i}\n" for i in places)

    def wait_for_change(self, job: str, since: JobStatus | None, wait_s: float) -> JobStatus:
        self.n += 1  # something has changed whenever one looks
        return RUNNING if self.n < 20 else replace(RUNNING, state=JobState.SUCCEEDED)

    def wait_for_end(self, job: str, wait_s: float) -> JobStatus:
        self.now += wait_s
        return RUNNING

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def followed(self) -> Following:
        return Following(cast("Job", self), lambda _status: None, sleep=self.sleep, clock=lambda: self.now)


def test_what_is_new_is_told_once_and_a_tenth_of_the_time_is_spent_on_reading() -> None:
    job = Talking()
    told = list(new_text(job.followed(), None, None, follow=True, clock=lambda: job.now))
    for i in range(20):
        assert "".join(told).count(f"says {i}\n") == 1
    assert len(told) == 20
    before_the_last = job.now - job.n
    assert (job.reading - job.n) / before_the_last <= 0.1 + 1e-9


def test_who_does_not_follow_is_told_what_there_is_at_once() -> None:
    job = Talking()
    assert len(list(new_text(job.followed(), None, None, follow=False))) == 1


@dataclass
class Restarted(Talking):
    """A job whose server goes away while its log is read, and is back after a while; the job has ended then."""

    reads: int = 0
    looks_away: int = 0

    def log(self, param: Any, replicate: Any) -> str:
        self.reads += 1
        if self.reads == 2:
            self.looks_away = 5
        if self.looks_away:
            self.now += 10  # as long as one question is repeated
            raise ServerUnreachableError("the server", "it is away", "wait")
        return "--- parameter set 0, replicate 0\nsays 0\n" * min(self.reads, 2)

    def wait_for_change(self, job: str, since: JobStatus | None, wait_s: float) -> JobStatus:
        if self.looks_away:
            self.looks_away -= 1
            return AWAY
        waits = since is not None and since.unknown_since is None
        assert self.reads < 2 or not waits, "it has ended: nobody waits for a change any more"
        return RUNNING if self.reads < 2 else replace(RUNNING, state=JobState.SUCCEEDED)


def test_a_log_is_followed_to_the_end_of_the_job_through_a_restart_of_its_server() -> None:
    job, outages, said = Restarted(), Outages(), list[str]()
    following = Following(
        cast("Job", job), lambda status: said.append(outages.line(status)), sleep=job.sleep, clock=lambda: job.now
    )  # fmt: skip
    told = "".join(new_text(following, None, None, follow=True, clock=lambda: job.now))
    assert told.count("says 0\n") == 2
    assert job.now < 30, "a reading that came to nothing counts as none"
    assert list(filter(None, said)) == ["unknown since then; connecting again", "connected again"]


@dataclass
class Absentee:
    """A job whose server is away for as many questions, and has cancelled it when it is back."""

    id: str = "job_1"
    looks_away: int = 200
    cancelled: bool = False

    @property
    def source(self) -> Absentee:
        return self

    def cancel(self, *, at_once: bool) -> None:
        self.cancelled = True

    def wait_for_end(self, job: str, wait_s: float) -> JobStatus:
        self.looks_away -= 1
        return AWAY if self.looks_away > 0 else replace(RUNNING, state=JobState.CANCELLED)

    wait = property()  # gives up after a minute


def test_who_cancels_and_waits_is_told_how_it_ended_however_long_the_server_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Absentee()
    monkeypatch.setattr("modelops.cli.jobs._steerable", lambda _text: job)
    monkeypatch.setattr("modelops.client.following.PAUSE_S", 0.0)
    said = CliRunner().invoke(jobs_app, ["cancel", job.id, "--wait"])
    assert (said.exit_code, job.cancelled, job.looks_away) == (0, True, 0)
    assert said.stdout.startswith("job_1: cancelled")
    assert said.stderr == "unknown since then; connecting again\nconnected again\n"


def test_a_server_that_is_away_for_longer_than_it_may_is_given_up() -> None:
    job = Restarted(looks_away=1000)
    following = Following(
        cast("Job", job), lambda _status: None, patience_s=60, sleep=job.sleep, clock=lambda: job.now
    )
    with pytest.raises(ServerUnreachableError, match="away for 60"):
        following.ask(lambda: job.log(None, None))


class Absent:
    """A server that does not answer two times, and then knows a job."""

    def __init__(self, job: str) -> None:
        self.http, self._job, self._asked = self, job, 0

    def get(self, path: str, query: Any, **_: Any) -> Answer:
        self._asked += 1
        if self._asked < 3:
            raise ServerUnreachableError("the server", "it is away", "wait")
        return Answer(200, {}, msgspec.json.encode({"jobs": [{"job": self._job, "state": "running"}]}))


def test_a_part_of_an_id_is_followed_as_a_whole_one_while_the_server_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, said = "job_" + "a" * 32, list[str]()
    source = Absent(whole)
    monkeypatch.setattr("modelops.client.server.running", lambda _environ: source)
    monkeypatch.setattr("modelops.client.following.PAUSE_S", 0.0)
    assert job_to_follow("aaaa", said.append).id == whole
    assert said == ["the server cannot be reached: it is away; wait; connecting again", "connected again"]
