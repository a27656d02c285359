"""What format 1 stored once is read by today's code, exactly; and what is stored today is as the pages say."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import msgspec
import pandas as pd  # type: ignore[import-untyped]
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doc_tables import rows_below
from stored_formats import FOLDER, V1, contents_of, copy_of_v1, made
from test_values import same

from modelops.bundles import unpack_bundle
from modelops.environments import parse_lock
from modelops.environments.manifest import read_manifest
from modelops.server.extend import extend_job, resume_job
from modelops.server.mend import needs_mending
from modelops.states import STORED, AggregateStatus, JobEvent, JobState, ReplicateStatus
from modelops.store import Objects, Records, StoredError
from modelops.store.aggregate_value import aggregate_value
from modelops.store.failures import failures_table
from modelops.store.job_log import log_lines
from modelops.store.parameters import Parameters
from modelops.store.results import aggregates_table, attempts_table, replicates_table
from modelops.store.segment_table import SegmentTable, open_table
from modelops.study.canonical import canonical_json, param_id
from modelops.study.seeds import seed_key, seed_of
from modelops.study.spec import decode_spec

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.store.contents import JobContents


@pytest.fixture(scope="module", params=["stored", "made today"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the home that was made once, or one that today's code makes of the same content."""
    root: Path = tmp_path_factory.mktemp("formats") / "home"
    if request.param == "stored":
        return copy_of_v1(root)
    made.make(root)
    return root


@pytest.fixture(scope="module")
def contents(home: Path) -> JobContents:
    return contents_of(home)


def equal(a: Any, b: Any) -> bool:
    """Compare values as `same` does, and tables by their libraries."""
    if isinstance(b, list) and any(isinstance(item, pa.Table) for item in b):
        return len(a) == len(b) and all(map(equal, a, b))
    match b:
        case pd.DataFrame():
            pd.testing.assert_frame_equal(a, b)
        case pd.Series():
            pd.testing.assert_series_equal(a, b)
        case pl.DataFrame():
            return type(a) is pl.DataFrame and a.equals(b)
        case pl.Series():
            return type(a) is pl.Series and a.equals(b)
        case pa.Table() | pa.RecordBatch() | pa.Array():
            return type(a) is type(b) and a.equals(b)
        case _:
            return same(a, b)
    return True


def test_every_output_is_read_as_it_was_returned(contents: JobContents) -> None:
    segment = contents.read(0)
    assert segment.index.tolist() == sorted(made.content())
    for index, expected in made.content().items():
        place = contents.spec.line.locate(index)
        if isinstance(expected, StoredError):
            assert segment.error_of(index) == expected
            continue
        assert segment.error_of(index) is None
        found = contents.output(place.param, place.replicate)
        if not isinstance(expected, dict):
            assert equal(found, expected)
            continue
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert equal(found[name], value), name


def test_the_study_its_parameters_and_seeds_are_read(home: Path, contents: JobContents) -> None:
    assert decode_spec((home / "objects" / FOLDER / "study.json").read_bytes()) == made.SPEC
    assert contents.spec == made.SPEC
    sets = contents.parameters.read(0, 9)
    assert same([s.values() for s in sets], made.PARAMETERS)
    assert [s.param_id for s in sets] == [param_id(s.canonical) for s in sets]
    rows = replicates_table(contents).to_pylist()
    assert [row["seed"] for row in rows] == [
        seed_of(seed_key(7, sets[row["param"]].param_id), row["replicate"]) for row in rows
    ]


def test_the_tables_are_those_that_were_written_then(home: Path, contents: JobContents) -> None:
    for name, table in (
        ("replicates", replicates_table(contents)),
        ("aggregates", aggregates_table(contents)),
        ("attempts", attempts_table(contents)),
    ):
        stored = pq.read_table(home / "objects" / FOLDER / "results" / f"{name}.parquet")
        assert stored.equals(table, check_metadata=True), name
    statuses = replicates_table(contents)["status"].to_pylist()
    assert statuses == ["succeeded", "succeeded", "crashed", "succeeded", "failed", "not_run"]
    assert aggregates_table(contents)["status"].to_pylist() == ["succeeded", "skipped"]
    assert aggregates_table(contents)["reason"].to_pylist() == [None, "1 of 3 succeeded"]
    failures = failures_table(contents).to_pylist()
    assert [f["message"] for f in failures] == ["signal 9 (Killed)", "beta is too large", None]


