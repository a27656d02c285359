"""Environments through whole jobs: every kind of input, what cannot be had, many at once, and in use."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import descendants

import modelops as mo
from modelops.cluster.embedded import EmbeddedCluster
from modelops.environments import Environments, Interpreters
from modelops.environments.uv import find_uv
from modelops.home import Home
from modelops.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 240.0
SIX = "4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274"  # six-1.17.0-py2.py3-none-any.whl
MODEL = """
import sys
import six

def simulate(params, seed):
    return {"six": six.__version__, "python": "%d.%d" % sys.version_info[:2], "executable": sys.executable}
"""
COMMAND = Path(sys.executable).parent / "modelops"


def own_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def write(folder: Path, **files: str) -> Path:
    """Write a bundle; a double underscore in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(textwrap.dedent(text))
    return folder


def project(*, requires_python: str = ">=3.9", dependencies: str = "") -> str:
    return (
        f'[project]\nname = "m"\nversion = "1"\nrequires-python = "{requires_python}"\n'
        f'dependencies = [{dependencies}]\n\n[tool.modelops]\nmodel = "model:simulate"\n'
    )


def with_uv_lock(folder: Path) -> Path:
    write(folder, model__py=MODEL, pyproject__toml=project(dependencies='"six==1.16.0"'))
    python = Interpreters(folder.parent / "memory").all()[0].executable
    subprocess.run([find_uv(), "lock", "-q", "--python", python], cwd=folder, check=True)
    return write(folder, pyproject__toml=project(dependencies='"six"'))


def with_pylock(folder: Path) -> Path:
    plain = write(folder.parent / "plain", requirements__txt="six==1.16.0\n")
    text = Environments(folder.parent / "cache").resolve(plain).text
    text = text[: text.index("[tool.modelops]")]
    return write(folder, model__py=MODEL, pyproject__toml=project(), pylock__toml=text)


def with_hashes(folder: Path) -> Path:
    requirements = f"six==1.17.0 --hash=sha256:{SIX}\n"
    return write(folder, model__py=MODEL, pyproject__toml=project(), requirements__txt=requirements)


def with_dependencies(folder: Path) -> Path:
    return write(folder, model__py=MODEL, pyproject__toml=project(dependencies='"six==1.17.0"'))


def with_script_metadata(folder: Path) -> Path:
    head = "# /// script\n# requires-python = '>=3.9'\n# dependencies = ['six==1.16.0']\n# ///\n"
    return write(folder, model__py=head + MODEL) / "model.py"


INPUTS = [
    (with_uv_lock, "1.16.0"),
    (with_pylock, "1.16.0"),
    (with_hashes, "1.17.0"),
    (with_dependencies, "1.17.0"),
    (with_script_metadata, "1.16.0"),
]


@pytest.mark.parametrize(("make", "version"), INPUTS, ids=lambda x: getattr(x, "__name__", x))
def test_every_kind_of_dependency_list_gives_its_replicates_what_it_lists(
    make: Callable[[Path], Path], version: str, cluster: EmbeddedCluster, tmp_path: Path
) -> None:
    bundle = make(tmp_path / "bundle")

    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=3), cluster=cluster)

    assert job.status().state == JobState.SUCCEEDED, job.status().reason
    assert job.results()["six"].to_pylist() == [version] * 3
    assert job.results()["python"].to_pylist() == [own_version()] * 3
    assert len(set(job.results()["executable"].to_pylist())) == 1
    assert str(cluster.home.cache.resolve()) in str(Path(job.output(0, 0, "executable")).parent.resolve())


@pytest.mark.parametrize("how", ["requires-python", ".python-version", "PEP 723"])
@pytest.mark.parametrize("wanted", ["3.11", "3.12", "3.13"])
def test_replicates_run_in_the_python_that_the_bundle_asks_for(
    wanted: str, how: str, cluster: EmbeddedCluster, tmp_path: Path
) -> None:
    found = {i.python_version for i in Interpreters(cluster.home.cache / "interpreters.json").all()}
    if wanted not in found:
        pytest.skip(f"this machine has no Python {wanted}, only {', '.join(sorted(found))}")
    folder = tmp_path / "bundle"
    if how == "requires-python":
        text = project(requires_python=f"=={wanted}.*", dependencies='"six"')
        bundle = write(folder, model__py=MODEL, pyproject__toml=text)
    elif how == ".python-version":
        bundle = write(folder, model__py=MODEL, pyproject__toml=project(dependencies='"six"'))
        (folder / ".python-version").write_text(f"{wanted}\n")
    else:
        head = f"# /// script\n# requires-python = '=={wanted}.*'\n# dependencies = ['six']\n# ///\n"
        bundle = write(folder, model__py=head + MODEL) / "model.py"

    job = mo.run(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=3), cluster=cluster)

    assert job.status().state == JobState.SUCCEEDED, job.status().reason
    assert job.results()["python"].to_pylist() == [wanted] * 3


