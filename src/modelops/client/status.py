"""What is known of a job: values that a modeler reads, wherever they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from modelops.states import FINAL_JOB_STATES, OUTCOMES, AggregateStatus, JobState, ReplicateStatus
from modelops.study.wording import shown_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

UNKNOWN: Final = "unknown"


@dataclass(frozen=True)
class Reported:
    """How far a running replicate says it is: what its model gave to ``context.report``."""

    param: int
    replicate: int
    fraction: float | None
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        done = [] if self.fraction is None else [f"{self.fraction:.0%}"]
        values = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.values.items()]
        # A model says what it likes: its line stays one, and leaves the terminal alone.
        said = shown_name(" ".join([*done, *values]))
        return f"parameter set {self.param}, replicate {self.replicate}: {said}"


@dataclass(frozen=True)
class PoolStatus:
    """A pool of workers as a job sees it.

    ``name``: as the study asks for it. ``asked``: it does; otherwise the job runs everywhere, and workers are in this
    pool. ``workers``, ``slots``: connected now. ``counts``: the job's replicates in it, by status. ``waiting_since``:
    since when the job asks for it and no worker of it is connected, else None.
    """

    name: str
    asked: bool = False
    workers: int = 0
    slots: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    waiting_since: datetime | None = None

    def __str__(self) -> str:
        said = []
        if self.waiting_since is not None:
            said.append(f"waits for a worker since {self.waiting_since.astimezone():%Y-%m-%d %H:%M:%S}")
        elif self.workers:
            said.append(f"{self.workers:,} worker{'' if self.workers == 1 else 's'}")
        if counts := ", ".join(f"{n:,} {status}" for status, n in self.counts.items() if n):
            said.append(counts)
        return f"{self.name}: {'; '.join(said) or 'nothing has run there'}"


@dataclass(frozen=True)
class JobStatus:
    """What is known of a job now.

    ``counts``: replicate status -> number; they add up to the number of replicates. ``aggregates``: aggregate
    status -> number. ``eta``: seconds left, None if unknown. ``progress``: what running replicates report of
    themselves. ``stalled``: why the job seems not to get on, empty if it does.
    ``waiting_for``: what the database or the storage of the server said, while one of them is away and the job waits.
    ``doing``: what is being done before replicates can run. ``pools``: the pools of workers that it asks for, or else
    those where it ran or could.

    When its server cannot be reached the state is ``"unknown"``, which is not ``failed``: ``unknown_since`` says
    since when, ``last_known`` what the state was then (None if it was never known here), and the numbers are those
    of then.
    """

    state: JobState | Literal["unknown"]
    counts: dict[str, int]
    aggregates: dict[str, int]
    reason: str
    eta: float | None = None
    progress: tuple[Reported, ...] = ()
    stalled: str = ""
    waiting_for: str = ""
    doing: str = ""
    pools: tuple[PoolStatus, ...] = ()
    unknown_since: datetime | None = None
    last_known: JobState | None = None

    @property
    def waiting_pools(self) -> tuple[PoolStatus, ...]:
        """The pools that it asks for and that have no worker now."""
        return tuple(pool for pool in self.pools if pool.waiting_since is not None)

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self.state in FINAL_JOB_STATES


def in_order(counts: Mapping[str, int]) -> dict[str, int]:
    """Return what was counted, what did not occur left out: outcomes first, the good one before the others."""
    known = [str(status) for status in dict.fromkeys([*OUTCOMES, *ReplicateStatus, *AggregateStatus])]
    words = sorted(counts, key=lambda word: known.index(word) if word in known else len(known))
    return {str(word): counts[word] for word in words if counts[word]}


@dataclass(frozen=True)
class JobEventRecord:
    """One line of a job's story. ``number``: 1, 2, 3, ... within the job."""

    at: datetime
    who: str
    kind: str
    text: str
    number: int = 0


@dataclass(frozen=True)
class JobFile:
    """One file of a job, as `JobSource.files` lists it. ``name`` is relative to the job's folder."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class JobFiles:
    """The files of a job at one moment; ``final``: no more will come, unless the job begins again."""

    files: tuple[JobFile, ...]
    final: bool
