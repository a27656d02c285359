"""A real runner has the conversation that docs/reference/protocol.md shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from doc_tables import REFERENCE, rows_below

from modelops_runner.frames import FrameSplitter, encode_frame
from modelops_runner.launch import runner_argv

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 120.0
OWN = ("pid", "python", "implementation", "executable", "prefix", "platform", "seconds", "cpu")
"""Fields that differ from run to run and from machine to machine."""


def without_own(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its own fields by type only."""
    return {
        key: {k: type(v).__name__ if k in OWN else v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in message.items()
    }


def test_a_runner_answers_as_the_page_says(tmp_path: Path) -> None:
    for folder in ("snapshot", "workdir", "tmpdir", "spool"):
        (tmp_path / folder).mkdir()
    page = (REFERENCE / "protocol.md").read_text("utf-8")
    source = re.search(r"```python\n# file: model\.py\n(.*?)```", page, re.DOTALL)
    assert source is not None
    (tmp_path / "snapshot" / "model.py").write_text(source[1])

    process = subprocess.Popen(
        runner_argv(sys.executable), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    give_up = threading.Timer(DEADLINE_S, process.kill)
    give_up.start()
    try:
        with process:
            converse(process, str(tmp_path))
            assert process.wait() == 0
    finally:
        give_up.cancel()


def converse(process: subprocess.Popen[bytes], folder: str) -> None:
    """Send what the worker sends, in turn with hearing what the runner should say; then it should be silent."""
    assert process.stdin
    assert process.stdout
    splitter, answers = FrameSplitter(), list[bytes]()
    for who, frame in rows_below("protocol.md", "| from | frame |"):
        body = frame.split(r"\r\n\r\n", 1)[1]
        if who == "worker":
            process.stdin.write(encode_frame(body.replace("/run/1", folder).encode()))
            continue
        while not answers:
            data = process.stdout.read(65_536)
            assert data, "the runner has ended"
            answers += splitter.feed(data)
        assert without_own(json.loads(answers.pop(0))) == without_own(json.loads(body))
    assert process.stdout.read() == b""
    assert not answers
    splitter.close()
