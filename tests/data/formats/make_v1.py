"""How ``v1/`` was made: one finished job as format 1 stores it. Made once; what it left must be readable forever.

It is committed so that everybody can see what the files hold; `content` below is what the tests look for.
It refuses to run where ``v1/`` exists. A format 2 gets a script and a folder of its own.
"""

from __future__ import annotations

import datetime
import io
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa

from modelops.bundles import pack_bundle
from modelops.environments import Interpreter
from modelops.environments.lock import EMPTY, make_lock
from modelops.environments.manifest import Folder, Manifest, write_manifest
from modelops.states import AggregateStatus, JobEvent, ReplicateStatus
from modelops.store import (
    AggregateRow,
    AggregateWriter,
    Execution,
    Objects,
    Records,
    SegmentWriter,
    StoredError,
)
from modelops.store.contents import JobContents
from modelops.store.fetch import bundle_object
from modelops.store.parameters import write_parameters
from modelops.store.results import finalize
from modelops.study.canonical import canonical_json
from modelops.study.ids import JobId, attempt_id
from modelops.study.index_line import Block, IndexLine
from modelops.study.spec import JobSpec, Limits, RetryPolicy
from modelops.worker.job_log import JobLog
from modelops_runner.values import encode

V1 = Path(__file__).parent / "v1"
JOB = JobId("job_0190a2b3c4d57e6f8091a2b3c4d5e6f7")
AT = datetime.datetime(2024, 7, 11, 12, 30, tzinfo=datetime.UTC)
PARAMETERS = [{"beta": 0.25, "mode": "a"}, {"beta": 1, "mode": "é"}]
LARGE = bytes(range(256)) * 300
ERROR = StoredError(
    "ValueError", "beta is too large", "model.py:3\n", "last words\n", "ValueError@model.py:3", None
)
DEATH = StoredError("", "signal 9 (Killed)", "", "", "signal 9", -9)
BUNDLE = {
    "model.py": "def simulate(params, seed):\n    return {}\n",
    "data/é.csv": "a\n1\n",
    "run.sh": "#!/bin/sh\n",
}  # the test vector of docs/reference/bundle.md
BUNDLE_DIGEST = "0fa73cbc91344aaa17ee3416749f60b97bd31aebd1a39e32d717cc000f0a8329"
MODEL_PRINTED = (0, b"hello from replicate 0\n")
PYTHON = Interpreter(
    "/usr/bin/python3.12", "3.12.1", "cpython", "linux-x86_64", "2.36", "cpython-312", "/usr"
)
SPEC = JobSpec(
    name="formats",
    bundle=BUNDLE_DIGEST,
    bundle_name="formats",
    model="model:simulate",
    aggregates=("model:summarize",),
    line=IndexLine((Block(0, 0, 2, 0, 2), Block(4, 0, 2, 2, 1))),
    study_seed=7,
    isolation="fork",
    limits=Limits(replicate_timeout_s=600.0, memory_bytes=1 << 30, threads=2),
    timeout_s=3600.0,
    min_success=0.5,
    retry=RetryPolicy(max_retries=2, on=frozenset({ReplicateStatus.CRASHED, ReplicateStatus.TIMED_OUT})),
    max_failures=3,
)


def content() -> dict[int, Any]:
    """Return what each index returned; a `StoredError` for one that did not succeed. Index 5 was never run."""
    return {
        0: {
            "loss": 0.5,
            "text": "é😀\0",
            "special": [float("nan"), struct.unpack(">d", bytes.fromhex("7ff8000000000abc"))[0], -0.0, 2**70],
            "nested": {"$x": (1, b"\0\xff"), None: np.float32(0.1)},
            "little": np.array([1, 2], "<i2"),
            "big": np.array([1, 2], ">i2"),
            "day": np.datetime64("2020-01-01"),
            "bytes": b"\0\1",
            "bytearray": bytearray(b"\0\1"),
            "large": LARGE,
        },
        1: {
            "loss": -0.0,
            "table": pa.table({"x": pa.array([1, None], pa.int32()), "y": ["a", "b"]}),
            "batch": pa.record_batch({"x": pa.array([1.5])}),
            "array": pa.array([["a"], None]),
            "frame": pd.DataFrame(
                {"cases": [1, 2]}, index=pd.date_range("2020-01-01", periods=2, freq="D", name="day")
            ),
            "series": pd.Series([0.5, np.nan], name=3),
            "polars": pl.DataFrame({"x": [1, 2], "c": ["a", None]}),
            "polars_series": pl.Series("s", [1.5, None]),
            "nested_table": [pa.table({"x": [1]})],
        },
        2: 1.5,  # no dict
        3: ERROR,
        4: DEATH,
    }


