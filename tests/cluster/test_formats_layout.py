"""What a finished job leaves behind has the names that docs/reference/layout.md lists, and no others."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from doc_tables import rows_below

import modelops as mo
from modelops.server.extend import extend_job
from modelops.store import Objects, Records
from modelops.study.canonical import canonical_json
from modelops.study.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.home import Home

MODEL = """
def simulate(params, seed):
    print("hello")
    return {"x": seed, "large": bytes(100_000)}


def summarize(replicates):
    return {"n": len(replicates)}
"""
TABLE = """
model = "model:simulate"
aggregate = "model:summarize"
"""
PLACES = {
    "<digest>": "[0-9a-f]{64}",
    "<job>": "job_[0-9a-f]{32}",
    "<attempt>": r"\d{4}-\d{6}",
    "<run>": r"\d+",
    "<content>": "[0-9a-f]{16}",
    "<check>": "[0-9a-f]{32}",
    "<sha256>": "[0-9a-f]{64}",
    "<day>": r"\d{4}-\d{2}-\d{2}",
    "<index>": r"\d+",
    "<n>": r"\d+",
}


def patterns() -> dict[str, re.Pattern[str]]:
    """Return the names of the page, each as an expression."""
    out = {}
    for row in rows_below("layout.md", "| object | content |"):
        expression = re.escape(row[0])
        for place, what in PLACES.items():
            expression = expression.replace(re.escape(place), what)
        out[row[0]] = re.compile(expression)
    return out


def names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_job_leaves_exactly_what_the_page_lists(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    home: Home = cluster.home
    before = names_below(home.objects)
    bundle = write_bundle(MODEL, name="layout", table=TABLE)
    job = mo.run(mo.Study(bundle=bundle, parameters=mo.grid(a=[1, 2]), replicates=3), cluster=cluster)
    assert job.status().state == "succeeded"
    with contextlib.closing(Records.open(home.database_url)) as records:
        objects = Objects.open(home.objects)
        extend_job(records, objects, JobId(job.id), "me", parameters=[canonical_json({"a": 3})])

    found = names_below(home.objects) - before
    listed = patterns()
    for name in found:
        assert [p for p in listed.values() if p.fullmatch(name)], f"{name} is not on the page"
        assert not name.startswith("v1/jobs/") or name.startswith(f"v1/jobs/{job.id}/")
    for name, pattern in listed.items():
        if name.startswith("v1/uploads/") or "/checkpoints/" in name or "/changed/" in name:
            continue  # of submissions over HTTP, of replicates that have not succeeded, of bundles that were changed
        assert [f for f in found if pattern.fullmatch(f)], f"{name} is on the page, and nothing has that name"

    workers = {row["worker"]: row["pid"] for row in job.attempts().to_pylist()}
    assert workers == {
        worker: pid for worker, pid in cluster.client.run(os.getpid).items() if worker in workers
    }

    top = {row[0].strip("/`") for row in rows_below("layout.md", "| in `MODELOPS_HOME` |")}
    beside = {f"modelops.db{end}" for end in ("-wal", "-shm", ".lock")}
    assert {path.name for path in home.data.iterdir()} - beside == top
