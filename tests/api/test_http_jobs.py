"""Jobs over HTTP: submitted, found, watched, cancelled, begun again, read."""

from __future__ import annotations

import hashlib
import io
import re
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pytest
from http_service import Client, Drivers, Seen, SeenReplicate, request_for, run_some, serving

from modelops.cli.job_views import show_list, show_status
from modelops.client.served import Summary
from modelops.server.http import waiting
from modelops.server.live import LivePool
from modelops.states import JobEvent, JobState, ReplicateStatus
from modelops.store import overview
from modelops.store.parameters import pour_parameters
from modelops.study.ids import JobId
from modelops.study.pools import Aliases, Membership
from modelops.study.ranges import EMPTY, Ranges

if TYPE_CHECKING:
    from modelops.server.service import JobService

EU = Membership("EU_West", {"region": "eu"})
GOOD, BAD = ReplicateStatus.SUCCEEDED, ReplicateStatus.FAILED
ALL_GOOD = dict.fromkeys(range(12), GOOD)


def detail(answer: Any, status: int) -> str:
    problem = answer.json()
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json")
    assert problem["status"] == status
    return str(problem["detail"])


def test_a_submitted_job_is_found_and_woken(client: Client, bundle: str, drivers: Drivers) -> None:
    answer = client("POST", "/v1/jobs", json=request_for(bundle), headers={"ModelOps-User": "ada@here"})
    job = answer.json()["job"]
    assert (answer.status, answer.headers["Location"]) == (201, f"/v1/jobs/{job}")
    assert drivers.woken == 1
    status = client.get(f"/v1/jobs/{job}")
    assert (status["state"], status["size"], status["counts"]) == ("queued", 12, {"pending": 12})
    assert (status["n_params"], status["n_replicates"], status["n_workers"]) == (3, 4, 1)
    assert [page["job"] for page in client.get("/v1/jobs")["jobs"]] == [job]
    (created,) = client.get(f"/v1/jobs/{job}/events")["events"]
    assert (created["who"], created["kind"], created["number"]) == ("ada@here", "created", 1)
    assert client.get(f"/v1/jobs/{job}/spec")["model"] == "model:simulate"
    assert client.get(f"/v1/jobs/{job}/parameters/2")["canonical"] == '{"x":2}'


def test_counts_are_of_what_is_committed_and_of_what_runs(
    client: Client, service: JobService, bundle: str, drivers: Drivers
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD, 1: GOOD, 2: BAD})
    drivers.seen[job] = Seen(
        Ranges([(3, 7)]),
        eta=12.5,
        progress=[SeenReplicate(5, 0.25, {"day": 3})],
        waiting_for="the disk is full",
        doing="installing 3 packages",
    )
    status = client.get(f"/v1/jobs/{job}")
    assert status["counts"] == {"succeeded": 2, "failed": 1, "running": 4, "pending": 5}
    assert (status["state"], status["driven"], status["eta"]) == ("running", True, 12.5)
    assert status["progress"] == [{"param": 1, "replicate": 1, "fraction": 0.25, "values": {"day": 3}}]
    assert status["waiting_for"] == "the disk is full"
    assert status["doing"] == "installing 3 packages"
    drivers.seen.clear()  # its driver is gone, or in another server
    status = client.get(f"/v1/jobs/{job}")
    assert status["counts"] == {"succeeded": 2, "failed": 1, "pending": 9}
    assert status["driven"] is False
    # Another server, or a local run, may drive it: it is not said to be about to be taken up.
    assert status["doing"].startswith("this server does not drive it, or not yet; which of the pending")


