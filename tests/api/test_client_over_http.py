"""The client over HTTP shows exactly what the store holds, and submits what is asked, once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from http_service import TOKEN, Drivers, serving
from stored_formats import copy_of_v1, made

import modelops as mo
from modelops.client import submission
from modelops.client.client import Client
from modelops.client.http import Address, Answer, Http
from modelops.client.served import HttpSource
from modelops.errors import NotFoundError, QueueFullError, RequestError
from modelops.home import Home
from modelops.server.service import JobService
from modelops.states import JobState
from modelops.store import Objects, Records
from modelops_runner.values import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Listening(Http):
    """Remembers which requests were made; drops the answer of one, as a network does."""

    def __init__(self, url: str) -> None:
        super().__init__(lambda: Address(url, TOKEN, "the test's server", "start it"))
        self.made: list[str] = []
        self.lose: str | None = None

    def _once(self, address: Address, method: str, target: str, *more: Any) -> Answer:
        self.made.append(f"{method} {target.partition('?')[0]}")
        answer = super()._once(address, method, target, *more)
        if self.lose == method:
            self.lose = None
            return Answer(503, {}, b"")
        return answer


@contextlib.contextmanager
def served(server: Home, here: Path, **options: Any) -> Iterator[HttpSource]:
    with contextlib.closing(Records.open(server.database_url)) as records:
        service = JobService(records, Objects.open(server.storage), server, Drivers(), **options)
        with serving(service) as client:
            http = Listening(client.url)
            yield HttpSource(http, Home.at(here))
            http.close()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[mo.Job, mo.Job]]:
    """Return one job twice: read from the store, and over HTTP."""
    folder = tmp_path_factory.mktemp("both")
    server = Home.at(copy_of_v1(folder / "server"))
    with served(server, folder / "here") as source:
        yield mo.Job(made.JOB, server), mo.Job(made.JOB, source=source)


READS: dict[str, Callable[[mo.Job], Any]] = {
    "status": lambda job: (job.status().state, job.status().counts, job.status().aggregates),
    "wait": lambda job: job.wait(timeout=5).state,
    "events": lambda job: job.events(),
    "spec": lambda job: job.spec,
    "manifest": lambda job: job.manifest,
    "params": lambda job: [job.params(p) for p in range(job.spec.line.n_params)],
    "lock": lambda job: job.source.lock(job.id),
    "results": lambda job: job.results(),
    "aggregates": lambda job: job.aggregates(),
    "failures": lambda job: job.failures(),
    "failure_summary": lambda job: job.failure_summary(),
    "aggregate_failures": lambda job: job.aggregate_failures(),
    "attempts": lambda job: job.attempts(),
    "log": lambda job: (job.log(), job.log(0), job.log(0, 0)),
    "files": lambda job: {f.name: f for f in job.source.files(job.id).files if f.name.startswith("segments")},
    "result_files": lambda job: {n: p.read_bytes() for n, p in job.result_files().items()},
}


@pytest.mark.parametrize("read", READS)
def test_a_job_over_http_is_the_job_in_the_store(both: tuple[mo.Job, mo.Job], read: str) -> None:
    stored, over_http = both
    wanted, found = READS[read](stored), READS[read](over_http)
    assert found == wanted
    if read == "results":
        assert found.schema.metadata == wanted.schema.metadata


def outputs(job: mo.Job, param: int, replicate: int) -> Any:
    """Return the outputs of a replicate, encoded so that they can be compared, or why there are none."""
    try:
        found = job.output(param, replicate)
    except NotFoundError as error:
        return str(error)
    assert {name: encode(job.output(param, replicate, name)) for name in found} == {
        name: encode(value) for name, value in found.items()
    }
    return [(name, type(value), encode(value)) for name, value in found.items()]


def test_every_value_is_the_one_the_model_returned(both: tuple[mo.Job, mo.Job]) -> None:
    stored, over_http = both
    places = [stored.spec.line.locate(index) for index in range(stored.spec.line.size)]
    wanted = [outputs(stored, *place) for place in places]
    assert {type(x) for x in wanted} == {str, list}
    assert [outputs(over_http, *place) for place in places] == wanted
    assert encode(over_http.aggregate(0)) == encode(stored.aggregate(0))


@pytest.fixture
def source(tmp_path: Path) -> Iterator[HttpSource]:
    with served(Home.at(tmp_path / "server"), tmp_path / "here") as source:
        yield source


@pytest.fixture
def made_requests(source: HttpSource) -> list[str]:
    assert isinstance(source.http, Listening)
    return source.http.made


@pytest.fixture
def bundle(write_bundle: Callable[..., Path]) -> Path:
    return write_bundle("def simulate(params, seed):\n    return {'x': seed}\n")


def test_a_bundle_that_is_there_is_not_sent_again(
    source: HttpSource, made_requests: list[str], bundle: Path
) -> None:
    client = Client(source=source)
    first = client.submit(mo.Study(bundle=bundle, replicates=3))
    assert sum(m.startswith("PUT /v1/bundles/") for m in made_requests) == 1
    made_requests.clear()
    second = client.submit(mo.Study(bundle=bundle, replicates=4))
    assert made_requests == ["POST /v1/jobs"]
    assert first.id != second.id
    assert first.events()[0].text == f"submitted from {bundle}"
    third = client.submit(mo.Study(bundle=first.spec.bundle))  # by its digest
    assert third.spec.bundle == first.spec.bundle


def test_a_submission_whose_answer_was_lost_makes_one_job(source: HttpSource, bundle: Path) -> None:
    client = Client(source=source)
    client.submit(mo.Study(bundle=bundle))
    assert isinstance(source.http, Listening)
    source.http.lose = "POST"
    job = client.submit(mo.Study(bundle=bundle, name="once"))
    assert [s.job for s in client.summaries() if s.name == "once"] == [job.id]


def test_a_large_table_of_parameters_goes_as_a_file_and_is_the_same(
    source: HttpSource, made_requests: list[str], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(source=source)
    sets = mo.grid(a=[*range(200)], b=[1, 1.0])
    small = client.submit(mo.Study(bundle=bundle, parameters=sets))
    monkeypatch.setattr(submission, "MAX_BODY_BYTES", 100)
    large = client.submit(mo.Study(bundle=bundle, parameters=sets))
    assert sum(m.startswith("PUT /v1/parameters/") for m in made_requests) == 1
    assert large.spec.line == small.spec.line
    for param in (0, 1, 399):
        mine, theirs = (job.source.parameter_set(job.id, param) for job in (large, small))
        assert mine == theirs
    assert large.source.parameter_set(large.id, mine.param_id).param == 399


def test_many_parameter_sets_are_added_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "MAX_BODY_BYTES", 100)
    with served(Home.at(copy_of_v1(tmp_path / "server")), tmp_path / "here") as source:
        job = mo.Job(made.JOB, source=source)
        n = job.spec.line.n_params
        job.extend(parameters=[{"more": i} for i in range(200)])
        assert isinstance(source.http, Listening)
        assert sum(m.startswith("PUT /v1/parameters/") for m in source.http.made) == 1
        assert (job.spec.line.n_params, job.params(n + 199)) == (n + 200, {"more": 199})


def test_ids_may_be_shortened_until_they_are_ambiguous(source: HttpSource, bundle: Path) -> None:
    client = Client(source=source)
    jobs = [client.submit(mo.Study(bundle=bundle)) for _ in range(3)]
    assert client.job(jobs[1].id[-9:]).id == jobs[1].id
    with pytest.raises(RequestError, match=r"'job_' fits 3 jobs: job_"):
        client.job("job_")
    with pytest.raises(NotFoundError, match="there is no job 'nonsense'"):
        client.job("nonsense")
    with pytest.raises(NotFoundError, match="there is no job"):
        client.job("not an id/..")
    with pytest.raises(NotFoundError, match="there is no job"):
        client.job("job_" + "f" * 32).results()


def test_the_list_is_whole_however_it_is_paged(
    source: HttpSource, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelops.client.client.PAGE", 2)
    client = Client(source=source)
    jobs = [client.submit(mo.Study(bundle=bundle)).id for _ in range(5)]
    assert [job.id for job in client.jobs()] == jobs[::-1]
    assert [s.job for s in client.summaries(limit=3)] == jobs[:1:-1]
    assert client.jobs(["running"]) == []


def test_a_queued_job_is_cancelled_for_good(source: HttpSource, bundle: Path) -> None:
    job = Client(source=source).submit(mo.Study(bundle=bundle))
    job.cancel()
    job.cancel()  # asking again changes nothing
    assert any(e.kind == "cancel_wanted" and "@" in e.who for e in job.events())


def test_a_wait_that_is_too_short_says_that_the_job_goes_on(source: HttpSource, bundle: Path) -> None:
    job = Client(source=source).submit(mo.Study(bundle=bundle))
    with pytest.raises(TimeoutError, match="it goes on"):
        job.wait(timeout=0.05)
    assert job.status().state == JobState.QUEUED


def test_a_full_queue_is_said_and_nothing_is_lost(tmp_path: Path, bundle: Path) -> None:
    with served(Home.at(tmp_path / "server"), tmp_path / "here", max_jobs=1) as source:
        client = Client(source=source)
        first = client.submit(mo.Study(bundle=bundle))
        with pytest.raises(QueueFullError, match=r"the queue is full: .*cancel"):
            client.submit(mo.Study(bundle=bundle))
        assert [job.id for job in client.jobs()] == [first.id]


def test_what_is_wrong_is_refused_before_anything_is_sent(
    source: HttpSource, made_requests: list[str], bundle: Path
) -> None:
    client = Client(source=source)
    for study, words in [
        (mo.Study(bundle=bundle, model="no_such"), "no_such"),
        (mo.Study(bundle=bundle, parameters=[{"a": 1}, {"a": 1}]), "are the same"),
        (mo.Study(bundle="nowhere"), "there is no bundle at nowhere"),
    ]:
        with pytest.raises(mo.ModelOpsError, match=words):
            client.submit(study)
    assert made_requests == []
    with pytest.raises(NotFoundError):  # a digest that nobody has
        client.submit(mo.Study(bundle="0" * 64))


def test_the_body_of_a_submission_is_what_the_schema_says(source: HttpSource, bundle: Path) -> None:
    job = Client(source=source).submit(
        mo.Study(bundle=bundle, parameters=[{"x": float("nan")}, {"x": 2**70}])
    )
    assert msgspec.to_builtins(job.spec.line)["blocks"][0]["n_params"] == 2
    assert job.params(1) == {"x": 2**70}
