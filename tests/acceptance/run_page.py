"""Run the examples of one documentation page: ``run_page.py STEPS.json FOLDER``, as a program of its own.

All steps of a page share one namespace and one folder, in the order of the page. The first step that does
not do what the page says ends the program with code 1 and a message that begins with ``page:line``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

COMMAND_TIMEOUT_S = 240


class ExampleError(Exception):
    """An example does not do what its page says."""


def run_python(step: dict[str, Any], namespace: dict[str, Any]) -> str:
    """Run a block in the namespace of the page; line numbers in a traceback are those of the page."""
    code = compile("\n" * step["line"] + step["text"], step["page"], "exec")
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(code, namespace)
    except Exception:  # noqa: BLE001  whatever it is, it is shown with its traceback
        raise ExampleError(f"the example raised\n{traceback.format_exc()}") from None
    return output.getvalue()


def run_command(command: str, wanted: int) -> str:
    """Run one line of shell, check its exit code, return its stdout."""
    if command.startswith("cd "):
        os.chdir(Path(command[3:].strip()).expanduser())
        return ""
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != wanted:
        raise ExampleError(
            f"exit code {done.returncode}, the page says {wanted}: {command}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def make_target(command: str, makefile: str) -> None:
    """Check that ``make TARGET`` names targets that exist; they are run by other tests."""
    targets = set(re.findall(r"^([\w.-]+):", makefile, re.MULTILINE))
    for word in shlex.split(command, comments=True)[1:]:
        if word not in targets:
            raise ExampleError(f"the Makefile has no target {word!r}")


def compare(expected: str, output: str) -> None:
    """Check that the expected lines occur in this order.

    ``...`` in a line is any text, spaces count as one, and the output may have more lines.
    """
    lines = iter([" ".join(line.split()) for line in output.splitlines()])
    for wanted in filter(None, (" ".join(line.split()) for line in expected.splitlines())):
        pattern = re.compile(".*".join(map(re.escape, wanted.split("..."))))
        if not any(pattern.fullmatch(line) for line in lines):
            raise ExampleError(
                f"the output has no line (after the ones before it)\n  {wanted}\nit is\n{output}"
            )


def run_step(step: dict[str, Any], namespace: dict[str, Any], makefile: str) -> None:
    """Do what one block says."""
    output = ""
    if step["file"]:
        place = Path(step["file"])
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(step["text"], encoding="utf-8")
    elif step["kind"] == "python":
        output = run_python(step, namespace)
    for command in step["commands"]:
        if command.startswith("make "):
            make_target(command, makefile)
        else:
            output += run_command(command, step["exit"])
    if step["expected"] is not None:
        compare(step["expected"], output)


def main() -> int:
    """Run the steps; return the exit code."""
    steps, folder = json.loads(Path(sys.argv[1]).read_text("utf-8")), sys.argv[2]
    makefile = Path(sys.argv[3]).read_text("utf-8")
    os.chdir(folder)
    sys.path.insert(0, folder)
    namespace: dict[str, Any] = {"__name__": "page"}
    for step in steps:
        try:
            run_step(step, namespace, makefile)
        except (ExampleError, subprocess.TimeoutExpired, OSError) as error:
            sys.stderr.write(f"{step['page']}:{step['line']}: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
