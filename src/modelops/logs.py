"""Logs of the processes of a pool: text on a terminal, elsewhere one JSON object a line; and reading them back."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MAX_BYTES: Final = 10 << 20
KEPT_FILES: Final = 3
TAIL_BYTES: Final = 64 << 10
IN_FULL: Final = "the error in full"  # the traceback of the sentence in the line before


SUBJECTS: Final = ("job", "param", "replicate", "attempt")  # what a line may be about
_subject: ContextVar[Mapping[str, Any]] = ContextVar("modelops_subject")


@contextlib.contextmanager
def about(**subject: Any) -> Iterator[None]:
    """Let what this thread (or task) logs within this block say what it is about, see `SUBJECTS`.

    A single line says it with ``extra``, under the same names.
    """
    token = _subject.set({**_subject.get({}), **subject})
    try:
        yield
    finally:
        _subject.reset(token)


class JsonLines(logging.Formatter):
    """One record, one line, one JSON object: time, level, logger, message, and the traceback if there is one.

    A line that is about a job, parameter set, replicate or attempt has them as well: see `about`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        subject = _subject.get({})
        for name in SUBJECTS:
            if (value := getattr(record, name, subject.get(name))) is not None:
                line[name] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class RotatingStderr(logging.StreamHandler[Any]):
    """Writes to stderr, which is the log file of this process alone, and begins a new file when it is full.

    The descriptor itself is moved, so what Python or a C library writes to stderr is in the same file.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(sys.stderr)
        self._path, self._max_bytes = path, max_bytes

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; called under the handler's lock."""
        super().emit(record)
        with contextlib.suppress(OSError):  # a full disk, a folder that is gone: the log goes on where it is
            if os.fstat(2).st_size > self._max_bytes:
                self.flush()
                move_aside(self._path)
                fd = open_log(self._path)
                os.dup2(fd, 2)
                os.dup2(fd, 1)
                os.close(fd)


def set_up_logging(log: Path | None = None, *, level: int = logging.INFO) -> None:
    """Log to stderr. ``log``: the file that stderr is, for a process whose log is a file."""
    handler = RotatingStderr(log) if log is not None else logging.StreamHandler()
    if log is not None or not sys.stderr.isatty():
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("alembic", "uvicorn"):  # what they tell of themselves is of no use to an operator
        logging.getLogger(name).setLevel(logging.WARNING)


def quiet_dask() -> None:
    """Let Dask's loggers log as all others do, and only what is wrong; it gives them handlers when imported."""
    for name in (
        "distributed",
        *(n for n in logging.root.manager.loggerDict if n.startswith("distributed.")),
    ):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING if name == "distributed" else logging.NOTSET)
    for name in ("tornado", "tornado.application", "bokeh"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def open_log(path: Path) -> int:
    """Open a log for appending; only its user may read it. Returns the descriptor."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def move_aside(path: Path, kept: int = KEPT_FILES) -> None:
    """Rename ``x.log`` to ``x.log.1`` and so on; the oldest goes."""
    for n in range(kept - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(f"{path.name}.{n}").replace(path.with_name(f"{path.name}.{n + 1}"))
    path.replace(path.with_name(f"{path.name}.1"))


def tail(path: Path, n: int = 15) -> list[str]:
    """Return the last lines of a log as a person reads them; none if there is no log."""
    return [text for line in _last_lines(path)[-n:] for text in _readable(line)][-2 * n :]


def gave_up_with(path: Path) -> str:
    """Return the sentence with which a process ended by itself; empty if its log does not end with one.

    A bug has no sentence: it is found by its traceback, which `tail` shows.
    """
    lines = _last_lines(path)
    if lines and _entry(lines[-1]).get("message") == IN_FULL:
        lines.pop()
    last = _entry(lines[-1]) if lines else {}
    return str(last["message"]) if last.get("level") == "critical" and "error" not in last else ""


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _entry(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and "message" in entry else {}


def _readable(line: str) -> list[str]:
    try:
        entry = json.loads(line)
        head = f"{entry['time'][11:19]} {entry['level']} {entry['message']}"
    except (ValueError, TypeError, KeyError):
        return [line]
    return [head, *str(entry.get("error", "")).splitlines()]
