"""What this process has counted and measured since it began, for its metrics. No id of a job is ever a label."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from enum import StrEnum
from itertools import zip_longest
from typing import Final

import msgspec


class Counted(StrEnum):
    """What is counted."""

    ENVIRONMENT_FAILURES = "environment_failures"
    DATABASE_ERRORS = "database_errors"
    STORAGE_ERRORS = "storage_errors"
    WORKERS_JOINED = "workers_joined"
    WORKERS_LEFT = "workers_left"
    WORKERS_DIED = "workers_died"
    WORKERS_UNFIT = "workers_unfit"
    WARM_STARTS = "warm_starts"  # of runner processes, by isolation
    FORK_STARTS = "fork_starts"
    SPAWN_STARTS = "spawn_starts"


class Measured(StrEnum):
    """What is measured, in seconds."""

    REPLICATES = "replicates"
    ENVIRONMENT_BUILDS = "environment_builds"


EDGES: Final = {
    Measured.REPLICATES: (
        0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0, 10000.0, 36000.0,
    ),
    Measured.ENVIRONMENT_BUILDS: (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
}  # fmt: skip


class Durations(msgspec.Struct, frozen=True, array_like=True):
    """A histogram. ``counts``: how many were at most as long as each of `EDGES`, and then how many longer."""

    counts: tuple[int, ...] = ()
    total_s: float = 0.0

    def __add__(self, other: Durations) -> Durations:
        counts = tuple(a + b for a, b in zip_longest(self.counts, other.counts, fillvalue=0))
        return Durations(counts, self.total_s + other.total_s)


class Totals(msgspec.Struct, frozen=True):
    """What a process has counted and measured until now."""

    counts: dict[str, int] = {}
    durations: dict[str, Durations] = {}

    def __add__(self, other: Totals) -> Totals:
        durations = dict(self.durations)
        for what, more in other.durations.items():
            durations[what] = durations.get(what, Durations()) + more
        return Totals(dict(Counter(self.counts) + Counter(other.counts)), durations)


_lock: Final = threading.Lock()
_counts: Final[Counter[Counted]] = Counter()
_durations: Final[dict[Measured, Durations]] = {}


def count(what: Counted) -> None:
    """Count one."""
    with _lock:
        _counts[what] += 1


def counted(what: Counted) -> int:
    """Return how many there were."""
    return _counts[what]


def measure(what: Measured, seconds: float) -> None:
    """Add one that took so long."""
    edges = EDGES[what]
    place = bisect_left(edges, seconds)
    add_durations(what, Durations(tuple(int(i == place) for i in range(len(edges) + 1)), seconds))


def add_durations(what: Measured, durations: Durations) -> None:
    """Add some that were measured before."""
    with _lock:
        _durations[what] = _durations.get(what, Durations()) + durations


def totals() -> Totals:
    """Return all that was counted and measured."""
    with _lock:
        return Totals({str(k): n for k, n in _counts.items()}, {str(k): d for k, d in _durations.items()})
