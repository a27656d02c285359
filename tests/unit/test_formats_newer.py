"""What a newer ModelOps left: each row of the table in docs/reference/layout.md is tried, none is missing."""

from __future__ import annotations

import gzip
import io
import json
import sqlite3
import tarfile
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doc_tables import rows_below
from stored_formats import FOLDER, copy_of_v1, made

from modelops.bundles import pack, snapshot, snapshot_changed, take_snapshot, unpack_bundle
from modelops.environments import Interpreter, failures, interpreters, parse_lock
from modelops.environments import lock as lock_module
from modelops.environments import manifest as manifest_module
from modelops.environments.cache import _read_lock
from modelops.environments.failures import Failures
from modelops.environments.interpreters import Interpreters
from modelops.environments.manifest import read_manifest
from modelops.errors import ModelOpsError, ResolutionError
from modelops.rpc import messages
from modelops.store import Objects, Records, checkpoints, schema, segments
from modelops.store.parameters import Parameters
from modelops.store.segment_table import open_table
from modelops.store.segments import job_folder
from modelops.study import spec
from modelops.study.spec import decode_spec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = rows_below("layout.md", "| what | where its number is |")
REFUSED = {row[0]: row[2] for row in ROWS}
NEWEST = {row[0]: row[3] for row in ROWS}


def study(home: Path) -> None:
    data = (home / "objects" / FOLDER / "study.json").read_bytes()
    decode_spec(data.replace(b'"format":1', b'"format":5'))


def newer_lock(home: Path) -> str:
    return (home / "objects" / FOLDER / "lock").read_text("utf-8").replace("format = 1", "format = 3")


def lock(home: Path) -> None:
    (home / "cached.toml").write_text(newer_lock(home), encoding="utf-8")
    assert _read_lock(home / "cached.toml") is None
    parse_lock(newer_lock(home))


def parameters(home: Path) -> None:
    file = home / "objects" / FOLDER / "parameters.parquet"
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({"modelops.format": "2"}), file)
    Parameters(Objects.open(home / "objects"), made.JOB)


def arrow(home: Path) -> None:
    refusals: list[ModelOpsError] = []
    for kind in ("segments", "executions", "aggregates"):
        (file,) = (home / "objects" / FOLDER / kind).iterdir()
        table = open_table(file.read_bytes(), file.name)
        newer = table.replace_schema_metadata({**table.schema.metadata, b"modelops.format": b"4"})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, newer.schema) as writer:
            writer.write_table(newer)
        try:
            open_table(sink.getvalue().to_pybytes(), file.name)
        except ModelOpsError as e:
            refusals.append(e)
    assert len(refusals) == 3
    raise refusals[0]


def archive(home: Path) -> None:
    packed = home / "objects" / "v1" / "bundles" / made.BUNDLE_DIGEST
    with tarfile.open(packed) as old:
        headers = {**old.pax_headers, "modelops.format": "2"}
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as new:
            for member in old:
                new.addfile(member, old.extractfile(member) if member.isreg() else None)
    packed.write_bytes(gzip.compress(plain.getvalue()))
    try:
        unpack_bundle(packed, made.BUNDLE_DIGEST, home / "unpacked")
    finally:
        assert not (home / "unpacked").exists()


def database(home: Path) -> None:
    with sqlite3.connect(home / "modelops.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9002'")
    raw.close()
    Records.open(f"sqlite:///{home / 'modelops.db'}")


def manifest(home: Path) -> None:
    file = home / "modelops-manifest"
    tree = msgspec.msgpack.decode(file.read_bytes())
    assert tree["format"] == 1
    file.write_bytes(msgspec.msgpack.encode({**tree, "format": 2}))
    assert read_manifest(home) is None


