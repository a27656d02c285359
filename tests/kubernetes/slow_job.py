"""A job that runs while something happens to the cluster."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from tests.kubernetes.conftest import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa
    from tests.kubernetes.conftest import Cluster

N = 75  # of each of two parameter sets
SLOW = """# /// script
# requires-python = ">=3.9"
# dependencies = []
# [tool.modelops]
# model = "slow:simulate"
# ///
import random, time

def simulate(params, seed):
    print("begins", seed, flush=True)
    time.sleep(0.2)
    return {"x": random.Random(seed).random() + params["p"]}
"""


class Running:
    """A job that runs, and has some of its outcomes."""

    def __init__(self, cluster: Cluster, folder: Path, n: int = N, *options: str) -> None:
        self._cluster, self._folder, self._n = cluster, folder, n
        (folder / "slow.py").write_text(SLOW)
        with cluster.forwarded():
            study = ("-p", "p=1,2", "-n", str(n), "--seed", "7", *options)
            self.job = cluster.submit(folder / "slow.py", *study)
            wait_for(lambda: cluster.succeeded(self.job) > 10, "replicates succeed")

    def goes_on(self) -> None:
        """Wait for more outcomes, or the end."""
        with self._cluster.forwarded():  # the server's pod may be another one
            before = self._cluster.succeeded(self.job)
            wait_for(
                lambda: self._cluster.succeeded(self.job) > min(before, 2 * self._n - 1), "the job goes on"
            )

    def attempts(self) -> pa.Table:
        """Wait for its end, see that all its results are right, and return what was tried."""
        out = self._folder / "out"
        with self._cluster.forwarded():
            assert self._cluster.ended(self.job) == "succeeded"
            assert self._cluster.succeeded(self.job) == 2 * self._n
            self._cluster.modelops("jobs", "sync", self.job, str(out))
        table = pq.read_table(out / "results/replicates.parquet")
        assert table.num_rows == 2 * self._n
        for row in table.select(["seed", "p", "x"]).to_pylist():
            assert row["x"] == random.Random(row["seed"]).random() + row["p"]
        return pq.read_table(out / "results/attempts.parquet")

    def n_begun(self) -> int:
        """Return how often a replicate began, as far as its log was kept."""
        with self._cluster.forwarded():
            return self._cluster.modelops("jobs", "logs", self.job).count("begins ")
