"""The functions that Dask calls on a worker. Each finds the worker's runtime and hands over.

What a task returns, and what it raises, is kept in the worker's table as well: whoever submitted it may be gone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

import msgspec
from distributed import get_worker, secede

from modelops.errors import InternalError
from modelops.logs import about
from modelops.worker.attempts import Attempt, task_error
from modelops.worker.messages import AggregateChunk, AggregateReceipt, Chunk, HeldAttempt, Receipt
from modelops.worker.plugin import ModelOpsWorker
from modelops.worker.topics import RECEIPTS_TOPIC

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distributed import Worker

    from modelops.study.ids import AttemptId, JobId
    from modelops.worker.runtime import WorkerRuntime

log = logging.getLogger(__name__)
AnyChunk = Chunk | AggregateChunk
T = TypeVar("T", Receipt, AggregateReceipt)

__all__ = [
    "AggregateReceipt",
    "AnyChunk",
    "Receipt",
    "aggregate",
    "attempts",
    "forget",
    "has_begun",
    "recall",
    "simulate",
    "stop",
]


def simulate(chunk: Chunk) -> Receipt:
    """Run a chunk of replicates in this worker's processes."""
    from modelops.worker.simulate import simulate_chunk

    attempt = Attempt(chunk.job, chunk.attempt, chunk.epoch, chunk.ranges, chunk.attempt_number, chunk.alone)
    known = runtime_of(get_worker()).attempts.receipt(chunk.job, chunk.attempt)
    if known is not None:  # Dask lost the result on its way, and wants it again
        return known
    return _run(chunk, attempt, lambda runtime: simulate_chunk(runtime, chunk, attempt, step_aside=secede))


def aggregate(chunk: AggregateChunk) -> AggregateReceipt:
    """Aggregate settled parameter sets in this worker's processes."""
    from modelops.worker.aggregate import aggregate_chunk

    attempt = Attempt(chunk.job, chunk.attempt, chunk.epoch, ranges=(), alone=chunk.alone)
    return _run(chunk, attempt, lambda runtime: aggregate_chunk(runtime, chunk, attempt))


def _run(chunk: AnyChunk, attempt: Attempt, run: Callable[[WorkerRuntime], T]) -> T:
    runtime = runtime_of(get_worker())
    table = runtime.attempts
    table.acknowledge(chunk.job, chunk.acknowledged)
    runtime.settled.remove(chunk.job, chunk.acknowledged)
    try:
        with about(job=chunk.job, attempt=chunk.attempt):
            receipt = run(runtime)
    except Exception as error:
        subject = {"job": chunk.job, "attempt": chunk.attempt}
        log.info("attempt %s of job %s came to nothing: %s", chunk.attempt, chunk.job, error, extra=subject)
        if attempt.ranges:
            _announce(runtime, table.keep(attempt, None, task_error(error)))
        raise
    else:
        if isinstance(receipt, Receipt):  # aggregates are short: they are made again, and not adopted
            _announce(runtime, table.keep(attempt, receipt, None))
        return receipt
    finally:
        table.leave(attempt)


def _announce(runtime: WorkerRuntime, held: HeldAttempt) -> None:
    runtime.announce(RECEIPTS_TOPIC, {"job": held.job, "held": msgspec.msgpack.encode(held)})


async def attempts(job: JobId, epoch: int, dask_worker: Worker) -> list[HeldAttempt]:
    """Return this worker's table of a job's attempts to its driver of this epoch.

    From then on nothing begins that an earlier driver submitted, and the receipts of what it began are announced.
    """
    return runtime_of(dask_worker).attempts.of_job(job, epoch)


async def stop(
    job: JobId, attempt: AttemptId, epoch: int | None, soon: bool = False, *, dask_worker: Worker
) -> bool:
    """Stop an attempt, or make sure that it will not start, and say so (True). On the event loop, beside the task.

    ``epoch``: of the driver that asks; one that was replaced stops nothing. None: whoever looks after records.
    ``soon``: nobody needs what it does.
    """
    return runtime_of(dask_worker).attempts.stop(job, attempt, epoch=epoch, soon=soon)


async def has_begun(job: JobId, attempt: AttemptId, dask_worker: Worker) -> bool:
    """Say whether an attempt has begun here; otherwise it waits behind something else, of any job."""
    return runtime_of(dask_worker).attempts.has_begun(job, attempt)


async def recall(job: JobId, attempt: AttemptId, epoch: int, dask_worker: Worker) -> bool:
    """Make sure that an attempt does not begin here, and say so; False if it has, then the rest of it comes back.

    Nothing comes back to a driver of an ``epoch`` that is over.
    """
    return runtime_of(dask_worker).attempts.recall(job, attempt, epoch=epoch)


async def forget(ended: Mapping[JobId, int], dask_worker: Worker) -> None:
    """Keep no receipt of jobs that their drivers of these epochs have ended, and run nothing more of them."""
    try:
        runtime = runtime_of(dask_worker)
    except ConnectionError:  # it keeps nothing, and nobody waits for an answer
        return
    for job, epoch in ended.items():
        runtime.attempts.forget(job, epoch)


def runtime_of(worker: Worker) -> WorkerRuntime:
    """Return what the plugin keeps on a worker. Raises ConnectionError for one that is just starting or ending."""
    plugin = worker.plugins.get("modelops")
    if plugin is not None and not isinstance(plugin, ModelOpsWorker):
        raise InternalError(f"the worker's plugin 'modelops' is a {type(plugin).__name__}")
    if plugin is None or not hasattr(plugin, "runtime"):
        raise ConnectionError(f"the worker {worker.address} runs nothing just now: it is starting or ending")
    return plugin.runtime