def test_nothing_is_running_in_a_job_that_has_ended_while_its_driver_still_says_so(
    client: Client, service: JobService, bundle: str, drivers: Drivers
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD, 1: BAD}, end=JobEvent.SOME_SUCCEEDED)
    drivers.seen[job] = Seen(
        Ranges([(3, 7)]),
        eta=12.5,
        progress=[SeenReplicate(5, 0.25, {"day": 3})],
        pools=[LivePool("eu-west", 2, 3, running=4)],
    )
    (listed,) = client.get("/v1/jobs")["jobs"]
    for status in (client.get(f"/v1/jobs/{job}"), listed):
        assert status["counts"] == {"succeeded": 1, "failed": 1, "not_run": 10}
        assert (status["state"], status["eta"], status["progress"]) == ("partial", None, [])
        assert not any("running" in pool["counts"] for pool in status["pools"])
    contents = service.contents(job)
    assert (contents.rest, contents.running) == ("not_run", EMPTY)


def test_a_pool_without_workers_is_seen_in_status_list_and_show(
    client: Client, service: JobService, bundle: str, drivers: Drivers
) -> None:
    job = client.submit(request_for(bundle, format=4, pools=("eu-west", "us")))["job"]
    run_some(service, job, {0: GOOD, 1: BAD})
    since = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    drivers.seen[job] = Seen(
        Ranges([(3, 7)]),
        pools=[LivePool("eu-west", 2, 3, running=4), LivePool("us", 0, 0, 0, waiting_since=since)],
    )
    pools = client.get(f"/v1/jobs/{job}")["pools"]
    nothing = {"asked": True, "workers": 0, "slots": 0, "counts": {}}
    assert pools == [
        {
            "name": "eu-west",
            "asked": True,
            "workers": 2,
            "slots": 3,
            "counts": {"running": 4},
            "waiting_since": None,
        },
        {"name": "us", **nothing, "waiting_since": "2026-01-02T03:04:05Z"},
    ]
    summary = msgspec.convert(client.get("/v1/jobs")["jobs"][0], Summary, strict=False)
    assert any("running, waits for a pool" in line for line in show_list([summary]))
    shown = show_status(job, summary.status())
    assert "pool:       eu-west: 2 workers; 4 running" in shown
    assert f"pool:       us: waits for a worker since {since.astimezone():%Y-%m-%d %H:%M:%S}" in shown
    assert [pool.name for pool in summary.status().waiting_pools] == ["us"]
    del drivers.seen[job]  # driven by nobody: nothing is known of workers
    assert [pool["waiting_since"] for pool in client.get(f"/v1/jobs/{job}")["pools"]] == [None, None]


@pytest.mark.parametrize(
    ("form", "pools", "status"), [(3, ["us"], 409), (4, ["u s"], 422), (4, ["us", "US"], 422)]
)
def test_pools_that_cannot_be_are_refused(
    client: Client, bundle: str, form: int, pools: list[str], status: int
) -> None:
    request = request_for(bundle, format=form, pools=tuple(pools))
    assert "pool" in detail(client("POST", "/v1/jobs", json=request), status)


def test_counts_of_an_ended_job_say_what_did_not_run(
    client: Client, service: JobService, bundle: str
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD, 1: BAD}, end=JobEvent.SOME_SUCCEEDED)
    status = client.get(f"/v1/jobs/{job}")
    assert (status["state"], status["counts"]) == ("partial", {"succeeded": 1, "failed": 1, "not_run": 10})


def test_jobs_are_paged_newest_first_and_chosen_by_state_and_id(
    client: Client, service: JobService, bundle: str
) -> None:
    jobs = [client.submit(request_for(bundle))["job"] for _ in range(5)]
    run_some(service, jobs[2], ALL_GOOD, end=JobEvent.ALL_SUCCEEDED)
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = client.get("/v1/jobs?limit=2" + (f"&cursor={cursor}" if cursor else ""))
        assert len(page["jobs"]) <= 2
        seen += [job["job"] for job in page["jobs"]]
        cursor = page["next"]
    assert seen == jobs[::-1]
    found = client.get("/v1/jobs?state=succeeded&state=failed")["jobs"]
    assert [job["job"] for job in found] == [jobs[2]]
    for part in (jobs[1][:-1], jobs[1].removeprefix("job_"), jobs[1][-8:]):
        assert jobs[1] in [job["job"] for job in client.get(f"/v1/jobs?match={part}")["jobs"]]
    assert client.get("/v1/jobs?match=_")["jobs"] == []  # no wildcard of SQL


