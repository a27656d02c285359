"""Wait for storage that does not do its part: an attempt keeps what it has and tries again, until it is stopped."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar

from modelops.errors import StorageError
from modelops.volumes import volume_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.study.ids import AttemptId
    from modelops.worker.attempts import Attempt

FIRST_WAIT_S: Final = 0.1
LONGEST_WAIT_S: Final = 5.0
ROOM_BYTES: Final = 1 << 20  # on this machine's volume, before a model is run again whose outputs had no room
log = logging.getLogger(__name__)

T = TypeVar("T")


def when_storage_allows(
    act: Callable[[], T], attempt: Attempt, say: Callable[[str], None], *, first_wait_s: float = FIRST_WAIT_S
) -> T:
    """Call ``act`` until it raises no StorageError, with growing pauses, and return what it returned.

    Parameters
    ----------
    act
        May be called again after it failed.
    attempt
        Is ``storing`` meanwhile. Once it was stopped and its grace is over, there is no further try.
    say
        Is told what storage said, at each failure: whoever listens may have begun to just now. At the end of the wait
        it is told the empty text.
    first_wait_s
        The first pause; the next ones are longer.

    Raises
    ------
    StorageError
        The attempt was stopped while storage was away.
    """
    wait_s = first_wait_s
    stopped = threading.Event()
    with attempt.stop.waking(stopped.set):
        try:
            while True:
                try:
                    return act()
                except StorageError as error:
                    attempt.storing = True
                    say(str(error))
                    deadline = attempt.stop.deadline
                    if deadline is not None and time.monotonic() >= deadline:
                        raise
                if deadline is None:
                    stopped.wait(wait_s)
                else:
                    threading.Event().wait(min(wait_s, max(0.0, deadline - time.monotonic())))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        finally:
            if attempt.storing:
                attempt.storing = False
                say("")


class Waiting:
    """The attempts of this worker that wait for storage; the log says when the first begins and the last ends to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: set[tuple[str, AttemptId]] = set()

    def note(self, attempt: Attempt, text: str) -> None:
        """Hear what storage said to an attempt; empty: it has stopped waiting."""
        key = (attempt.job, attempt.attempt)
        with self._lock:
            before = bool(self._attempts)
            if text:
                self._attempts.add(key)
            else:
                self._attempts.discard(key)
            after = bool(self._attempts)
        if after and not before:
            subject = {"job": attempt.job, "attempt": attempt.attempt}
            log.warning("attempt %s of job %s waits: %s", attempt.attempt, attempt.job, text, extra=subject)
        elif before and not after:
            log.info("no attempt waits for storage any more")


def find_room(folder: Path, n_bytes: int = ROOM_BYTES) -> None:
    """Find out whether so much can be written to a folder now.

    Raises
    ------
    StorageError
        It cannot; the text names the folder.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        raise StorageError(
            f"outputs cannot be kept in {folder}: {error.strerror or error} ({volume_of(folder)}); free some space "
            "there, or set MODELOPS_HOME to a folder on another volume"
        ) from error