def stats(home: Path) -> None:
    bundle = home / "bundle"
    bundle.mkdir()
    (bundle / "model.py").write_text("x = 1\n")
    digest, snapshot = take_snapshot(bundle, home / "cache")
    file = snapshot.with_name(f"{digest}.stats.json")
    tree = json.loads(file.read_bytes())
    file.write_text(json.dumps({**tree, "format": 2}))
    assert snapshot_changed(snapshot) == ["missing: a list of stats that this version reads"]
    inode = snapshot.stat().st_ino
    assert take_snapshot(bundle, home / "cache") == (digest, snapshot)
    assert snapshot_changed(snapshot) == []
    assert snapshot.stat().st_ino == inode, "its bytes are right: it is kept"


def memories(home: Path) -> None:
    failures = Failures(home / "failures")
    failures.remember("a", ResolutionError("x", "no such package"))
    assert failures.recall("a", 0.0) is not None
    (file,) = (home / "failures").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "format": 2}))
    assert failures.recall("a", 0.0) is None

    memory = home / "interpreters.json"
    found = Interpreters(memory, environ={}).all()
    tree = json.loads(memory.read_bytes())
    invented = msgspec.structs.replace(found[0], version="3.99.0")
    for remembered in tree["probed"].values():
        remembered["found"] = msgspec.to_builtins(invented)
    assert {i.version for i in read(memory, tree)} == {"3.99.0"}, "it is believed while its format is ours"
    assert read(memory, {**tree, "format": 2}) == found


def read(memory: Path, tree: dict[str, Any]) -> list[Interpreter]:
    memory.write_text(json.dumps(tree))
    return Interpreters(memory, environ={}).all()


NEWER: dict[str, Callable[[Path], None]] = {
    "study.json": study,
    "lock": lock,
    "parameters.parquet": parameters,
    "segments, executions, aggregates": arrow,
    "bundle archive": archive,
    "modelops.db": database,
    "environment manifest": manifest,
    "snapshot stats": stats,
    "remembered interpreters and failures": memories,
}
ELSEWHERE = {
    "results": "never read by ModelOps",
    "checkpoint": "tests/unit/test_checkpoints.py",
    "[protocol](protocol.md)": "tests/process/test_runner.py",
    "packs, logs": "their names carry v1",
}


def test_the_page_says_the_newest_number_of_each() -> None:
    newest = {
        "`study.json`": spec.FORMAT,
        "`lock`": lock_module.FORMAT,
        "`parameters.parquet`": segments.FORMAT,
        "segments, executions, aggregates": segments.NOT_NEEDED_FORMAT,
        "results": segments.FORMAT,
        "bundle archive": pack.FORMAT,
        "`modelops.db`": schema.HEAD,
        "checkpoint": checkpoints.FORMAT,
        "environment manifest": manifest_module.FORMAT,
        "snapshot stats": snapshot.FORMAT,
        "remembered interpreters and failures": failures.FORMAT,
        "[protocol](protocol.md)": messages.PROTOCOL,
        "packs, logs": job_folder(made.JOB).split("/")[0],
    }
    assert failures.FORMAT == interpreters.FORMAT
    assert {what.strip("`"): str(number) for what, number in newest.items()} == NEWEST


def test_every_row_of_the_page_is_tried() -> None:
    assert set(REFUSED) == set(NEWER) | set(ELSEWHERE)


@pytest.mark.parametrize("what", [what for what in NEWER if REFUSED[what].startswith("refused")])
def test_what_is_newer_is_refused_with_a_sentence(what: str, tmp_path: Path) -> None:
    with pytest.raises(
        ModelOpsError, match=r"newer ModelOps.*[2345].*up to.*([1234]|000[0-9]).*upgrade modelops"
    ):
        NEWER[what](copy_of_v1(tmp_path / "home"))


@pytest.mark.parametrize("what", [what for what in NEWER if REFUSED[what].startswith("passed over")])
def test_what_is_newer_and_can_be_made_again_is_passed_over(what: str, tmp_path: Path) -> None:
    NEWER[what](copy_of_v1(tmp_path / "home"))
