"""A bundle is what it was when the job was submitted, whatever its models do to their files."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import modelops as mo
from modelops.bundles import snapshot_changed
from modelops.cluster.embedded import EmbeddedCluster
from modelops.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from modelops.home import Home

VANDAL = """
import os

def simulate(params, seed):
    with open("data.csv") as f:
        x = int(f.read())
    path = os.path.realpath("data.csv")
    if seed == 5 and {when}:
        os.chmod(path, 0o644)
        with open(path, "w") as f:
            f.write("666")
        os.chmod(path, 0o444)
    return {{"x": x}}
"""


def vandal(write_bundle: Callable[..., Path], when: str) -> Path:
    bundle = write_bundle(VANDAL.format(when=when))
    (bundle / "data.csv").write_text("7")
    return bundle


def vandal_once(write_bundle: Callable[..., Path], once: Path) -> Path:
    """Write a bundle whose model changes it once; the file ``once`` says that it has."""
    return vandal(write_bundle, f"not os.path.exists({str(once)!r}) and not open({str(once)!r}, 'x').close()")


def kinds(job: mo.Job) -> list[str]:
    return [event.kind for event in job.events()]


def study(bundle: Path, n: int = 40) -> mo.Study:
    return mo.Study(bundle=bundle, parameters=[{"a": 1}], seeds=list(range(n)))


def test_a_model_that_opens_a_file_of_its_bundle_for_writing_gets_a_permission_error(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(
        """
        def simulate(params, seed):
            if seed == 5:
                open("data.csv", "w")
            with open("data.csv") as f:
                return {"x": int(f.read())}
        """
    )
    (bundle / "data.csv").write_text("7")

    job = mo.run(study(bundle, 12), cluster=cluster)

    (row,) = job.failures().to_pylist()
    assert (row["seed"], row["error_type"]) == (5, "PermissionError")
    assert job.results()["x"].to_pylist() == [7 if k != 5 else None for k in range(12)]
    assert snapshot_changed(job.snapshot()) == []


def test_replicates_of_a_changed_bundle_run_again_from_a_fresh_one(
    cluster: EmbeddedCluster,
    write_bundle: Callable[..., Path],
    tmp_path: Path,
    warned: list[str],
) -> None:
    once = tmp_path / "done"
    bundle = vandal_once(write_bundle, once)

    job = mo.run(study(bundle), cluster=cluster)

    assert once.exists()
    assert job.status().state == JobState.SUCCEEDED
    assert job.status().counts == {"succeeded": 40}
    assert job.results()["x"].to_pylist() == [7] * 40
    assert "replicates.parquet" in job.result_files()
    assert snapshot_changed(job.snapshot()) == []
    story = kinds(job)
    assert story.count("results_voided") == story.count("repaired") == 1
    assert story.index("results_voided") < story.index("none_succeeded") < story.index("repaired")
    (event,) = [e for e in job.events() if e.kind == "results_voided"]
    assert "changed: data.csv" in event.text
    assert len(warned) == 1
    assert "changed: data.csv" in warned[0]


def test_a_bundle_that_is_changed_again_fails_the_job_with_the_names_of_the_files(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = vandal(write_bundle, "True")

    job = mo.run(study(bundle), cluster=cluster)

    status = job.status()
    assert status.state == JobState.FAILED
    assert "changed: data.csv" in status.reason
    assert status.counts == {"not_run": 40}
    assert set(job.results()["status"].to_pylist()) == {"not_run"}
    assert "x" not in job.results().column_names
    assert kinds(job).count("results_voided") == 2
    assert kinds(job).count("repaired") == 1

    (bundle / "model.py").write_text(
        "def simulate(params, seed):\n    return {'x': open('data.csv').read()}\n"
    )
    after = mo.run(study(bundle, 3), cluster=cluster)
    assert after.results()["x"].to_pylist() == ["7"] * 3


@pytest.fixture
def far_cluster(home: Home, tmp_path: Path) -> Iterator[EmbeddedCluster]:
    """Workers with bundles of their own, as on other hosts: nothing happens to those of who drives the job."""
    far = EmbeddedCluster(home, n_workers=2)
    far._settings = replace(far._settings, cache=tmp_path / "far")
    with far:
        yield far


CHANGES_IN_AN_AGGREGATE = """
import os

def simulate(params, seed):
    return {"x": seed}

