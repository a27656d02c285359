"""``mo.until``: as many replicates as each parameter set needs, the same ones whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import driving
import pyarrow.compute as pc
import pytest
from driving import submitted, wait_for

import modelops as mo
from modelops.client.run import Watcher
from modelops.server.extend import extend_job, resume_job
from modelops.server.mend import mend_job
from modelops.states import JobState
from modelops.store.contents import JobContents
from modelops.store.results import aggregates_table, replicates_table
from modelops.store.segments import job_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pyarrow as pa

    from modelops.client.job import Job
    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.driver.machine import Machine
    from modelops.study.ids import JobId
    from modelops.study.stopping import Until

NOISY = """
import os, random, time

def simulate(params, seed):
    time.sleep(random.SystemRandom().choice([0, 0, 0, params.get("slow", 0.02)]))  # no part of the result
    if seed % 50 == 0:
        raise ValueError("unlucky")
    return {"x": random.Random(seed).gauss(1.0, params["spread"]), "word": "a", "none": None}

def count(replicates):
    return {"n": len(replicates)}
"""
TABLE = 'model = "model:simulate"\naggregate = "model:count"\n'
SETS = [{"spread": 0.0}, {"spread": 0.3}, {"spread": 0.6}, {"spread": 9.0}]


def rule(**said: Any) -> Until:
    return mo.until(**{"half_width": 0.1, "of": "x", "min": 10, "max": 150, **said})


def study_of(bundle: Path, **said: Any) -> mo.Study:
    return mo.Study(
        **{"bundle": bundle, "parameters": SETS, "replicates": rule(), "min_success": 0.5, "seed": 3, **said}
    )


@pytest.fixture
def bundle(write_bundle: Callable[..., Path]) -> Path:
    return write_bundle(NOISY, table=TABLE)


def values(table: pa.Table, param: int) -> list[float | None]:
    """Return the outputs of a parameter set's replicates, up to the first that is not needed."""
    rows = table.filter(pc.equal(table["param"], param))
    statuses = rows["status"].to_pylist()
    n = statuses.index("not_needed") if "not_needed" in statuses else len(statuses)
    assert set(statuses[n:]) <= {"not_needed"}
    return [
        None if s == "failed" else x for s, x in zip(statuses[:n], rows["x"].to_pylist()[:n], strict=True)
    ]


class KillsOne(Watcher):
    """Kills a worker when the job is under way."""

    def __init__(self, pid: int) -> None:
        self.pid, self.killed = pid, False

    def changed(self, machine: Machine) -> None:
        if not self.killed and machine.progress > 0.02:
            self.killed = True
            os.kill(self.pid, signal.SIGKILL)


def digests(job: Job) -> list[str]:
    files = job.result_files()
    return [
        sha256(files[name].read_bytes()).hexdigest() for name in ("replicates.parquet", "aggregates.parquet")
    ]


def test_each_set_gets_what_the_rule_says_and_a_killed_worker_changes_no_byte(
    cluster: EmbeddedCluster, bundle: Path
) -> None:
    everything = mo.run(study_of(bundle, replicates=150), cluster=cluster).results()
    job = mo.run(study_of(bundle), cluster=cluster)
    results, n_needed = job.results(), []
    for param in range(4):
        got, all_of_it = values(results, param), values(everything, param)
        assert got == all_of_it[: len(got)]
        assert rule().needed(all_of_it) == len(got)
        n_needed.append(len(got))
    assert n_needed[0] <= n_needed[1] < n_needed[2] <= n_needed[3] == 150
    status, n = job.status(), sum(n_needed)
    assert (status.counts["not_needed"], sum(status.counts.values())) == (600 - n, 600)
    assert job.aggregates()["n_replicates"].to_pylist() == n_needed
    assert job.aggregates()["n"].to_pylist() == [
        sum(x is not None for x in values(results, p)) for p in range(4)
    ]
    assert job.failures().num_rows == status.counts["failed"]
    assert "run to the end that" in [e.text for e in job.events() if e.kind == "surplus"][-1]

    watcher = KillsOne(next(iter(cluster.client.run(os.getpid).values())))
    again = mo.run(study_of(bundle), cluster=cluster, watcher=watcher)
    assert watcher.killed
    assert digests(again) == digests(job)


class Server(driving.Server):
    def n_known(self, job: JobId) -> int:
        return sum(self.records.counts(job).values())

    def finished(self, job: JobId) -> tuple[pa.Table, pa.Table]:
        wait_for(
            lambda: self.records.job(job).state in (JobState.PARTIAL, JobState.SUCCEEDED), "it has ended"
        )
        contents = JobContents.of(self.objects, self.records, job)
        return replicates_table(contents), aggregates_table(contents)


@pytest.fixture
def server(cluster: EmbeddedCluster, tmp_path: Path) -> Iterator[Server]:
    server = Server(cluster, tmp_path)
    with closing(server.records):
        yield server
        server.stop()


