"""The result of a replicate depends on what it is, never on where, when, beside what or how often it was run."""

from __future__ import annotations

import math
import os
import random
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import modelops as mo
from modelops.client.run import Watcher
from modelops.cluster.embedded import EmbeddedCluster
from modelops.driver import machine as driver_machine
from modelops.errors import RequestError
from modelops.states import JobState, ReplicateStatus
from modelops.study.canonical import canonical_json, param_id
from modelops.study.seeds import seed_key, seeds_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.client.job import Job
    from modelops.driver.machine import Machine
    from modelops.home import Home

TABLE = """
model = { one = "model:one", other = "model:other" }
"""
SAYS_WHO_IT_IS = """
def one(params, seed):
    return {"is": f"one {sorted(params.items())} {seed} VERSION"}

def other(params, seed):
    return {"is": f"other {sorted(params.items())} {seed} VERSION"}
"""


def says(job: Job) -> list[str]:
    assert job.status().state == JobState.SUCCEEDED, job.status().reason
    return [str(text) for text in job.results()["is"].to_pylist()]


def test_other_parameters_entry_points_and_versions_never_share_a_result(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    """All on warm workers, with equal seeds, one version after another and back again."""
    seen = set()
    for version in ("first", "second", "first"):
        bundle = write_bundle(SAYS_WHO_IT_IS.replace("VERSION", version), table=TABLE)
        for name in ("one", "other"):
            for a in (1, 2):
                study = mo.Study(bundle=bundle, model=name, parameters=[{"a": a}], seeds=[11, 977, 35])
                found = says(mo.run(study, cluster=cluster))
                assert found == [f"{name} [('a', {a})] {seed} {version}" for seed in (11, 977, 35)]
                seen.update(found)
    assert len(seen) == 2 * 2 * 2 * 3


def test_a_file_beside_the_module_makes_another_version(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle('def simulate(params, seed):\n    return {"is": open("table.txt").read()}\n')
    for text in ("a", "b", "a"):
        (bundle / "table.txt").write_text(text)
        assert says(mo.run(mo.Study(bundle=bundle, replicates=3), cluster=cluster)) == [text] * 3


def test_explicit_seeds_are_used_as_they_are(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(
        'def simulate(params, seed):\n    return {"got": seed, "kind": type(seed).__name__}\n'
    )
    for seeds in ([11, 977, 35], [0, 2**63 - 1, 2**32]):
        study = mo.Study(bundle=bundle, parameters=[{"a": 1}, {"a": 2}], seeds=seeds)
        results = mo.run(study, cluster=cluster).results()
        assert results["seed"].to_pylist() == results["got"].to_pylist() == seeds * 2
        assert set(results["kind"].to_pylist()) == {"int"}


def test_derived_seeds_are_those_of_the_reference_and_distinct(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle('def simulate(params, seed):\n    return {"got": seed}\n')
    sets: list[dict[str, Any]] = [{"a": 1}, {"a": 1.0}, {"b": "x"}]
    results = mo.run(
        mo.Study(bundle=bundle, parameters=sets, replicates=500, seed=7), cluster=cluster
    ).results()
    assert results["got"].to_pylist() == results["seed"].to_pylist()
    for p, params in enumerate(sets):
        ours = results["seed"].to_pylist()[500 * p : 500 * (p + 1)]
        assert ours == seeds_of(seed_key(7, param_id(canonical_json(params))), 0, 500).tolist()
        assert len(set(ours)) == 500
        assert all(0 <= seed < 2**32 for seed in ours)


def test_one_and_one_point_nought_stay_apart(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle('def simulate(params, seed):\n    return {"is": repr(params["a"])}\n')
    sets = [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": -0.0}, {"a": 0.0}]
    job = mo.run(mo.Study(bundle=bundle, parameters=sets, replicates=2), cluster=cluster)
    assert says(job)[::2] == ["1", "1.0", "True", "'1'", "-0.0", "0.0"]
    assert len(set(job.results()["param_id"].to_pylist())) == len(sets)
    assert len(set(job.results()["seed"].to_pylist())) == 2 * len(sets)


def test_a_duplicate_is_refused_and_both_rows_are_named(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle("def simulate(params, seed):\n    return {}\n")
    sets = [{"a": 1, "b": 2}, {"a": 1.0, "b": 2}, {"b": 2, "a": 1}]
    with pytest.raises(RequestError, match="parameter sets 0 and 2 are the same"):
        mo.run(mo.Study(bundle=bundle, parameters=sets), cluster=cluster)


# --- min_success ------------------------------------------------------------------------------------

FAILS_SOMETIMES = """
def simulate(params, seed):
    if seed < params["bad"]:
        raise ValueError(f"seed {seed} is bad")
    return {"seed": seed}

def summarize(replicates):
    return {"n": len(replicates), "seeds": ",".join(str(r["seed"]) for r in replicates)}
"""


@pytest.mark.parametrize(
    ("min_success", "needed"), [(None, 10), (0.75, 8), (1, 1), (5, 5), (0.0, 1), (0.8, 8)], ids=str
)
def test_a_set_with_failures_follows_min_success(
    min_success: float | int | None, needed: int, cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(FAILS_SOMETIMES, table='model = "model:simulate"\naggregate = "model:summarize"\n')
    seeds = list(range(9, -1, -1))  # not ascending: the order is that of the replicates
    bad = [0, 2, 5, 9, 10]
    study = mo.Study(
        bundle=bundle, parameters=[{"bad": n} for n in bad], seeds=seeds, min_success=min_success
    )
    job = mo.run(study, cluster=cluster)
    assert job.status().state == JobState.PARTIAL
    assert job.status().counts == {"succeeded": 50 - sum(bad), "failed": sum(bad)}
    for row, n_bad in zip(job.aggregates().to_pylist(), bad, strict=True):
        assert (row["n_succeeded"], row["n_replicates"]) == (10 - n_bad, 10)
        if 10 - n_bad >= needed:
            assert (row["status"], row["reason"]) == ("succeeded", None)
            assert (row["n"], row["seeds"]) == (10 - n_bad, ",".join(str(s) for s in seeds if s >= n_bad))
        else:
            assert (row["status"], row["n"], row["seeds"]) == ("skipped", None, None)
            assert row["reason"] == f"{10 - n_bad} of 10 replicates succeeded, min_success needs {needed}"
    ran = sum(10 - n >= needed for n in bad)
    assert job.status().aggregates == {
        k: n for k, n in (("succeeded", ran), ("skipped", len(bad) - ran)) if n
    }


def test_a_job_in_which_all_fail_is_failed_though_they_fail_differently(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(
        """
        def simulate(params, seed):
            raise [ValueError, KeyError, OSError][seed % 3](seed)
        def summarize(replicates):
            return {"n": 1}
        """,
        table='model = "model:simulate"\naggregate = "model:summarize"\n',
    )
    job = mo.run(
        mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=60, min_success=1), cluster=cluster
    )
    assert job.status().state == JobState.FAILED
    assert job.status().counts == {"failed": 60}
    assert job.status().aggregates == {"skipped": 1}


# --- the same bytes ---------------------------------------------------------------------------------

PYPROJECT = """
[project]
name = "untidy"
version = "1.0"
requires-python = ">=3.11"
[tool.modelops]
model = "model:simulate"
aggregate = "model:summarize"
"""
UNTIDY = """
import os, random, time
from pathlib import Path

def simulate(params, seed):
    tmp = Path(os.environ["TMPDIR"])
    found = [p.name for folder in (Path("."), tmp) for p in sorted(folder.iterdir())]
    rng = random.Random(seed)
    (tmp / f"scratch-{seed}").write_bytes(rng.randbytes(10_000))
    Path(f"written-{seed}").write_text("x")
    Path("model.py").unlink()
    os.environ["FOUND"] = found[0]
    os.chdir(tmp)
    time.sleep(params["long"] if seed == 5 else 0.01)
    if seed == 3:
        raise ValueError(params["long"])
    if seed == 8 and params["long"] == 0.5:
        os._exit(7)
    return {
        "x": rng.random(), "n": seed % 7, "even": seed % 2 == 0, "text": f"{seed} \\N{SNOWMAN}",
        "nan": float("nan") if seed % 5 == 0 else -0.0, "list": [seed], "found": " ".join(found),
        "odd" if seed % 2 else "rest": 1.5,
    }

def summarize(replicates):
    xs = [r["x"] for r in replicates]
    return {"first": xs[0], "last": xs[-1], "mean": sum(xs) / len(xs), "n": len(xs), "xs": xs}
"""
N_SETS, N_SEEDS = 3, 14


class KillsWorkers(Watcher):
    """Kills one worker process after another with -9, in mid-job."""

    def __init__(self, cluster: EmbeddedCluster) -> None:
        self.pids = sorted(cluster.client.run(os.getpid).values())
        self.at = [4, N_SETS * N_SEEDS // 2]  # succeeded replicates
        self.killed: list[int] = []

    def changed(self, machine: Machine) -> None:
        if self.at and machine.counts()[ReplicateStatus.SUCCEEDED] >= self.at[0]:
            del self.at[0]
            self.killed.append(self.pids.pop())
            os.kill(self.killed[-1], signal.SIGKILL)


@pytest.fixture(scope="module")
def untidy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "untidy"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "model.py").write_text(UNTIDY)
    return folder


def result_files(untidy: Path, cluster: EmbeddedCluster, watcher: Watcher | None = None, **more: Any) -> Job:
    study = mo.Study(
        bundle=untidy,
        parameters=[{"long": long} for long in (2.0, 0.5, 0.01)],
        seeds=list(range(N_SEEDS)),
        min_success=0.5,
        **more,
    )
    job = mo.run(study, cluster=cluster, watcher=watcher)
    n = N_SETS * N_SEEDS
    expected = {"succeeded": n - N_SETS - 1, "failed": N_SETS, "crashed": 1}
    assert job.status().counts == expected, job.status().reason
    assert job.status().aggregates == {"succeeded": N_SETS}
    return job


def bytes_of(job: Job) -> dict[str, bytes]:
    files = job.result_files()
    return {name: files[name].read_bytes() for name in ("replicates.parquet", "aggregates.parquet")}


@pytest.fixture(scope="module")
def reference(untidy: Path, session_cluster: EmbeddedCluster) -> dict[str, bytes]:
    """The files of a run with two workers and chunks as the clock has them, which are right."""
    job = result_files(untidy, session_cluster)
    results = job.results()
    good = [k for k, status in enumerate(results["status"].to_pylist()) if status == "succeeded"]
    seeds = list(range(N_SEEDS)) * N_SETS
    assert [results["x"][k].as_py() for k in good] == [
        (rng.randbytes(10_000), rng.random())[1] for rng in (random.Random(seeds[k]) for k in good)
    ]
    assert {results["found"][k].as_py() for k in good} == {"model.py pyproject.toml"}
    assert all(math.copysign(1, job.output(0, seed, "nan")) == -1 for seed in (1, 2, 4))
    firsts = [job.aggregate(p)["xs"] for p in range(N_SETS)]
    assert firsts[0] == [x for x in results["x"].to_pylist()[:N_SEEDS] if x is not None]
    assert [len(xs) for xs in firsts] == [N_SEEDS - 1, N_SEEDS - 2, N_SEEDS - 1]
    return bytes_of(job)


def with_chunks_of(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = partial(driver_machine.Machine, replicates_per_chunk=n)
    monkeypatch.setattr(driver_machine, "Machine", pinned)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_files_are_the_same_whatever_the_chunks(
    size: int,
    untidy: Path,
    reference: dict[str, bytes],
    cluster: EmbeddedCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_chunks_of(size, monkeypatch)
    assert bytes_of(result_files(untidy, cluster)) == reference


@pytest.mark.parametrize(("workers", "size"), [(1, 1000), (3, 1)])
def test_files_are_the_same_whatever_the_number_of_workers_and_the_order(
    workers: int,
    size: int,
    home: Home,
    untidy: Path,
    reference: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a probe, one worker goes along the line; three with chunks of one finish in any order."""
    with_chunks_of(size, monkeypatch)
    with EmbeddedCluster(home, n_workers=workers) as other:
        assert len(other.workers()) == workers
        assert bytes_of(result_files(untidy, other, fail_fast=False)) == reference


def test_files_are_the_same_when_workers_were_killed_on_the_way(
    untidy: Path, reference: dict[str, bytes], cluster: EmbeddedCluster
) -> None:
    killer = KillsWorkers(cluster)
    job = result_files(untidy, cluster, watcher=killer)
    assert len(killer.killed) == 2
    assert "worker_died" in {event.kind for event in job.events()}
    assert bytes_of(job) == reference


@pytest.mark.parametrize("isolation", ["fork", "spawn"])
def test_isolation_does_not_change_the_files(
    isolation: str, untidy: Path, reference: dict[str, bytes], cluster: EmbeddedCluster
) -> None:
    assert bytes_of(result_files(untidy, cluster, isolation=isolation)) == reference
