"""What would others cost for each replicate? Goal: a tenth of the best of them.

The same function, five floats out, one task per replicate, two processes, values in hand: `ProcessPoolExecutor.map`
with chunks of one, loky, Ray, Parsl, and Dask's `Client.map`. None of them keeps anything. ModelOps runs on a running
warm server and stores what it gets. `multiprocessing.Pool.map` with its automatic chunks stands beside them. Each
gets as many tasks as take it a few seconds. Those that are not installed are left out, which is said; `make bench`
runs this in an environment of its own that has them.

Usage: python bench/peers.py [N_OF_OURS]
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modelops as mo
from measuring import arguments, describe, folder_on_disk
from serving import served

if TYPE_CHECKING:
    from collections.abc import Callable

N_TASKS, N_CHEAP, N_OURS = 4_000, 1_000_000, 1_000_000


def simulate(seed: int) -> dict[str, float]:
    return {"a": seed / 3, "b": -seed / 7, "c": 0.5 * seed, "d": 0.1, "e": seed * 1e-300}


def microseconds(run: Callable[[int], Any], n: int) -> float:
    """Return what a task takes; ``run`` is called once before with a few, to start what has to be started."""
    run(200)
    began = time.perf_counter()
    values = run(n)
    seconds = time.perf_counter() - began
    assert len(values) == n
    assert values[-1] == simulate(n - 1)
    return seconds / n * 1e6


def of_pool() -> float:
    with multiprocessing.Pool(2) as pool:
        return microseconds(lambda n: pool.map(simulate, range(n)), N_CHEAP)


def of_executor() -> float:
    with ProcessPoolExecutor(2) as pool:
        return microseconds(lambda n: list(pool.map(simulate, range(n), chunksize=1)), N_TASKS)


def of_loky() -> float:
    loky = importlib.import_module("loky")
    pool = loky.get_reusable_executor(max_workers=2)
    try:
        return microseconds(lambda n: list(pool.map(simulate, range(n), chunksize=1)), N_TASKS)
    finally:
        pool.shutdown()


def of_ray() -> float:
    ray = importlib.import_module("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        task = ray.remote(simulate)
        return microseconds(lambda n: ray.get([task.remote(seed) for seed in range(n)]), N_TASKS)
    finally:
        ray.shutdown()


def of_parsl() -> float:
    parsl = importlib.import_module("parsl")
    executors = importlib.import_module("parsl.executors")
    providers = importlib.import_module("parsl.providers")
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of its own programs
    )
    with folder_on_disk() as folder:
        executor = executors.HighThroughputExecutor(
            max_workers_per_node=2,
            address="127.0.0.1",
            provider=providers.LocalProvider(init_blocks=1, max_blocks=1),
        )
        with parsl.load(parsl.Config(executors=[executor], run_dir=folder)):
            app = parsl.python_app(simulate)
            return microseconds(lambda n: [f.result() for f in [app(seed) for seed in range(n)]], N_TASKS)


def of_dask() -> float:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        return microseconds(lambda n: client.gather(client.map(simulate, range(n), pure=False)), N_TASKS)


def of_modelops(n: int) -> float:
    with served() as (_, bundle):
        began = time.perf_counter()
        job = mo.submit(mo.Study(bundle=bundle, parameters=[{"x": 0.5}], replicates=n, aggregate=[]))
        assert job.wait().state == "succeeded"
        assert job.results().num_rows == n
        return (time.perf_counter() - began) / n * 1e6


PEERS = {
    "ProcessPoolExecutor.map, chunksize 1": (of_executor, ""),
    "loky": (of_loky, "loky"),
    "Ray": (of_ray, "ray"),
    "Parsl, HighThroughputExecutor": (of_parsl, "parsl"),
    "Dask, Client.map": (of_dask, "distributed"),
}


def main() -> None:
    said = arguments(__doc__)
    ours = of_modelops(int(said[0]) if said else N_OURS)
    print(f"ModelOps: {ours:.2f} us per replicate")
    print(f"multiprocessing.Pool.map, automatic chunks: {of_pool():.2f} us")
    found = {}
    for name, (measure, package) in PEERS.items():
        try:
            version = importlib.metadata.version(package) if package else ""
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed here")
            continue
        try:
            found[name] = measure()
        except Exception as error:  # noqa: BLE001  another program's: what is left is measured all the same
            print(f"{name} {version} could not be measured: {error!r:.200}")
            continue
        print(f"{name} {version}: {found[name]:.1f} us per task".replace(" :", ":"))
    best = min(found, key=lambda name: found[name])
    print(f"ratio to the best of them, {best}: {ours / found[best]:.3f} (goal: at most 0.1)")
    describe("distributed", "msgspec", "pyarrow", "SQLAlchemy")


if __name__ == "__main__":
    main()
