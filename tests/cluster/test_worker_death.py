"""Workers die with -9, by accident or by what they run: nothing outlives them, and the job ends right."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import modelops as mo
from modelops.client.run import Watcher
from modelops.states import JobState, ReplicateStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.driver.machine import Machine

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
DEADLINE_S = 120.0  # of what must come; a slow machine restarts a worker in ten seconds and more
GONE_WITHIN_S = 2.0


def wait_for(condition: Callable[[], bool], what: str, within_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.01)


def state_and_parent(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[1])


def alive(pid: int) -> bool:
    return state_and_parent(pid)[0] not in "ZX"


def patience() -> float:
    """How much longer everything takes because others use the machine, too."""
    return max(1.0, 2 * os.getloadavg()[0] / len(os.sched_getaffinity(0)))


HANGS_ONCE = """
import os, signal, subprocess, sys, threading
from pathlib import Path

def orphan():
    "A process that nobody waits for, in a session of its own, two forks away; return its pid."
    r, w = os.pipe()
    if (first := os.fork()) == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(w, str(os.getpid()).encode())
        while True:
            signal.pause()
    os.waitpid(first, 0)
    return os.read(r, 100).decode()

def simulate(params, seed):
    note = Path(params["note"])
    if seed == 5 and not note.exists():
        sleeps = [sys.executable, "-c", "import threading; threading.Event().wait()"]
        child = subprocess.Popen(sleeps)
        with_session = subprocess.Popen(sleeps, start_new_session=True)
        pids = f"{os.getpid()} {child.pid} {with_session.pid} {orphan()}"
        note.with_suffix(".new").write_text(pids)
        note.with_suffix(".new").rename(note)
        threading.Event().wait()
    return {"seed": seed}

def summarize(replicates):
    return {"seeds": [r["seed"] for r in replicates]}
"""


def test_what_hangs_below_a_killed_worker_is_gone_and_the_job_ends_right(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = write_bundle(HANGS_ONCE, table='model = "model:simulate"\naggregate = "model:summarize"\n')
    note = tmp_path / "pids"
    workers = set(cluster.client.run(os.getpid).values())

    def kill_the_worker() -> tuple[list[int], float]:
        wait_for(note.exists, "the replicate hangs")
        pids = [int(pid) for pid in note.read_text().split()]
        assert len(pids) == 4
        assert all(map(alive, pids))
        pid = pids[0]
        while pid not in workers:
            pid = state_and_parent(pid)[1]
            assert pid > 1, "the runner is no descendant of a worker"
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        wait_for(lambda: not any(map(alive, pids)), f"{pids} are gone")
        return pids, time.monotonic() - killed_at

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_the_worker)
        study = mo.Study(bundle=bundle, parameters=[{"note": str(note)}], seeds=list(range(12)))
        job = mo.run(study, cluster=cluster)
        _, seconds = killing.result()
    assert seconds < GONE_WITHIN_S * patience()
    assert job.status().state == JobState.SUCCEEDED, job.status().reason
    assert job.results()["seed"].to_pylist() == list(range(12))
    assert job.aggregate(0) == {"seeds": list(range(12))}
    assert [e.kind for e in job.events()].count("worker_died") == 1
    wait_for(lambda: len(cluster.workers()) == 2, "there are two workers again")


KILLS_ITS_WORKER = """
import os, signal

def kill_worker():
    reaper = os.getppid()
    with open(f"/proc/{reaper}/stat") as f:
        worker = int(f.read().rpartition(")")[2].split()[1])
    os.kill(worker, signal.SIGKILL)
    signal.pause()

def simulate(params, seed):
    if seed == 5 and params["who"] == "replicate":
        kill_worker()
    return {"seed": seed}

def summarize(replicates):
    if len(replicates) == 12 and replicates[0]["seed"] == 0 and replicates[-1]["seed"] == 11:
        kill_worker()
    return {"n": len(replicates)}

def count(replicates):
    return {"n": len(replicates)}
"""
TABLE = """
model = "model:simulate"
aggregate = { count = "model:count", summarize = "model:summarize" }
"""


def test_a_replicate_that_kills_its_worker_three_times_is_crashed_and_its_siblings_succeed(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(KILLS_ITS_WORKER, table=TABLE)
    study = mo.Study(
        bundle=bundle,
        parameters=[{"who": "replicate"}, {"who": "nobody"}],
        seeds=list(range(12)),
        aggregate="count",
        min_success=0.9,
    )
    job = mo.run(study, cluster=cluster)
    status = job.status()
    assert status.state == JobState.PARTIAL, status.reason
    assert status.counts == {"succeeded": 23, "crashed": 1}
    (row,) = job.failures().to_pylist()
    assert (row["param"], row["seed"], row["status"]) == (0, 5, "crashed")
    assert "took its worker down 3 times" in row["message"]
    assert [row["n"] for row in job.aggregates().to_pylist()] == [11, 12]
    wait_for(lambda: len(cluster.workers()) == 2, "there are two workers again")
    again = mo.run(mo.Study(bundle=bundle, parameters=[{"who": "nobody"}], aggregate=[]), cluster=cluster)
    assert again.status().state == JobState.SUCCEEDED


def test_an_aggregate_that_kills_its_worker_three_times_is_failed_and_the_replicates_stand(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(KILLS_ITS_WORKER, table=TABLE)
    study = mo.Study(
        bundle=bundle, parameters=[{"who": "nobody"}], seeds=list(range(12)), aggregate="summarize"
    )
    job = mo.run(study, cluster=cluster)
    status = job.status()
    assert status.state == JobState.PARTIAL, status.reason
    assert status.counts == {"succeeded": 12}
    assert status.aggregates == {"failed": 1}
    (row,) = job.aggregates().to_pylist()
    assert "took its worker down 3 times" in row["reason"]
    wait_for(lambda: len(cluster.workers()) == 2, "there are two workers again")


class Runs(Watcher):
    """Tells when the first replicate of a job has succeeded."""

    def __init__(self) -> None:
        self.began = threading.Event()

    def changed(self, machine: Machine) -> None:
        if machine.counts()[ReplicateStatus.SUCCEEDED]:
            self.began.set()


def test_jobs_that_share_a_cluster_all_hear_of_a_death(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """One hangs on a worker; both have chunks there when it dies."""
    bundle = write_bundle(HANGS_ONCE, table='model = "model:simulate"\naggregate = "model:summarize"\n')
    note, watcher = tmp_path / "pids", Runs()

    def run(note: Path, watcher: Watcher) -> str:
        study = mo.Study(bundle=bundle, parameters=[{"note": str(note)}], seeds=[*range(12)], aggregate=[])
        return mo.run(study, cluster=cluster, watcher=watcher).status().state

    with ThreadPoolExecutor(2) as pool:
        hanging = pool.submit(run, note, Watcher())
        wait_for(note.exists, "the replicate hangs")
        other = pool.submit(run, tmp_path, watcher)  # this note exists, so nothing hangs
        wait_for(watcher.began.is_set, "the other job runs")
        reaper = state_and_parent(int(note.read_text().split()[0]))[1]
        os.kill(state_and_parent(reaper)[1], signal.SIGKILL)
        assert hanging.result(DEADLINE_S) == JobState.SUCCEEDED
        assert other.result(DEADLINE_S) == JobState.SUCCEEDED
