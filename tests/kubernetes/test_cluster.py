"""Jobs on a real cluster end with the right results, whatever happens to the pods meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from tests.kubernetes.conftest import ROOT, kubectl, wait_for

if TYPE_CHECKING:
    from tests.kubernetes.conftest import Cluster

N = 400
SLOW = """# /// script
# requires-python = ">=3.9"
# dependencies = []
# [tool.modelops]
# model = "slow:simulate"
# ///
import random, time

def simulate(params, seed):
    time.sleep(0.1)
    return {"x": random.Random(seed).random() + params["p"]}
"""


def status(cluster: Cluster, job: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.modelops("jobs", "show", job, "--json"))
    return found


def succeeded(cluster: Cluster, job: str) -> int:
    return int(status(cluster, job)["counts"].get("succeeded", 0))


def test_a_job_from_outside_gives_what_it_gives_here(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.forwarded():
        there, here = str(tmp_path / "there"), str(tmp_path / "here")
        cluster.modelops("run", str(ROOT / "bundles/coin.py"), "--out", there, "--quiet")
        cluster.modelops("run", str(ROOT / "bundles/coin.py"), "--out", here, "--quiet", "--workers", "1")
    columns = ["param_id", "replicate", "seed", "status"]
    tables = [pq.read_table(Path(folder) / "replicates.parquet") for folder in (there, here)]
    assert tables[0].equals(tables[1])
    assert set(columns) <= set(tables[0].column_names)
    assert set(tables[0]["status"].to_pylist()) == {"succeeded"}


def test_pods_that_go_cost_no_result_and_a_graceful_end_no_retry(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with cluster.forwarded():
        said = cluster.modelops(
            "submit", str(tmp_path / "slow.py"), "-p", "p=1,2", "-n", str(N), "--seed", "7", "--json"
        )
        job = json.loads(said)["job"]
        wait_for(lambda: succeeded(cluster, job) > 20, "replicates succeed")

        before = succeeded(cluster, job)
        kubectl(
            "-n", "modelops", "delete", *cluster.pods("worker")
        )  # waits for its end: sooner than it would be killed
        cluster.ready()
        wait_for(lambda: succeeded(cluster, job) > before, "another worker goes on")

        kubectl("-n", "modelops", "scale", "deployment/modelops-worker", "--replicas=2")
        cluster.ready()
        kubectl("-n", "modelops", "delete", cluster.pods("worker")[0], "--grace-period=0", "--force")
        kubectl("-n", "modelops", "scale", "deployment/modelops-worker", "--replicas=1")
        kubectl("-n", "modelops", "delete", *cluster.pods("scheduler"))
        kubectl("-n", "modelops", "delete", *cluster.pods("server"))
        cluster.ready()
    with cluster.forwarded():  # the server's pod is another one
        wait_for(lambda: status(cluster, job)["state"] not in ("running", "finalizing"), "the job ends")
        assert (status(cluster, job)["state"], succeeded(cluster, job)) == ("succeeded", 2 * N)
        out = tmp_path / "out"
        cluster.modelops("jobs", "sync", job, str(out))
    table = pq.read_table(out / "results/replicates.parquet")
    assert table.num_rows == 2 * N
    import random

    for row in table.select(["seed", "p", "x"]).to_pylist():
        assert row["x"] == random.Random(row["seed"]).random() + row["p"]
