"""What a worker is told when it starts: where storage is, and which folders are its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.home import Home


@dataclass(frozen=True)
class WorkerSettings:
    """Plain values only: this crosses to the worker processes.

    ``objects``: path or URL of object storage. ``cache``: environments and bundle snapshots, shared by the
    workers of a machine. ``scratch``: below it each worker process makes a folder of its own, for spools, logs
    and working directories of its runners.
    """

    objects: str
    cache: Path
    scratch: Path

    @classmethod
    def of_home(cls, home: Home) -> Self:
        """Return the settings of workers on the machine that has this home."""
        return cls(home.storage, home.cache, home.state / "workers")
