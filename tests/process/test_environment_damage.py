"""Every way in which a cached environment was seen to break, and that the next job does not notice it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import pytest

from modelops.environments import Environment, Environments, Interpreters
from modelops.environments.manifest import NAME
from modelops.environments.uv import find_uv

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def bundle(folder: Path, *requirements: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    return folder


def run(environment: Environment, code: str) -> str:
    return subprocess.run(
        [environment.python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def site(environment: Environment) -> Path:
    return next((environment.path / "lib").glob("python3*")) / "site-packages"


def info(environment: Environment, name: str) -> Path:
    return site(environment) / "six-1.17.0.dist-info" / name


def rewrite_in_place(path: Path, content: bytes) -> None:
    """Change a file without changing its inode: what uv's cache holds changes with it."""
    path.chmod(0o644)
    with path.open("r+b") as f:
        f.truncate(0)
        f.write(content)
    path.chmod(0o444)


def other_python(environment: Environment) -> str:
    memory = environment.path.parent.parent / "interpreters.json"
    found = [i for i in Interpreters(memory).all() if i.python_version != own_version()]
    if not found:
        pytest.skip("this machine has one Python only")
    return found[0].executable


def own_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def relink(python: Path, target: str) -> None:
    python.unlink()
    python.symlink_to(target)


def empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@dataclass(frozen=True)
class Case:
    what: str
    damage: Callable[[Environment], object]
    named: str


CASES = [
    Case("site-packages emptied", lambda e: empty(site(e)), "is missing"),
    Case("site-packages removed", lambda e: shutil.rmtree(site(e)), "site-packages is missing"),
    Case("bin/python leads to another Python", lambda e: relink(e.python, other_python(e)), "instead of"),
    Case(
        "bin/python dangling", lambda e: relink(e.python, "/nowhere/python"), "dangling (it leads to /nowhere"
    ),
    Case("bin removed", lambda e: shutil.rmtree(e.path / "bin"), "bin is missing"),
    Case(
        "module truncated in place", lambda e: rewrite_in_place(site(e) / "six.py", b""), "six.py has 0 bytes"
    ),
    Case(
        "module changed in place, same size",
        lambda e: rewrite_in_place(site(e) / "six.py", b"#" * (site(e) / "six.py").stat().st_size),
        "six.py was written to",
    ),
    Case("module removed", lambda e: (site(e) / "six.py").unlink(), "six.py is missing"),
    Case(
        "METADATA truncated in place", lambda e: rewrite_in_place(info(e, "METADATA"), b""), "METADATA has 0"
    ),
    Case("WHEEL truncated in place", lambda e: rewrite_in_place(info(e, "WHEEL"), b""), "WHEEL has 0"),
    Case("RECORD truncated in place", lambda e: rewrite_in_place(info(e, "RECORD"), b""), "RECORD has 0"),
    Case("dist-info removed", lambda e: shutil.rmtree(info(e, "RECORD").parent), "dist-info is missing"),
    Case("mode changed", lambda e: (site(e) / "six.py").chmod(0o000), "six.py has mode"),
    Case("pyvenv.cfg removed", lambda e: (e.path / "pyvenv.cfg").unlink(), ": pyvenv.cfg is missing"),
    Case("lib64 link changed", lambda e: relink(e.path / "lib64", "bin"), "lib64 is a link to"),
    Case("manifest removed", lambda e: (e.path / NAME).unlink(), "no manifest"),
    Case("manifest truncated", lambda e: rewrite_in_place(e.path / NAME, b"\x81"), "no manifest"),
]


@pytest.fixture(autouse=True)
def _private_uv_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))


@pytest.fixture
def environments(tmp_path: Path) -> Environments:
    return Environments(tmp_path / "cache")


