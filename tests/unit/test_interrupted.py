"""Ctrl-C at any moment of a command: one word, one exit code, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import importlib.abc, os, signal, sys

class CtrlC(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == AT:
            os.kill(os.getpid(), signal.SIGINT)

AT = sys.argv[1]
sys.modules.pop(AT, None)
sys.meta_path.insert(0, CtrlC())
from modelops.cli import main
sys.argv[:] = ["modelops", *sys.argv[2:]]
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
        [sys.executable, "-c", PROGRAM, module, *words], capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout, said.stderr) == (4, "", "stopped\n")


def test_a_ctrl_c_that_the_shell_lets_be_ignored_is_ignored() -> None:
    said = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", PROGRAM, "typer", "--version"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("modelops ")
