"""Ask a run to stop, from any thread."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class StopSignal:
    """Tell the thread that runs a chunk to give back the rest. Thread-safe; what was asked stays asked.

    Parameters
    ----------
    grace_s
        How long the replicate that is running when `stop` is called may go on. It counts if it ends in
        time; otherwise its process is killed and it is given back as unstarted.
    """

    def __init__(self, *, grace_s: float = 5.0) -> None:
        self._grace_s = grace_s
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], None]] = []
        self._deadline: float | None = None
        self._gives_back = False

    def give_back(self) -> None:
        """Give back what has not begun, once a replicate has; that one goes on for as long as it takes."""
        with self._lock:
            self._gives_back = True
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    @property
    def gives_back(self) -> bool:
        """Whether `give_back` was called."""
        return self._gives_back

    def stop(self, *, hard: bool = False, grace_s: float | None = None) -> None:
        """Let nothing new start; ``hard``: kill the running replicate at once, ``grace_s``: after so long."""
        with self._lock:
            grace_s = self._grace_s if grace_s is None else grace_s
            deadline = time.monotonic() + (0.0 if hard else grace_s)
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._deadline is not None

    @property
    def deadline(self) -> float | None:
        """When the running replicate is killed (``time.monotonic``), None as long as nobody said stop."""
        return self._deadline

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call ``wake`` whenever `stop` or `give_back` is called within this block."""
        with self._lock:
            self._wakers.append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakers.remove(wake)
