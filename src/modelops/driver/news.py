"""What workers announce through the scheduler, handed to whoever drives the job it is about.

A Dask client has one handler per topic. Several jobs share a client, so there is one `News` for each client.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Client

    from modelops.study.ids import JobId

_LOCK = threading.Lock()
_known: WeakKeyDictionary[Client, News] = WeakKeyDictionary()


class News:
    """Announcements with a ``job`` in them. Listeners are called on the client's own thread and must be quick."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._topics: set[str] = set()
        self._listeners: defaultdict[tuple[str, str], list[Callable[[dict[str, Any]], None]]] = defaultdict(
            list
        )

    @classmethod
    def of(cls, client: Client) -> News:
        """Return the one of this client."""
        with _LOCK:
            return _known.setdefault(client, cls())

    @contextlib.contextmanager
    def listening(
        self, client: Client, topic: str, job: JobId, hear: Callable[[dict[str, Any]], None]
    ) -> Iterator[None]:
        """Call ``hear`` with what is announced of a job under a topic, within this block."""
        with self._lock:
            self._listeners[topic, job].append(hear)
            if topic not in self._topics:
                self._topics.add(topic)
                client.subscribe_topic(topic, lambda event: self._heard(topic, event[1]))
        try:
            yield
        finally:
            with self._lock:
                self._listeners[topic, job].remove(hear)
                if not self._listeners[topic, job]:
                    del self._listeners[topic, job]

    def _heard(self, topic: str, message: dict[str, Any]) -> None:
        with self._lock:
            listeners = list(self._listeners.get((topic, message.get("job", "")), ()))
        for hear in listeners:
            hear(message)
