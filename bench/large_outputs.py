"""At what rate do large outputs reach storage? Goal: at least half the rate of a plain copy of the same bytes.

100 replicates that return 50 MB each, on a started cluster with two workers, from `mo.run` to its return: outcomes are
then committed, and every byte has been hashed and synced on its way. Beside it, into the same folder: a plain copy of
100 files of 50 MB, each synced as well, by one process and by two at once; and one that is not synced. Before each of
them the machine rests: a virtual machine gives free memory back to its host within seconds, and who writes before that
has happened to what was removed last writes several times as fast.
The highest memory of the workers and their runners is shown after a tenth of the replicates and after all.

Usage: python bench/large_outputs.py [REPLICATES] [MEGABYTES] [REPEATS]
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import modelops as mo
from measuring import arguments, describe, folder_on_disk, peak_bytes, show
from modelops.client.run import Watcher
from modelops.cluster.embedded import EmbeddedCluster
from modelops.home import Home

REST_S = 5.0
PYPROJECT = """
[project]
name = "large"
version = "1.0"
requires-python = ">=3.11"
[tool.modelops]
model = "large:simulate"
"""
MODEL = """
import random

DATA = {}

def simulate(params, seed):
    n = params["bytes"]
    if n not in DATA:
        DATA[n] = random.Random(1).randbytes(n)
    return {"data": DATA[n], "seed": seed}
"""


def copy(source: Path, folder: Path, n: int, *, sync: bool, threads: int = 1) -> float:
    """Copy a file ``n`` times; return the seconds."""
    folder.mkdir()

    def one(k: int) -> None:
        path = folder / str(k)
        shutil.copyfile(source, path)
        if sync:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(n)))
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    said = arguments(__doc__)
    n = int(said[0]) if said else 100
    megabytes = int(said[1]) if len(said) > 1 else 50
    repeats = int(said[2]) if len(said) > 2 else 3
    ours, synced, two, plain = [], [], [], []
    with folder_on_disk() as folder:
        bundle = Path(folder, "large")
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(PYPROJECT)
        (bundle / "large.py").write_text(MODEL)
        source = Path(folder, "source")
        source.write_bytes(os.urandom(megabytes * 1_000_000))
        home = Home.at(Path(folder, "home"))
        copies = home.objects / "copies"
        sets = [{"bytes": megabytes * 1_000_000}]
        with EmbeddedCluster(home, n_workers=2) as cluster:
            few = mo.Study(bundle=bundle, parameters=sets, replicates=max(1, n // 10), fail_fast=False)
            mo.run(few, cluster=cluster, watcher=Watcher())  # builds the environment
            early = peak_bytes()
            for seed in range(repeats):
                time.sleep(REST_S)
                study = mo.Study(bundle=bundle, parameters=sets, replicates=n, seed=seed, fail_fast=False)
                began = time.perf_counter()
                job = mo.run(study, cluster=cluster, watcher=Watcher())
                ours.append(time.perf_counter() - began)
                assert job.status().state == "succeeded", job.status()
                shutil.rmtree(home.objects / "v1" / "jobs" / job.id / "packs")
                time.sleep(REST_S)
                synced.append(copy(source, copies, n, sync=True))
                time.sleep(REST_S)
                two.append(copy(source, copies, n, sync=True, threads=2))
                time.sleep(REST_S)
                plain.append(copy(source, copies, n, sync=False))
            late = peak_bytes()
    total = n * megabytes
    us = show(f"mo.run, {n} outputs of {megabytes} MB", ours)
    for what, seconds in (
        ("a plain copy, each file synced", synced),
        ("the same, two at once", two),
        ("a plain copy, nothing synced", plain),
    ):
        them = show(what, seconds)
        print(f"  {total / us:.0f} MB/s beside {total / them:.0f}: {them / us:.2f} of its rate (goal: 0.5)")
    for role in ("workers", "runners"):
        print(
            f"highest memory of the {role}: {early[role] / 1e6:.0f} MB after few, {late[role] / 1e6:.0f} after all"
        )
    describe("distributed", "pyarrow")


if __name__ == "__main__":
    main()
