"""What a model can do to a worker, and what its user sees: the whole way through Dask, and the job goes on."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING

import pytest

import modelops as mo
from modelops.cluster.embedded import EmbeddedCluster
from modelops.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


N = 12  # replicates; number 5 misbehaves


@dataclass(frozen=True)
class Fault:
    what: str
    code: str
    status: str
    message: str
    replicate_timeout: str | None = None
    memory: str | None = None


FAULTS = [
    Fault("raises", "raise ValueError('beta is negative')", "failed", "beta is negative"),
    Fault("sys.exit", "import sys; sys.exit(3)", "crashed", "exit code 3"),
    Fault("os._exit", "import os; os._exit(3)", "crashed", "exit code 3"),
    Fault("killed", "import os; os.kill(os.getpid(), 9)", "crashed", "signal 9 (Killed)"),
    Fault("segfault", "import ctypes; ctypes.string_at(0)", "crashed", "signal 11 (Segmentation fault)"),
    Fault(
        "never returns",
        "import threading; threading.Event().wait()",
        "timed_out",
        "1",
        replicate_timeout="1s",
    ),
    Fault(
        "memory",
        "x = bytearray(2_000_000_000); x[::4096] = x[::4096]",
        "out_of_memory",
        "limit",
        memory="300MiB",
    ),
    Fault("returns a set", "return {'x': {1, 2}}", "invalid_output", "set"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=attrgetter("what"))
def test_one_bad_replicate_is_named_and_its_siblings_succeed(
    fault: Fault, cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(
        f"""
        def simulate(params, seed):
            if seed == 5:
                {fault.code}
            return {{"x": seed}}
        """
    )
    study = mo.Study(
        bundle=bundle,
        parameters=[{"a": 1}],
        seeds=list(range(N)),
        replicate_timeout=fault.replicate_timeout,
        memory=fault.memory,
    )
    job = mo.run(study, cluster=cluster)
    assert job.status().state == JobState.PARTIAL
    assert job.status().counts["succeeded"] == N - 1
    (row,) = job.failures().to_pylist()
    assert (row["seed"], row["status"]) == (5, fault.status)
    assert fault.message in row["message"]
    assert job.results()["x"].to_pylist() == [k if k != 5 else None for k in range(N)]


def test_a_missing_import_is_one_error_for_the_job_with_the_line_to_add(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle("import no_such_module\ndef simulate(params, seed):\n    return {}\n")
    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=50), cluster=cluster)
    status = job.status()
    assert status.state == JobState.FAILED
    assert "No module named 'no_such_module'" in status.reason
    assert "dependencies" in status.reason
    assert status.counts.get("failed", 0) == 0
    assert status.counts["not_run"] == 50


def test_a_dependency_that_does_not_exist_fails_the_job_once_and_no_replicate(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(
        "def simulate(params, seed):\n    return {}\n", dependencies='"no-such-package-modelops-test==9.9"'
    )
    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=50), cluster=cluster)
    status = job.status()
    assert status.state == JobState.FAILED
    assert "no-such-package-modelops-test" in status.reason
    assert status.counts == {"not_run": 50}


def test_no_worker_is_started_for_what_is_known_to_be_impossible(
    tmp_path: Path, shared_cache: Path, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_self: EmbeddedCluster) -> EmbeddedCluster:
        raise AssertionError("a cluster was started")

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "cache").symlink_to(shared_cache)
    monkeypatch.setenv("MODELOPS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(EmbeddedCluster, "__enter__", start)
    # So that nothing needs to be remembered. In its package, the name of the module is that of the function.
    monkeypatch.setattr(import_module("modelops.client.run"), "LOOK_FIRST_S", 60.0)
    bundle = write_bundle(
        "def simulate(params, seed):\n    return {}\n", dependencies='"no-such-package-modelops-test==9.9"'
    )
    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=50), workers=1)
    status = job.status()
    assert status.state == JobState.FAILED
    assert "no-such-package-modelops-test" in status.reason
    assert status.counts == {"not_run": 50}
    assert [e.kind for e in job.events()] == ["created", "lease_taken", "started", "environment_failed"]


def test_what_the_bundle_prints_is_in_the_jobs_log_with_its_replicate(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(
        """
        import os, subprocess
        print("hello from the import")
        def simulate(params, seed):
            print("print", seed)
            os.write(1, b"raw %d\\n" % seed)
            subprocess.run(["echo", f"child {seed}"])
            return {"x": 1}
        """
    )
    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], seeds=[100, 101, 102]), cluster=cluster)
    assert job.status().state == JobState.SUCCEEDED
    assert "hello from the import" in job.log()
    for kind in ("print", "raw", "child"):
        assert f"{kind} 101" in job.log(0, 1)
        assert f"{kind} 102" not in job.log(0, 1)


def test_ten_megabytes_of_print_are_whole_in_the_jobs_log(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(
        """
        def simulate(params, seed):
            for i in range(100_000):
                print(f"{seed}:{i:06d}".ljust(99, "."))
            return {"x": 1}
        """
    )
    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], seeds=[1, 2]), cluster=cluster)
    assert job.status().state == JobState.SUCCEEDED
    lines = job.log(0, 1).splitlines()
    assert [line.rstrip(".") for line in lines] == [f"2:{i:06d}" for i in range(100_000)]


def test_a_module_missed_only_in_the_model_is_one_error_for_the_job_too(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle("def simulate(params, seed):\n    import no.such\n    return {}\n")
    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=50), cluster=cluster)
    status = job.status()
    assert status.state == JobState.FAILED
    assert "No module named 'no'" in status.reason
    assert "model.py" in status.reason
    assert status.counts == {"not_run": 50}


@pytest.mark.parametrize("empty", ["{}", "''", "None"])
def test_an_empty_answer_is_a_success(
    empty: str, cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(f"def simulate(params, seed):\n    return {empty}\n")
    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=3), cluster=cluster)
    assert job.status().state == JobState.SUCCEEDED
    assert job.output(0, 0) == ({} if empty == "{}" else {"value": eval(empty)})


def test_a_job_in_which_everything_fails_stops_early_and_says_why(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle("def simulate(params, seed):\n    raise RuntimeError('always')\n")
    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=2000), cluster=cluster)
    status = job.status()
    assert status.state == JobState.FAILED
    assert "always" in status.reason
    assert status.counts["not_run"] > 1900
    assert sum(status.counts.values()) == 2000


def test_a_bundle_that_ends_every_process_that_imports_it_fails_its_job_at_the_first_chunk(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(
        "import os\nprint('last words', flush=True)\nos._exit(7)\ndef simulate(params, seed): ...\n"
    )
    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=40), cluster=cluster)
    status = job.status()
    assert status.state == JobState.FAILED
    assert "exit code 7\nlast words" in status.reason
    assert "modelops bundle check" in status.reason
    assert status.counts == {"not_run": 40}
    assert "chunk_erred" not in [event.kind for event in job.events()]  # nothing was put off and tried again