def test_a_dependency_that_does_not_exist_is_one_error_and_the_second_job_does_not_ask_uv_again(
    cluster: EmbeddedCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, uv = tmp_path / "calls", tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\nexec "{find_uv()}" "$@"\n')
    uv.chmod(0o755)
    monkeypatch.setattr("modelops.environments.uv.find_uv", lambda: uv)
    text = project(dependencies='"no-such-package-modelops-test==9.9"')
    bundle = write(tmp_path / "bundle", model__py=MODEL, pyproject__toml=text)
    study = mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=50)

    first = mo.run(study, cluster=cluster)
    n_calls = len(calls.read_text().splitlines())
    second = mo.run(study, cluster=cluster)

    assert n_calls == 1
    assert len(calls.read_text().splitlines()) == 1
    for job in (first, second):
        status = job.status()
        assert status.state == JobState.FAILED
        said = " ".join(status.reason.split())  # uv folds its lines
        assert "No solution found" in said
        assert "no-such-package-modelops-test==9.9" in said
        assert "m/pyproject.toml" in status.reason
        assert status.counts == {"not_run": 50}
        assert job.failures().num_rows == 50
        assert set(job.failures()["status"].to_pylist()) == {"not_run"}
        assert job.failure_summary().num_rows == 0
        assert [event.kind for event in job.events()].count("environment_failed") == 1


def test_without_a_python_that_fits_the_job_says_which_were_found_and_nothing_ran(
    home: Home, tmp_path: Path
) -> None:
    bundle = write(tmp_path / "m", model__py=MODEL, pyproject__toml=project(requires_python="==3.99.*"))
    done = subprocess.run(
        [COMMAND, "run", bundle, "-p", "a=1", "-n", "5", "-w", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).split())
    assert "the bundle needs Python ==3.99.*" in said
    for interpreter in Interpreters(home.cache / "interpreters.json").all():
        assert f"{interpreter.version} (" in said
    assert "5 not_run" in said
    assert "Traceback" not in said


def test_two_clusters_and_thirty_two_threads_build_a_new_environment_once(tmp_path: Path) -> None:
    text = project(dependencies='"six==1.17.0", "idna==3.10"')
    bundle = write(tmp_path / "bundle", model__py=MODEL, pyproject__toml=text)
    home = Home.at(tmp_path / "home")
    lock = Environments(home.cache).resolve(bundle).text

    def build(cache: Path, text: str, _number: int) -> tuple[bool, str]:
        from modelops.environments import Environments, parse_lock

        environment = Environments(cache).ensure(parse_lock(text))
        return environment.built, str(environment.path)

    clusters = [
        EmbeddedCluster(
            Home(tmp_path / f"data{i}", home.cache, tmp_path / f"state{i}"), n_workers=1, threads=16
        )
        for i in range(2)
    ]
    with clusters[0], clusters[1]:
        futures = [
            cluster.client.submit(build, home.cache, lock, number, pure=False)
            for number in range(16)
            for cluster in clusters
        ]
        answers = [future.result(timeout=DEADLINE_S) for future in futures]
        study = mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=64)
        with ThreadPoolExecutor(2) as threads:
            jobs = list(threads.map(lambda one: mo.run(study, cluster=one), clusters))

    assert len(answers) == 32
    assert [built for built, _ in answers].count(True) == 1
    assert len({path for _, path in answers}) == 1
    assert [job.status().counts for job in jobs] == [{"succeeded": 64}] * 2


