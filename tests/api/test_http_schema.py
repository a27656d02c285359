"""The schema is true: it says of each route what the route does, and a fuzzer finds nothing that it does not say."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import msgspec
import pytest
from http_service import TOKEN, Client, Drivers, Seen, SeenReplicate, request_for, run_some, serving
from wrong_submissions import SETS, WRONG

from modelops.environments import Interpreter
from modelops.environments.lock import EMPTY, make_lock
from modelops.errors import ClusterError, ConflictError, RequestError
from modelops.server.http.app import OPERATIONS
from modelops.server.http.openapi import document, problems_of
from modelops.server.http.operations import Place, place_of
from modelops.server.reconciler import Reconciler
from modelops.states import JobEvent, ReplicateStatus
from modelops.store.segments import job_folder
from modelops.study.ids import JobId
from modelops.study.ranges import Ranges
from modelops.study.spec import JobSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.server.service import JobService
    from modelops.store import Records
    from modelops.study.ids import AttemptId

PAGE = (Path(__file__).parents[2] / "docs/reference/http-api.md").read_text("utf-8")
SCHEMA = document(OPERATIONS, "1")


class NoPool:
    """A pool without workers, whose scheduler is away."""

    @property
    def client(self) -> Any:
        raise ClusterError("not connected to the scheduler")

    def workers(self) -> dict[str, int]:
        return {}


class Idle(Drivers):
    """Drivers of a server that drives nothing, as its reconciler sees them."""

    records: Records

    def driven(self) -> list[JobId]:
        return []

    def attempts(self, job: JobId) -> dict[AttemptId, str]:
        return {}

    def lost(self, job: JobId, attempt: AttemptId) -> None:
        raise AssertionError(job, attempt)

    @contextlib.contextmanager
    def apart(self, job: JobId) -> Iterator[int | None]:
        yield self.records.take_lease(job, "the reconciler")


def schema_of(name: str) -> Any:
    whole = {"$ref": f"#/components/schemas/{name}", "components": SCHEMA["components"]}
    return jsonschema_rs.Draft202012Validator(whole)


def test_the_served_schema_is_the_one_of_the_routes(client: Client) -> None:
    served = client.get("/v1/openapi.json")
    assert served["openapi"].startswith("3.1")
    assert served["paths"] == msgspec.json.decode(msgspec.json.encode(SCHEMA["paths"]))
    assert served["security"] == [{"token": []}]


def test_every_schema_in_it_is_one(client: Client) -> None:
    for name in SCHEMA["components"]["schemas"]:
        assert schema_of(name).is_valid({}) in (True, False)


SCHEMATHESIS = """\
[dictionaries.jobs]
values = {jobs}
[dictionaries.files]
values = {files}
[parameters]
"path.job" = {{ dictionary = "jobs" }}
"path.digest" = {{ dictionary = "bundles", probability = 0.5 }}
"path.name" = {{ dictionary = "files", probability = 0.8 }}
"path.param" = {{ dictionary = "numbers", probability = 0.8 }}
"query.param" = {{ dictionary = "numbers", probability = 0.8 }}
"query.replicate" = {{ dictionary = "replicates", probability = 0.8 }}
"query.wait_s" = 0.01
"body.spec.bundle" = {{ dictionary = "bundles" }}
"body.spec.model" = {{ dictionary = "models" }}
[dictionaries.bundles]
values = {bundles}
[dictionaries.models]
values = ["model:simulate"]
[dictionaries.replicates]
values = [0, 1, 2, 3]
[dictionaries.numbers]
values = ["0", "1", "2", "3"]
"""


def jobs_in_every_state(service: JobService, client: Client, bundle: str, drivers: Drivers) -> list[str]:
    """Make a job in each state that an operation may meet, with outcomes in most."""
    ok, failed = ReplicateStatus.SUCCEEDED, ReplicateStatus.FAILED
    made = [client.submit(request_for(bundle, name=f"job {n}"))["job"] for n in range(6)]
    lock = make_lock(
        EMPTY, Interpreter("python", "3.12.1", "cpython", "linux-x86_64", "2.36", "cpython-312", "/usr")
    )
    for job in made[:-1]:
        service.objects.put_new(f"{job_folder(JobId(job))}/lock", lock.text.encode())
    partial, whole, running, cancelling, cancelled, _queued = made
    run_some(service, partial, {**dict.fromkeys(range(6), ok), 7: failed}, end=JobEvent.SOME_SUCCEEDED)
    run_some(service, whole, dict.fromkeys(range(12), ok), chunk=5, end=JobEvent.ALL_SUCCEEDED)
    run_some(service, running, {0: ok, 1: ok, 4: failed})
    reports = [SeenReplicate(2, 0.5, {"loss": 1.5}), SeenReplicate(3, 1.0)]
    drivers.seen[running] = Seen(Ranges.of(range(2, 4)), 12.5, reports)
    for job, events in (
        (cancelling, [JobEvent.CANCEL_ASKED]),
        (cancelled, [JobEvent.CANCEL_ASKED, JobEvent.STOPPED]),
    ):
        run_some(service, job, {0: ok, 1: failed})
        assert client("POST", f"/v1/jobs/{job}/cancel").status == 200
        epoch = service.records.take_lease(JobId(job), "a driver")
        for event in events:
            service.records.change_state(JobId(job), event, who="a driver", epoch=epoch)
    states = [service.records.job(JobId(job)).state for job in made]
    assert states == ["partial", "succeeded", "running", "cancelling", "cancelled", "queued"]
    return made


@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing(
    service: JobService, bundle: str, drivers: Drivers, tmp_path: Path
) -> None:
    """Every operation in all phases and by all checks there are; they meet jobs in every state.

    By hand with more examples and chance: MODELOPS_FUZZ_EXAMPLES=50 MODELOPS_FUZZ_SEED=4242.
    """
    seed = os.environ.get("MODELOPS_FUZZ_SEED")
    chance = ["--generation-deterministic"] if seed is None else ["--seed", seed]
    service.supervisor = idle = Idle(drivers.seen)
    idle.records = service.records
    service.reconciler = Reconciler(service.records, service.objects, idle, NoPool(), "reconciler")  # type: ignore[arg-type]
    with serving(service, longest_wait_s=0.02) as client:
        jobs = jobs_in_every_state(service, client, bundle, idle)
        files = [f["name"] for job in jobs[:3] for f in client.get(f"/v1/jobs/{job}/files")["files"]]
        config = tmp_path / "schemathesis.toml"
        config.write_text(SCHEMATHESIS.format(jobs=jobs, files=files, bundles=[bundle]))
        done = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"), "--config-file", config, "run",
                f"{client.url}/v1/openapi.json", "--header", f"Authorization: Bearer {TOKEN}",
                "--phases", "examples,coverage,fuzzing,stateful", "--suppress-health-check", "all",
                "--max-examples", os.environ.get("MODELOPS_FUZZ_EXAMPLES", "20"), *chance,
                "--request-timeout", "60", "--no-color",
            ],
            capture_output=True, text=True, timeout=900, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert f"Tested: {len(OPERATIONS) - 1}" in done.stdout  # the schema itself is no operation to it


@pytest.mark.parametrize(
    ("changes", "says"), WRONG, ids=[f"{n}-{says[:20]}" for n, (_, says) in enumerate(WRONG)]
)
def test_what_is_wrong_by_itself_is_wrong_by_the_schema_too(changes: dict[str, Any], says: str) -> None:
    from modelops.server.submission import check_spec

    spec = request_for("0" * 64, **changes).spec
    try:
        check_spec(spec)
    except ConflictError:
        allowed = True
    except RequestError:
        allowed = False
    else:
        allowed = True  # it depends on the bundle or the parameter sets
    data = msgspec.json.decode(msgspec.json.encode(spec))
    if b"null" not in msgspec.json.encode(changes):  # what JSON cannot say, such as NaN
        assert schema_of("NewJobSpec").is_valid(data) == allowed


@pytest.mark.parametrize(("texts", "says"), SETS)
def test_a_parameter_name_that_none_can_have_is_wrong_by_the_schema_too(
    texts: list[bytes], says: str
) -> None:
    if "name" in says or "$" in says:
        data = {"spec": {}, "parameters": [msgspec.json.decode(text) for text in texts]}
        errors = [
            e for e in schema_of("SubmitRequest").iter_errors(data) if "parameters" in str(e.instance_path)
        ]
        assert errors


def test_a_spec_that_the_client_makes_is_right_by_the_schema() -> None:
    schema = schema_of("NewJobSpec")
    for changes in (
        {},
        {"seeds": (1, 2, 3, 4)},
        {"min_success": 2},
        {"min_success": 0.5},
        {"timeout_s": 3600.0},
    ):
        spec = request_for("0" * 64, **changes).spec
        assert schema.is_valid(msgspec.json.decode(msgspec.json.encode(spec)))
    assert {f.encode_name for f in msgspec.structs.fields(JobSpec)} == set(
        SCHEMA["components"]["schemas"]["NewJobSpec"]["properties"]
    )


def test_the_schema_allows_the_spec_of_an_extended_job_and_not_to_submit_it_as_new() -> None:
    spec = request_for("0" * 64, format=2, parameters="parameters.2-0123456789abcdef.parquet").spec
    data = msgspec.json.decode(msgspec.json.encode(spec))
    assert schema_of("JobSpec").is_valid(data)
    assert not schema_of("SubmitRequest").is_valid({"spec": data, "parameters": [{}]})


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_every_route_is_described_on_the_page(operation: Any) -> None:
    path = operation.path.replace(":path}", "}")
    rows = [line for line in PAGE.splitlines() if f"| `{operation.method}` | `{path}` |" in line]
    assert len(rows) == 1
    for field in msgspec.structs.fields(operation.parameters):
        if place_of(field) is Place.QUERY:
            assert f"`{field.encode_name}`" in rows[0]


def test_the_page_describes_no_route_that_there_is_not() -> None:
    described = re.findall(r"^\| `([A-Z]+)` \| `(/\S*)` \|", PAGE, re.MULTILINE)
    assert sorted(described) == sorted((o.method, o.path.replace(":path}", "}")) for o in OPERATIONS)


def test_the_page_describes_every_status_and_every_field_of_a_job() -> None:
    statuses = {
        status for operation in OPERATIONS for status in (*operation.answers, *problems_of(operation))
    }
    assert [s for s in sorted(statuses) if f"| {s} |" not in PAGE] == []
    fields = SCHEMA["components"]["schemas"]["JobView"]["properties"]
    assert [name for name in fields if f"`{name}`" not in PAGE] == []


def test_the_page_describes_every_metric(client: Client) -> None:
    text = client("GET", "/metrics").data.decode()
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert names
    assert [name for name in names if f"`{name}`" not in PAGE] == []
