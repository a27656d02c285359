"""Fixtures every layer shares: a home of its own for each test, and bundles written from a few lines."""

from __future__ import annotations

import logging
import os
import signal
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from services import S3, Postgres

from modelops.home import Home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A test fails for what is wrong, never because the machine was slow.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")

# What a shell puts into the background ignores Ctrl-C, and so do its children; tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PYPROJECT = """\
[project]
name = "{name}"
version = "1.0"
requires-python = ">=3.11"
dependencies = [{dependencies}]

[tool.modelops]
{table}
"""


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Environments that tests may share, so that each is built once in a test run."""
    return tmp_path_factory.mktemp("modelops-cache")


@pytest.fixture
def home(tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Give the test a home of its own with the shared cache of environments."""
    root = tmp_path / "home"
    root.mkdir()
    (root / "cache").symlink_to(shared_cache)
    monkeypatch.setenv("MODELOPS_HOME", str(root))
    return Home.at(root)


@pytest.fixture
def write_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a bundle from the source of its module."""

    def write(
        source: str, *, name: str = "mymodel", table: str = 'model = "model:simulate"', dependencies: str = ""
    ) -> Path:
        folder = tmp_path / "bundles" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pyproject.toml").write_text(
            PYPROJECT.format(name=name, table=textwrap.dedent(table), dependencies=dependencies)
        )
        (folder / "model.py").write_text(textwrap.dedent(source))
        return folder

    return write


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Start a real PostgreSQL for the tests that ask for one."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def s3_service() -> Iterator[S3]:
    """Start a real S3 service for the tests that ask for one."""
    with S3() as service:
        yield service


@pytest.fixture
def s3(s3_service: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """Lend the S3 service, with the variables by which clients find it."""
    for name, value in s3_service.environ.items():
        monkeypatch.setenv(name, value)
    return s3_service


def descendants(pid: int) -> set[int]:
    """Return the pids of all live descendants of a process."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_bytes().rsplit(b")", 1)[1].split()
        except OSError:
            continue  # it ended while we looked
        if fields[0] != b"Z":
            parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    grown = True
    while grown:
        new = {p for p, parent in parents.items() if (parent == pid or parent in found) and p not in found}
        found |= new
        grown = bool(new)
    return found


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """Fail the test if it leaves a child process that was not there before."""
    before = descendants(os.getpid())
    yield
    deadline = time.monotonic() + 30
    while left := descendants(os.getpid()) - before:  # one that was killed a moment ago may still be ending
        if time.monotonic() > deadline:
            break
        threading.Event().wait(0.02)
    assert not left, f"processes left behind: {left}"


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Collect what ModelOps warns of in this process.

    Not ``caplog``: a `LocalCluster` sets the level of the handlers that pytest hangs on Dask's logger, and
    these are the ones of ``caplog``.
    """

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    collector = Collector(logging.WARNING)
    logging.getLogger("modelops").addHandler(collector)
    yield messages
    logging.getLogger("modelops").removeHandler(collector)
