"""What driver and workers say to each other: chunks out, receipts back. Plain frozen values.

They travel as Dask task arguments and results, so they stay small: ranges and counts, never parameters
or outputs. Whoever changes what they mean, or what one of both stores for the other, counts `PROTOCOL` up: then a
server gives no work to workers of the other kind (`modelops.cluster.versions`).
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from modelops.counters import Durations
from modelops.states import ReplicateStatus
from modelops.study.ids import AttemptId, JobId
from modelops.study.ranges import Range, Ranges

PROTOCOL: Final = 3


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at a set of indices; what one Dask task runs.

    ``attempt_number``: 1 for the first try; the same for all its replicates. ``retry_on``: outcomes that
    are left out of the segment, because they will be tried again (empty on the last try). ``study``: the object
    below the job's folder that holds its spec, another one after each extension, and ``study_digest`` its SHA-256, so
    that no worker runs what was not recorded. ``acknowledged``: attempts of
    this job whose receipts the worker need not keep any longer. ``may_resume``: replicates may have begun before,
    here or elsewhere, and left checkpoints. ``alone``: nothing of any job may run beside it on this worker, as it is
    suspected to take workers down.
    """

    job: JobId
    attempt: AttemptId
    epoch: int
    ranges: tuple[Range, ...]
    attempt_number: int = 1
    retry_on: tuple[ReplicateStatus, ...] = ()
    study: str = "study.json"
    study_digest: str = ""
    acknowledged: tuple[AttemptId, ...] = ()
    may_resume: bool = False
    alone: bool = False


NO_NUMBER: Final = (
    254  # in ``watched`` of a `SegmentRef`: it succeeded, and the output that decides is no number
)
NoNumbers: TypeAlias = tuple[tuple[str, tuple[Range, ...]], ...]


class SegmentRef(msgspec.Struct, frozen=True, kw_only=True):
    """A stored segment: the final outcomes of a set of indices.

    ``name``: object name below ``v1/jobs/<job>/``. ``digest``: SHA-256 of the object, hexadecimal.
    ``pack``: name of the object that holds its large outputs, or None; ``execution``: name of the object
    with durations and hosts. ``durations``: of its replicates, for metrics; not kept. ``pool``: of the worker, as its
    driver calls it. ``watched``: for the driver of a job with ``until``, how each replicate ended and the number of the
    output that decides, see `modelops.driver.needs`; not part of what is committed. ``no_numbers``: likewise, in which
    replicates that output is no number, and in words what it is instead.
    """

    attempt: AttemptId
    name: str
    digest: str
    n_bytes: int
    ranges: tuple[Range, ...]
    counts: dict[ReplicateStatus, int]
    pack: str | None = None
    pack_bytes: int = 0
    execution: str | None = None
    pool: str | None = None
    durations: Durations | None = None
    watched: bytes | None = None
    no_numbers: NoNumbers = ()


class ErrorExample(msgspec.Struct, frozen=True, kw_only=True):
    """One full example of an error, for a fingerprint (type and place)."""

    fingerprint: str
    status: ReplicateStatus
    error_type: str
    message: str
    traceback: str = ""
    stderr: str = ""
    index: int = -1


class FailureCount(msgspec.Struct, frozen=True, kw_only=True):
    """How often one fingerprint occurred in a chunk."""

    example: ErrorExample
    count: int


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a chunk. Every index of it is in exactly one of segment, retry, or unstarted.

    ``retry``: outcomes that are to be tried again, not in the segment. ``unstarted``: given back because
    the attempt was stopped. ``model_seconds``: time spent in the model, summed over replicates.
    ``wall_seconds``: what running them took, without what a chunk of any size costs (loading the job, storing).
    ``missing_import``: a module the bundle lacks (one error for the job), as the sentence to show.
    ``part_of``: the attempt that handed this in and goes on with one replicate, which is not in it. ``parts``: what an
    attempt that has ended now had handed in that way, in case it was not heard of.
    """

    job: JobId
    attempt: AttemptId
    worker: str
    host: str
    part_of: AttemptId | None = None
    parts: tuple[Receipt, ...] = ()
    segment: SegmentRef | None = None
    retry: tuple[tuple[ReplicateStatus, tuple[Range, ...]], ...] = ()
    unstarted: tuple[Range, ...] = ()
    failures: tuple[FailureCount, ...] = ()
    model_seconds: float = 0.0
    wall_seconds: float = 0.0
    missing_import: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def indices(self) -> Ranges:
        """Every index of it."""
        of_segment = self.segment.ranges if self.segment is not None else ()
        again = tuple(pair for _, ranges in self.retry for pair in ranges)
        return Ranges((*of_segment, *again, *self.unstarted))


class AggregateChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Parameter sets to aggregate in one Dask task, and the segments that hold their replicates.

    ``study``, ``study_digest``, ``acknowledged``, ``alone``: as in a `Chunk`.
    """

    job: JobId
    attempt: AttemptId
    epoch: int
    params: tuple[Range, ...]
    segments: tuple[SegmentRef, ...]
    study: str = "study.json"
    study_digest: str = ""
    acknowledged: tuple[AttemptId, ...] = ()
    alone: bool = False


class AggregateRef(msgspec.Struct, frozen=True, kw_only=True):
    """A stored aggregate segment: rows of (parameter set, aggregate entry point), every one of ``params``.

    ``inputs``: digests of the segments it read; it is stale when they change.
    """

    attempt: AttemptId
    name: str
    digest: str
    n_bytes: int
    params: tuple[Range, ...]
    counts: dict[str, int]  # AggregateStatus -> number of rows
    inputs: tuple[str, ...]
    pack: str | None = None
    pack_bytes: int = 0


class AggregateReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an aggregate chunk.

    ``wall_seconds``: what making the aggregates took, without what a chunk of any size costs (storing it).
    """

    job: JobId
    attempt: AttemptId
    worker: str
    host: str
    stored: AggregateRef | None = None
    stopped: bool = False
    failures: tuple[FailureCount, ...] = ()
    wall_seconds: float = 0.0


class TaskError(msgspec.Struct, frozen=True, kw_only=True):
    """What a task raised: a fault of ModelOps or the machine, not of the model.

    ``final``: no hope in another try. ``unfit``: it is this worker that cannot, others may.
    """

    error_type: str
    message: str
    final: bool
    unfit: bool = False


class HeldAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt in a worker's own table.

    ``ranges``: its indices; none for an attempt at aggregates. ``state``: ``running``, ``storing`` (storage does not
    take what it has finished) or ``ended``; then ``receipt`` or ``error`` says how. ``started_at``: Unix seconds.
    """

    job: JobId
    attempt: AttemptId
    epoch: int
    ranges: tuple[Range, ...]
    attempt_number: int
    state: str
    started_at: float
    receipt: Receipt | None = None
    error: TaskError | None = None