def test_the_environment_is_being_built_while_the_cluster_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster here waits for the environment: one after the other would never come to an end."""
    monkeypatch.setenv("MODELOPS_HOME", str(tmp_path / "home"))
    start = EmbeddedCluster.start

    def start_behind_the_environment(self: EmbeddedCluster) -> EmbeddedCluster:
        deadline = time.monotonic() + DEADLINE_S
        while not Environments(self.home.cache).list():
            assert time.monotonic() < deadline, "nothing was built before the cluster had started"
            threading.Event().wait(0.02)
        return start(self)

    monkeypatch.setattr(EmbeddedCluster, "start", start_behind_the_environment)
    job = mo.run(mo.Study(bundle=with_dependencies(tmp_path / "bundle"), replicates=2), workers=1)
    assert job.status().state == JobState.SUCCEEDED


def test_two_jobs_that_begin_together_on_two_clusters_build_a_new_environment_once(tmp_path: Path) -> None:
    text = project(dependencies='"six==1.17.0", "idna==3.10"')
    bundle = write(tmp_path / "bundle", model__py=MODEL, pyproject__toml=text)
    cache = tmp_path / "cache"
    clusters = [
        EmbeddedCluster(Home(tmp_path / f"data{i}", cache, tmp_path / f"state{i}"), n_workers=1, threads=2)
        for i in range(2)
    ]
    study = mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=8)
    with clusters[0], clusters[1], ThreadPoolExecutor(2) as threads:
        jobs = list(threads.map(lambda one: mo.run(study, cluster=one), clusters))

    assert [job.status().counts for job in jobs] == [{"succeeded": 8}] * 2
    (built,) = Environments(cache).list()
    assert set(built.packages) == {"six==1.17.0", "idna==3.10"}
    assert not list(cache.glob("quarantine/*"))


def test_an_environment_that_a_job_uses_survives_gc_and_verify(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    began, go_on = tmp_path / "began", tmp_path / "go-on"
    model = f"""
        import os, time

        def simulate(params, seed):
            open({str(began)!r}, "a").close()
            deadline = time.monotonic() + {DEADLINE_S}
            while not os.path.exists({str(go_on)!r}):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            import six
            return {{"six": six.__version__}}
        """
    text = project(dependencies='"six==1.17.0"')
    bundle = write(tmp_path / "bundle", model__py=model, pyproject__toml=text)
    study = mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=4)

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [COMMAND, "env", *arguments], env={**os.environ, "MODELOPS_HOME": str(home.data)},
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    with EmbeddedCluster(home, n_workers=2) as cluster, ThreadPoolExecutor(1) as thread:
        running = thread.submit(mo.run, study, cluster=cluster)
        try:
            wait_for(began.exists, running.done)
            listed = command("list", "--json")
            verified = command("verify")
            collected = command("gc", "--all")
        finally:
            go_on.touch()
        job = running.result(DEADLINE_S)
        (environment,) = Environments(home.cache).list()
        after = mo.run(study, cluster=cluster)

    assert '"in_use": true' in listed
    assert f"{environment.key}: ok" in verified
    assert f"kept {environment.key}: a process uses it" in collected
    for one in (job, after):
        assert one.status().counts == {"succeeded": 4}
        assert one.results()["six"].to_pylist() == ["1.17.0"] * 4
        assert [event.text for event in one.events() if event.kind == "note"] == []


BACKEND = """
import os, signal, zipfile

def get_requires_for_build_wheel(config_settings=None):
    return []

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    fifo = os.environ.get("FIFO_OF_TEST")
    if fifo:
        with open(fifo, "w") as f:
            f.write("building\\n")
        while True:
            signal.pause()
    name = "slow-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as z:
        z.writestr("slow.py", "answer = 42\\n")
        z.writestr("slow-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: slow\\nVersion: 1.0\\n")
        z.writestr("slow-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        z.writestr("slow-1.0.dist-info/RECORD", "".join("%s,,\\n" % n for n in z.namelist()))
    return name
"""


def test_a_build_that_is_killed_with_its_whole_tree_is_retried_at_once(home: Home, tmp_path: Path) -> None:
    bundle = write(
        tmp_path / "bundle",
        model__py="import slow\ndef simulate(params, seed):\n    return {'x': slow.answer}\n",
        pyproject__toml='[tool.modelops]\nmodel = "model:simulate"\n',
        requirements__txt="./libs/slow\nsix\n",
    )
    write(
        bundle / "libs" / "slow",
        backend__py=BACKEND,
        pyproject__toml="""
            [build-system]
            requires = []
            build-backend = "backend"
            backend-path = ["."]
            [project]
            name = "slow"
            version = "1.0"
            """,
    )
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [str(COMMAND), "run", str(bundle), "-p", "a=1", "-n", "4", "-w", "1"]
    first = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "FIFO_OF_TEST": str(fifo)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        wait_for(
            lambda: bool(select.select([fd], [], [], 0.05)[0] and os.read(fd, 100)),
            lambda: first.poll() is not None,
        )
        os.close(fd)
    finally:
        for pid in [first.pid, *descendants(first.pid)]:
            with contextlib.suppress(ProcessLookupError):  # one may end by the death of another
                os.kill(pid, signal.SIGKILL)
        first.wait()

    second = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )

    assert second.returncode == 0, second.stderr
    assert "4 succeeded" in second.stdout
    lines = [line for line in second.stderr.splitlines() if "damaged" in line]
    assert len(lines) == 1, second.stderr
    assert "its build was interrupted" in lines[0]


def wait_for(condition: Callable[[], bool], ended: Callable[[], bool]) -> None:
    """Wait until something holds; give up when what should bring it about has ended."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert not ended(), "it ended before that"
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