def test_ten_watches_are_answered_when_something_changes(service: JobService, bundle: str) -> None:
    with serving(service, longest_wait_s=600) as client:  # so none is answered because its time is over
        status = client.submit(request_for(bundle))
        job, answers = status["job"], []

        def watch() -> None:
            answers.append(client.get(f"/v1/jobs/{job}?wait_s=60&tag={status['tag']}"))

        watchers = [threading.Thread(target=watch) for _ in range(10)]
        for watcher in watchers:
            watcher.start()
        run_some(service, job, {0: GOOD})
        for watcher in watchers:
            watcher.join(60)
    assert waiting.POLL_S <= 1  # so that a fact is visible within 5 s, whoever wrote it
    assert len(answers) == 10
    assert all(answer["tag"] != status["tag"] for answer in answers)
    assert {answer["state"] for answer in answers} <= {"queued", "preparing", "running"}


def test_who_waits_when_the_server_ends_is_told_that_it_is_away(
    service: JobService, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, join, answers = threading.Event(), waiting.Waiting._join, list[Any]()

    def noted(self: waiting.Waiting, *given: Any) -> Any:
        waits.set()
        return join(self, *given)

    monkeypatch.setattr(waiting.Waiting, "_join", noted)
    with serving(service, longest_wait_s=600) as client:
        job = client.submit(request_for(bundle))["job"]
        watcher = threading.Thread(
            target=lambda: answers.append(client("GET", f"/v1/jobs/{job}?wait_s=60&ended=true"))
        )
        watcher.start()
        assert waits.wait(60)
    watcher.join(60)
    (answer,) = answers
    assert (answer.status, answer.json()["error"]) == (503, "ClusterError")
    assert "is ending" in answer.json()["detail"]


def test_who_waits_for_the_end_is_answered_by_nothing_else(service: JobService, bundle: str) -> None:
    with serving(service, longest_wait_s=600) as client:
        job, answers = client.submit(request_for(bundle))["job"], []
        watcher = threading.Thread(
            target=lambda: answers.append(client.get(f"/v1/jobs/{job}?wait_s=60&ended=true"))
        )
        watcher.start()
        run_some(service, job, {0: GOOD})
        assert client.get(f"/v1/jobs/{job}?wait_s=0&ended=true")["state"] == "running"
        assert not answers
        for event in (JobEvent.CANCEL_ASKED, JobEvent.STOPPED):
            service.records.change_state(JobId(job), event, who="me")
        watcher.join(60)
    assert [answer["state"] for answer in answers] == ["cancelled"]


def test_a_watch_of_what_does_not_change_ends_and_says_so(service: JobService, bundle: str) -> None:
    with serving(service, longest_wait_s=0.1) as client:
        status = client.submit(request_for(bundle))
        assert client.get(f"/v1/jobs/{status['job']}?wait_s=60&tag={status['tag']}")["tag"] == status["tag"]
        assert client.get(f"/v1/jobs/{status['job']}/events?wait_s=60&after=1") == {"events": [], "next": 1}


def test_events_are_read_on_and_waited_for(client: Client, service: JobService, bundle: str) -> None:
    job = client.submit(request_for(bundle))["job"]
    service.records.add_event(JobId(job), "me", "note", "second", {"a": 1})
    page = client.get(f"/v1/jobs/{job}/events?limit=1")
    assert (len(page["events"]), page["next"]) == (1, 1)
    later = threading.Timer(0.1, lambda: service.records.add_event(JobId(job), "me", "note", "third"))
    later.start()
    page = client.get(f"/v1/jobs/{job}/events?after=2&wait_s=30")
    later.join()
    assert [event["text"] for event in page["events"]] == ["third"]


def test_a_cancel_is_recorded_heard_and_may_be_repeated(
    client: Client, service: JobService, bundle: str, drivers: Drivers
) -> None:
    job = client.submit(request_for(bundle))["job"]
    for _ in range(3):
        answer = client("POST", f"/v1/jobs/{job}/cancel", headers={"ModelOps-User": "ada"})
        assert (answer.status, answer.json()["cancel_asked"]) == (200, True)
    assert service.records.cancel_asked_by(JobId(job)) == "ada"
    assert drivers.woken == 4
    assert [e["kind"] for e in client.get(f"/v1/jobs/{job}/events")["events"]] == ["created", "cancel_wanted"]


def test_a_driver_hears_that_nothing_is_to_be_waited_for_and_only_if_it_was_asked(
    client: Client, service: JobService, bundle: str
) -> None:
    job = client.submit(request_for(bundle))["job"]
    drivers = service.supervisor
    assert isinstance(drivers, Drivers)
    for query, heard in (("", 0), ("", 0), ("?at_once=false", 0), ("?at_once=true", 1)):
        assert client("POST", f"/v1/jobs/{job}/cancel{query}").status == 200
        assert drivers.abandoned == [job] * heard, query
    assert "true or false" in detail(client("POST", f"/v1/jobs/{job}/cancel?at_once=1"), 400)


def test_an_ended_job_cannot_be_cancelled_unless_it_is(
    client: Client, service: JobService, bundle: str
) -> None:
    ended, cancelled = (client.submit(request_for(bundle))["job"] for _ in range(2))
    run_some(service, ended, ALL_GOOD, end=JobEvent.ALL_SUCCEEDED)
    assert "is succeeded already; there is nothing to cancel" in detail(
        client("POST", f"/v1/jobs/{ended}/cancel"), 409
    )
    for event in (JobEvent.CANCEL_ASKED, JobEvent.STOPPED):
        service.records.change_state(JobId(cancelled), event, who="me")
    assert client("POST", f"/v1/jobs/{cancelled}/cancel").json()["state"] == "cancelled"


def test_resume_runs_what_is_missing_and_begins_once_per_key(
    client: Client, service: JobService, bundle: str, drivers: Drivers
) -> None:
    job = client.submit(request_for(bundle))["job"]
    assert f"job {job} is queued" in detail(client("POST", f"/v1/jobs/{job}/resume"), 409)
    run_some(service, job, {0: GOOD, 1: BAD}, end=JobEvent.SOME_SUCCEEDED)
    woken = drivers.woken
    for _ in range(2):
        answer = client("POST", f"/v1/jobs/{job}/resume", headers={"Idempotency-Key": "again"})
        assert (answer.status, answer.json()["run"], answer.json()["state"]) == (200, 2, "queued")
    assert drivers.woken == woken + 1
    assert client.get(f"/v1/jobs/{job}")["counts"] == {"succeeded": 1, "failed": 1, "pending": 10}
    assert "was used for another request" in detail(
        client("POST", f"/v1/jobs/{job}/resume", json={"failed": True}, headers={"Idempotency-Key": "again"}),
        409,
    )


def test_a_job_of_which_nothing_is_missing_is_not_resumed(
    client: Client, service: JobService, bundle: str
) -> None:
    job = client.submit(request_for(bundle, aggregates=()))["job"]
    run_some(service, job, {**ALL_GOOD, 3: BAD}, end=JobEvent.SOME_SUCCEEDED)
    assert "nothing is missing" in detail(client("POST", f"/v1/jobs/{job}/resume"), 409)
    answer = client("POST", f"/v1/jobs/{job}/resume", json={"failed": True})
    assert answer.json()["counts"] == {"succeeded": 11, "pending": 1}


def test_extend_runs_only_what_is_new(client: Client, service: JobService, bundle: str) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, ALL_GOOD, end=JobEvent.ALL_SUCCEEDED)
    more = {"replicates": 6, "parameters": [{"x": 99}]}
    for _ in range(2):
        answer = client("POST", f"/v1/jobs/{job}/extend", json=more, headers={"Idempotency-Key": "more"})
        assert (answer.status, answer.json()["size"], answer.json()["n_params"]) == (200, 24, 4)
    assert client.get(f"/v1/jobs/{job}")["counts"] == {"succeeded": 12, "pending": 12}
    assert client.get(f"/v1/jobs/{job}/parameters/3")["canonical"] == '{"x":99}'
    run_some(service, job, dict.fromkeys(range(12, 24), GOOD), end=JobEvent.ALL_SUCCEEDED)
    assert "nothing would be added" in detail(
        client("POST", f"/v1/jobs/{job}/extend", json={"replicates": 6}), 409
    )


