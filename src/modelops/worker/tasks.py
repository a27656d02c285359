"""The functions that Dask calls on a worker. Each finds the worker's runtime and hands over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distributed import get_worker

from modelops.errors import InternalError
from modelops.worker.messages import AggregateChunk, AggregateReceipt, Chunk, Receipt
from modelops.worker.plugin import ModelOpsWorker

if TYPE_CHECKING:
    from distributed import Worker

    from modelops.study.ids import AttemptId, JobId
    from modelops.worker.runtime import WorkerRuntime

AnyChunk = Chunk | AggregateChunk

__all__ = ["AggregateReceipt", "AnyChunk", "Receipt", "aggregate", "simulate", "stop"]


def simulate(chunk: Chunk) -> Receipt:
    """Run a chunk of replicates in this worker's processes."""
    from modelops.worker.simulate import simulate_chunk

    return simulate_chunk(_runtime(get_worker()), chunk)


def aggregate(chunk: AggregateChunk) -> AggregateReceipt:
    """Aggregate settled parameter sets in this worker's processes."""
    from modelops.worker.aggregate import aggregate_chunk

    return aggregate_chunk(_runtime(get_worker()), chunk)


async def stop(job: JobId, attempt: AttemptId, dask_worker: Worker) -> None:
    """Stop an attempt, or make sure that it will not start. Runs on the event loop, beside the task."""
    _runtime(dask_worker).attempts.stop(job, attempt)


def _runtime(worker: Worker) -> WorkerRuntime:
    plugin = worker.plugins["modelops"]
    if not isinstance(plugin, ModelOpsWorker):
        raise InternalError(f"the worker's plugin 'modelops' is a {type(plugin).__name__}")
    return plugin.runtime
