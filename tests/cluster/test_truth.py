"""On real workers: a job that was extended equals a fresh one, and damage is found, run again, and leaves no trace."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from driving import submitted

import modelops as mo
from modelops.client.run import Watcher
from modelops.driver.hands import Hands
from modelops.server.extend import extend_job, resume_job
from modelops.server.reconcile import Mismatch
from modelops.server.reconciler import Reconciler
from modelops.server.supervisor import Supervisor
from modelops.server.workers import ask_workers
from modelops.states import FINAL_JOB_STATES, JobEvent, JobState, ReplicateStatus
from modelops.store import Objects, Records
from modelops.store.contents import JobContents
from modelops.store.leases import leases_for
from modelops.store.results import attempts_table
from modelops.store.segments import job_folder
from modelops.study.canonical import canonical_json
from modelops.study.ids import AttemptId, JobId
from modelops.study.ranges import Ranges
from modelops.worker import tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.driver.machine import Machine

MODEL = """
import os, time


def simulate(params, seed):
    if params.get("slow"):
        time.sleep(float(params["slow"]))
    if os.path.exists(params.get("wall", "/nonexistent")):
        raise ValueError("there is a wall")
    return {"x": seed * params["a"], "large": bytes([seed % 256]) * 70_000}


def summarize(replicates):
    return {"total": sum(r["x"] for r in replicates), "n": len(replicates)}
"""
GATED_MODEL = """
import os, time


def simulate(params, seed, context):
    while context.replicate == 7 and not os.path.exists(params["gate"]):
        time.sleep(0.01)
    return {"x": seed * params["a"], "large": bytes([seed % 256]) * 70_000}


def summarize(replicates):
    return {"total": sum(r["x"] for r in replicates), "n": len(replicates)}