def test_many_parameter_sets_are_added_by_a_file(client: Client, service: JobService, bundle: str) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, ALL_GOOD, end=JobEvent.ALL_SUCCEEDED)
    file = io.BytesIO()
    pour_parameters(file, (b'{"x":%d}' % i for i in range(100, 600)))
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    more = {"parameters_sha256": digest}
    assert "upload the file" in detail(client("POST", f"/v1/jobs/{job}/extend", json=more), 404)
    assert client("PUT", f"/v1/parameters/{digest}", body=file.getvalue()).status == 201
    assert client("POST", f"/v1/jobs/{job}/extend", json=more).json()["n_params"] == 503
    both = {"parameters": [], **more}
    run_some(service, job, dict.fromkeys(range(12, 2012), GOOD), end=JobEvent.ALL_SUCCEEDED)
    assert "not both" in detail(client("POST", f"/v1/jobs/{job}/extend", json=both), 409)


TABLES = ("replicates", "aggregates", "failures", "attempts")


@pytest.mark.parametrize("final", [False, True])
def test_tables_are_read_during_and_after_the_job(
    client: Client, service: JobService, bundle: str, final: bool
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD, 1: GOOD, 2: BAD}, end=JobEvent.SOME_SUCCEEDED if final else None)
    tables = {name: client("GET", f"/v1/jobs/{job}/tables/{name}") for name in TABLES}
    assert {answer.headers["Content-Type"] for answer in tables.values()} == {
        "application/vnd.apache.arrow.stream"
    }
    read = {name: pa.ipc.open_stream(answer.data).read_all() for name, answer in tables.items()}
    rest = "not_run" if final else "pending"
    assert read["replicates"]["status"].to_pylist() == ["succeeded", "succeeded", "failed", *[rest] * 9]
    assert read["replicates"]["z"].to_pylist()[:2] == [0, 1]
    assert len(read["failures"]) == (10 if final else 1)
    assert len(read["aggregates"]) == 3
    assert detail(client("GET", f"/v1/jobs/{job}/tables/others"), 404)