def make(root: Path) -> None:
    """Write the job below ``root``."""
    objects = Objects.open(root / "objects")
    records = Records.open(f"sqlite:///{root / 'modelops.db'}", clock=lambda: AT)
    folder = f"v1/jobs/{JOB}"
    objects.put_new(bundle_object(SPEC.bundle), _archive())
    objects.put_new(
        f"{folder}/lock", make_lock(EMPTY, PYTHON, bundle_digest=BUNDLE_DIGEST, install=True).text.encode()
    )
    write_parameters(objects, JOB, map(canonical_json, PARAMETERS))
    spec = msgspec.json.encode(SPEC)
    objects.put_new(f"{folder}/study.json", spec)
    records.create_job(JOB, spec, name=SPEC.name, bundle=SPEC.bundle, who="somebody", why="submitted")
    epoch = records.take_lease(JOB, "somebody")
    for event in (JobEvent.STARTED, JobEvent.ENVIRONMENT_READY, JobEvent.SETTLED):
        records.change_state(JOB, event, who="driver", epoch=epoch)

    first = attempt_id(epoch, 1)
    writer = SegmentWriter(objects, JOB, first, worker="tcp://10.0.0.1:4000", host="node1", pid=17)
    for index, value in content().items():
        run = Execution(AT.timestamp() + index, 1.5, 0.25, 1 << 20 if index else None, 1)
        if isinstance(value, StoredError):
            status = ReplicateStatus.FAILED if value is ERROR else ReplicateStatus.CRASHED
            writer.add(index, status, True, [], value, run)
        else:
            is_dict = isinstance(value, dict)
            outputs = [(name, *encode(v)) for name, v in (value if is_dict else {"value": value}).items()]
            writer.add(index, ReplicateStatus.SUCCEEDED, is_dict, outputs, None, run)
    with JobLog(objects, JOB, first) as log:
        log.write(*MODEL_PRINTED)
    segment = writer.finish()
    assert segment is not None
    records.commit_segment(JOB, epoch, segment)

    aggregate = AggregateWriter(objects, JOB, attempt_id(epoch, 2))
    outputs = [("loss", *encode(0.25)), ("all", *encode(LARGE))]
    aggregate.add(AggregateRow(0, "model:summarize", AggregateStatus.SUCCEEDED, 2, 3, outputs=outputs))
    aggregate.add(AggregateRow(1, "model:summarize", AggregateStatus.SKIPPED, 1, 3, "1 of 3 succeeded"))
    records.commit_aggregates(JOB, epoch, aggregate.finish([segment.digest]))
    finalize(JobContents.of(objects, records, JOB))
    records.change_state(JOB, JobEvent.SOME_SUCCEEDED, who="driver", epoch=epoch)
    records.close()

    write_manifest(
        root,
        Manifest(
            key="cpython3.12-0",
            interpreter=PYTHON,
            binary=(1, 2),
            folders=[Folder("lib", ["a.py"], [1], [2], [33060])],
            links={"bin/python": "/usr/bin/python3.12"},
            hashes={"bin/x": "0" * 64},
            n_bytes=1,
            built_at=3.0,
            build_seconds=0.5,
            packages=["six==1.17.0"],
        ),
    )


def _archive() -> bytes:
    archive = io.BytesIO()
    with tempfile.TemporaryDirectory() as name:
        for path, text in BUNDLE.items():
            file = Path(name) / path
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        (Path(name) / "run.sh").chmod(0o755)
        (Path(name) / "latest.csv").symlink_to("data/é.csv")
        assert pack_bundle(Path(name), archive) == BUNDLE_DIGEST
    return archive.getvalue()


if __name__ == "__main__":
    if V1.exists():
        sys.exit(f"{V1} exists: it is what this format is held to, and is never made again")
    make(V1)
    (V1 / "modelops.db.lock").unlink()
    (V1 / "objects" / ".tmp").rmdir()