"""
TABLE = """
model = "model:simulate"
aggregate = "model:summarize"
"""
SETS: list[dict[str, Any]] = [{"a": 1}, {"a": 2}, {"a": 3}]
DEADLINE_S = 120.0


class Server:
    """What a server has of drivers, on the cluster of the tests."""

    def __init__(self, cluster: EmbeddedCluster) -> None:
        self.cluster, home = cluster, cluster.home
        self.records, self.objects = Records.open(home.database_url), Objects.open(home.storage)
        leases = leases_for(self.records, home.state / "leases")
        self.supervisor = Supervisor(
            records=self.records,
            objects=self.objects,
            cache=home.cache,
            pool=cluster,
            leases=leases,
            who="server",
        )
        self.reconciler = Reconciler(
            self.records, self.objects, self.supervisor, cluster, "reconciler", settle_s=0.2, grace_s=0.0
        )

    def ended(self, job: JobId) -> JobState:
        """Wait until a job is final and no longer driven, and return its state."""
        self.supervisor.wake()
        self.until(
            lambda: self.records.job(job).state in FINAL_JOB_STATES and job not in self.supervisor.driven(),
            job,
        )
        return self.records.job(job).state

    def until(self, condition: Callable[[], bool], job: JobId) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, [(e.kind, e.text) for e in self.records.events(job)]
            threading.Event().wait(0.02)

    def files(self, job: JobId) -> dict[str, bytes]:
        names = ("replicates", "aggregates")
        return {n: self.objects.get(f"{job_folder(job)}/results/{n}.parquet") for n in names}

    def n_attempts(self, job: JobId) -> int:
        """Return how often a replicate was run, of all of them together."""
        return len(
            attempts_table(JobContents.of(self.objects, self.records, job)).column("param").to_pylist()
        )


@pytest.fixture
def server(cluster: EmbeddedCluster) -> Iterator[Server]:
    made = Server(cluster)
    made.supervisor.start()
    yield made
    made.supervisor.stop()
    made.records.close()


@pytest.fixture
def bundle(write_bundle: Callable[..., Path]) -> Path:
    return write_bundle(MODEL, name="truth", table=TABLE)


def run(bundle: Path, cluster: EmbeddedCluster, sets: list[dict[str, Any]], n: int, **more: Any) -> JobId:
    study = mo.Study(bundle=bundle, parameters=sets, replicates=n, seed=3, **more)
    return JobId(mo.run(study, cluster=cluster, progress=False).id)


def flip(server: Server, name: str, rng: random.Random) -> None:
    data = server.objects.get(name)
    at = rng.randrange(len(data))
    server.objects.put(name, data[:at] + bytes([data[at] ^ (1 + rng.randrange(255))]) + data[at + 1 :])


def test_an_extended_job_leaves_the_files_of_a_fresh_one_and_runs_only_what_is_new(
    server: Server, bundle: Path
) -> None:
    job = run(bundle, server.cluster, SETS[:2], 5)
    extend_job(server.records, server.objects, job, "me", replicates=8, parameters=[canonical_json(SETS[2])])
    assert server.ended(job) is JobState.SUCCEEDED
    fresh = run(bundle, server.cluster, SETS, 8)
    assert server.files(job) == server.files(fresh)
    assert server.records.job(job).reason == "", "why it began again is no reason of how it ended"
    assert server.n_attempts(job) == 24
    assert server.reconciler.run(job) == []


@pytest.mark.parametrize("again", [{"replicates": 7}, {"parameters": [canonical_json({"a": 3})]}])
def test_what_came_after_a_backup_that_was_put_back_is_not_taken_for_what_comes_later(
    server: Server, bundle: Path, again: dict[str, Any]
) -> None:
    """Storage still has an extension that the records do not know, under the names that the next one would have."""
    job = run(bundle, server.cluster, SETS[:2], 5)
    url = server.cluster.home.database_url.removeprefix("sqlite:///")
    with (
        contextlib.closing(sqlite3.connect(url)) as live,
        contextlib.closing(sqlite3.connect(":memory:")) as kept,
    ):
        live.backup(kept)
        extend_job(server.records, server.objects, job, "me", replicates=8)
        assert server.ended(job) is JobState.SUCCEEDED
        kept.backup(live)
    assert server.records.job(job).run == 1
    extend_job(server.records, server.objects, job, "me", **again)
    assert server.ended(job) is JobState.SUCCEEDED, [(e.kind, e.text) for e in server.records.events(job)]
    sets, n = (SETS, 5) if "parameters" in again else (SETS[:2], 7)
    assert server.files(job) == server.files(run(bundle, server.cluster, sets, n))
    assert server.n_attempts(job) == len(sets) * n
    assert "segments_withdrawn" in {event.kind for event in server.records.events(job)}
    assert server.reconciler.run(job) == []


def test_damage_at_any_byte_is_found_and_run_again_and_the_results_are_the_same(
    server: Server, bundle: Path
) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    job = run(bundle, server.cluster, SETS, 8)
    before, ran = server.files(job), server.n_attempts(job)
    lost = rng.choice(server.records.segments(job))
    flip(server, f"{job_folder(job)}/{rng.choice([lost.name, lost.pack])}", rng)
    flip(server, f"{job_folder(job)}/results/replicates.parquet", rng)
    found = server.reconciler.run(job)
    assert [f.kind for f in found] == [Mismatch.SEGMENT_DAMAGED], seed
    assert server.ended(job) is JobState.SUCCEEDED, seed
    assert server.files(job) == before, seed
    assert server.n_attempts(job) - ran == len(Ranges(lost.ranges)), seed
    assert server.reconciler.run(job) == [], seed
    assert server.records.mismatches()["segment_damaged"] >= 1


def test_damage_that_is_met_while_other_damage_is_repaired_is_run_again_by_the_same_run(
    server: Server, bundle: Path
) -> None:
    """The look of every minute reads nothing; the aggregate that it has made again does."""
    job = run(bundle, server.cluster, SETS[:1], 8)
    before, ran = server.files(job), server.n_attempts(job)
    (aggregate,) = server.records.aggregates(job)
    lost = next(ref for ref in server.records.segments(job) if ref.pack)
    server.objects.delete(f"{job_folder(job)}/{aggregate.name}")
    flip(server, f"{job_folder(job)}/{lost.pack}", random.Random(7))
    assert [f.kind for f in server.reconciler.run(job, deep=False)] == [Mismatch.AGGREGATE_DAMAGED]
    assert server.ended(job) is JobState.SUCCEEDED, server.records.job(job).reason
    assert server.files(job) == before
    assert server.n_attempts(job) - ran == len(Ranges(lost.ranges))
    assert server.reconciler.run(job) == []


@pytest.mark.parametrize("what", ["segment", "pack"])
def test_damage_while_a_job_runs_is_mended_before_it_ends(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    """A pack is read by aggregates only: it is damaged while the last replicate of each set waits for that."""
    server = Server(cluster)
    rng = random.Random(7)
    gate = tmp_path / "gate"
    bundle = write_bundle(GATED_MODEL, name="gated", table=TABLE)
    sets = [{**params, "gate": str(gate)} for params in SETS]

    class Vandal(Watcher):
        job: JobId | None = None
        done = False

        def prepared(self, job: Any, _n: int) -> None:
            self.job = JobId(job.id)

        def changed(self, machine: Machine) -> None:
            if not self.done and self.job and machine.counts()[ReplicateStatus.SUCCEEDED]:
                self.done = True
                ref = server.records.segments(self.job)[0]
                flip(server, f"{job_folder(self.job)}/{ref.name if what == 'segment' else ref.pack}", rng)
                gate.touch()

    vandal = Vandal()
    study = mo.Study(bundle=bundle, parameters=sets, replicates=8, seed=3)
    job = JobId(mo.run(study, cluster=cluster, watcher=vandal).id)
    assert vandal.done
    assert server.records.job(job).state is JobState.SUCCEEDED
    fresh = run(bundle, cluster, sets, 8)
    assert server.files(job) == server.files(fresh)
    story = [event for event in server.records.events(job) if event.kind == "mismatch"]
    assert [event.data["kind"] for event in story] == ["segment_damaged"]
    server.records.close()


def test_what_was_withdrawn_does_not_count_again_while_a_worker_keeps_its_receipt(
    server: Server, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """A worker keeps a receipt until its next chunk, and with the last replicates of a job there is none."""
    gate = tmp_path / "gate"
    bundle = write_bundle(GATED_MODEL, name="gated", table=TABLE)
    sets: list[dict[str, Any]] = [{"a": 1, "gate": str(gate)}]
    study = mo.Study(bundle=bundle, parameters=sets, replicates=8, seed=3)
    job = submitted(study, server.cluster.home)

    def n_done() -> int:
        return server.records.counts(job).get(ReplicateStatus.SUCCEEDED, 0)

    def kept() -> set[AttemptId]:
        tables = server.cluster.client.run(tasks.attempts, job, 0).values()
        return {x.attempt for table in tables for x in table if x.state == "ended"}

    try:
        server.supervisor.wake()
        server.until(lambda: n_done() == 7, job)
        lost = next(ref for ref in server.records.segments(job) if ref.attempt in kept())
        server.objects.delete(f"{job_folder(job)}/{lost.name}")
        assert [f.kind for f in server.reconciler.run(job)] == [Mismatch.SEGMENT_DAMAGED]
        server.until(lambda: n_done() == 7, job)
        assert server.reconciler.run(job) == []
    finally:
        gate.touch()
    assert server.ended(job) is JobState.SUCCEEDED
    assert server.n_attempts(job) == 8 + len(Ranges(lost.ranges))
    assert server.files(job) == server.files(run(bundle, server.cluster, sets, 8))
    assert [e.kind for e in server.records.events(job)].count("mismatch") == 1


def test_a_study_that_workers_cannot_read_is_stored_again_and_what_they_met_before_ends_nothing(
    server: Server, bundle: Path
) -> None:
    """A worker keeps how a chunk of an earlier driver has ended, also if that was for damage which is mended."""
    study = mo.Study(bundle=bundle, parameters=SETS, replicates=4, seed=3)
    job = submitted(study, server.cluster.home)
    flip(server, f"{job_folder(job)}/study.json", random.Random(7))
    assert server.ended(job) is JobState.SUCCEEDED, server.records.job(job).reason
    assert server.files(job) == server.files(run(bundle, server.cluster, SETS, 4))
    assert server.records.mismatches()["study_damaged"] >= 1


def test_a_job_that_somebody_calls_ended_while_it_runs_goes_on(server: Server, bundle: Path) -> None:
    job = run(bundle, server.cluster, SETS, 2)
    extend_job(server.records, server.objects, job, "me", parameters=[canonical_json({"a": 5, "slow": 2})])
    server.supervisor.wake()
    server.until(lambda: bool(server.supervisor.attempts(job)), job)
    with server.records.database.writing() as sql:
        sql.exec_driver_sql("UPDATE jobs SET state = 'failed' WHERE job = ?", (job,))
    assert [f.kind for f in server.reconciler.run(job)] == [Mismatch.STATE_DIFFERS]
    assert server.ended(job) is JobState.SUCCEEDED
    assert server.n_attempts(job) == 8, "nothing was stopped or run again"
    assert server.reconciler.run(job) == []


def failed_and_resumed(
    server: Server, bundle: Path, folder: Path, n_replicates: int
) -> tuple[JobId, list[dict[str, Any]]]:
    """Run a job of which one set fails, mend that, and have it tried again; return the job and its parameter sets."""
    wall = folder / "wall"
    wall.write_text("")
    sets: list[dict[str, Any]] = [{"a": 1}, {"a": 2, "wall": str(wall)}]
    job = run(bundle, server.cluster, sets, n_replicates)
    assert server.records.job(job).state is JobState.PARTIAL
    wall.unlink()
    resume_job(server.records, server.objects, job, "me", failed=True)
    return job, sets


def test_failures_are_tried_again_when_asked(server: Server, bundle: Path, tmp_path: Path) -> None:
    job, sets = failed_and_resumed(server, bundle, tmp_path, 5)
    assert server.ended(job) is JobState.SUCCEEDED
    fresh = run(bundle, server.cluster, sets, 5)
    assert server.files(job) == server.files(fresh)
    assert server.n_attempts(job) == 15


def test_failures_that_a_worker_still_holds_are_tried_again_too(
    server: Server, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the receipt of the last chunk until it is told that the job has ended, and nobody comes to that."""
    monkeypatch.setattr(Hands, "forget_job", lambda *_, **__: None)
    job, _ = failed_and_resumed(server, bundle, tmp_path, 1)
    server.ended(job)
    assert server.records.counts(job) == {ReplicateStatus.SUCCEEDED: 2}


