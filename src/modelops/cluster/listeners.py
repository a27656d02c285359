"""Who in this process wants to hear of workers and of what they say; several jobs share one client."""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Client


class Listeners:
    """Thread-safe. What is told is told to one listener after the other, and nothing is told twice at once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._workers: list[tuple[Callable[[str, int], None], Callable[[str, bool], None]]] = []
        self._topics: dict[str, list[Callable[[Any], None]]] = {}
        self._client: Client | None = None
        self._subscribed: set[str] = set()  # of the topics, those that the client was told of

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

    @contextlib.contextmanager
    def on_topic(self, topic: str, handler: Callable[[Any], None]) -> Iterator[None]:
        """Call ``handler(message)`` within this block for all that workers log under a topic of Dask's events."""
        with self._lock:
            handlers = self._topics.setdefault(topic, [])
            handlers.append(handler)
            self._subscribe(topic)
        try:
            yield
        finally:
            with self._lock:
                handlers.remove(handler)

    def listen_to(self, client: Client | None) -> None:
        """Hear through this client from now on; None: there is none just now."""
        with self._lock:
            self._client = client
            self._subscribed.clear()
            for topic in self._topics:
                self._subscribe(topic)

    def _subscribe(self, topic: str) -> None:
        """Have a topic told by the client, once for as long as it lives: each time is a message to the scheduler."""
        if self._client is not None and topic not in self._subscribed:
            self._client.subscribe_topic(topic, partial(self._heard, topic))
            self._subscribed.add(topic)

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

    def _heard(self, topic: str, event: tuple[float, Any]) -> None:
        with self._lock:
            for handler in tuple(self._topics.get(topic, ())):
                handler(event[1])
