"""Drain a runner's stderr in a thread of its own: into bounded tails, a rotating file, and the job's log."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from modelops.processes.stderr import Attribution, readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from modelops.processes.outcome import LogSink

logger = logging.getLogger(__name__)
QUOTA_BYTES = 16 * 1024 * 1024  # of one replicate, passed on in full; of what follows only the tail
LOG_FILE_BYTES = 8 * 1024 * 1024
READ_BYTES = 256 * 1024
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.5  # in which marks gather, unless somebody waits for one
GATHERED_BYTES = 8 * 1024  # in a pause; then it was long enough: a pipe may hold no more than 64 KiB


class RotatingFile:
    """A log file that is at most twice ``max_bytes`` long, older half in ``<name>.1``. One writer."""

    def __init__(self, path: Path, *, max_bytes: int = LOG_FILE_BYTES) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._at_line_start = True

    def write(self, index: int | None, text: bytes) -> None:
        """Append text, each line behind ``[index]``."""
        prefix = b"[%s] " % (b"-" if index is None else b"%d" % index)
        for at in range(0, len(text), self._max_bytes // 4):
            piece = text[at : at + self._max_bytes // 4]
            ends = piece.endswith(b"\n")
            body = (piece[:-1] if ends else piece).replace(b"\n", b"\n" + prefix)
            line = (prefix if self._at_line_start else b"") + body + (b"\n" if ends else b"")
            if self._size + len(line) > self._max_bytes and self._size:
                self._rotate()
            self._file.write(line)
            self._size += len(line)
            self._at_line_start = ends

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        self._file = self._path.open("ab", buffering=0)
        self._size = 0


class Drain:
    """The thread that reads one runner's stderr until its end, and what it knows.

    Parameters
    ----------
    fd
        Read end of the pipe; this object owns it.
    """

    def __init__(self, fd: int, marker: str, log: RotatingFile, *, quota: int = QUOTA_BYTES) -> None:
        self._fd = fd
        self._log = log
        self._attribution = Attribution(marker, quota=quota)
        self._changed = threading.Condition()
        self._sink: LogSink | None = None
        self._sink_error: Exception | None = None
        self._ended = False
        self._n_awaiting = 0
        self._has_begun = False  # a request, since the last pause
        self.mark_seen_at = 0.0  # time.monotonic when a mark was last drained
        self._thread = threading.Thread(target=self._run, name="modelops-stderr", daemon=True)
        self._thread.start()

    def begin(self, sink: LogSink | None) -> None:
        """Begin a request: forget earlier tails and hand on what is printed to ``sink``."""
        with self._changed:
            self._attribution.begin()
            self._sink, self._sink_error = sink, None
            self._has_begun = True  # its first mark is waited for
            self._changed.notify_all()

    def end(self) -> None:
        """End a request. Raises what the sink raised."""
        with self._changed:
            self._sink = None
            error, self._sink_error = self._sink_error, None
        if error is not None:
            raise error

    def opened(self, index: int) -> float | None:
        """Return when the replicate's mark was seen, None if it was not (indices of a request rise)."""
        with self._changed:
            return self.mark_seen_at if self._attribution.last_index >= index else None

    def wait_closed(self, index: int, timeout_s: float) -> bool:
        """Wait until all that a replicate printed is here, or the stream has ended."""
        return self._await(lambda: self._ended or self._attribution.closed(index), timeout_s)

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait until nobody holds the other end of the pipe."""
        return self._await(lambda: self._ended, timeout_s)

    def _await(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        with self._changed:
            if condition():
                return True
            self._n_awaiting += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(condition, timeout_s)
            finally:
                self._n_awaiting -= 1

    def tail(self, index: int | None) -> str:
        """Return the last text of a replicate; None: of no replicate."""
        with self._changed:
            return readable(self._attribution.tail(index))

    def last_opened(self) -> int:
        """Return the last index of this request whose mark was seen, -1 if none was."""
        with self._changed:
            return self._attribution.last_index

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait for the thread; the process and all that held its stderr have been killed."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("a process that cannot be killed still holds the stderr of a dead runner")

    def _run(self) -> None:
        pause_s, read_at = SHORTEST_PAUSE_S, 0.0
        try:
            while data := os.read(self._fd, READ_BYTES):
                last_read_at, read_at = read_at, time.monotonic()
                with self._changed:
                    before = (self._attribution.last_index, self._attribution.index)
                    printed = self._pass_on(self._attribution.feed(data))
                    if before != (self._attribution.last_index, self._attribution.index):
                        self.mark_seen_at = read_at
                        self._changed.notify_all()
                    # To wake up for each mark would cost more than to read it. Who prints hardly waits for us.
                    if printed:
                        pause_s = SHORTEST_PAUSE_S
                    elif len(data) > GATHERED_BYTES:
                        pause_s /= 2 * len(data) / GATHERED_BYTES
                    if not printed or read_at - last_read_at < SHORTEST_PAUSE_S:
                        self._changed.wait_for(lambda: self._n_awaiting or self._has_begun, pause_s)
                        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                    if self._has_begun:
                        self._has_begun, pause_s = False, SHORTEST_PAUSE_S
            with self._changed:
                self._pass_on(self._attribution.close())
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            os.close(self._fd)
            self._log.close()

    def _pass_on(self, texts: Iterable[tuple[int | None, bytes]]) -> bool:
        """Write text to the log and hand it on; return whether there was any."""
        printed = False
        for index, text in texts:
            printed = True
            try:
                self._log.write(index, text)
            except OSError as error:  # a full disk must not stop the model; its tail is in memory
                logger.warning("cannot write the log of a runner: %s", error)
            if self._sink is not None:
                try:
                    self._sink(index, text)
                except Exception as error:  # noqa: BLE001 - the caller's code; raised to him by `end`
                    self._sink, self._sink_error = None, error
        return printed