def test_too_many_failures_take_nothing_from_a_repair_and_leave_a_resumed_job_as_many_again(
    server: Server, bundle: Path, tmp_path: Path
) -> None:
    wall = tmp_path / "wall"
    sets: list[dict[str, Any]] = [{"a": 1, "slow": 0.05}, {"a": 2, "slow": 0.1, "wall": str(wall)}]
    wall.touch()
    job = run(bundle, server.cluster, sets, 50, max_failures=4, fail_fast=False)
    before = server.records.counts(job)
    n_failed = before[ReplicateStatus.FAILED]
    assert 4 < n_failed < 50
    for ref in server.records.segments(job):
        if ReplicateStatus.SUCCEEDED in ref.counts and ReplicateStatus.FAILED not in ref.counts:
            server.objects.delete(f"{job_folder(job)}/{ref.name}")
    assert server.reconciler.run(job)
    server.ended(job)
    assert server.records.counts(job) == before
    resume_job(server.records, server.objects, job, "me")
    server.ended(job)
    row = server.records.job(job)
    assert row.reason.endswith("replicates of this run failed, more than max_failures = 4")
    assert server.records.counts(job)[ReplicateStatus.FAILED] > n_failed + 4


def test_what_runs_for_a_job_that_has_ended_is_stopped_and_what_nobody_runs_is_run_again(
    server: Server, bundle: Path
) -> None:
    job = run(bundle, server.cluster, [{"a": 1, "slow": 0.01}], 3)
    extend_job(server.records, server.objects, job, "me", parameters=[canonical_json({"a": 5, "slow": 600})])
    server.supervisor.wake()

    def running() -> bool:
        answers = ask_workers(server.cluster) or {}
        return any(line.live and line.job == job for lines in answers.values() for line in lines or ())

    server.until(running, job)
    # Nobody runs it: the driver waits for an attempt that its worker has never heard of.
    (worker, *_) = server.cluster.workers()
    driver = server.supervisor._driven[job].driver
    assert driver._loop is not None
    driver._loop.hands._holders[AttemptId("0001-999999")] = worker
    found = server.reconciler.run(job)
    assert [(f.kind, f.what) for f in found] == [(Mismatch.NOBODY_RUNS, "0001-999999")]
    server.until(lambda: AttemptId("0001-999999") not in server.supervisor.attempts(job), job)
    assert server.reconciler.run(job) == []
    # Somebody still runs it: the records say that the job has ended.
    with server.supervisor.apart(job) as epoch:
        for event in (JobEvent.CANCEL_ASKED, JobEvent.STOPPED):
            server.records.change_state(job, event, who="test", epoch=epoch)
    found = server.reconciler.run(job)
    assert {f.kind for f in found} == {Mismatch.RUNS_AFTER_END}
    server.until(lambda: not running(), job)
    assert server.reconciler.run(job) == []
    story = [event for event in server.records.events(job) if event.kind == "mismatch"]
    assert [event.data["kind"] for event in story] == ["nobody_runs", "runs_after_end"]


def test_a_job_that_a_live_driver_elsewhere_has_is_left_to_it(cluster: EmbeddedCluster, bundle: Path) -> None:
    job = run(bundle, cluster, SETS[:1], 3)
    with contextlib.ExitStack() as stack:
        ours, theirs = Server(cluster), Server(cluster)
        stack.callback(ours.records.close)
        stack.callback(theirs.records.close)
        before = ours.records.events(job)
        with theirs.supervisor.apart(job):
            ours.objects.delete(f"{job_folder(job)}/{ours.records.segments(job)[0].name}")
            during = ours.records.events(job)
            assert ours.reconciler.run(job) == []
            assert ours.records.events(job) == during
        assert len(during) == len(before) + 1
        assert [f.kind for f in ours.reconciler.run(job)] == [Mismatch.SEGMENT_DAMAGED]