def test_a_driver_that_takes_over_and_an_extended_job_decide_as_one_that_ran_through(
    cluster: EmbeddedCluster, server: Server, bundle: Path
) -> None:
    short = submitted(study_of(bundle, replicates=rule(max=40)), cluster.home, database=server.url)
    for n in (30, 60):
        server.start()
        wait_for(lambda n=n: server.n_known(short) >= n, "some have ended")  # type: ignore[misc]
        server.stop()
    server.start()
    first, _ = server.finished(short)
    assert len(values(first, 2)) == len(values(first, 3)) == 40

    extend_job(server.records, server.objects, short, "user", replicates=150)
    extended = server.finished(short)
    fresh = submitted(study_of(bundle), cluster.home, database=server.url)
    assert server.finished(fresh) == extended


FAILS_AT_FIRST = """
import random
from pathlib import Path

def simulate(params, seed):
    if seed % 5 == 0 and not Path(params["mended"]).exists():
        raise ValueError("not mended")
    return {"x": random.Random(seed).gauss(1.0, 0.4)}
"""


def test_what_outcomes_decided_is_decided_anew_when_they_count_no_more(
    cluster: EmbeddedCluster, server: Server, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Once because failed replicates are tried again, once because stored outcomes are lost."""
    sets = [{"mended": str(tmp_path / "mended"), "n": n} for n in range(3)]
    study = study_of(write_bundle(FAILS_AT_FIRST), parameters=sets)
    job = submitted(study, cluster.home, database=server.url)
    server.start()
    first, _ = server.finished(job)
    (tmp_path / "mended").touch()
    resume_job(server.records, server.objects, job, "user", failed=True)
    mended = server.finished(job)
    assert [len(values(mended[0], p)) for p in range(3)] != [len(values(first, p)) for p in range(3)]
    fresh = submitted(study, cluster.home, database=server.url)
    assert server.finished(fresh) == mended

    server.stop()
    lost = next(ref for ref in server.records.segments(job) if "not_needed" not in ref.counts)
    server.objects.delete(f"{job_folder(job)}/{lost.name}")
    epoch = server.records.take_lease(job, "test")
    assert mend_job(server.records, server.objects, job, epoch, "test", deep=True)
    server.start()
    assert server.finished(job) == mended


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("y", "has no output 'y'; it has: x, word, none"),
        ("word", "has an output 'word' that is no number"),
        ("none", "has an output 'none' that is no number"),
    ],
)
def test_an_output_that_is_missing_or_no_number_stops_the_job_and_is_named(
    cluster: EmbeddedCluster, bundle: Path, of: str, said: str
) -> None:
    job = mo.run(study_of(bundle, replicates=rule(of=of)), cluster=cluster)
    status, rows = job.status(), job.results()
    assert status.state == JobState.PARTIAL
    succeeded = rows.filter(pc.equal(rows["status"], "succeeded"))
    first = succeeded["replicate"][0].as_py()
    assert f"until goes by {of!r}, and replicate {first} of parameter set 0 {said}. " in status.reason
    assert len(succeeded) == status.counts["succeeded"]
    assert None not in succeeded["x"].to_pylist()


NONE_NOW_AND_THEN = """
import random, time

def simulate(params, seed):
    time.sleep(random.SystemRandom().choice([0, 0, 0.02]))  # no part of the result
    return {"x": None if seed % 40 == 0 else random.Random(seed).gauss(1.0, params["spread"]), "drawn": float(seed)}
"""


def test_the_first_replicate_without_a_number_is_named_whatever_ended_first_and_what_has_run_is_kept(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle, named = write_bundle(NONE_NOW_AND_THEN), set()
    for watcher in (None, KillsOne(next(iter(cluster.client.run(os.getpid).values())))):
        job = mo.run(study_of(bundle), cluster=cluster, watcher=watcher)
        status, rows = job.status(), job.results()
        assert status.state == JobState.PARTIAL
        assert None not in rows.filter(pc.equal(rows["status"], "succeeded"))["drawn"].to_pylist()
        named.add(status.reason)
    (reason,) = named
    rows = rows.filter(pc.equal(rows["status"], "succeeded"))
    none = [
        (p, r)
        for p, r, x in zip(*(rows[name].to_pylist() for name in ("param", "replicate", "seed")), strict=True)
        if x % 40 == 0
    ]
    assert (
        f"replicate {none[0][1]} of parameter set {none[0][0]} has an output 'x' that is no number" in reason
    )


SURPLUS_NEVER_ENDS = """
import os, time
from pathlib import Path

def simulate(params, seed, context):
    pid = Path(params["folder"]) / "pid"
    if context.replicate >= 10:
        pid.with_suffix(".new").write_text(str(os.getpid()))
        pid.with_suffix(".new").rename(pid)
        time.sleep(3600)
    while context.replicate == 9 and not pid.exists():  # so it is run ahead
        time.sleep(0.01)
    return {"x": 1}
"""


def test_what_is_run_beyond_what_is_needed_is_stopped(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = write_bundle(SURPLUS_NEVER_ENDS)
    study = mo.Study(bundle=bundle, parameters=[{"folder": str(tmp_path)}], replicates=rule(max=20))
    job = mo.run(study, cluster=cluster)
    assert job.status().counts == {"succeeded": 10, "not_needed": 10}
    said = [event.text for event in job.events() if event.kind == "surplus"]
    assert said[0].endswith("stopped because of replicates that are not needed")
    assert said[1] == "0 replicates were run to the end that are not needed"
    pid = (tmp_path / "pid").read_text()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the replicate that is not needed has been stopped")
