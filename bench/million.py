"""What do a million replicates cost? Goal: 10 us each; 20 us with an aggregate per parameter set.

A model that does nothing, five floats out, on a running warm server with two workers of one thread each: from
`mo.submit` to `results()` in hand, outcomes stored and in result files. All are compared by value afterwards. Wall
seconds say little on a machine that does other things meanwhile; so CPU seconds are shown too, by process. Also how
much memory server (which holds the driver) and scheduler took above idle, finalizing included (goal: 200 MB), and how
many files the job left (goal: 2,000). Beside it `multiprocessing.Pool.map` of the same function with its automatic
chunks: no isolation, nothing kept, the honest floor.

Usage: python bench/million.py [N] [SHAPES], shapes out of: sets-and-replicates sets replicates aggregates
"""

from __future__ import annotations

import multiprocessing
import time
from typing import TYPE_CHECKING

import numpy as np

import modelops as mo
from measuring import arguments, describe
from serving import Processes, served

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.home import Home

N = 1_000_000
SHAPES = ("sets-and-replicates", "sets", "replicates", "aggregates")


def shape(name: str, n: int) -> tuple[int, int]:
    """Return how many parameter sets and replicates a shape has."""
    per_set = {"sets-and-replicates": round(n**0.5), "replicates": n}.get(name, 1)
    return n // per_set, per_set


def measure(name: str, n: int, home: Home, bundle: Path) -> None:
    n_sets, n_replicates = shape(name, n)
    n = n_sets * n_replicates
    study = mo.Study(
        bundle=bundle,
        parameters=mo.grid(x=[p / 10 for p in range(n_sets)]),
        replicates=n_replicates,
        aggregate=None if name == "aggregates" else [],
    )
    with Processes(home) as processes:
        began = time.perf_counter()
        job = mo.submit(study)
        submitted = time.perf_counter()
        status = job.wait()
        ended = time.perf_counter()
        table = job.results()
        wall_s = time.perf_counter() - began
    assert status.state == "succeeded", status
    seeds, x = table["seed"].to_numpy().astype(float), np.repeat(np.arange(n_sets) / 10, n_replicates)
    expected = {"a": seeds / 3, "b": -seeds / 7, "c": x * seeds, "d": np.full(n, 0.1), "e": seeds * 1e-300}
    assert all((table[key].to_numpy() == values).all() for key, values in expected.items())
    if name == "aggregates":
        made = job.aggregates()
        assert (made["total"].to_numpy() == seeds / 3).all()
        assert (made["n"].to_numpy() == 1).all()
    cpu_s = sum(processes.cpu_s.values())
    grown = sum(processes.grown_bytes.values()) / 2**20
    files = sum(path.is_file() for path in (home.objects / "v1" / "jobs" / job.id).rglob("*"))
    goal = 20 if name == "aggregates" else 10
    print(
        f"{n_sets:,} x {n_replicates:,}{', an aggregate per set' if name == 'aggregates' else ''}: "
        f"{wall_s / n * 1e6:.2f} us per replicate (goal: at most {goal}), {wall_s:.1f} s: "
        f"submit {submitted - began:.1f}, wait {ended - submitted:.1f}, results {wall_s + began - ended:.1f}"
    )
    by_role = ", ".join(f"{role} {s / n * 1e6:.2f}" for role, s in processes.cpu_s.items() if s / n > 5e-8)
    print(f"  CPU: {cpu_s / n * 1e6:.2f} us per replicate: {by_role}")
    print(
        f"  server and scheduler: {grown:.0f} MiB above idle (goal: at most 200); {files} files (goal: 2,000)"
    )


def simulate(seed: int) -> dict[str, float]:
    return {"a": seed / 3, "b": -seed / 7, "c": 0.5 * seed, "d": 0.1, "e": seed * 1e-300}


def floor(n: int) -> None:
    """Measure what nothing can beat that runs the function in other processes and has its values in hand."""
    with multiprocessing.Pool(2) as pool:
        pool.map(simulate, range(1_000))
        began = time.perf_counter()
        assert len(pool.map(simulate, range(n))) == n
        print(f"multiprocessing.Pool.map: {(time.perf_counter() - began) / n * 1e6:.2f} us per replicate")


def main() -> None:
    said = arguments(__doc__)
    n = int(said[0]) if said else N
    with served() as (home, bundle):
        for name in said[1:] or SHAPES:
            measure(name, n, home, bundle)
    floor(n)
    describe("distributed", "msgspec", "pyarrow", "SQLAlchemy")


if __name__ == "__main__":
    main()
