"""The schema is true: it says of each route what the route does, and a fuzzer finds nothing that it does not say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import msgspec
import pytest
from http_service import TOKEN, Client, request_for, run_some, serving
from wrong_submissions import SETS, WRONG

from modelops.errors import ConflictError, RequestError
from modelops.server.http.app import OPERATIONS
from modelops.server.http.openapi import document, problems_of
from modelops.server.http.operations import Place, place_of
from modelops.states import JobEvent, ReplicateStatus
from modelops.study.spec import JobSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.server.service import JobService
    from modelops.study.ids import JobId

PAGE = (Path(__file__).parents[2] / "docs/reference/http-api.md").read_text("utf-8")
SCHEMA = document(OPERATIONS, "1")


class NothingWrong:
    """A reconciler that finds nothing."""

    def run(self, job: JobId | None) -> Sequence[Any]:
        return []


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


def test_schemathesis_finds_nothing(service: JobService, bundle: str, tmp_path: Path) -> None:
    """Every operation, with data that the schema allows and with data that it does not, by all checks there are."""
    service.reconciler = NothingWrong()
    with serving(service, longest_wait_s=0.02) as client:
        job = client.submit(request_for(bundle))["job"]
        outcomes = {**dict.fromkeys(range(6), ReplicateStatus.SUCCEEDED), 7: ReplicateStatus.FAILED}
        run_some(service, job, outcomes, end=JobEvent.SOME_SUCCEEDED)
        config = tmp_path / "schemathesis.toml"
        config.write_text(f'[parameters]\n"path.job" = "{job}"\n')  # so that there is something to find
        done = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"), "--config-file", config, "run",
                f"{client.url}/v1/openapi.json", "--header", f"Authorization: Bearer {TOKEN}",
                "--phases", "coverage,fuzzing", "--max-examples", "5", "--generation-deterministic",
                "--suppress-health-check", "all", "--request-timeout", "60", "--no-color",
            ],
            capture_output=True, text=True, timeout=280, cwd=tmp_path, check=False,
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
        assert schema_of("JobSpec").is_valid(data) == (allowed or "must be 'parameters.parquet'" in says)


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
    schema = schema_of("JobSpec")
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
        SCHEMA["components"]["schemas"]["JobSpec"]["properties"]
    )


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