def test_an_output_comes_as_it_is_stored_also_a_large_one(
    client: Client, service: JobService, bundle: str
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD, 1: GOOD, 2: BAD})
    id_ = client.get(f"/v1/jobs/{job}/parameters/0")["param_id"]
    for param in ("0", id_):
        small = msgspec.msgpack.decode(client("GET", f"/v1/jobs/{job}/output?param={param}&replicate=0").data)
        assert small == {"returned_dict": True, "outputs": [["z", "json", b"0"], ["y", "bytes", b"1.5"]]}
    large = msgspec.msgpack.decode(client("GET", f"/v1/jobs/{job}/output?param=0&replicate=1&name=y").data)
    assert large == {"returned_dict": True, "outputs": [["y", "bytes", b"1" * 100_000]]}
    for query, says in [
        ("param=0&replicate=2", "is failed"),
        ("param=0&replicate=3", "is pending"),
        ("param=0&replicate=4", "has no replicate 4"),
        ("param=0&replicate=0&name=x", "there is no output 'x'; there are: z, y"),
        (f"param={'0' * 32}&replicate=0", "no parameter set with the id"),
    ]:
        assert says in detail(client("GET", f"/v1/jobs/{job}/output?{query}"), 404)
    assert "has no aggregate" in detail(client("GET", f"/v1/jobs/{job}/aggregate?param=0"), 404)


