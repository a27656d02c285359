"""How long do workers idle at the end of a job whose replicates differ by a factor of 100? Goal: 1.1 times the ideal.

A model that sleeps, for times drawn from a lognormal distribution of which 99 % lie within a factor of 100; so what
else the machine computes hardly matters. The ideal for the slots is the sum of the times divided by the slots, or the
longest replicate if that takes longer. Measured from `mo.run` to its return. Beside it, with the same times in the
same order: `Client.map` on the same cluster, one task per replicate, and `multiprocessing.Pool.map`, with its own
chunks. Nothing is kept there.

Usage: python bench/tail.py [SLOTS] [SECONDS_PER_SLOT] [REPEATS]
"""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from pathlib import Path

import modelops as mo
from measuring import arguments, describe, folder_on_disk, show
from modelops.client.run import Watcher
from modelops.cluster.embedded import EmbeddedCluster
from modelops.home import Home

MEDIAN_S = 0.05
SIGMA = math.log(100) / (2 * 2.5758)  # of the logarithm: 99 % lie within 2.5758 of them on each side
PYPROJECT = """
[project]
name = "sleepy"
version = "1.0"
requires-python = ">=3.11"
[tool.modelops]
model = "sleepy:simulate"
"""
MODEL = """
import time

def simulate(params, seed):
    time.sleep(params["seconds"])
    return {"slept": params["seconds"]}
"""


def main() -> None:
    said = arguments(__doc__)
    slots = int(said[0]) if said else 4
    per_slot_s = float(said[1]) if len(said) > 1 else 30.0
    repeats = int(said[2]) if len(said) > 2 else 3
    n = int(slots * per_slot_s / (MEDIAN_S * math.exp(SIGMA**2 / 2)))
    ours, dask, pool = [], [], []
    with folder_on_disk() as folder:
        bundle = Path(folder, "sleepy")
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(PYPROJECT)
        (bundle / "sleepy.py").write_text(MODEL)
        with EmbeddedCluster(Home.at(Path(folder, "home")), n_workers=slots) as cluster:
            mo.run(
                mo.Study(bundle=bundle, parameters=[{"seconds": 0.0}], replicates=100),
                cluster=cluster,
                watcher=Watcher(),
            )  # builds the environment
            for seed in range(repeats):
                rng = random.Random(seed)
                times = [MEDIAN_S * math.exp(rng.gauss(0, SIGMA)) for _ in range(n)]
                ideal_s = max(sum(times) / slots, *times)
                print(
                    f"seed {seed}: {n} replicates of {min(times):.4f} to {max(times):.2f} s, ideal {ideal_s:.1f} s"
                )

                study = mo.Study(bundle=bundle, parameters=[{"seconds": t} for t in times])
                began = time.perf_counter()
                job = mo.run(study, cluster=cluster, watcher=Watcher())
                ours.append((time.perf_counter() - began) / ideal_s)
                assert job.status().state == "succeeded", job.status()

                began = time.perf_counter()
                cluster.client.gather(cluster.client.map(time.sleep, times, pure=False))
                dask.append((time.perf_counter() - began) / ideal_s)
                with multiprocessing.get_context("spawn").Pool(slots) as workers:
                    began = time.perf_counter()
                    workers.map(time.sleep, times)
                    pool.append((time.perf_counter() - began) / ideal_s)
    print(f"times the ideal for {slots} slots (goal: 1.1)")
    show("mo.run", ours, unit="")
    show("Client.map, one task per replicate", dask, unit="")
    show("Pool.map, its own chunks", pool, unit="")
    describe("distributed")


if __name__ == "__main__":
    main()
