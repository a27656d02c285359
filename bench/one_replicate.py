"""How long does one replicate take, from `mo.submit` to its outcome in hand? Goal: a median of 40 ms of 100.

On a running warm server. The outcome is stored, synced and in the result files when it is here. Beside it what one
would do without ModelOps: `Client.submit(...).result()` on an idle Dask cluster of two processes, which keeps
nothing.

Usage: python bench/one_replicate.py [REPEATS]
"""

from __future__ import annotations

import time

from distributed import Client, LocalCluster

import modelops as mo
from measuring import arguments, describe, show
from serving import served


def noop(seed: int) -> dict[str, float]:
    return {"a": seed / 3}


def main() -> None:
    said = arguments(__doc__)
    repeats = int(said[0]) if said else 100
    ours, bare = [], []
    with served() as (_, bundle):
        for seed in range(repeats + 5):  # the first ones find connections closed and caches empty
            began = time.perf_counter()
            job = mo.submit(mo.Study(bundle=bundle, parameters=[{"x": 0.5}], seeds=[seed], aggregate=[]))
            assert job.wait().state == "succeeded"
            assert job.output(0, 0, "a") == seed / 3
            ours.append(time.perf_counter() - began)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for seed in range(repeats + 5):
            began = time.perf_counter()
            assert client.submit(noop, seed, pure=False).result() == {"a": seed / 3}
            bare.append(time.perf_counter() - began)
    median = show("one replicate, from submit to its outcome", ours[5:])
    show("Client.submit(...).result()", bare[5:])
    print(f"{median * 1e3:.1f} ms (goal: at most 40 ms)")
    describe("distributed", "msgspec", "pyarrow", "SQLAlchemy")


if __name__ == "__main__":
    main()
