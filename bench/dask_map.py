"""What do isolation, durability and status cost, compared with bare Dask tasks? Goal: at most a tenth of them.

Runs 20 parameter sets x 200 no-op replicates that return five floats, with 20 aggregates, on a started cluster
with two workers, from `mo.run` to its return: outcomes are then committed to the store and in result files. All
are compared by value afterwards. Beside it, on the same cluster, what one would write without ModelOps:
`Client.map` of 4,000 functions that do nothing at all, gathered. The two alternate.

Usage: python bench/dask_map.py [REPEATS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import modelops as mo
from measuring import describe, show
from modelops.client.run import Watcher
from modelops.cluster.embedded import EmbeddedCluster
from modelops.home import Home

N_SETS, N_REPLICATES = 20, 200
PYPROJECT = """
[project]
name = "noop"
version = "1.0"
requires-python = ">=3.11"
[tool.modelops]
model = "noop:simulate"
aggregate = "noop:summarize"
"""
MODEL = """
def simulate(params, seed):
    return {"a": seed / 3, "b": -seed / 7, "c": params["x"] * seed, "d": 0.1, "e": seed * 1e-300}

def summarize(replicates):
    return {"total": sum(r["a"] for r in replicates), "n": len(replicates)}
"""


def noop(_: int) -> None:
    return None


def check(job: mo.Job) -> None:
    """Compare every outcome and every aggregate with what they must be."""
    table = job.results()
    seeds = table["seed"].to_numpy().astype(float)
    x = np.repeat(np.arange(N_SETS) / 10, N_REPLICATES)
    assert table.num_rows == N_SETS * N_REPLICATES
    for name, expected in {
        "a": seeds / 3,
        "b": -seeds / 7,
        "c": x * seeds,
        "d": np.full(len(seeds), 0.1),
        "e": seeds * 1e-300,
    }.items():
        assert (table[name].to_numpy() == expected).all(), name
    for p, row in enumerate(job.aggregates().to_pylist()):
        mine = seeds[p * N_REPLICATES : (p + 1) * N_REPLICATES]
        assert (row["n"], row["total"]) == (N_REPLICATES, sum((mine / 3).tolist()))


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "noop")
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(PYPROJECT)
        (bundle / "noop.py").write_text(MODEL)
        sets = [{"x": p / 10} for p in range(N_SETS)]
        with EmbeddedCluster(Home.at(Path(folder, "home")), n_workers=2) as cluster:
            ours, theirs = [], []
            for n in range(-1, repeats):  # the first builds the environment and is not counted
                study = mo.Study(bundle=bundle, parameters=sets, replicates=N_REPLICATES, seed=n + 1)
                started = time.perf_counter()
                job = mo.run(study, cluster=cluster, watcher=Watcher())
                ours.append(time.perf_counter() - started)
                assert job.status().state == "succeeded", job.status()
                check(job)

                started = time.perf_counter()
                futures = cluster.client.map(noop, range(N_SETS * N_REPLICATES), pure=False)
                assert len(cluster.client.gather(futures)) == N_SETS * N_REPLICATES
                theirs.append(time.perf_counter() - started)
                del futures
    us = show("mo.run, 4,000 replicates and 20 aggregates", ours[1:])
    them = show("Client.map, 4,000 functions", theirs[1:])
    print(f"ratio of the medians: {us / them:.3f} (goal: at most 0.1)")
    describe("distributed", "msgspec", "pyarrow", "SQLAlchemy")


if __name__ == "__main__":
    main()
