"""What the driver's machine is told. Facts, in the past tense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelops.study.ids import AttemptId
    from modelops.study.ranges import Ranges
    from modelops.worker.messages import AggregateReceipt, Receipt, SegmentRef


@dataclass(frozen=True, slots=True)
class EnvironmentReady:
    """The job's environment was resolved and one worker has it; chunks may be submitted."""


@dataclass(frozen=True, slots=True)
class EnvironmentFailed:
    """The environment cannot be had: ends the job once, with uv's own words; nothing has failed to run."""

    error_type: str
    message: str


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker is ready to take chunks in ``slots`` threads."""

    worker: str
    slots: int


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """A worker is gone. ``died``: its process ended unasked; otherwise it was drained or partitioned."""

    worker: str
    died: bool


@dataclass(frozen=True, slots=True)
class Found:
    """An attempt in a worker's own table: it runs, or has ended and nobody has taken its receipt.

    ``indices``: none for an attempt at aggregates. ``attempt_number`` as in its chunk.
    """

    attempt: AttemptId
    indices: Ranges
    attempt_number: int = 1


@dataclass(frozen=True, slots=True)
class AttemptsFound:
    """A worker said what is in its table, in answer to AskForAttempts."""

    worker: str
    attempts: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class AttemptBegun:
    """An attempt that was to be alone runs now, and nothing of any job runs beside it on its worker."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """A receipt came back. Nothing is committed by it."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class ChunkErred:
    """The task raised: a fault of ModelOps or the machine (storage full), not of the model.

    ``final``: trying again has no hope.
    """

    attempt: AttemptId
    error_type: str
    message: str
    final: bool


@dataclass(frozen=True, slots=True)
class AttemptLost:
    """An attempt ended without a receipt. ``worker_died``: its worker's process died while holding it."""

    attempt: AttemptId
    worker_died: bool


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """A replicate that runs has kept its first checkpoint in this attempt."""

    index: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The store accepted (or, ``accepted`` False, refused: indices covered already) an attempt's segment.

    ``segment``: what was written for a CommitSynthetic, so that aggregates can read it.
    """

    attempt: AttemptId
    accepted: bool = True
    segment: SegmentRef | None = None


@dataclass(frozen=True, slots=True)
class AggregateDone:
    """A receipt for an aggregate chunk came back."""

    receipt: AggregateReceipt


@dataclass(frozen=True, slots=True)
class TimerRang:
    """The timer of this name rang."""

    name: str


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The user wants the job to stop. ``who`` goes into the job's record."""

    who: str = "user"


@dataclass(frozen=True, slots=True)
class Finalized:
    """The result files are written and verified."""


@dataclass(frozen=True, slots=True)
class ResultsVoided:
    """Instead of Finalized: what was committed does not count any more, because the bundle was changed under it."""

    reason: str


@dataclass(frozen=True, slots=True)
class StoreLost:
    """The database or the storage does not answer: intake pauses, nothing is acknowledged."""

    what: str


@dataclass(frozen=True, slots=True)
class StoreBack:
    """The store answers again."""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """Another driver holds the job. This one stops without a word to the store."""


Event = (
    EnvironmentReady
    | EnvironmentFailed
    | WorkerJoined
    | WorkerLeft
    | AttemptsFound
    | AttemptBegun
    | ChunkDone
    | ChunkErred
    | AttemptLost
    | Checkpointed
    | Committed
    | AggregateDone
    | TimerRang
    | CancelAsked
    | Finalized
    | ResultsVoided
    | StoreLost
    | StoreBack
    | LeaseLost
)
