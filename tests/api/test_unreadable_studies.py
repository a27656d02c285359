"""Jobs whose study cannot be read, damaged or of a newer version: the others are seen, driven and repaired."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import time
from typing import TYPE_CHECKING

import pytest
from http_service import TOKEN, request_for
from stored_job import StoredJob
from test_reconcile import SETS, N, damage, names
from test_reconciler import Nobody, NoPool, reconciler

from modelops.cli.job_views import show_list, show_record
from modelops.client.http import Address, Http
from modelops.client.job import Job
from modelops.client.served import HttpSource
from modelops.client.server import recorded_jobs
from modelops.errors import RequestError, StudyDamagedError
from modelops.home import Home
from modelops.server.reconcile import Mismatch
from modelops.server.supervisor import Supervisor
from modelops.states import FINAL_JOB_STATES, JobEvent, JobState
from modelops.store.leases import FileLeases
from modelops.store.waiting_work import waiting_work
from modelops.study.ids import JobId, new_job_id
from modelops.study.index_line import IndexLine
from modelops.study.spec import FORMAT, JobSpec, RetryPolicy, encode_spec

if TYPE_CHECKING:
    from pathlib import Path

    from http_service import Client

    from modelops.server.service import JobService
    from modelops.store import Records

DEADLINE_S = 60.0
DAMAGED = "recorded in the database, is damaged: "
NEWER = f"written by a newer ModelOps (study format 99, this one reads up to {FORMAT}); upgrade modelops"


def add(records: Records, good: bytes) -> dict[JobId, str]:
    """Record jobs that cannot be read; return what is wrong with each."""
    told = json.loads(good)
    wrong = {
        b'{"format": 1': DAMAGED,
        b"\xff\xfe": DAMAGED,
        json.dumps({**told, "retry": {"backoff": None}}).encode(): DAMAGED,
        json.dumps({"format": 99, "what": "nobody knows"}).encode(): NEWER,
    }
    jobs = {new_job_id(): (data, why) for data, why in wrong.items()}
    for job, (data, _) in jobs.items():
        records.create_job(job, data, name="odd")
    return {job: why for job, (_, why) in jobs.items()}


def test_the_list_has_a_row_for_each_and_says_what_is_wrong(
    service: JobService, client: Client, bundle: str, server_home: Home
) -> None:
    good = client.submit(request_for(bundle))["job"]
    odd = add(service.records, service.records.job(JobId(good)).spec)
    views = {view["job"]: view for view in client.get("/v1/jobs")["jobs"]}
    assert set(views) == {good, *odd}
    assert views[good]["unreadable"] == ""
    for job, why in odd.items():
        assert why in views[JobId(job)]["unreadable"]
        assert views[JobId(job)]["state"] == "queued"
    recorded = recorded_jobs({"MODELOPS_HOME": str(server_home.data)}, (), None)  # as if no server ran
    assert {summary.job for summary in recorded} == {good, *odd}
    lines = {line.split()[0]: line for line in show_list(recorded)}
    for job, why in odd.items():
        assert why in lines[job]
    assert service.jobs_by_state() == {JobState.QUEUED: 1 + len(odd)}
    assert waiting_work(service.records).replicates == views[good]["size"]
    assert service.records.pools_of([JobId(good), *odd]) == dict.fromkeys([good, *odd], ())


def test_one_is_shown_and_what_needs_its_study_says_which_job_and_what_helps(
    service: JobService, client: Client, bundle: str, server_home: Home, tmp_path: Path
) -> None:
    good = client.submit(request_for(bundle))["job"]
    odd = add(service.records, service.records.job(JobId(good)).spec)
    http = Http(lambda: Address(client.url, TOKEN, "the test's server", "start it"))
    over_http = HttpSource(http, Home.at(tmp_path / "here"))
    for job, why in odd.items():
        for job_seen in (Job(job, source=over_http), Job(job, server_home)):
            status = job_seen.status()
            assert (status.state, status.counts, why in status.reason) == ("queued", {}, True)
            shown = show_record(job_seen, job_seen.events(), 8)
            assert shown[:2] == ["study:      cannot be read, see above", "events:"]
            assert "created" in shown[2]
        for event in (JobEvent.CANCEL_ASKED, JobEvent.STOPPED):
            service.records.change_state(job, event, who="me")
        served, stored = Job(job, source=over_http), Job(job, server_home)
        extend = functools.partial(served.extend, 9)
        for ask in (served.failures, served.log, served.resume, extend, stored.failures):
            with pytest.raises(
                (StudyDamagedError, RequestError), match=f"job {job}.*{re.escape(why)}"
            ) as raised:
                ask()
            assert "reconcile" not in str(raised.value)
    http.close()


def test_reconciling_names_each_and_repairs_the_others(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path, SETS, N)
    stored.run()
    odd = add(stored.records, stored.records.job(stored.job).spec)
    damage(stored, names(stored, "aggregates")[0], "flip")
    found = reconciler(stored, Nobody(stored)).run()
    assert {(finding.job, finding.kind) for finding in found} == {
        (stored.job, Mismatch.AGGREGATE_DAMAGED),
        *((job, Mismatch.STUDY_UNREADABLE) for job in odd),
    }
    for job, why in odd.items():
        assert [why in f.text for f in found if f.job == job] == [True]
        told = [event.kind for event in stored.records.events(job)]
        assert told == (["created"] if why is NEWER else ["created", "mismatch"])


def test_no_server_drives_them_and_a_cancel_ends_them(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path, SETS, N)
    stored.run()
    records = stored.records
    odd = list(add(records, records.job(stored.job).spec))
    for job in odd[1:-1]:
        records.ask_cancel(job, "me")
    supervisor = Supervisor(
        records=records,
        objects=stored.objects,
        cache=tmp_path / "cache",
        pool=NoPool(),
        leases=FileLeases(records, tmp_path / "leases"),
        who="us",
    )
    supervisor.start()
    with contextlib.ExitStack() as stack:
        stack.callback(supervisor.stop)
        deadline = time.monotonic() + DEADLINE_S
        while any(records.job(job).state not in FINAL_JOB_STATES for job in odd[1:]):
            assert time.monotonic() < deadline
            if records.job(odd[1]).state in FINAL_JOB_STATES:
                records.ask_cancel(odd[-1], "me")  # after it was looked at
            supervisor.wake()
            time.sleep(0.02)
    assert {records.job(job).state for job in odd[1:]} == {JobState.CANCELLED}
    assert [event.kind for event in records.events(odd[0])] == ["created"]


def test_no_number_is_written_that_json_does_not_hold() -> None:
    policy = RetryPolicy(max_delay=math.inf)
    spec = JobSpec(name="x", bundle="", bundle_name="", model="m:f", line=IndexLine.of(1, 1), retry=policy)
    with pytest.raises(RequestError, match=r"retry\.max_delay = inf of the study must be a finite number"):
        encode_spec(spec)
