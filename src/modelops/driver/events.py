"""What the driver's machine is told. Facts, in the past tense."""

from __future__ import annotations

import msgspec

from modelops.study.ids import AttemptId
from modelops.study.ranges import Ranges
from modelops.worker.messages import AggregateReceipt, Receipt, SegmentRef


class EnvironmentReady(msgspec.Struct, frozen=True):
    """The job's environment was resolved and one worker has it; chunks may be submitted."""


class EnvironmentFailed(msgspec.Struct, frozen=True):
    """The environment cannot be had: ends the job once, with uv's own words; nothing has failed to run."""

    error_type: str
    message: str


class WorkerJoined(msgspec.Struct, frozen=True):
    """A worker is ready to take chunks in ``slots`` threads.

    ``pool``: the one it is in, if any; ``labels``: their values, by which it can be asked for as well.
    """

    worker: str
    slots: int
    pool: str = ""
    labels: tuple[str, ...] = ()


class WorkerLeft(msgspec.Struct, frozen=True):
    """A worker is gone. ``died``: its process ended unasked; otherwise it was drained or partitioned."""

    worker: str
    died: bool


class WorkersRefused(msgspec.Struct, frozen=True):
    """Workers are connected that get no work, as their versions do not fit.

    ``names``: of each of them, all there are now, by what it can be asked for.
    """

    names: tuple[tuple[str, ...], ...]


class Found(msgspec.Struct, frozen=True):
    """An attempt in a worker's own table: it runs, or has ended and nobody has taken its receipt.

    ``indices``: none for an attempt at aggregates. ``attempt_number`` as in its chunk.
    """

    attempt: AttemptId
    indices: Ranges
    attempt_number: int = 1


class AttemptsFound(msgspec.Struct, frozen=True):
    """A worker said what is in its table, in answer to AskForAttempts."""

    worker: str
    attempts: tuple[Found, ...]


class AttemptBegun(msgspec.Struct, frozen=True):
    """An attempt runs. If it was to be alone, nothing of any job runs beside it on its worker."""

    attempt: AttemptId


class AttemptWaits(msgspec.Struct, frozen=True):
    """An attempt was submitted some time ago and has not begun: something else, of any job, has its slot."""

    attempt: AttemptId


class AttemptRecalled(msgspec.Struct, frozen=True):
    """In answer to RecallAttempt or StopAttempt: it had not begun, and never will."""

    attempt: AttemptId


class ChunkDone(msgspec.Struct, frozen=True):
    """A receipt came back: of an attempt, or of a part of one that goes on. Nothing is committed by it."""

    receipt: Receipt


class ChunkErred(msgspec.Struct, frozen=True):
    """The task raised: a fault of ModelOps or the machine (storage full), not of the model.

    ``final``: trying again has no hope. ``unfit``: it is its worker that cannot, others may.
    """

    attempt: AttemptId
    error_type: str
    message: str
    final: bool
    unfit: bool = False


class AttemptLost(msgspec.Struct, frozen=True):
    """An attempt ended without a receipt. ``worker_died``: its worker's process died while holding it."""

    attempt: AttemptId
    worker_died: bool


class Checkpointed(msgspec.Struct, frozen=True):
    """A replicate that runs has kept its first checkpoint in this attempt."""

    index: int


class Committed(msgspec.Struct, frozen=True):
    """The store accepted (or, ``accepted`` False, refused: indices covered already) an attempt's segment.

    ``segment``: what was written for a CommitSynthetic, so that aggregates can read it.
    """

    attempt: AttemptId
    accepted: bool = True
    segment: SegmentRef | None = None


class AggregateDone(msgspec.Struct, frozen=True):
    """A receipt for an aggregate chunk came back."""

    receipt: AggregateReceipt


class TimerRang(msgspec.Struct, frozen=True):
    """The timer of this name rang."""

    name: str


class CancelAsked(msgspec.Struct, frozen=True):
    """The user wants the job to stop. ``who`` goes into the job's record."""

    who: str = "user"


class Finalized(msgspec.Struct, frozen=True):
    """The result files are written and verified. ``reason``: what failed most often, if anything did."""

    reason: str = ""


class ResultsVoided(msgspec.Struct, frozen=True):
    """Instead of Finalized: what was committed does not count any more, because the bundle was changed under it."""

    reason: str


class StoreLost(msgspec.Struct, frozen=True):
    """The database or the storage does not answer: intake pauses, nothing is acknowledged."""

    what: str


class StoreBack(msgspec.Struct, frozen=True):
    """The store answers again."""


class LeaseLost(msgspec.Struct, frozen=True):
    """Another driver holds the job. This one stops without a word to the store."""


Event = (
    EnvironmentReady
    | EnvironmentFailed
    | WorkerJoined
    | WorkerLeft
    | WorkersRefused
    | AttemptsFound
    | AttemptBegun
    | AttemptWaits
    | AttemptRecalled
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
