"""Say so when something takes long, while it does."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SLOW_S: Final = 30.0  # uv waits four times as long for an index that is silent


@contextlib.contextmanager
def said_if_slow(say: Callable[[], None], after_s: float = SLOW_S) -> Iterator[None]:
    """Call ``say``, once and on a thread of its own, if the block takes longer than that."""
    timer = threading.Timer(after_s, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
