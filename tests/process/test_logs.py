"""Logs of a pool's processes: whole JSON lines, new files when they are full, and the last lines for a person."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from modelops.logs import IN_FULL, JsonLines, about, gave_up_with, move_aside, open_log, tail

if TYPE_CHECKING:
    from pathlib import Path

FULL = """
import logging, os, sys
from pathlib import Path
from modelops import logs
log = Path(sys.argv[1])
fd = logs.open_log(log)
os.dup2(fd, 2)
logs.MAX_BYTES = 1000
handler = logs.RotatingStderr(log, max_bytes=1000)
handler.setFormatter(logs.JsonLines())
logging.basicConfig(level=logging.INFO, handlers=[handler])
for n in range(40):
    logging.info("line %s", n)
os.write(2, b"from a library\\n")
"""


def record(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, None) if error is not None else None
    return logging.LogRecord("modelops.x", logging.WARNING, "x.py", 1, message, arguments, info)


def test_a_record_is_one_line_of_json_whatever_is_in_it() -> None:
    line = JsonLines().format(
        record("two\nlines and %s", "\N{GREEK SMALL LETTER BETA}", error=ValueError("no"))
    )
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["logger"]) == ("warning", "modelops.x")
    assert said["message"] == "two\nlines and \N{GREEK SMALL LETTER BETA}"
    assert "ValueError: no" in said["error"]
    assert said["time"].endswith("Z")


def test_a_line_says_what_it_is_about_by_its_thread_or_by_itself() -> None:
    def said(**extra: object) -> dict[str, object]:
        line = record("x")
        vars(line).update(extra)
        found = json.loads(JsonLines().format(line))
        return {name: found[name] for name in ("job", "param", "replicate", "attempt") if name in found}

    assert said() == {}
    others: list[dict[str, object]] = []
    with about(job="job_1"):
        with about(attempt="1-2"):
            assert said(param=0, replicate=3) == {
                "job": "job_1",
                "param": 0,
                "replicate": 3,
                "attempt": "1-2",
            }
            assert said(job="job_2") == {"job": "job_2", "attempt": "1-2"}
            thread = threading.Thread(target=lambda: others.append(said()))
            thread.start()
            thread.join()
        assert said() == {"job": "job_1"}
    assert others == [{}]
    assert said(attempt="1-9") == {"attempt": "1-9"}


def test_a_full_log_is_moved_aside_and_what_libraries_write_goes_to_the_new_one(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    subprocess.run([sys.executable, "-c", FULL, str(log)], check=True)
    names = sorted(p.name for p in log.parent.iterdir())
    assert names == ["server.log", "server.log.1", "server.log.2", "server.log.3"]
    assert log.read_text().endswith("from a library\n")
    assert all(p.stat().st_mode & 0o077 == 0 for p in log.parent.iterdir())
    lines = [x for n in (3, 2, 1) for x in (log.parent / f"server.log.{n}").read_text().splitlines()]
    kept = [json.loads(x)["message"] for x in lines]
    assert kept == [f"line {n}" for n in range(int(kept[0].split()[1]), int(kept[-1].split()[1]) + 1)]


def test_the_oldest_file_goes(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    for n in range(5):
        log.write_text(str(n))
        move_aside(log)
    assert [(tmp_path / f"x.log.{n}").read_text() for n in (1, 2, 3)] == ["4", "3", "2"]
    assert not (tmp_path / "x.log.4").exists()


def test_the_last_lines_are_for_a_person_to_read(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    fd = open_log(log)
    try:
        for line in (
            "Traceback of the interpreter",
            JsonLines().format(record("it broke", error=ValueError("so"))),
        ):
            os.write(fd, line.encode() + b"\n")
        os.write(fd, b"\xff half a li")
    finally:
        os.close(fd)
    first, second, *more, last = tail(log)
    assert first == "Traceback of the interpreter"
    assert second.endswith("warning it broke")
    assert more == ["ValueError: so"]
    assert last.endswith("half a li")
    assert tail(tmp_path / "none.log") == []


def test_a_log_that_ends_with_a_sentence_gives_it_and_any_other_end_gives_none(tmp_path: Path) -> None:
    line = JsonLines().format
    sentence, bug = record("no disk"), record("a bug", error=ValueError("x"))
    in_full = record(IN_FULL, error=ValueError("no disk"))
    sentence.levelname = bug.levelname = "CRITICAL"
    log = tmp_path / "server.log"
    assert gave_up_with(log) == ""
    for written, said in [
        ([sentence], "no disk"),
        ([sentence, in_full], "no disk"),
        ([bug], ""),  # its traceback is what there is to say
        ([sentence, in_full, record("started again")], ""),
        ([in_full], ""),
    ]:
        log.write_text("".join(f"{line(r)}\n" for r in written))
        assert gave_up_with(log) == said
    log.write_text(f"{line(sentence)}\nSegmentation fault\n")
    assert gave_up_with(log) == ""