def summarize(replicates):
    with open("data.csv") as f:
        x = int(f.read())
    path = os.path.realpath("data.csv")
    os.chmod(path, 0o644)
    with open(path, "w") as f:
        f.write("666")
    return {"x": x}
"""


def test_a_bundle_that_is_changed_where_the_models_run_is_run_again_from_a_fresh_one(
    far_cluster: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    once = tmp_path / "done"
    bundle = vandal_once(write_bundle, once)

    job = mo.run(study(bundle), cluster=far_cluster)

    assert once.exists()
    assert job.status().counts == {"succeeded": 40}
    assert job.results()["x"].to_pylist() == [7] * 40
    assert kinds(job).count("results_voided") == kinds(job).count("repaired") == 1
    (event,) = [e for e in job.events() if e.kind == "results_voided"]
    assert f"changed: data.csv on {socket.gethostname()}" in event.text


@pytest.mark.parametrize("where", ["model", "aggregate"])
def test_a_bundle_that_is_changed_each_time_where_it_runs_fails_the_job(
    far_cluster: EmbeddedCluster, write_bundle: Callable[..., Path], where: str
) -> None:
    if where == "model":
        bundle = vandal(write_bundle, "True")
        job = mo.run(study(bundle), cluster=far_cluster)
    else:
        bundle = write_bundle(CHANGES_IN_AN_AGGREGATE)
        (bundle / "data.csv").write_text("7")
        asked = mo.Study(
            bundle=bundle, parameters=[{"a": 1}, {"a": 2}], replicates=4, aggregate="model:summarize"
        )
        job = mo.run(asked, cluster=far_cluster)

    status = job.status()
    assert status.state == JobState.FAILED
    assert "changed: data.csv" in status.reason
    assert set(status.counts) == {"not_run"}
    assert kinds(job).count("results_voided") == 2


def test_modules_that_warm_processes_took_from_a_changed_bundle_are_not_used_again(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    once = tmp_path / "done"
    bundle = write_bundle(
        f"""
        import os

        def simulate(params, seed):
            if seed == 0 and not os.path.exists({str(once)!r}):
                open({str(once)!r}, "x").close()
                path = os.path.realpath("helper.py")
                os.chmod(path, 0o644)
                with open(path, "w") as f:
                    f.write("ANSWER = 666\\n")
            import helper
            return {{"x": helper.ANSWER}}
        """
    )
    (bundle / "helper.py").write_text("ANSWER = 42\n")

    job = mo.run(study(bundle), cluster=cluster)

    assert kinds(job).count("repaired") == 1
    assert job.results()["x"].to_pylist() == [42] * 40


def test_a_job_that_ran_beside_the_one_that_changed_their_bundle_runs_again_too(
    home: Home, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Both jobs have the same snapshot: the second one begins before the change and ends after the repair."""
    began, changed, once = tmp_path / "began", tmp_path / "changed", tmp_path / "once"
    bundle = write_bundle(
        """
        import os, time

        def wait(path):
            deadline = time.monotonic() + 300
            while not os.path.exists(path):
                assert time.monotonic() < deadline
                time.sleep(0.01)

        def simulate(params, seed):
            if params["role"] == "bystander":
                open(params["began"], "a").close()
                wait(params["changed"])
            elif not os.path.exists(params["once"]):
                open(params["once"], "x").close()
                wait(params["began"])
                path = os.path.realpath("data.csv")
                os.chmod(path, 0o644)
                open(path, "w").write("666")
            return {"x": int(open("data.csv").read())}
        """
    )
    (bundle / "data.csv").write_text("7")
    paths = {"began": str(began), "changed": str(changed), "once": str(once)}
    jobs: dict[str, mo.Job] = {}

    def run(role: str) -> None:
        parameters = [{"role": role, **paths}]
        jobs[role] = mo.run(mo.Study(bundle=bundle, parameters=parameters, replicates=1), cluster=cluster)
        changed.touch()

    with EmbeddedCluster(home, n_workers=1, threads=2) as cluster, ThreadPoolExecutor(2) as threads:
        list(threads.map(run, ("bystander", "vandal")))

    for role in ("bystander", "vandal"):
        assert jobs[role].status().state == JobState.SUCCEEDED, role
        assert jobs[role].results()["x"].to_pylist() == [7], role
        assert kinds(jobs[role]).count("repaired") == 1, role
