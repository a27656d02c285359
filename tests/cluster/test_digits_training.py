"""The shipped training is killed at random, with its process and with its worker, and does not show it."""

from __future__ import annotations

import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from driving import DriverProcess, submitted, wait_for

import modelops as mo
from modelops.client.job import Job
from modelops.server.extend import resume_job
from modelops.states import JobState
from modelops.store import Objects, Records
from modelops.worker.topics import PROGRESS_TOPIC

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.study.ids import JobId

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
BUNDLE = Path(__file__).parents[2] / "bundles" / "digits_training"
EPOCHS = 20


def lines_of(log: Path) -> list[tuple[int, int]]:
    """Return the epochs that were begun, and the processes that did."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [(int(epoch), int(pid)) for epoch, pid in map(str.split, lines)]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(kind: str, pid: int) -> bool:
    """Kill a runner, or its worker, which is the parent of its reaper; say whether it was there."""
    try:
        os.kill(pid if kind == "runner" else parent(parent(pid)), signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def no_checkpoint_is_left(cluster: EmbeddedCluster, job: JobId) -> bool:
    return not list(Objects.open(cluster.home.storage).list(f"v1/jobs/{job}/checkpoints"))


def test_a_training_that_is_killed_at_random_ends_with_the_weights_of_one_that_is_not(
    cluster: EmbeddedCluster, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed of the kills: {seed}")  # noqa: T201  shown if it fails
    choose, log, done = random.Random(seed), tmp_path / "epochs", threading.Event()
    # The worker dies with it oftener than a replicate may take its worker down that makes no progress.
    kinds = ["runner", "worker", "worker", "worker"]
    choose.shuffle(kinds)
    at = sorted(choose.sample(range(2, EPOCHS - 4), len(kinds)))

    def kill_all() -> list[tuple[str, int]]:
        killed: list[tuple[str, int]] = []
        n_seen = 0
        for kind, epoch in zip(kinds, at, strict=True):
            hit = False
            while not hit:

                def is_time(epoch: int = epoch, n_seen: int = n_seen) -> bool:
                    lines = lines_of(log)
                    return done.is_set() or (len(lines) > n_seen and lines[-1][0] >= epoch)

                wait_for(is_time, f"epoch {epoch}")
                if done.is_set():
                    return killed
                n_seen, (now, pid) = len(lines_of(log)), lines_of(log)[-1]
                hit = kill(kind, pid)
            killed.append((kind, now))
        return killed

    def study(**more: str | float) -> mo.Study:
        return mo.Study(
            bundle=BUNDLE,
            parameters=[{"learning_rate": 0.05, **more}],
            seeds=[7],
            retry=mo.Retry(max_retries=5, initial_delay=0),
        )

    undisturbed = mo.run(study(), cluster=cluster)
    reports: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as threads, cluster.on_topic(PROGRESS_TOPIC, reports.append):
        killing = threads.submit(kill_all)
        try:
            job = mo.run(study(execution_log=str(log), pause=0.3), cluster=cluster)
        finally:
            done.set()
        killed = killing.result()
    assert job.status().state == JobState.SUCCEEDED, job.status().reason
    assert len(killed) >= 3, f"it was too quick to be killed: {killed}"
    mine, theirs = job.output(0, 0), undisturbed.output(0, 0)
    assert mine["digest"] == theirs["digest"]
    assert all(np.array_equal(mine[name], theirs[name]) for name in ("w1", "b1", "w2", "b2"))
    assert mine["accuracy"] > 0.95
    begun = [epoch for epoch, _ in lines_of(log)]
    assert sorted(set(begun)) == list(range(1, EPOCHS + 1))
    steps = [after - before for before, after in pairwise(begun)]
    assert set(steps) <= {0, 1}, f"more than the epoch it was in was run again: {begun}"
    assert steps.count(0) <= len(killed)
    assert {"index", "fraction", "values", "job"} <= set(reports[0])
    assert reports[-1]["values"]["epoch"] == EPOCHS
    assert no_checkpoint_is_left(cluster, job.id)


COUNTS = """
import time
from pathlib import Path

def simulate(params, seed, context):
    state, folder = Path(context.checkpoint_dir, "n"), Path(params["folder"])
    n = int(state.read_text()) if state.exists() else 0
    while n < 3:
        n += 1
        with open(folder / "steps", "a") as log:
            log.write(f"{n} ")
        state.write_text(str(n))
        context.checkpoint()
        while n == 2 and not (folder / "go").exists():
            (folder / "waits").touch()
            time.sleep(0.01)
    return {"n": n}
"""


def test_a_job_that_was_cancelled_and_is_resumed_goes_on_from_its_checkpoints(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle, database = write_bundle(COUNTS), cluster.home.database_url
    job = submitted(mo.Study(bundle=bundle, parameters=[{"folder": str(tmp_path)}]), cluster.home)
    objects = Objects.open(cluster.home.storage)
    with closing(Records.open(database)) as records:

        def ended() -> bool:
            return not any(row.job == job for row in records.open_jobs())

        with DriverProcess(cluster) as driver:
            wait_for((tmp_path / "waits").exists, "two steps are kept")
            records.ask_cancel(job, "a test")
            wait_for(ended, "it is cancelled")
            driver.stop()
        assert records.job(job).state == JobState.CANCELLED
        assert not no_checkpoint_is_left(cluster, job)
        resume_job(records, objects, job, "a test")
        (tmp_path / "go").touch()
        with DriverProcess(cluster):
            wait_for(ended, "it has ended")
        assert records.job(job).state == JobState.SUCCEEDED
    assert (tmp_path / "steps").read_text().split() == ["1", "2", "3"]
    assert Job(job, cluster.home).output(0, 0, "n") == 3
    assert no_checkpoint_is_left(cluster, job)