@pytest.mark.parametrize("case", CASES, ids=attrgetter("what"))
def test_damage_is_named_in_one_line_and_mended_by_one_build(
    case: Case, environments: Environments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = environments.resolve(bundle(tmp_path / "one", "six==1.17.0"))
    before = environments.ensure(lock)
    assert before.built
    case.damage(before)

    with caplog.at_level(logging.WARNING):
        after = environments.ensure(lock)

    assert after.built
    assert after.path == before.path
    assert [r.getMessage() for r in caplog.records if case.named in r.getMessage()] == [
        r.getMessage() for r in caplog.records
    ]
    assert len(caplog.records) == 1
    assert run(after, "import six; print(six.__version__)") == "1.17.0"
    assert not environments.ensure(lock).built
    assert environments.verify(after.key).damages == ()
    second = environments.ensure(environments.resolve(bundle(tmp_path / "two", "six==1.17.0", "idna")))
    assert run(second, "import idna, six; print(six.__version__)") == "1.17.0"
    assert environments.verify(second.key).damages == ()


@pytest.mark.parametrize("size", ["shorter", "same"])
def test_damage_in_uvs_cache_does_not_reach_a_bundle_that_is_built_first(
    size: str, environments: Environments, tmp_path: Path
) -> None:
    first = environments.ensure(environments.resolve(bundle(tmp_path / "one", "six==1.17.0")))
    module = site(first) / "six.py"
    if module.stat().st_nlink < 2:
        pytest.skip("uv does not hard-link here")
    rewrite_in_place(module, b"#" * (module.stat().st_size if size == "same" else 10))

    second = environments.ensure(environments.resolve(bundle(tmp_path / "two", "six==1.17.0", "idna")))

    assert run(second, "import idna, six; print(six.__version__)") == "1.17.0"
    assert environments.verify(second.key).damages == ()
    assert environments.validate(first.key)


def test_a_wheel_that_uv_cannot_unpack_from_its_cache_is_downloaded_again(
    environments: Environments, tmp_path: Path
) -> None:
    environments.ensure(environments.resolve(bundle(tmp_path / "one", "six==1.17.0")))
    for cached in (tmp_path / "uv-cache").rglob("six-1.17.0.dist-info"):
        if cached.is_dir():
            shutil.rmtree(cached)

    second = environments.ensure(environments.resolve(bundle(tmp_path / "two", "six==1.17.0", "idna")))

    assert run(second, "import idna, six; print(six.__version__)") == "1.17.0"


def test_what_a_model_writes_is_no_damage(environments: Environments, tmp_path: Path) -> None:
    lock = environments.resolve(bundle(tmp_path / "one", "six"))
    environment = environments.ensure(lock)
    run(environment, "import six")
    (site(environment) / "new_module.py").write_text("x = 1")
    (site(environment) / "__pycache__").mkdir(exist_ok=True)
    (site(environment) / "__pycache__" / "kernel-12.nbi").write_bytes(b"numba")

    assert environments.validate(environment.key) == []
    assert not environments.ensure(lock).built
    assert environments.verify(environment.key).damages == ()


def test_installed_files_are_read_only(environments: Environments, tmp_path: Path) -> None:
    environment = environments.ensure(environments.resolve(bundle(tmp_path / "one", "six")))

    assert (site(environment) / "six.py").stat().st_mode & 0o222 == 0
    assert (environment.path / "pyvenv.cfg").stat().st_mode & 0o222 == 0


def test_an_emptied_environment_is_mended_without_the_network(
    environments: Environments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = environments.resolve(bundle(tmp_path / "one", "six==1.17.0"))
    empty(site(environments.ensure(lock)))
    monkeypatch.setenv("UV_OFFLINE", "1")

    assert run(environments.ensure(lock), "import six; print(six.__version__)") == "1.17.0"


def test_contents_that_rot_under_the_same_stats_are_found_by_verify(
    environments: Environments, tmp_path: Path
) -> None:
    lock = environments.resolve(bundle(tmp_path / "one", "six==1.17.0"))
    environment = environments.ensure(lock)
    module = site(environment) / "six.py"
    was = module.stat()
    rewrite_in_place(module, b"#" * was.st_size)
    os.utime(module, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert environments.validate(environment.key) == []

    verified = environments.verify(environment.key)

    assert [d.path.rpartition("/")[2] for d in verified.damages] == ["six.py"]
    assert verified.set_aside
    again = environments.ensure(lock)
    assert again.built
    assert run(again, "import six; print(six.__version__)") == "1.17.0"
    assert environments.verify(again.key).damages == ()


def test_uv_is_not_called_for_a_whole_environment(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    uv = tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\nexec "{find_uv()}" "$@"\n')
    uv.chmod(0o755)
    root = bundle(tmp_path / "one", "six")
    cold = Environments(tmp_path / "cache", uv=uv)
    cold.ensure(cold.resolve(root))
    assert len(calls.read_text().splitlines()) == 3  # compile, venv, sync
    calls.unlink()

    warm = Environments(tmp_path / "cache", uv=uv)
    assert not warm.ensure(warm.resolve(root)).built

    assert not calls.exists()


def test_quarantine_stays_bounded(environments: Environments, tmp_path: Path) -> None:
    lock = environments.resolve(bundle(tmp_path / "one"))
    for _ in range(6):
        (environments.ensure(lock).path / "pyvenv.cfg").unlink()
    environments.ensure(lock)

    assert 1 <= len(list((tmp_path / "cache" / "quarantine").iterdir())) <= 3
