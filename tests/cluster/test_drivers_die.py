"""A driver is killed, stopped or cut off, another one takes its jobs over, and nothing is lost or run twice."""

from __future__ import annotations

import hashlib
import signal
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from driving import DriverProcess, submitted, wait_for

import modelops as mo
from modelops.client.job import Job
from modelops.client.run import Watcher
from modelops.states import JobState, ReplicateStatus
from modelops.store import Records
from modelops.worker import tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services import Postgres

    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.driver.machine import Machine
    from modelops.study.ids import JobId

MODEL = """
import os, time
from pathlib import Path

def simulate(params, seed):
    folder = Path(params["folder"])
    with open(folder / "starts", "a") as f:
        f.write(f"{seed}\\n")
    time.sleep(0.2)  # long enough for chunks of one
    while seed >= 4 and not (folder / "go").exists():
        time.sleep(0.01)
    return {"x": seed * 0.1}

def summarize(replicates):
    return {"sum": sum(r["x"] for r in replicates)}
"""
TABLE = 'model = "model:simulate"\naggregate = "model:summarize"\n'
N = 7  # replicates; the first four end soon, the others wait for a file


@pytest.fixture
def study(write_bundle: Callable[..., Path], tmp_path: Path) -> Iterator[mo.Study]:
    bundle = write_bundle(MODEL, table=TABLE)
    yield mo.Study(bundle=bundle, parameters=[{"folder": str(tmp_path)}], seeds=list(range(N)))
    (tmp_path / "go").touch()  # nothing of a test that failed keeps the workers of the next one


def starts(folder: Path) -> Counter[int]:
    path = folder / "starts"
    return Counter(map(int, path.read_text().split())) if path.exists() else Counter()


def wait_until_final(job: JobId, database: str) -> JobState:
    with closing(Records.open(database)) as records:
        wait_for(lambda: not any(x.job == job for x in records.open_jobs()), f"{job} ends")
        return records.job(job).state


def wait_for_outcomes(job: JobId, database: str, n: int) -> None:
    with closing(Records.open(database)) as records:
        wait_for(lambda: records.counts(job).get(ReplicateStatus.SUCCEEDED, 0) == n, f"{n} are committed")


def result_digests(job: Job) -> dict[str, str]:
    files = job.result_files()
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if name != "attempts.parquet"
    }


def test_a_killed_driver_is_replaced_and_nothing_that_ran_or_was_finished_is_run_again(
    cluster: EmbeddedCluster, study: mo.Study, tmp_path: Path
) -> None:
    job, database = submitted(study, cluster.home), cluster.home.database_url
    with DriverProcess(cluster) as first:
        wait_for_outcomes(job, database, 4)
        wait_for(lambda: len(starts(tmp_path)) == 6, "two replicates hang")
        first.kill()
    with DriverProcess(cluster) as second:
        hanging = sorted(starts(tmp_path))[4:]
        second.wait_until_running(job, hanging)
        (tmp_path / "go").touch()
        assert wait_until_final(job, database) == JobState.SUCCEEDED
    assert starts(tmp_path) == Counter(range(N)), "a replicate was begun twice"
    done = Job(job, cluster.home)
    assert [event.kind for event in done.events()].count("lease_taken") == 2
    undisturbed = mo.run(study, cluster=cluster)
    assert result_digests(done) == result_digests(undisturbed)
    assert len(result_digests(done)) == 2


def test_what_ends_while_nobody_drives_is_committed_by_the_next_driver(
    cluster: EmbeddedCluster, study: mo.Study, tmp_path: Path
) -> None:
    job, database = submitted(study, cluster.home), cluster.home.database_url
    with DriverProcess(cluster) as first:
        wait_for_outcomes(job, database, 4)
        wait_for(lambda: len(starts(tmp_path)) == 6, "two replicates hang")
        first.stop()
    (tmp_path / "go").touch()
    with closing(Records.open(database)) as records:
        assert records.job(job).state == JobState.RUNNING
        folder = cluster.home.objects / "v1" / "jobs" / job / "segments"
        committed = {Path(ref.name).name for ref in records.segments(job)}
        wait_for(
            lambda: len({x.name for x in folder.iterdir()} - committed) == 2,
            "both are stored, and in no record",
        )
    with DriverProcess(cluster):
        assert wait_until_final(job, database) == JobState.SUCCEEDED
    assert starts(tmp_path) == Counter(range(N))


def test_a_driver_that_slept_past_its_lease_writes_nothing_more(
    cluster: EmbeddedCluster, study: mo.Study, tmp_path: Path, postgres: Postgres
) -> None:
    database = postgres.new_database()
    job = submitted(study, cluster.home, database=database)
    with DriverProcess(cluster, database=database, lease_s=2.0) as first:
        wait_for(lambda: len(starts(tmp_path)) == 6, "two replicates hang")
        hanging = sorted(starts(tmp_path))[4:]
        first.wait_until_running(job, hanging)
        first.send(signal.SIGSTOP)
        with DriverProcess(cluster, database=database, lease_s=2.0) as second:
            second.wait_until_running(job, hanging)
            (tmp_path / "go").touch()
            assert wait_until_final(job, database) == JobState.SUCCEEDED
            n_said = first.n_said
            first.send(signal.SIGCONT)
            # It has the receipts as well, and learns at its first write that the job is another's.
            first.wait_until(lambda line: not line, "it drives nothing", after=n_said)
            first.stop()
    with closing(Records.open(database)) as records:
        events = records.events(job)
        owner = next(event.who for event in events if event.kind == "lease_taken")
        taken = [event.number for event in events if event.kind == "lease_taken"]
        assert len(taken) == 2
        assert [x for x in events if x.who == owner and x.number > taken[1]] == []
        assert records.counts(job) == {ReplicateStatus.SUCCEEDED: N}
    assert starts(tmp_path) == Counter(range(N))


