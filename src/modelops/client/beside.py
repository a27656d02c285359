"""Hear Ctrl-C, and do what is to be done then in a thread of its own.

A handler interrupts whatever its thread is doing: somebody may be writing to stderr just then, or hold a lock. So a
handler itself neither prints nor waits.
"""

from __future__ import annotations

import logging
import signal
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

log = logging.getLogger(__name__)
END_WITHIN_S: Final = 2.0


class Beside:
    """Does what it is given, in order. Use it in a ``with`` block, which waits for that at its end, not for long.

    Parameters
    ----------
    pressed
        Within the block, what Ctrl-C and SIGTERM call instead of what they did before. Only the main thread gets
        signals; where another thread enters the block they stay as they are.
    """

    def __init__(self, pressed: Callable[[int, FrameType | None], None]) -> None:
        self._pressed = pressed
        self._before: dict[int, object] = {}
        self._asked: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="modelops-beside", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._pressed) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us before
        self._asked.put(None)
        self._thread.join(END_WITHIN_S)

    def do(self, act: Callable[[], object]) -> None:
        """Have this done soon. Takes no lock, so that a signal handler may call it at any moment."""
        self._asked.put(act)

    def _run(self) -> None:
        while (act := self._asked.get()) is not None:
            try:
                act()
            except Exception:  # what comes after it is done all the same
                log.exception("after a signal")
