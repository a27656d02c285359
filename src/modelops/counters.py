"""What this process has counted since it began, for its metrics. No id of a job or replicate is ever a label."""

from __future__ import annotations

import threading
from collections import Counter
from enum import StrEnum
from typing import Final


class Counted(StrEnum):
    """What is counted."""

    ENVIRONMENT_FAILURES = "environment_failures"
    DATABASE_ERRORS = "database_errors"
    STORAGE_ERRORS = "storage_errors"
    WORKERS_JOINED = "workers_joined"
    WORKERS_LEFT = "workers_left"
    WORKERS_DIED = "workers_died"


_lock: Final = threading.Lock()
_counts: Final[Counter[Counted]] = Counter()


def count(what: Counted) -> None:
    """Count one."""
    with _lock:
        _counts[what] += 1


def counted(what: Counted) -> int:
    """Return how many there were."""
    return _counts[what]