def test_what_was_adopted_is_not_stopped_by_the_driver_that_had_it_before(
    cluster: EmbeddedCluster, study: mo.Study, tmp_path: Path
) -> None:
    """One that slept past its lease does not know, and its clock may say that the job has used up its time."""

    def told(dask_worker: Any) -> list[bool]:
        return [x.stop.stopped or x.recalled for x in tasks.runtime_of(dask_worker).attempts]

    job, database = submitted(study, cluster.home), cluster.home.database_url
    with DriverProcess(cluster) as first:
        wait_for(lambda: len(starts(tmp_path)) == 6, "two replicates hang")
        first.wait_until_running(job, sorted(starts(tmp_path))[4:])
        first.kill()
    with DriverProcess(cluster) as second:
        second.wait_until_running(job, sorted(starts(tmp_path))[4:])
        for worker, lines in cluster.client.run(tasks.attempts, job, 2).items():
            before = cluster.client.run(told, workers=[worker])
            assert before[worker] == [False]
            for held in lines:
                assert cluster.client.run(tasks.stop, job, held.attempt, 1, workers=[worker]) == {
                    worker: False
                }
                assert cluster.client.run(tasks.recall, job, held.attempt, 1, workers=[worker]) == {
                    worker: False
                }
            assert cluster.client.run(told, workers=[worker]) == before
        (tmp_path / "go").touch()
        assert wait_until_final(job, database) == JobState.SUCCEEDED
    assert starts(tmp_path) == Counter(range(N))


def test_a_database_that_is_killed_in_the_middle_delays_a_job_and_changes_nothing(
    cluster: EmbeddedCluster, study: mo.Study, tmp_path: Path, postgres: Postgres
) -> None:
    database = postgres.new_database()
    job = submitted(study, cluster.home, database=database)
    with DriverProcess(cluster, database=database, lease_s=20.0) as driver:
        wait_for(lambda: len(starts(tmp_path)) == 6, "two replicates hang")
        postgres.stop()
        (tmp_path / "go").touch()
        line = driver.wait_until(
            lambda line: bool(line.get(job, {}).get("waiting_for")), "it says what it waits for"
        )
        assert "127.0.0.1" in line[job]["waiting_for"]
        postgres.start()
        assert wait_until_final(job, database) == JobState.SUCCEEDED
    with closing(Records.open(database)) as records:
        kinds = [event.kind for event in records.events(job)]
        assert "store_lost" in kinds
        assert [kind for kind in kinds if kind in ("started", "settled", "all_succeeded")] == [
            "started",
            "settled",
            "all_succeeded",
        ]
        assert records.counts(job) == {ReplicateStatus.SUCCEEDED: N}
    assert starts(tmp_path) == Counter(range(N))


def test_storage_that_cannot_be_written_delays_a_job_and_loses_nothing(
    cluster: EmbeddedCluster, study: mo.Study, tmp_path: Path
) -> None:
    job, database = submitted(study, cluster.home), cluster.home.database_url
    inbox = cluster.home.objects / ".tmp"  # without it nobody can write, not even root
    with DriverProcess(cluster):
        wait_for(lambda: len(starts(tmp_path)) == 6, "two replicates hang")
        inbox.rename(inbox.with_name(".away"))
        try:
            (tmp_path / "go").touch()
            with closing(Records.open(database)) as records:
                wait_for(
                    lambda: any(x.kind == "storage_away" for x in records.events(job)),
                    "the job's story says it",
                )
                (text,) = [x.text for x in records.events(job) if x.kind == "storage_away"]
                assert str(cluster.home.objects) in text
                assert records.job(job).state == JobState.RUNNING
        finally:
            inbox.with_name(".away").rename(inbox)
        assert wait_until_final(job, database) == JobState.SUCCEEDED
    assert starts(tmp_path) == Counter(range(N))


def test_a_run_in_this_process_waits_for_storage_and_says_so(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    """Storage goes when the first replicates have ended, and comes back when the message was heard."""
    inbox = cluster.home.objects / ".tmp"
    away = inbox.with_name(".away")

    class Waits(Watcher):
        heard = ""

        def changed(self, machine: Machine) -> None:
            if machine.counts()[ReplicateStatus.SUCCEEDED] and not self.heard and inbox.exists():
                inbox.rename(away)

        def waiting(self, text: str) -> None:
            self.heard = text
            if away.exists():
                away.rename(inbox)

    watcher = Waits()
    source = "import time\ndef simulate(params, seed):\n    time.sleep(0.05)\n    return {'x': seed}\n"
    try:
        study = mo.Study(bundle=write_bundle(source), seeds=list(range(40)))
        job = mo.run(study, cluster=cluster, watcher=watcher)
    finally:
        if away.exists():
            away.rename(inbox)
    assert str(cluster.home.objects) in watcher.heard
    assert job.status().state == JobState.SUCCEEDED
    assert job.results()["x"].to_pylist() == list(range(40))
