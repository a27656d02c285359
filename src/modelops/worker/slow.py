"""Say so when something takes long, while it does."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SLOW_S: Final = 30.0  # uv waits four times as long for an index that is silent


@contextlib.contextmanager
def said_if_slow(say: Callable[[str], None], after_s: float = SLOW_S) -> Iterator[Callable[[str], None]]:
    """Call ``say``, once and on a thread of its own, if the block takes longer than that.

    Yields
    ------
        What is to be told how far it is; ``say`` is given the last of that.
    """
    last = [""]

    def note(text: str) -> None:
        last[0] = text

    timer = threading.Timer(after_s, lambda: say(last[0]))
    timer.daemon = True
    timer.start()
    try:
        yield note
    finally:
        timer.cancel()
