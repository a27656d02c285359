"""Who in this process wants to hear of workers: several jobs share one connection."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Listeners:
    """Thread-safe. What is told is told to one listener after the other, in the order in which it happened."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._workers: list[tuple[Callable[[str, int], None], Callable[[str, bool], None]]] = []

    @contextlib.contextmanager
    def on_workers(
        self, joined: Callable[[str, int], None], left: Callable[[str, bool], None]
    ) -> Iterator[None]:
        """Call ``joined(worker, slots)`` and ``left(worker, died)`` within this block, on a thread of the pool."""
        listener = (joined, left)
        with self._lock:
            self._workers.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._workers.remove(listener)

    def joined(self, worker: str, slots: int) -> None:
        """Tell everybody of a worker, or of its new number of slots."""
        with self._lock:
            for joined, _ in tuple(self._workers):
                joined(worker, slots)

    def left(self, worker: str, died: bool) -> None:
        """Tell everybody that a worker is gone."""
        with self._lock:
            for _, left in tuple(self._workers):
                left(worker, died)
