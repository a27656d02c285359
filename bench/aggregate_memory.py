"""How much memory does it take to aggregate 200 outputs of 10 MB? Goal: far less than their 2 GB.

One parameter set with 200 replicates that return 10 MB of bytes each. An incremental aggregate (`start`, `add`,
`finish`) and one that takes the list do the same, each in a job of its own on a fresh cluster. What is shown is the
highest memory that any runner had, the process in which the aggregate runs, and any worker, which reads the outputs.
What one would do without ModelOps, all files in a list, needs the 2 GB as the second one does.

Usage: python bench/aggregate_memory.py [REPLICATES] [MEGABYTES]
"""

from __future__ import annotations

import time
from pathlib import Path

import modelops as mo
from measuring import arguments, describe, folder_on_disk, peak_bytes
from modelops.client.run import Watcher
from modelops.cluster.embedded import EmbeddedCluster
from modelops.home import Home

PYPROJECT = """
[project]
name = "summed"
version = "1.0"
requires-python = ">=3.11"
[tool.modelops]
model = "summed:simulate"
aggregate = ["summed:Incremental", "summed:whole"]
"""
MODEL = """
import random
import zlib

def simulate(params, seed):
    return {"data": random.Random(seed).randbytes(params["bytes"])}

class Incremental:
    def start(self, params):
        return {"crc": 0, "bytes": 0}

    def add(self, state, replicate):
        state["crc"] = zlib.crc32(replicate["data"], state["crc"])
        state["bytes"] += len(replicate["data"])

    def finish(self, state):
        return state

def whole(replicates):
    crc = 0
    for replicate in replicates:
        crc = zlib.crc32(replicate["data"], crc)
    return {"crc": crc, "bytes": sum(len(replicate["data"]) for replicate in replicates)}
"""


def main() -> None:
    said = arguments(__doc__)
    n = int(said[0]) if said else 200
    megabytes = int(said[1]) if len(said) > 1 else 10
    found = []
    with folder_on_disk() as folder:
        bundle = Path(folder, "summed")
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(PYPROJECT)
        (bundle / "summed.py").write_text(MODEL)
        for name in ("Incremental", "whole"):
            with EmbeddedCluster(Home.at(Path(folder, name)), n_workers=2) as cluster:
                study = mo.Study(
                    bundle=bundle,
                    parameters=[{"bytes": megabytes * 1_000_000}],
                    replicates=n,
                    aggregate=[f"summed:{name}"],
                )
                began = time.perf_counter()
                job = mo.run(study, cluster=cluster, watcher=Watcher())
                seconds = time.perf_counter() - began
                found.append(job.aggregate(0))
                peak = peak_bytes()
            print(
                f"{name}: runner {peak['runners'] / 1e6:.0f} MB, worker {peak['workers'] / 1e6:.0f} MB at most, "
                f"for {n * megabytes} MB of outputs; {seconds:.1f} s in all"
            )
    assert found[0] == found[1]
    describe("distributed", "pyarrow")


if __name__ == "__main__":
    main()
