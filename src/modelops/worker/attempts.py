"""The worker's own table of attempts, outside Dask: what runs here, since when, and what was told to stop."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelops.processes import StopSignal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.study.ids import AttemptId, JobId
    from modelops.study.ranges import Range


@dataclass
class Attempt:
    """One attempt while it runs on this worker."""

    job: JobId
    attempt: AttemptId
    epoch: int
    ranges: tuple[Range, ...]
    started_at: float = field(default_factory=time.time)
    stop: StopSignal = field(default_factory=StopSignal)


class AttemptTable:
    """Thread-safe: tasks enter and leave on worker threads, ``stop`` comes from the event loop."""

    MAX_REMEMBERED_STOPS = 10_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[tuple[JobId, AttemptId], Attempt] = {}
        self._stopped_before_start: dict[tuple[JobId, AttemptId], None] = {}

    def enter(self, attempt: Attempt) -> bool:
        """Record that an attempt begins; False if it was stopped before it began."""
        with self._lock:
            key = (attempt.job, attempt.attempt)
            if key in self._stopped_before_start:
                return False
            self._running[key] = attempt
            return True

    def leave(self, attempt: Attempt) -> None:
        """Record that an attempt is over."""
        with self._lock:
            self._running.pop((attempt.job, attempt.attempt), None)

    def stop(self, job: JobId, attempt: AttemptId) -> None:
        """Stop it now, or as soon as it would start."""
        with self._lock:
            running = self._running.get((job, attempt))
            if running is None:
                self._stopped_before_start[job, attempt] = None
                while len(self._stopped_before_start) > self.MAX_REMEMBERED_STOPS:
                    del self._stopped_before_start[next(iter(self._stopped_before_start))]
        if running is not None:
            running.stop.stop()

    def stop_all(self) -> None:
        """Stop everything that runs."""
        for attempt in self:
            attempt.stop.stop(hard=True)

    def __iter__(self) -> Iterator[Attempt]:
        with self._lock:
            return iter(list(self._running.values()))
