"""Building: once however many ask, killed half-way, from a source distribution, on a full disk."""

from __future__ import annotations

import logging
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

import msgspec
import pytest

from modelops.environments import Environment, Environments, Interpreters
from modelops.environments.uv import find_uv, start_time
from modelops.errors import InternalError, NoInterpreterError, ResolutionError, StorageError

DEADLINE_S = 120.0

BACKEND = """
import os, signal, zipfile

def get_requires_for_build_wheel(config_settings=None):
    return []

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    fifo = os.environ.get("FIFO_OF_TEST")
    if fifo:
        with open(fifo, "w") as f:
            f.write("%d\\n" % os.getpid())
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

BUILDER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from modelops.environments import Environments, parse_lock

cache, file, root, n = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
lock = parse_lock(file.read_text())
environments = Environments(cache)
with ThreadPoolExecutor(n) as threads:
    got = list(threads.map(lambda _: environments.ensure(lock, bundle_root=root), range(n)))
print(sum(e.built for e in got), len({e.path for e in got}))
"""


def bundle(folder: Path, *requirements: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    return folder


def slow_bundle(folder: Path) -> Path:
    """Return a bundle with a package beside it whose build blocks while FIFO_OF_TEST is set."""
    package = folder / "libs" / "slow"
    package.mkdir(parents=True)
    (package / "backend.py").write_text(BACKEND)
    (package / "pyproject.toml").write_text(
        textwrap.dedent("""
        [build-system]
        requires = []
        build-backend = "backend"
        backend-path = ["."]
        [project]
        name = "slow"
        version = "1.0"
        """)
    )
    return bundle(folder, "./libs/slow", "six")


def run(environment: Environment, code: str) -> str:
    return subprocess.run(
        [environment.python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def start_builder(cache: Path, lock: Path, root: Path, n: int, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(cache), str(lock), str(root), str(n)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **environ}, start_new_session=True,
    )  # fmt: skip


def read_line(fifo: Path) -> str:
    """Wait for one line from a named pipe, whose writer may not have opened it yet."""
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        deadline = time.monotonic() + DEADLINE_S
        text = ""
        while not text.endswith("\n"):
            assert time.monotonic() < deadline, "the build did not start"
            select.select([fd], [], [], 0.1)
            try:
                text += os.read(fd, 100).decode()
            except BlockingIOError:
                continue
        return text
    finally:
        os.close(fd)


@pytest.fixture
def environments(tmp_path: Path) -> Environments:
    return Environments(tmp_path / "cache")


def test_several_processes_and_many_threads_build_one_environment_once(
    environments: Environments, tmp_path: Path
) -> None:
    root = bundle(tmp_path / "one", "six", "idna")
    lock = environments.resolve(root)
    file = tmp_path / "lock.toml"
    file.write_text(lock.text)

    builders = [start_builder(tmp_path / "cache", file, root, 16) for _ in range(3)]
    answers = [b.communicate(timeout=DEADLINE_S)[0].split() for b in builders]

    assert [b.returncode for b in builders] == [0, 0, 0]
    assert sum(int(built) for built, _ in answers) == 1
    assert {paths for _, paths in answers} == {"1"}
    assert not environments.ensure(lock).built


def test_thirty_two_threads_share_one_environment_object(tmp_path: Path, environments: Environments) -> None:
    root = bundle(tmp_path / "one", "six")
    with ThreadPoolExecutor(32) as threads:
        got = list(threads.map(lambda _: environments.ensure(environments.resolve(root)), range(32)))

    assert sum(e.built for e in got) == 1


@pytest.mark.parametrize("victims", ["the whole tree", "the builder only"])
def test_a_killed_build_leaves_nothing_that_looks_whole_and_the_retry_works_at_once(
    victims: str, environments: Environments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = slow_bundle(tmp_path / "one")
    lock = environments.resolve(root)
    file, fifo = tmp_path / "lock.toml", tmp_path / "fifo"
    file.write_text(lock.text)
    os.mkfifo(fifo)
    builder = start_builder(tmp_path / "cache", file, root, 1, FIFO_OF_TEST=str(fifo))
    backend = int(read_line(fifo))
    key = environments.key(lock)
    assert environments.validate(key), "a half-built environment must not look whole"
    backend_started = start_time(backend)
    if victims == "the whole tree":
        os.killpg(builder.pid, signal.SIGKILL)
    else:
        os.kill(builder.pid, signal.SIGKILL)
    builder.communicate(timeout=DEADLINE_S)

    with caplog.at_level(logging.WARNING):
        environment = environments.ensure(lock, bundle_root=root)

    assert environment.built
    assert run(environment, "import slow, six; print(slow.answer)") == "42"
    assert [r for r in caplog.records if "no manifest" in r.getMessage()] == caplog.records
    assert len(caplog.records) == 1
    deadline = time.monotonic() + DEADLINE_S
    while start_time(backend) == backend_started and Path(f"/proc/{backend}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the killed builder's backend still runs"
        threading.Event().wait(0.01)


def test_a_bundle_without_dependencies_gets_an_environment_too(
    environments: Environments, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.py").write_text("def simulate(params, seed): return {}\n")

    environment = environments.ensure(environments.resolve(tmp_path / "empty"))

    assert run(environment, "import sys; print(sys.prefix)") == str(environment.path)
    assert environments.validate(environment.key) == []


def test_a_dependency_without_a_wheel_is_built(environments: Environments, tmp_path: Path) -> None:
    environment = environments.ensure(environments.resolve(bundle(tmp_path / "one", "docopt==0.6.2")))

    assert run(environment, "import docopt; print(docopt.__version__)") == "0.6.2"


def test_a_dependency_that_does_not_compile_is_a_final_error_with_the_compilers_words(
    environments: Environments, tmp_path: Path
) -> None:
    root = slow_bundle(tmp_path / "one")
    backend = BACKEND.replace("fifo = os.environ", "raise RuntimeError('no compiler'); fifo = os.environ")
    (root / "libs" / "slow" / "backend.py").write_text(backend)
    lock = environments.resolve(root)

    with pytest.raises(ResolutionError, match="no compiler"):
        environments.ensure(lock, bundle_root=root)
    with pytest.raises(ResolutionError, match="no compiler"):
        environments.ensure(lock, bundle_root=root)

    assert environments.list() == []


def test_a_wheel_that_was_published_with_a_wrong_record_is_no_damage(
    environments: Environments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    root = slow_bundle(tmp_path / "one")
    wrong = BACKEND.replace('"".join(', '"slow.py,sha256=AAAA,999\\n" + "".join(')
    (root / "libs" / "slow" / "backend.py").write_text(wrong)
    lock = environments.resolve(root)

    environment = environments.ensure(lock, bundle_root=root)

    assert run(environment, "import slow; print(slow.answer)") == "42"
    assert not environments.ensure(lock, bundle_root=root).built
    assert environments.verify(environment.key).damages == ()


def test_bundles_that_differ_only_in_code_share_an_environment(
    environments: Environments, tmp_path: Path
) -> None:
    first, second = bundle(tmp_path / "one", "six"), bundle(tmp_path / "two", "six")
    (first / "a.py").write_text("x = 1")
    (second / "a.py").write_text("x = 2")

    assert environments.ensure(environments.resolve(first)).built
    assert not environments.ensure(environments.resolve(second)).built


def test_a_bundle_with_entry_points_is_installed_and_has_an_environment_of_its_own(
    environments: Environments, tmp_path: Path
) -> None:
    root = tmp_path / "wired"
    root.mkdir()
    (root / "backend.py").write_text(BACKEND.replace("answer = 42", "answer = 1"))
    (root / "pyproject.toml").write_text(
        textwrap.dedent("""
        [build-system]
        requires = []
        build-backend = "backend"
        backend-path = ["."]
        [project]
        name = "slow"
        version = "1.0"
        dependencies = ["six"]
        [project.entry-points."modelops.wire"]
        wire = "slow:wire"
        """)
    )
    for path in [*root.iterdir(), root]:
        path.chmod(path.stat().st_mode & ~0o222)  # as a snapshot is
    lock = environments.resolve(root)
    environment = environments.ensure(lock, bundle_root=root)
    assert lock.install
    said = run(environment, "import slow, six; print(slow.answer, slow.__file__)")
    assert said.startswith(f"1 {environment.path}")

    root.chmod(0o755)
    (root / "backend.py").chmod(0o644)
    (root / "backend.py").write_text(BACKEND.replace("answer = 42", "answer = 2"))
    changed = environments.ensure(environments.resolve(root), bundle_root=root)

    assert changed.key != environment.key
    assert run(changed, "import slow; print(slow.answer)") == "2"
    with pytest.raises(InternalError, match="bundle's folder"):
        Environments(tmp_path / "elsewhere").ensure(lock)


def test_pythons_other_than_the_workers_own_are_used_side_by_side(
    environments: Environments, tmp_path: Path
) -> None:
    found = {i.python_version: i for i in environments.interpreters.all() if i.implementation == "cpython"}
    versions = [v for v in ("3.11", "3.12", "3.13") if v in found]
    if len(versions) < 2:
        pytest.skip("this machine has one Python only")
    for version in versions:
        root = tmp_path / version
        root.mkdir()
        (root / "pyproject.toml").write_text(
            '[project]\nname = "m"\nversion = "1"\ndependencies = ["six"]\n'
            f'requires-python = "=={version}.*"\n'
        )
        lock = environments.resolve(root)
        environment = environments.ensure(lock)
        code = "import sys, six; print('%d.%d' % sys.version_info[:2])"
        assert run(environment, code) == lock.python_version == version
    assert len(environments.list()) == len(versions)


def test_a_python_that_is_not_there_is_an_error_that_lists_those_found(
    environments: Environments, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "pyproject.toml").write_text(
        '[project]\nname = "m"\nversion = "1"\nrequires-python = ">=3.99"\ndependencies = []\n'
    )
    own = "{}.{}.{}".format(*sys.version_info[:3])

    with pytest.raises(NoInterpreterError, match=r">=3\.99") as caught:
        environments.resolve(tmp_path / "m")

    assert any(found.startswith(own) for found in caught.value.found)


def test_progress_is_told_in_lines(environments: Environments, tmp_path: Path) -> None:
    lines: list[str] = []
    lock = environments.resolve(bundle(tmp_path / "one", "six", "idna"), on_progress=lines.append)
    environments.ensure(lock, on_progress=lines.append)

    assert any(line.startswith("resolving") for line in lines)
    assert any(line.startswith("installing 2 packages") for line in lines)


@pytest.fixture
def small_volume(tmp_path: Path) -> Path:
    volume = tmp_path / "volume"
    volume.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", volume], capture_output=True)
    if done.returncode != 0:
        pytest.skip("no permission to mount a small volume")
    return volume


def test_a_full_disk_is_named_and_nothing_half_built_is_left(small_volume: Path, tmp_path: Path) -> None:
    try:
        environments = Environments(small_volume / "cache")
        lock = Environments(tmp_path / "cache").resolve(bundle(tmp_path / "one", "packaging", "pytz"))

        with pytest.raises(StorageError, match=r"(?s)No space left on device.*" + str(small_volume)):
            environments.ensure(lock)

        assert environments.list() == []
        subprocess.run(["mount", "-o", "remount,size=50m", small_volume], check=True)
        assert environments.ensure(lock).built
    finally:
        subprocess.run(["umount", small_volume], check=True)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")

    with pytest.raises(StorageError, match="cache"):
        Environments(tmp_path / "cache").resolve(bundle(tmp_path / "one", "six"))


def test_workers_of_two_images_share_a_cache_and_keep_their_environments(tmp_path: Path) -> None:
    """During an upgrade, say: Python is of one version in both, and was compiled twice."""
    one, other = Environments(tmp_path / "cache"), Environments(tmp_path / "cache")
    lock = one.resolve(bundle(tmp_path / "one"))
    here = one.interpreter_for(lock)
    there = msgspec.structs.replace(here, mark="of another image")
    first = one.ensure(lock, here)
    assert other.ensure(lock, there).path != first.path
    again = one.ensure(lock, here)
    assert (again.path, again.built, again.damage) == (first.path, False, None)


def test_a_replaced_interpreter_is_noticed(tmp_path: Path) -> None:
    environments = Environments(tmp_path / "cache")
    lock = environments.resolve(bundle(tmp_path / "one"))
    interpreter = Interpreters(tmp_path / "memory.json").all()[0]
    environment = environments.ensure(lock, interpreter)
    copy = tmp_path / "python-copy"
    copy.write_bytes(Path(interpreter.executable).read_bytes())
    environment.python.unlink()
    environment.python.symlink_to(copy)

    assert [d.path for d in environments.validate(environment.key)] == ["bin/python"]


@pytest.mark.parametrize("what", ["scratch", "envs"])
def test_that_somebody_cleans_the_cache_while_it_is_written_is_no_fault_of_the_dependencies(
    tmp_path: Path, what: str
) -> None:
    """Else it would be remembered, and end a job, as what can never be installed."""
    cache, uv = tmp_path / "cache", tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\n[ "$2" = sync ] && rm -rf "{cache / what}"\nexec "{find_uv()}" "$@"\n')
    uv.chmod(0o755)
    root = slow_bundle(tmp_path / "bundle")
    lock = Environments(cache).resolve(root)
    with pytest.raises(StorageError, match=r"was removed while environment .* was being built"):
        Environments(cache, uv=uv).ensure(lock, bundle_root=root)
    assert Environments(cache).ensure(lock, bundle_root=root).built
