"""What the driver's machine orders. Imperative; ``loop`` performs them, and nothing else does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelops.states import JobEvent, JobState, ReplicateStatus
    from modelops.study.ids import AttemptId
    from modelops.study.ranges import Ranges
    from modelops.worker.messages import AggregateChunk, AggregateRef, Chunk, ErrorExample, SegmentRef


@dataclass(frozen=True, slots=True)
class PrepareEnvironment:
    """Resolve the dependencies, store the lock, and have it built; answer EnvironmentReady or Failed."""


@dataclass(frozen=True, slots=True)
class AskForAttempts:
    """Ask this worker for its table of this job's attempts; answer AttemptsFound (or WorkerLeft).

    From then on the receipts of these attempts come to this driver, also of those that have ended since.
    """

    worker: str


@dataclass(frozen=True, slots=True)
class SubmitChunk:
    """Submit to this worker. One Dask key per attempt; Dask never retries."""

    chunk: Chunk
    worker: str


@dataclass(frozen=True, slots=True)
class SubmitAggregates:
    """Submit to this worker."""

    chunk: AggregateChunk
    worker: str


@dataclass(frozen=True, slots=True)
class StopAttempt:
    """Ask the worker to stop: finish nothing more, store what is finished, give back the rest."""

    attempt: AttemptId
    worker: str


@dataclass(frozen=True, slots=True)
class CommitSegment:
    """Write the row in one transaction; answer Committed. Idempotent by attempt."""

    segment: SegmentRef


@dataclass(frozen=True, slots=True)
class RecordRetry:
    """Record that these will be tried again, as attempt ``number``; a later driver is given it."""

    indices: Ranges
    number: int


@dataclass(frozen=True, slots=True)
class CommitSynthetic:
    """Write and commit a segment that no worker could: these replicates took their worker down."""

    attempt: AttemptId
    indices: Ranges
    status: ReplicateStatus
    error: ErrorExample


@dataclass(frozen=True, slots=True)
class CommitSyntheticAggregates:
    """Write and commit ``failed`` aggregates that no worker could: aggregating these took its worker down."""

    attempt: AttemptId
    params: Ranges
    error: ErrorExample


@dataclass(frozen=True, slots=True)
class CommitAggregates:
    """Write the row of an aggregate segment; answer Committed."""

    stored: AggregateRef


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Answer TimerRang at ``at`` on the clock of ``now``. A later one of that name replaces it."""

    name: str
    at: float


@dataclass(frozen=True, slots=True)
class ChangeState:
    """Record a transition of the job, with its cause."""

    event: JobEvent
    state: JobState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """Append to the job's story without changing its state."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Finalize:
    """Write the result files from the committed segments; answer Finalized, or ResultsVoided."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over in this state. Nothing follows."""

    state: JobState
    reason: str = ""


Command = (
    PrepareEnvironment
    | AskForAttempts
    | SubmitChunk
    | SubmitAggregates
    | StopAttempt
    | CommitSegment
    | RecordRetry
    | CommitSynthetic
    | CommitSyntheticAggregates
    | CommitAggregates
    | SetTimer
    | ChangeState
    | Note
    | Finalize
    | Finish
)
