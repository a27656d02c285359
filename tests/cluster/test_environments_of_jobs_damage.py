"""A cached environment that was damaged between two jobs: noticed, named once, rebuilt once, and the job succeeds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import modelops as mo
from modelops.cluster.embedded import EmbeddedCluster
from modelops.environments import Environments, Interpreters
from modelops.environments.manifest import NAME
from modelops.environments.uv import find_uv
from modelops.home import Home
from modelops.states import JobState
from modelops.study.ids import attempt_id
from modelops.worker.attempts import Attempt
from modelops.worker.messages import Chunk
from modelops.worker.runtime import WorkerRuntime
from modelops.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TAKE = """
def take():
    try:
        os.close(os.open(FLAG, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.rename(sys.prefix, os.path.join(os.path.dirname(sys.prefix), f".aside-{os.getpid()}"))
"""
MODEL = """
import os

def simulate(params, seed):
    import six
    return {"six": six.__version__, "pid": os.getpid()}
"""


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedCluster]:
    """A cluster with a home and a uv cache of its own: what is damaged here is used by nobody else."""
    root = tmp_path_factory.mktemp("private")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_CACHE_DIR", str(root / "uv-cache"))
        with EmbeddedCluster(Home.at(root / "home"), n_workers=2) as started:
            yield started


@pytest.fixture
def uv_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Record each call of uv by this process; what is called is the real one."""
    calls, uv = tmp_path / "uv-calls", tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\nexec "{find_uv()}" "$@"\n')
    uv.chmod(0o755)
    monkeypatch.setattr("modelops.environments.uv.find_uv", lambda: uv)
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def site(root: Path) -> Path:
    return next((root / "lib").glob("python3*")) / "site-packages"


def empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def truncate_in_place(path: Path) -> None:
    """Change a file without changing its inode: what uv's cache holds changes with it."""
    path.chmod(0o644)
    os.truncate(path, 10)
    path.chmod(0o444)


def relink(python: Path, target: str) -> None:
    python.unlink()
    python.symlink_to(target)


def other_python(root: Path) -> str:
    own = sys.version_info[:2]
    for found in Interpreters(root.parent.parent / "interpreters.json").all():
        if tuple(map(int, found.python_version.split("."))) != own:
            return found.executable
    pytest.skip("this machine has one Python only")


@dataclass(frozen=True)
class Case:
    what: str
    damage: Callable[[Path], object]
    named: str


CASES = [
    Case("site-packages emptied", lambda root: empty(site(root)), "is missing"),
    Case("another Python", lambda root: relink(root / "bin/python", other_python(root)), "instead of"),
    Case("dangling", lambda root: relink(root / "bin/python", "/nowhere/python"), "dangling"),
    Case("bin removed", lambda root: shutil.rmtree(root / "bin"), "bin is missing"),
    Case("truncated in place", lambda root: truncate_in_place(site(root) / "six.py"), "six.py has 10 bytes"),
    Case("manifest removed", lambda root: (root / NAME).unlink(), "no manifest"),
]


def study(bundle: Path) -> mo.Study:
    return mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=20)


def environment_of(job: mo.Job) -> Path:
    """Return the folder of the only environment that has exactly six."""
    (found,) = [e.path for e in Environments(job.home.cache).list() if e.packages == ("six==1.17.0",)]
    return found


def notes(job: mo.Job) -> list[str]:
    return [event.text for event in job.events() if event.kind == "note"]


@pytest.mark.parametrize("case", CASES, ids=attrgetter("what"))
def test_damage_between_two_jobs_is_named_once_and_mended_once_also_beside_warm_processes(
    case: Case,
    private: EmbeddedCluster,
    write_bundle: Callable[..., Path],
    warned: list[str],
    uv_calls: Callable[[], list[str]],
) -> None:
    bundle = write_bundle(MODEL, dependencies='"six==1.17.0"')
    before = mo.run(study(bundle), cluster=private)
    assert before.status().state == JobState.SUCCEEDED
    calls = len(uv_calls())
    del warned[:]
    case.damage(environment_of(before))

    after = mo.run(study(bundle), cluster=private)

    assert after.status().state == JobState.SUCCEEDED
    assert after.results()["six"].to_pylist() == ["1.17.0"] * 20
    assert len(warned) == 1, warned
    assert case.named in warned[0]
    (note,) = notes(after)
    assert case.named in note
    assert "rebuilt" in note
    assert sum(call.startswith("venv") for call in uv_calls()[calls:]) == 1
    # Processes of the damaged environment are warm, and not used again.
    assert not set(after.results()["pid"].to_pylist()) & set(before.results()["pid"].to_pylist())
    second = write_bundle(
        "def simulate(params, seed):\n    import idna, six\n    return {'six': six.__version__}\n",
        name="second",
        dependencies='"six==1.17.0", "idna==3.10"',
    )
    assert mo.run(study(second), cluster=private).results()["six"].to_pylist() == ["1.17.0"] * 20
    again = mo.run(study(bundle), cluster=private)
    assert notes(again) == []
    assert len(warned) == 1


def test_a_whole_environment_costs_no_call_of_uv_and_warm_processes_go_on(
    private: EmbeddedCluster, write_bundle: Callable[..., Path], uv_calls: Callable[[], list[str]]
) -> None:
    bundle = write_bundle(MODEL, dependencies='"six==1.17.0"')
    first = mo.run(study(bundle), cluster=private)
    calls = uv_calls()

    second = mo.run(study(bundle), cluster=private)

    assert uv_calls() == calls
    assert set(second.results()["pid"].to_pylist()) & set(first.results()["pid"].to_pylist())


def test_damage_that_only_the_worker_meets_is_mended_there_and_told_to_the_job_once(
    private: EmbeddedCluster, write_bundle: Callable[..., Path], warned: list[str], tmp_path: Path
) -> None:
    job = mo.run(study(write_bundle(MODEL, dependencies='"six==1.17.0"')), cluster=private)
    settings = WorkerSettings(str(private.home.objects), private.home.cache, tmp_path / "scratch")
    runtime = WorkerRuntime(settings, address="tcp://here", slots=1)
    attempt = Attempt(job.id, attempt_id(1, 1), 1, ranges=())
    chunk = Chunk(job=job.id, attempt=attempt.attempt, epoch=1, ranges=())
    try:
        empty(site(environment_of(job)))
        with runtime.using(chunk, attempt) as context:
            assert (site(context.environment.path) / "six.py").exists()
            held = Environments(private.home.cache).gc(everything=True)
            assert context.environment.key in [key for key, _ in held.skipped]
        (note,) = runtime.take_notes(job.id)
        assert "is missing" in note
        assert "rebuilt on" in note
        assert runtime.take_notes(job.id) == ()
        assert len(warned) == 1

        # Between two chunks nobody holds it; one that was removed or rebuilt meanwhile is made ready again.
        Environments(private.home.cache).gc(everything=True)
        with runtime.using(chunk, attempt) as context:
            assert (site(context.environment.path) / "six.py").exists()
        (context.environment.path / NAME).unlink()
        with runtime.using(chunk, attempt) as later:
            assert later.environment.mark != context.environment.mark
            assert later.runner != context.runner
    finally:
        runtime.close()


READS = "import six\n    open(six.__file__).close()\n"
TAKEN = {
    "import of the bundle": "take()\nimport six\ndef simulate(params, seed):\n",
    "late import": "def simulate(params, seed):\n    take()\n    import six\n",
    "file of a package": f"import six\ndef simulate(params, seed):\n    take()\n    {READS}",
}


@pytest.mark.parametrize("when", TAKEN)
def test_what_is_not_there_as_its_environment_is_set_aside_is_no_fault_of_the_bundle(
    when: str, private: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Another worker of the cache finds it damaged, and builds it anew."""
    bundle = write_bundle(
        f"import os, sys\nFLAG = {str(tmp_path / 'taken')!r}\n{TAKE}\n{TAKEN[when]}"
        "    return {'six': six.__version__}\n",
        dependencies='"six==1.17.0", "idna==3.10"',
    )
    job = mo.run(study(bundle), cluster=private)
    assert (tmp_path / "taken").exists()
    assert job.status().state == JobState.SUCCEEDED, job.status()
    assert job.results()["six"].to_pylist() == ["1.17.0"] * 20


@pytest.mark.parametrize("sets", [1, 50], ids=["one", "many"])
def test_an_aggregate_whose_environment_is_set_aside_is_made_again(
    sets: int, private: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = write_bundle(
        f"import os, sys\nFLAG = {str(tmp_path / 'taken')!r}\n{TAKE}\n"
        "def simulate(params, seed):\n    return {'x': 1.0}\n\n"
        f"def total(replicates):\n    take()\n    {READS}    return {{'n': float(len(list(replicates)))}}\n",
        dependencies='"six==1.17.0", "idna==3.10"',
        table='model = "model:simulate"\naggregate = "model:total"\n',
    )
    parameters = [{"a": a} for a in range(sets)]
    job = mo.run(mo.Study(bundle=bundle, parameters=parameters, replicates=4), cluster=private)
    assert (tmp_path / "taken").exists()
    assert job.status().state == JobState.SUCCEEDED, job.status()
    assert job.aggregates()["n"].to_pylist() == [4.0] * sets


def test_the_line_that_names_the_damage_is_on_stderr_of_modelops_run(
    private: EmbeddedCluster, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = write_bundle(MODEL, dependencies='"six==1.17.0"')
    job = mo.run(study(bundle), cluster=private)
    truncate_in_place(site(environment_of(job)) / "six.py")

    done = subprocess.run(
        [Path(sys.executable).parent / "modelops", "run", bundle, "-p", "a=1", "-n", "20", "-w", "2"],
        env={**os.environ, "MODELOPS_HOME": str(private.home.data)},
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "damaged" in line]
    assert len(lines) == 1, done.stderr
    assert "six.py has 10 bytes" in lines[0]
    assert "it will be rebuilt" in lines[0]
