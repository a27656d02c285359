"""Aggregate settled parameter sets: stream their replicates from segments into a runner, store what it returns."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from modelops.states import AggregateStatus, ReplicateStatus
from modelops.store.segments import AggregateWriter, SegmentReader
from modelops.study.ranges import Ranges
from modelops.worker.attempts import Attempt
from modelops.worker.messages import AggregateReceipt, ErrorExample, FailureCount

if TYPE_CHECKING:
    from modelops.processes import AggregateOutcome
    from modelops.worker.job_context import JobContext
    from modelops.worker.messages import AggregateChunk
    from modelops.worker.runtime import WorkerRuntime


def aggregate_chunk(runtime: WorkerRuntime, chunk: AggregateChunk) -> AggregateReceipt:
    """Run every aggregate of the job over each parameter set of the chunk, and store the rows.

    Only succeeded replicates are seen, in replicate order. A parameter set with fewer than ``min_success`` of them
    is `skipped`, with the reason.
    """
    began = time.perf_counter()
    attempt = Attempt(chunk.job, chunk.attempt, chunk.epoch, ranges=())
    if not runtime.attempts.enter(attempt):
        return _receipt(runtime, chunk, stopped=True)
    try:
        context = runtime.job(chunk.job)
        writer = AggregateWriter(runtime.objects, chunk.job, chunk.attempt, runtime.spool)
        failures: dict[str, FailureCount] = {}
        reader = SegmentReader(runtime.objects, chunk.job, chunk.segments)
        for param in Ranges(chunk.params):
            for target in context.spec.aggregates:
                if attempt.stop.stopped:
                    writer.discard()
                    return _receipt(runtime, chunk, stopped=True)
                _aggregate_one(runtime, context, reader, writer, param, target, failures)
        stored = writer.finish(params=chunk.params, inputs=tuple(s.digest for s in chunk.segments))
        return _receipt(
            runtime,
            chunk,
            stored=stored,
            failures=tuple(failures.values()),
            wall_seconds=time.perf_counter() - began,
        )
    finally:
        runtime.attempts.leave(attempt)


def _aggregate_one(
    runtime: WorkerRuntime,
    context: JobContext,
    reader: SegmentReader,
    writer: AggregateWriter,
    param: int,
    target: str,
    failures: dict[str, FailureCount],
) -> None:
    spec = context.spec
    indices = spec.line.of_param(param)
    n_succeeded = reader.count(indices, ReplicateStatus.SUCCEEDED)
    needed = spec.needed(len(indices))
    if n_succeeded < needed:
        reason = f"{n_succeeded} of {len(indices)} replicates succeeded, min_success needs {needed}"
        writer.add(param, target, AggregateStatus.SKIPPED, n_succeeded, len(indices), reason=reason)
        return
    outcome = runtime.pool.aggregate(
        context.runner,
        target,
        params=context.parameters[param].canonical,
        param=param,
        n=n_succeeded,
        rows=reader.rows(context.spec.line, param),
    )
    if outcome.error is None:
        writer.add(
            param,
            target,
            AggregateStatus.SUCCEEDED,
            n_succeeded,
            len(indices),
            returned_dict=outcome.returned_dict,
            outputs=outcome.outputs,
        )
        return
    reason = f"{outcome.error.type}: {outcome.error.message}"
    writer.add(param, target, AggregateStatus.FAILED, n_succeeded, len(indices), reason=reason, error=outcome.error)
    _count(failures, outcome)


def _count(failures: dict[str, FailureCount], outcome: AggregateOutcome) -> None:
    error = outcome.error
    if error is None:
        return
    before = failures.get(error.fingerprint)
    example = (
        before.example
        if before
        else ErrorExample(
            fingerprint=error.fingerprint,
            status=ReplicateStatus.FAILED,
            error_type=error.type,
            message=error.message,
            traceback=error.traceback,
            stderr=error.stderr,
        )
    )
    failures[error.fingerprint] = FailureCount(example=example, count=(before.count if before else 0) + 1)


def _receipt(runtime: WorkerRuntime, chunk: AggregateChunk, **what: object) -> AggregateReceipt:
    return AggregateReceipt(
        job=chunk.job, attempt=chunk.attempt, worker=runtime.address, host=runtime.host, **what  # type: ignore[arg-type]  # one constructor, three callers
    )