def test_an_aggregate_is_read_as_it_was_returned(contents: JobContents) -> None:
    assert same(aggregate_value(contents, 0, "model:summarize"), {"loss": 0.25, "all": made.LARGE})


def test_the_database_is_read(home: Path) -> None:
    records = Records.open(f"sqlite:///{home / 'modelops.db'}")
    row = records.job(made.JOB)
    assert (row.state, row.run, row.epoch, row.created_at) == (JobState.PARTIAL, 1, 1, made.AT)
    assert decode_spec(row.spec) == made.SPEC
    assert records.counts(made.JOB) == {
        ReplicateStatus.SUCCEEDED: 3,
        ReplicateStatus.FAILED: 1,
        ReplicateStatus.CRASHED: 1,
    }
    assert records.covered(made.JOB).pairs == ((0, 5),)
    assert [event.kind for event in records.events(made.JOB)] == [
        "created",
        "lease_taken",
        "started",
        "environment_ready",
        "settled",
        "some_succeeded",
    ]
    assert (row.study, row.used_s, row.cancel_by, row.stalled) == ("study.json", 0.0, None, "")
    assert records.take_lease(made.JOB, "somebody else") == 2, "and it can be written to"
    records.close()


def test_a_job_of_then_is_as_recorded_and_can_be_resumed_and_extended(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(home, copy)
    objects, records = Objects.open(copy / "objects"), Records.open(f"sqlite:///{copy / 'modelops.db'}")
    _, plan = needs_mending(records, objects, made.JOB, deep=True)
    assert not plan
    row = resume_job(records, objects, made.JOB, "me")
    assert (row.state, row.run) == (JobState.QUEUED, 2)
    for event in (JobEvent.CANCEL_ASKED, JobEvent.STOPPED):
        records.change_state(made.JOB, event, who="me")
    more = canonical_json({"beta": 9})
    row = extend_job(records, objects, made.JOB, "me", replicates=4, parameters=[more])
    spec = decode_spec(row.spec)
    assert spec.line.blocks[:2] == made.SPEC.line.blocks
    assert Parameters(objects, made.JOB, spec.parameters)[2].canonical == more
    assert records.covered(made.JOB).pairs == ((0, 5),)
    records.close()


def test_the_bundle_is_unpacked_to_its_digest(home: Path, tmp_path: Path) -> None:
    archive = home / "objects" / "v1" / "bundles" / made.BUNDLE_DIGEST
    snapshot = unpack_bundle(archive, made.BUNDLE_DIGEST, tmp_path)
    assert {path: (snapshot / path).read_text("utf-8") for path in made.BUNDLE} == made.BUNDLE
    assert (snapshot / "run.sh").stat().st_mode & 0o111
    assert (snapshot / "latest.csv").readlink().as_posix() == "data/é.csv"


def test_lock_manifest_and_log_are_read(home: Path, contents: JobContents) -> None:
    lock = parse_lock((home / "objects" / FOLDER / "lock").read_text("utf-8"))
    assert (lock.python_version, lock.implementation, lock.platform) == ("3.12", "cpython", "linux-x86_64")
    assert (lock.glibc, lock.bundle_digest, lock.install) == ("2.36", made.BUNDLE_DIGEST, True)
    manifest = read_manifest(home)
    assert manifest is not None
    assert (manifest.interpreter, manifest.folders[0].names) == (made.PYTHON, ["a.py"])
    (line,) = log_lines(contents)
    assert (line.index, line.text.encode(), line.dropped_bytes) == (*made.MODEL_PRINTED, 0)


# The pages


def listed(page: str, header: str) -> list[tuple[str, str]]:
    """Return (name, type) of each column; a row may name several."""
    return [
        (name, kind.replace("\\", ""))
        for names, kind, *_ in rows_below(page, header)
        for name in names.replace("`", "").split(", ")
    ]


def written(fields: Any) -> list[tuple[str, str]]:
    """Return (name, type) of each field, structs by that word alone."""
    return [(f.name, re.sub(r"struct<.*", "struct", str(f.type))) for f in fields]


@pytest.mark.parametrize("kind", ["segments", "executions", "aggregates"])
def test_an_arrow_file_has_the_schema_of_the_page(home: Path, kind: str) -> None:
    (file,) = (home / "objects" / FOLDER / kind).iterdir()
    schema = open_table(file.read_bytes(), file.name).schema
    body = listed("segments.md", "| segment column |")[2:]
    columns = listed("segments.md", f"| {kind.removesuffix('s')} column |")
    if kind == "aggregates":
        columns = columns[:-3] + body
    expected = [(name, t.replace("list<struct>", "list<item: struct")) for name, t in columns]
    assert written(schema) == expected
    if kind != "executions":
        assert written(schema.field("error").type) == listed("segments.md", "| field of `error` |")
        outputs = schema.field("outputs").type.value_type
        assert written(outputs) == listed("segments.md", "| field of `outputs` |")
    keys = {
        name.strip("`")
        for names, where, _ in rows_below("segments.md", "| metadata | in |")
        for name in names.split("`, `")
        if where in ("all", kind)
    }
    assert {key.decode() for key in schema.metadata} == keys
    assert schema.metadata[b"modelops.format"] == b"1"


def test_the_page_lists_the_codes_of_aggregates() -> None:
    (row,) = [row for row in rows_below("segments.md", "| aggregate column |") if row[0] == "status"]
    assert re.findall(r"(\d) `(\w+)`", row[2] + "`") == [(str(i), s) for i, s in enumerate(AggregateStatus)]


def test_the_page_of_states_lists_the_codes_of_replicates() -> None:
    codes = {
        int(row[0]): row[1] for row in rows_below("states.md", "| code in a segment |") if row[0].isdigit()
    }
    assert codes == dict(enumerate(STORED))


def test_parameters_have_the_schema_of_the_page(home: Path) -> None:
    file = pq.ParquetFile(home / "objects" / FOLDER / "parameters.parquet")
    assert written(file.schema_arrow) == listed("layout.md", "| column of `parameters.parquet` |")
    assert file.metadata.metadata[b"modelops.format"] == b"1"


ARROW_NAMES = {"float64": "double", "text": "large_string"}


@pytest.mark.parametrize(
    ("name", "page_header"),
    [
        ("replicates", "| replicates column |"),
        ("aggregates", "| aggregates column |"),
        ("attempts", "| execution column |"),
    ],
)
def test_a_result_file_has_the_schema_of_the_page(home: Path, name: str, page_header: str) -> None:
    schema = pq.read_schema(home / "objects" / FOLDER / "results" / f"{name}.parquet")
    outputs = {"replicates": ["loss", "text", "value"], "aggregates": ["loss"], "attempts": []}[name]
    expected: list[str] = []
    for column, kind in listed("results.md", page_header):
        match column:
            case "the parameters":
                expected += ["beta", "mode"]
            case "the scalar outputs":
                expected += outputs
            case _:
                expected.append(column)
                assert str(schema.field(column).type) == ARROW_NAMES.get(kind, kind), column
    assert schema.names == expected
    assert schema.metadata[b"modelops.format"] == b"1"
    assert (b"modelops.left_out" in schema.metadata) == (name != "attempts")


def test_a_spec_with_a_key_of_a_later_time_is_read_without_it() -> None:
    spec = msgspec.json.decode((V1 / "objects" / FOLDER / "study.json").read_bytes())
    more = msgspec.json.encode({**spec, "colour": "blue"})
    assert decode_spec(more) == made.SPEC
    least = {key: spec[key] for key in ("format", "name", "bundle", "bundle_name", "model", "line")}
    assert decode_spec(msgspec.json.encode(least)).min_success == 1.0


def test_a_reader_goes_by_names_and_passes_over_columns_it_does_not_know(tmp_path: Path) -> None:
    contents = contents_of(copy_of_v1(tmp_path / "home"))
    stored = contents.read(0)
    names = stored.table.column_names[::-1]
    changed = stored.table.select(names).append_column("more", pa.array([0] * len(stored)))
    segment = SegmentTable(contents.objects, contents.job, stored.ref, changed)
    assert list(segment.index) == list(stored.index)
    assert same(segment.output_of(0, "special"), made.content()[0]["special"])
    assert segment.error_of(3) == made.ERROR