def test_the_log_of_what_is_not_there_is_refused_and_that_of_what_prints_nothing_is_empty(
    client: Client, service: JobService, bundle: str
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD})
    assert client("GET", f"/v1/jobs/{job}/log?param=2&replicate=3").data == b""
    for query, says in [
        ("param=99", f"job {job} has no parameter set 99: it has 3 parameter sets, numbered from 0"),
        ("param=3&replicate=0", "has no parameter set 3"),
        (f"param={'0' * 32}", f"has no parameter set {'0' * 32}: it has 3"),
        ("param=0&replicate=4", "has no replicate 4 of parameter set 0: they are numbered from 0"),
    ]:
        assert says in detail(client("GET", f"/v1/jobs/{job}/log?{query}"), 404)


def test_files_are_those_that_are_committed_and_have_the_digests_that_are_said(
    client: Client, service: JobService, bundle: str
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD, 1: GOOD}, chunk=1)
    service.objects.put_new(f"v1/jobs/{job}/segments/orphan.arrow", b"nobody committed this")
    listed = client.get(f"/v1/jobs/{job}/files")
    assert (len(listed["files"]), listed["final"], listed["next"]) == (
        3,
        False,
        None,
    )  # two segments, one pack
    run_some(service, job, {}, end=JobEvent.SOME_SUCCEEDED)
    listed = client.get(f"/v1/jobs/{job}/files")
    names = [file["name"] for file in listed["files"]]
    assert listed["final"]
    assert names == sorted(names)
    assert {f"results/{n}.parquet" for n in ("replicates", "aggregates", "attempts")} < set(names)
    for file in listed["files"]:
        data = client("GET", f"/v1/jobs/{job}/files/{file['name']}").data
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["n_bytes"], file["sha256"])
    paged, cursor = [], ""
    while cursor is not None:
        page = client.get(f"/v1/jobs/{job}/files?limit=2&cursor={cursor}")
        paged += [file["name"] for file in page["files"]]
        cursor = page["next"]
    assert paged == names
    for name in (
        "segments/orphan.arrow",
        "study.json",
        "results/other",
        "%2e%2e/study.json",
    ):
        assert "has no file" in detail(client("GET", f"/v1/jobs/{job}/files/{name}"), 404)


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-9", slice(0, 10)), ("bytes=5-", slice(5, None)), ("bytes=-7", slice(-7, None)),
        ("bytes=0-99999999999", slice(0, None)), ("bytes=10-10", slice(10, 11)),
    ],
)  # fmt: skip
def test_a_part_of_a_file_is_sent_when_asked_for(
    client: Client, service: JobService, bundle: str, header: str, part: slice
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD, 1: GOOD})
    (file,) = [f for f in client.get(f"/v1/jobs/{job}/files")["files"] if f["name"].startswith("packs")]
    path = f"/v1/jobs/{job}/files/{file['name']}"
    whole = client("GET", path)
    answer = client("GET", path, headers={"Range": header})
    lo, hi, _ = part.indices(len(whole.data))
    assert (answer.status, answer.data) == (206, whole.data[part])
    assert answer.headers["Content-Range"] == f"bytes {lo}-{hi - 1}/{len(whole.data)}"
    assert answer.headers["ETag"] == f'"{file["sha256"]}"'
    changed = client("GET", path, headers={"Range": header, "If-Range": '"another"'})
    assert (changed.status, changed.data) == (200, whole.data)


def test_a_range_behind_the_last_byte_is_refused_and_one_of_another_file_passed_over(
    client: Client, service: JobService, bundle: str
) -> None:
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD})
    (file,) = client.get(f"/v1/jobs/{job}/files")["files"]
    path = f"/v1/jobs/{job}/files/{file['name']}"
    answer = client("GET", path, headers={"Range": f"bytes={file['n_bytes']}-"})
    assert "lies outside" in detail(answer, 416)
    assert answer.headers["Content-Range"] == f"bytes */{file['n_bytes']}"
    passed_over = (
        "bytes=1-2,5-6",
        "lines=1-2",
        "bytes=9-2",
        "nonsense",
        "bytes=-",
        "bytes=-0",
        "bytes=99999999-",
    )
    for header in passed_over:
        assert client("GET", path, headers={"Range": header}).status == 200
    head = client("HEAD", path)
    assert (head.status, head.data, head.headers["Content-Length"]) == (200, b"", str(file["n_bytes"]))


