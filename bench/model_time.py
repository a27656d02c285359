"""How much of the machine's time is left for the model? Goal: 90 % for a model of 1 ms, 97 % for 10 ms and more.

A model that computes for a given time of its CPU, on a started cluster with two workers of one thread, from `mo.run`
to its return. Two shares are shown. That of CPU seconds: what the models used, of what all processes together used
(driver, scheduler, workers, runners); other programs of the machine do not matter for it. And that of the machine's
time: what the models used, of the cores' time that passed; for this one the machine must be idle. Beside them, on the
same cluster, what one would do without ModelOps: `Client.map` of the same function, one task per replicate, and
`multiprocessing.Pool.map`, with its own chunks and nothing kept; both of a quarter of the replicates.

Usage: python bench/model_time.py [SECONDS_OF_WORK_PER_CORE]
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import modelops as mo
from measuring import CpuOfTree, arguments, describe, folder_on_disk
from modelops.client.run import Watcher
from modelops.cluster.embedded import EmbeddedCluster
from modelops.home import Home

MODEL_MS = (1, 10, 100)
LESS = 4  # what the peers do of it: their shares hardly depend on how long it is, and theirs take long
GOALS = {1: 0.90, 10: 0.97, 100: 0.97}
N_WORKERS = 2
PYPROJECT = """
[project]
name = "busy"
version = "1.0"
requires-python = ">=3.11"
[tool.modelops]
model = "busy:simulate"
"""
MODEL = """
import time

def simulate(params, seed):
    until = time.process_time() + params["ms"] / 1000
    while time.process_time() < until:
        sum(range(500))
    return {"a": seed / 3, "b": -seed / 7, "c": 0.5, "d": 0.1, "e": seed * 1e-300}
"""


def busy(ms: int) -> None:
    """Do what the model does."""
    until = time.process_time() + ms / 1000
    while time.process_time() < until:
        sum(range(500))


def report(what: str, model_s: float, cpu: CpuOfTree, wall_s: float) -> tuple[float, float]:
    used = cpu.used()
    share, of_cores = model_s / sum(used.values()), model_s / (N_WORKERS * wall_s)
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(used.items()))
    print(
        f"  {what}: {share:.1%} of CPU seconds, {of_cores:.1%} of the cores' time in {wall_s:.1f} s ({parts})"
    )
    return share, of_cores


def main() -> None:
    said = arguments(__doc__)
    seconds = float(said[0]) if said else 60.0
    with folder_on_disk() as folder:
        bundle = Path(folder, "busy")
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(PYPROJECT)
        (bundle / "busy.py").write_text(MODEL)
        with EmbeddedCluster(Home.at(Path(folder, "home")), n_workers=N_WORKERS) as cluster:
            warm_up = mo.Study(bundle=bundle, parameters=[{"ms": 1}], replicates=100)
            mo.run(warm_up, cluster=cluster, watcher=Watcher())  # builds the environment
            for ms in MODEL_MS:
                n = max(LESS, int(N_WORKERS * seconds * 1000 / ms))
                print(f"model of {ms} ms, {n:,} replicates (goal: {GOALS[ms]:.0%})")
                study = mo.Study(bundle=bundle, parameters=[{"ms": ms}], replicates=n, seed=ms)
                cpu, began = CpuOfTree(), time.perf_counter()
                job = mo.run(study, cluster=cluster, watcher=Watcher())
                wall_s = time.perf_counter() - began
                assert job.status().state == "succeeded", job.status()
                report("ModelOps", sum(job.attempts()["cpu_seconds"].to_pylist()), cpu, wall_s)

                cpu, began = CpuOfTree(), time.perf_counter()
                cluster.client.gather(cluster.client.map(busy, [ms] * (n // LESS), pure=False))
                report("Client.map", n // LESS * ms / 1000, cpu, time.perf_counter() - began)
        for ms in MODEL_MS:
            n = max(1, int(N_WORKERS * seconds * 1000 / ms / LESS))
            cpu, began = CpuOfTree(), time.perf_counter()
            with multiprocessing.get_context("spawn").Pool(N_WORKERS) as pool:
                pool.map(busy, [ms] * n)
                report(f"Pool.map, {ms} ms", n * ms / 1000, cpu, time.perf_counter() - began)
    describe("distributed", "msgspec", "pyarrow", "SQLAlchemy")


if __name__ == "__main__":
    main()
