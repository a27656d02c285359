"""Wait for storage that does not do its part: an attempt keeps what it has and tries again, until it is stopped."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar

from modelops.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.worker.attempts import Attempt

FIRST_WAIT_S: Final = 0.1
LONGEST_WAIT_S: Final = 5.0

T = TypeVar("T")


def when_storage_allows(act: Callable[[], T], attempt: Attempt, say: Callable[[str], None]) -> T:
    """Call ``act`` until it raises no StorageError, with growing pauses, and return what it returned.

    Parameters
    ----------
    act
        May be called again after it failed.
    attempt
        Is ``storing`` meanwhile. Once it was stopped and its grace is over, there is no further try.
    say
        Is told once what storage said.

    Raises
    ------
    StorageError
        The attempt was stopped while storage was away.
    """
    wait_s = FIRST_WAIT_S
    stopped = threading.Event()
    with attempt.stop.waking(stopped.set):
        try:
            while True:
                try:
                    return act()
                except StorageError as error:
                    if not attempt.storing:
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
            attempt.storing = False
