"""Listing, verifying and collecting environments, and that none goes while a process uses it."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from modelops.environments import Environment, Environments
from modelops.environments.manifest import NAME

if TYPE_CHECKING:
    from pathlib import Path

# What a runner does: hold a shared lock on the mark, import from the environment when told to.
USER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_SH)
print("in use", flush=True)
sys.stdin.readline()
import six
print(six.__version__, flush=True)
sys.stdin.readline()
"""


def build(environments: Environments, folder: Path, *requirements: str) -> Environment:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    return environments.ensure(environments.resolve(folder))


class UserProcess:
    """A process that runs from an environment, as a runner does."""

    def __init__(self, environment: Environment) -> None:
        self._process = subprocess.Popen(
            [environment.python, "-c", USER, environment.path / ".in-use"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._said() == "in use"

    def import_six(self) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write("go on\n")
        self._process.stdin.flush()
        return self._said()

    def end(self) -> None:
        self._process.communicate(timeout=60)

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture
def environments(tmp_path: Path) -> Environments:
    return Environments(tmp_path / "cache")


def test_an_environment_in_use_survives_gc_and_verify(environments: Environments, tmp_path: Path) -> None:
    used = build(environments, tmp_path / "used", "six==1.17.0")
    idle = build(environments, tmp_path / "idle", "idna")
    user = UserProcess(used)

    collected = environments.gc(everything=True)
    verified = environments.verify(used.key)

    assert [info.key for info in collected.removed] == [idle.key]
    assert collected.n_bytes > 0
    assert collected.skipped == ((used.key, "a process uses it"),)
    assert verified.in_use
    assert not verified.set_aside
    assert [info.in_use for info in environments.list()] == [True]
    assert user.import_six() == "1.17.0"
    user.end()
    assert [info.key for info in environments.gc(everything=True).removed] == [used.key]
    assert environments.list() == []


def test_a_damaged_environment_in_use_is_rebuilt_beside_the_process_that_uses_it(
    environments: Environments, tmp_path: Path
) -> None:
    used = build(environments, tmp_path / "used", "six==1.17.0")
    user = UserProcess(used)
    (used.path / "bin" / "activate").unlink()

    assert build(environments, tmp_path / "used", "six==1.17.0").built

    environments.gc(everything=False)
    assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 1, "its old folder is still in use"
    assert user.import_six() == "1.17.0"
    user.end()
    environments.gc()
    assert list((tmp_path / "cache" / "quarantine").iterdir()) == []
    assert len(environments.list()) == 1


def test_a_held_environment_stays_and_a_replaced_one_cannot_be_held(
    environments: Environments, tmp_path: Path
) -> None:
    environment = build(environments, tmp_path / "one")
    with environments.hold(environment):
        assert environments.gc(everything=True).removed == ()
    assert len(environments.gc(everything=True).removed) == 1

    with pytest.raises(FileNotFoundError), environments.hold(environment):
        pytest.fail("there is nothing to hold")


def test_gc_by_age_removes_what_was_not_used_for_so_long(environments: Environments, tmp_path: Path) -> None:
    old = build(environments, tmp_path / "old", "six")
    new = build(environments, tmp_path / "new", "idna")
    os.utime(old.path / ".in-use", (1e9, 1e9))
    compiled = tmp_path / "cache" / "pycache"
    for one in (old, new):
        (compiled / one.key / "lib").mkdir(parents=True)

    assert [i.key for i in environments.list()] == [new.key, old.key]
    assert [i.key for i in environments.gc(max_age_s=3600).removed] == [old.key]
    assert [folder.name for folder in compiled.iterdir()] == [new.key]


def test_using_an_environment_makes_it_young_again(environments: Environments, tmp_path: Path) -> None:
    environment = build(environments, tmp_path / "one", "six")
    os.utime(environment.path / ".in-use", (1e9, 1e9))

    assert not build(environments, tmp_path / "one", "six").built

    assert environments.gc(max_age_s=3600).removed == ()


def test_gc_by_size_removes_the_least_recently_used(environments: Environments, tmp_path: Path) -> None:
    built = [build(environments, tmp_path / name, name) for name in ("six", "idna", "tomli")]
    for age, environment in enumerate(built):
        os.utime(environment.path / ".in-use", (2e9 - age, 2e9 - age))
    sizes = {info.key: info.n_bytes for info in environments.list()}

    removed = environments.gc(max_bytes=sizes[built[0].key] + sizes[built[1].key]).removed

    assert [info.key for info in removed] == [built[2].key]


def test_an_environment_without_manifest_is_collected_unless_it_is_being_built(
    environments: Environments, tmp_path: Path
) -> None:
    environment = build(environments, tmp_path / "one", "six")
    (environment.path / NAME).unlink()
    lock = environment.path.parent / f".{environment.key}.lock"
    with lock.open("r+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert environments.gc().skipped == ((environment.key, "it is being built"),)
    assert [i.key for i in environments.gc().removed] == [environment.key]


def test_verify_sets_a_damaged_environment_aside_and_the_next_job_gets_a_whole_one(
    environments: Environments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = build(environments, tmp_path / "one", "six==1.17.0")
    assert environments.verify(environment.key).damages == ()
    module = next(environment.path.glob("lib/*/site-packages/six.py"))
    module.unlink()
    with caplog.at_level(logging.WARNING):
        verified = environments.verify(environment.key)

    assert verified.set_aside
    assert [str(d).endswith("six.py is missing") for d in verified.damages] == [True]
    assert "six.py is missing" in caplog.text
    assert build(environments, tmp_path / "one", "six==1.17.0").built


def test_the_list_says_what_is_in_an_environment(environments: Environments, tmp_path: Path) -> None:
    environment = build(environments, tmp_path / "one", "six==1.17.0")

    (info,) = environments.list()

    assert info.key == environment.key
    assert info.packages == ("six==1.17.0",)
    assert info.python.startswith("{}.{}.{}".format(*sys.version_info[:3]))
    assert info.n_bytes > 30_000
    assert info.damages == ()
    assert not info.in_use
