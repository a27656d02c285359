"""The installed command in a process of its own, with a home of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.home import Home

COMMAND = Path(sys.executable).parent / "modelops"


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout as JSON."""
        return json.loads(self.out)


@pytest.fixture
def modelops(home: Home, tmp_path: Path) -> Iterator[Callable[..., Said]]:
    """Return a function that runs ``modelops`` with these arguments, as a user in an empty folder does.

    A pool that a command has started ends with the test.
    """
    folder = tmp_path / "here"
    folder.mkdir()
    yield command(home, folder)
    end_pool(home)


def end_pool(home: Home) -> None:
    """End the pool of a home, if one was ever started."""
    if home.run.is_dir():
        command(home, home.data)("down")


def command(home: Home, folder: Path) -> Callable[..., Said]:
    """Return a function that runs ``modelops`` with these arguments in a folder."""

    def run(*arguments: str | Path, cwd: Path = folder, **environ: str) -> Said:
        done = subprocess.run(
            [COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=240,
            env={**os.environ, "MODELOPS_HOME": str(home.data), **environ}, check=False,
        )  # fmt: skip
        assert "modelops/cli" not in done.stderr, done.stderr  # a traceback of ours
        return Said(done.returncode, done.stdout, done.stderr)

    return run
