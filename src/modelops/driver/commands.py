"""What the driver's machine orders. Imperative; ``loop`` performs them, and nothing else does."""

from __future__ import annotations

import msgspec

from modelops.states import JobEvent, JobState, ReplicateStatus
from modelops.study.ids import AttemptId
from modelops.study.ranges import Ranges
from modelops.worker.messages import AggregateChunk, AggregateRef, Chunk, ErrorExample, SegmentRef


class PrepareEnvironment(msgspec.Struct, frozen=True):
    """Resolve the dependencies, store the lock, and have it built; answer EnvironmentReady or Failed."""


class AskForAttempts(msgspec.Struct, frozen=True):
    """Ask this worker for its table of this job's attempts; answer AttemptsFound (or WorkerLeft).

    From then on the receipts of these attempts come to this driver, also of those that have ended since.
    """

    worker: str


class SubmitChunk(msgspec.Struct, frozen=True):
    """Submit to this worker. One Dask key per attempt; Dask never retries."""

    chunk: Chunk
    worker: str


class SubmitAggregates(msgspec.Struct, frozen=True):
    """Submit to this worker."""

    chunk: AggregateChunk
    worker: str


class StopAttempt(msgspec.Struct, frozen=True):
    """Ask the worker to stop: finish nothing more, store what is finished, give back the rest.

    If nothing of it has begun, answer AttemptRecalled: its place may be another job's for hours.
    ``soon``: it does what is not needed, so what runs has little time to end.
    """

    attempt: AttemptId
    worker: str
    soon: bool = False


class RecallAttempt(msgspec.Struct, frozen=True):
    """Take back from this worker what of it has not begun.

    If nothing has, answer AttemptRecalled. Otherwise AttemptBegun, and the rest comes back with its receipt or a part.
    """

    attempt: AttemptId
    worker: str


class CommitSegment(msgspec.Struct, frozen=True):
    """Write the row in one transaction; answer Committed. Idempotent by attempt."""

    segment: SegmentRef


class RecordRetry(msgspec.Struct, frozen=True):
    """Record that these will be tried again, as attempt ``number``; a later driver is given it."""

    indices: Ranges
    number: int


class CommitSynthetic(msgspec.Struct, frozen=True):
    """Write and commit a segment that no worker could: these replicates took their worker down."""

    attempt: AttemptId
    indices: Ranges
    status: ReplicateStatus
    error: ErrorExample


class CommitNotNeeded(msgspec.Struct, frozen=True):
    """Write and commit that these replicates are not needed.

    ``displaced``: those of them that have outcomes which count (or may, as the store has not answered yet): they count
    no more.
    """

    attempt: AttemptId
    indices: Ranges
    displaced: Ranges


class CommitSyntheticAggregates(msgspec.Struct, frozen=True):
    """Write and commit ``failed`` aggregates that no worker could: aggregating these took its worker down."""

    attempt: AttemptId
    params: Ranges
    error: ErrorExample


class CommitAggregates(msgspec.Struct, frozen=True):
    """Write the row of an aggregate segment; answer Committed."""

    stored: AggregateRef


class SetTimer(msgspec.Struct, frozen=True):
    """Answer TimerRang at ``at`` on the clock of ``now``. A later one of that name replaces it."""

    name: str
    at: float


class ChangeState(msgspec.Struct, frozen=True):
    """Record a transition of the job, with its cause."""

    event: JobEvent
    state: JobState
    reason: str = ""


class Note(msgspec.Struct, frozen=True):
    """Append to the job's story without changing its state."""

    kind: str
    text: str


class Finalize(msgspec.Struct, frozen=True):
    """Write the result files from the committed segments; answer Finalized, or ResultsVoided."""


class Finish(msgspec.Struct, frozen=True):
    """The job is over in this state. Nothing follows."""

    state: JobState
    reason: str = ""


Command = (
    PrepareEnvironment
    | AskForAttempts
    | SubmitChunk
    | SubmitAggregates
    | StopAttempt
    | RecallAttempt
    | CommitSegment
    | RecordRetry
    | CommitSynthetic
    | CommitNotNeeded
    | CommitSyntheticAggregates
    | CommitAggregates
    | SetTimer
    | ChangeState
    | Note
    | Finalize
    | Finish
)