def test_what_does_not_exist_is_named(client: Client, bundle: str) -> None:
    job = client.submit(request_for(bundle))["job"]
    for path in ("", "/events", "/spec", "/tables/replicates", "/files", "/log", "/lock", "/parameters/0"):
        assert "there is no job job_no" in detail(client("GET", f"/v1/jobs/job_no{path}"), 404)
    for act in ("cancel", "resume", "extend"):
        answer = client("POST", f"/v1/jobs/job_no/{act}", json={})
        assert "there is no job job_no" in detail(answer, 404)
    assert "has no parameter set 3" in detail(client("GET", f"/v1/jobs/{job}/parameters/3"), 404)
    assert "not resolved yet" in detail(client("GET", f"/v1/jobs/{job}/lock"), 404)


def test_metrics_count_what_is_stored(
    client: Client, service: JobService, bundle: str, drivers: Drivers
) -> None:
    drivers.pools = {"tls://10.0.0.1:4000": EU}
    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {0: GOOD, 1: BAD, 2: GOOD}, chunk=1)
    client("GET", "/v1/jobs/nothing")
    lines = client("GET", "/metrics").data.decode().splitlines()
    for line in (
        'modelops_replicates_total{status="succeeded"} 2',
        'modelops_replicates_total{status="failed"} 1',
        'modelops_replicates_total{status="crashed"} 0',
        'modelops_jobs{state="running"} 1',
        'modelops_jobs{state="queued"} 0',
        "modelops_workers 1",
        "modelops_worker_slots 2",
        'modelops_pool_workers{pool="eu-west"} 1',
        'modelops_http_requests_total{method="GET",status="4xx"} 1',
    ):
        assert line in lines
    assert not [line for line in lines if job in line]


def test_the_server_says_what_it_is_connected_to(
    client: Client, service: JobService, drivers: Drivers, bundle: str
) -> None:
    client.submit(request_for(bundle))
    server = client.get("/v1/server")
    worker = {"address": "tls://10.0.0.1:4000", "slots": 2}
    assert server["workers"] == [{**worker, "pool": "", "labels": {}}]
    drivers.pools = {"tls://10.0.0.1:4000": EU}
    assert client.get("/v1/server")["workers"] == [{**worker, "pool": "EU_West", "labels": {"region": "eu"}}]
    assert (server["scheduler"], server["database"], server["protocol"]) == ("connected", "ok", 1)
    assert server["jobs"] == {"queued": 1}
    drivers.scheduler, drivers.pool = False, {}
    server = client.get("/v1/server")
    assert (server["scheduler"], server["workers"]) == ("away", [])
    assert overview.n_unfinished(service.records) == 1
    assert JobState.QUEUED in service.jobs_by_state()


def test_metrics_say_how_much_waits(client: Client, service: JobService, bundle: str) -> None:
    def metric(name: str) -> float:
        text = client("GET", "/metrics").data.decode()
        (line,) = [x for x in text.splitlines() if x.startswith(f"{name} ")]
        return float(line.split()[1])

    assert (metric("modelops_replicates_pending"), metric("modelops_queue_wait_seconds")) == (0, 0)
    job = client.submit(request_for(bundle))["job"]
    other = client.submit(request_for(bundle))["job"]
    assert metric("modelops_replicates_pending") == 24
    assert metric("modelops_queue_wait_seconds") > 0
    run_some(service, job, dict.fromkeys(range(5), ReplicateStatus.SUCCEEDED))
    assert metric("modelops_replicates_pending") == 19
    run_some(service, job, dict.fromkeys(range(5, 12), ReplicateStatus.FAILED), end=JobEvent.SOME_SUCCEEDED)
    assert metric("modelops_replicates_pending") == 12
    assert metric("modelops_jobs_stalled") == 0
    service.records.record_stalled(JobId(other), "no worker", who="a watch", text="it does not get on")
    assert metric("modelops_jobs_stalled") == 1
    assert metric("modelops_environment_build_failures_total") >= 0
    assert metric("modelops_workers_unfit_total") >= 0


