"""Ctrl-C at any moment of a command: one word, one exit code, never a traceback. And the end of a container."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import importlib.abc, os, signal, sys

class Signal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == AT:
            os.kill(os.getpid(), signal.Signals[WHICH])

WHICH, AT = sys.argv[1:3]
sys.modules.pop(AT, None)
sys.meta_path.insert(0, Signal())
from modelops.cli import main
sys.argv[:] = ["modelops", *sys.argv[3:]]
main()
raise SystemExit("the command goes on")
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("typer", ["--help"]),
        ("modelops.cli.jobs", ["jobs", "list"]),
        ("importlib.metadata", ["--version"]),  # while the words are read
        ("modelops.client.server", ["jobs", "list"]),  # within the command
        ("sqlalchemy", ["jobs", "show", "job_1"]),
    ],
)
def test_ctrl_c_ends_a_command_with_4_and_one_word_whenever_it_comes(
    module: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPS_HOME", str(tmp_path))
    (tmp_path / "modelops.db").touch()
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM, "SIGINT", module, *words], capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout, said.stderr) == (4, "", "stopped\n")


def test_a_ctrl_c_that_the_shell_lets_be_ignored_is_ignored() -> None:
    said = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", PROGRAM, "SIGINT", "typer", "--version"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("modelops ")


FIRST = ["unshare", "--pid", "--fork", "--kill-child"]  # the first process of its own, as in a container


def _can_be_first() -> bool:
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run([*FIRST, "true"], check=False, capture_output=True).returncode
    )


@pytest.mark.skipif(not _can_be_first(), reason="needs root on Linux")
@pytest.mark.parametrize(
    ("module", "part"),
    [("typer", "worker"), ("modelops.cluster.crew", "worker"), ("modelops.cluster.tls", "scheduler")],
)
def test_a_container_that_is_told_to_end_while_it_starts_ends(module: str, part: str, tmp_path: Path) -> None:
    """The kernel drops a signal to the first process that has no handler for it, and nobody sends it twice."""
    said = subprocess.run(
        [*FIRST, sys.executable, "-c", PROGRAM, "SIGTERM", module, part, "--host", "no address"],
        env={**os.environ, "MODELOPS_HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (said.returncode, said.stdout, said.stderr) == (128 + signal.SIGTERM, "", "")
