"""What do isolation, durability and status cost, compared with bare Dask tasks? Goal: at most a tenth of them.

Runs 20 parameter sets x 200 no-op replicates that return five floats, with 20 aggregates, on a running warm server with
two workers, from `mo.submit` to `results()` in hand: outcomes are then committed to the store and in result files. All
are compared by value afterwards. Beside it, on a cluster of the same size, what one would write without ModelOps:
`Client.map` of 4,000 functions that do nothing at all, gathered. The two alternate.

Usage: python bench/dask_map.py [REPEATS]
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from distributed import Client, LocalCluster

import modelops as mo
from measuring import arguments, describe, show
from serving import served

if TYPE_CHECKING:
    import pyarrow as pa

N_SETS, N_REPLICATES = 20, 200


def noop(_: int) -> None:
    return None


def check(job: mo.Job, table: pa.Table) -> None:
    """Compare every outcome and every aggregate with what they must be."""
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
    said = arguments(__doc__)
    repeats = int(said[0]) if said else 7
    sets = [{"x": p / 10} for p in range(N_SETS)]
    ours, theirs = [], []
    with (
        served() as (_, bundle),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for n in range(-1, repeats):  # the first is not counted
            study = mo.Study(bundle=bundle, parameters=sets, replicates=N_REPLICATES, seed=n + 1)
            started = time.perf_counter()
            job = mo.submit(study)
            assert job.wait().state == "succeeded", job.status()
            table = job.results()
            ours.append(time.perf_counter() - started)
            check(job, table)

            started = time.perf_counter()
            futures = client.map(noop, range(N_SETS * N_REPLICATES), pure=False)
            assert len(client.gather(futures)) == N_SETS * N_REPLICATES
            theirs.append(time.perf_counter() - started)
            del futures
    us = show("from submit to results, 4,000 replicates and 20 aggregates", ours[1:])
    them = show("Client.map, 4,000 functions", theirs[1:])
    print(f"{us:.2f} s (goal: at most 0.6 s); ratio of the medians: {us / them:.3f} (goal: at most 0.1)")
    describe("distributed", "msgspec", "pyarrow", "SQLAlchemy")


if __name__ == "__main__":
    main()