def test_a_job_of_which_nothing_runs_waits_though_it_may_run(
    client: Client, service: JobService, drivers: Drivers, bundle: str
) -> None:
    def waits() -> bool:
        text = client("GET", "/metrics").data.decode()
        (line,) = [x for x in text.splitlines() if x.startswith("modelops_queue_wait_seconds ")]
        return float(line.split()[1]) > 0

    job = client.submit(request_for(bundle))["job"]
    run_some(service, job, {})
    assert service.records.job(JobId(job)).state is JobState.RUNNING
    assert not waits(), "whoever drives it says it"
    drivers.seen[job] = Seen()
    assert waits(), "all slots are taken, or there are none"
    drivers.seen[job] = Seen(running=Ranges([(0, 2)]))
    assert not waits(), "its first replicates may take hours"
    drivers.seen[job] = Seen(sleeps_until=1.0)
    assert not waits(), "they have run, and are tried again later"
    drivers.seen[job] = Seen()
    run_some(service, job, {0: ReplicateStatus.SUCCEEDED})
    assert not waits()


def test_each_pool_is_said_to_wait_for_what_its_own_workers_can_run(
    client: Client, drivers: Drivers, service: JobService, bundle: str
) -> None:
    def backlog(of: str = "pending") -> dict[str, int]:
        text = client("GET", "/metrics").data.decode()
        metric = f"modelops_pool_replicates_{of}"
        found = re.findall(rf'^{metric}\{{pool="(.+)"\}} (\d+)$', text, re.MULTILINE)
        return {pool: int(n) for pool, n in found}

    def submit(*pools: str) -> str:
        asks: dict[str, Any] = {"format": 4, "pools": pools} if pools else {}
        return str(client.submit(request_for(bundle, **asks))["job"])

    drivers.aliases = Aliases.of_table({"us": ["us-east"]}, "aliases")
    assert backlog() == {"no_pool": 0, "us": 0, "us-east": 0}  # known before anything waits
    assert backlog("unserved") == {}
    drivers.pool = {f"tls://10.0.0.{n}:4000": 1 for n in (1, 2, 3)}
    drivers.pools = {"tls://10.0.0.1:4000": EU, "tls://10.0.0.2:4000": Membership("", {"kind": "gpu"})}
    everywhere = submit()
    assert backlog() == {"no_pool": 12, "eu-west": 0, "us": 0, "us-east": 0}
    mine = submit("eu_west")
    submit("EU")  # a label of the workers in eu-west
    assert backlog() == {"no_pool": 12, "eu-west": 24, "eu": 12, "us": 0, "us-east": 0}
    submit("US_East", "eu-west")
    submit("nowhere")
    submit("gpu")  # a label of workers that are in no pool
    everything = {"eu-west": 36, "eu": 12, "us": 12, "us-east": 12, "nowhere": 12, "gpu": 12, "no_pool": 24}
    assert backlog() == everything
    assert backlog("unserved") == {"us": 12, "nowhere": 12}, (
        "eu, eu-west and gpu have a worker, by name or label"
    )
    drivers.pools["tls://10.0.0.3:4000"] = Membership("us-east", {})
    assert backlog("unserved") == {"nowhere": 12}
    del drivers.pools["tls://10.0.0.3:4000"]
    run_some(service, mine, dict.fromkeys(range(5), ReplicateStatus.SUCCEEDED))
    run_some(
        service, everywhere, dict.fromkeys(range(12), ReplicateStatus.FAILED), end=JobEvent.SOME_SUCCEEDED
    )
    assert backlog() == {**everything, "eu-west": 31, "no_pool": 12}
