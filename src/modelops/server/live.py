"""What the driver of a job knows of it while it drives, for whoever asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelops.study.ranges import EMPTY, Ranges

if TYPE_CHECKING:
    from datetime import datetime

    from modelops.states import JobState


@dataclass(frozen=True)
class Progress:
    """What a replicate said of itself while it runs; ``index``: of the job's line."""

    index: int
    fraction: float | None
    values: dict[str, Any]


@dataclass(frozen=True)
class LivePool:
    """A pool as a job sees it now. ``waiting_since``: since when it is asked for and has no worker."""

    name: str
    workers: int
    slots: int
    running: int
    waiting_since: datetime | None = None


@dataclass(frozen=True)
class LiveView:
    """What the driver of a job knows of it now.

    ``counts``, ``aggregates``: by status. ``eta``: seconds left, None if unknown. ``running``: the indices that
    workers hold. ``n_aggregating``: parameter sets whose aggregates they make. ``longest_s``: seconds of the longest
    chunk of replicates and of aggregates, None before the first. ``waiting_for``: what the database or the storage
    said, while one of them is away. ``stalled``: why it stands still, if it does. ``doing``: what is being done
    before replicates can run, e.g. which packages are installed. ``pools``: those that the job asks for, or else
    those that workers are in. ``n_lost_with_worker``: attempts that ended with the death of their worker.
    ``held_up``: workers can do nothing for it now, see `Machine.is_held_up`. ``needs_worker``: and nothing but a
    worker of one of its pools changes that. ``sleeps_until``: and nothing changes that before this time (of
    `time.monotonic`), see `Machine.sleeps_until`.
    """

    state: JobState
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    aggregates: dict[str, int] = field(default_factory=dict)
    eta: float | None = None
    running: Ranges = EMPTY
    n_aggregating: int = 0
    longest_s: tuple[float | None, float | None] = (None, None)
    progress: tuple[Progress, ...] = ()
    waiting_for: str = ""
    stalled: str = ""
    doing: str = ""
    pools: tuple[LivePool, ...] = ()
    n_lost_with_worker: int = 0
    held_up: bool = False
    needs_worker: bool = False
    sleeps_until: float | None = None
