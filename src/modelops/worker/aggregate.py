"""Aggregate settled parameter sets: stream their replicates from segments into a runner, store what it returns."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.bundles.missing import line_to_add
from modelops.environments import dependency_inputs
from modelops.errors import StorageError
from modelops.states import AggregateStatus, ReplicateStatus
from modelops.store import AggregateWriter
from modelops.store.segments import AggregateRow
from modelops.study.ranges import Ranges
from modelops.worker.job_log import JobLog
from modelops.worker.messages import AggregateReceipt, ErrorExample, FailureCount
from modelops.worker.replicates import ReplicateReader
from modelops.worker.stored import stored_error, stored_outputs

if TYPE_CHECKING:
    from modelops.processes import AggregateOutcome, LogSink, ReplicateError
    from modelops.worker.attempts import Attempt
    from modelops.worker.job_context import JobContext
    from modelops.worker.messages import AggregateChunk
    from modelops.worker.runtime import WorkerRuntime


def aggregate_chunk(runtime: WorkerRuntime, chunk: AggregateChunk, attempt: Attempt) -> AggregateReceipt:
    """Run every aggregate of the job over each parameter set of the chunk, and store the rows.

    Only succeeded replicates are seen, in replicate order. A parameter set with fewer than ``min_success`` of them
    is `skipped`, with the reason. What storage could not give is read again when it is back, from the beginning.
    """
    if not runtime.attempts.enter(attempt):
        return _receipt(runtime, chunk, stopped=True)
    runtime.say_begun(attempt)
    try:
        with runtime.using(chunk, attempt) as context:
            return _aggregate(runtime, context, chunk, attempt)
    except StorageError:
        if not attempt.stop.stopped:
            raise
        return _receipt(runtime, chunk, stopped=True)


def _aggregate(
    runtime: WorkerRuntime, context: JobContext, chunk: AggregateChunk, attempt: Attempt
) -> AggregateReceipt:
    with JobLog(runtime.objects, chunk.job, chunk.attempt) as job_log:
        began = time.perf_counter()

        def make() -> _AggregateRun | None:
            run = _AggregateRun(runtime, context, chunk, attempt)
            return run if run.all(job_log.write) else None

        run = runtime.when_storage_allows(make, attempt)
        wall_seconds = time.perf_counter() - began
        runtime.when_storage_allows(job_log.store, attempt)
    if run is None:
        return _receipt(runtime, chunk, stopped=True)
    inputs = tuple(s.digest for s in chunk.segments)
    return _receipt(
        runtime,
        chunk,
        stored=runtime.when_storage_allows(lambda: run.writer.finish(inputs=inputs), attempt),
        failures=tuple(run.failures.values()),
        wall_seconds=wall_seconds,
    )


class _AggregateRun:
    """The aggregates of one chunk while they are made."""

    def __init__(
        self, runtime: WorkerRuntime, context: JobContext, chunk: AggregateChunk, attempt: Attempt
    ) -> None:
        self.runtime, self.context, self.chunk, self.attempt = runtime, context, chunk, attempt
        self.writer = AggregateWriter(runtime.objects, chunk.job, chunk.attempt)
        self.reader = ReplicateReader(
            runtime.objects, runtime.segments, chunk.job, chunk.segments, context.spec.line
        )
        self.failures: dict[str, FailureCount] = {}

    def all(self, log: LogSink) -> bool:
        """Make them all; False if the attempt was stopped."""
        for param in Ranges(self.chunk.params):
            for target in self.context.spec.aggregates:
                if self.attempt.stop.stopped or not self._one(param, target, log):
                    return False
        return True

    def _one(self, param: int, target: str, log: LogSink) -> bool:
        spec = self.context.spec
        n, n_succeeded = len(spec.line.of_param(param)), self.reader.count(param, ReplicateStatus.SUCCEEDED)
        if spec.until is not None:
            n -= self.reader.count(param, ReplicateStatus.NOT_NEEDED)
        needed = spec.needed(n)
        if n_succeeded < needed:
            reason = f"{n_succeeded} of {n} replicates succeeded, min_success needs {needed}"
            self.writer.add(AggregateRow(param, target, AggregateStatus.SKIPPED, n_succeeded, n, reason))
            return True
        outcome = self._call(param, target, n_succeeded, log)
        if outcome.stopped:
            return False
        error = outcome.error
        if error is None:
            self.writer.add(
                AggregateRow(
                    param,
                    target,
                    AggregateStatus.SUCCEEDED,
                    n_succeeded,
                    n,
                    returned_dict=outcome.returned_dict,
                    outputs=stored_outputs(outcome.outputs),
                )
            )
        else:
            reason = self._reason(error)
            row = AggregateRow(
                param, target, AggregateStatus.FAILED, n_succeeded, n, reason, error=stored_error(error)
            )
            self.writer.add(row)
            self._count(outcome.status, error)
        return True

    def _reason(self, error: ReplicateError) -> str:
        what = f"{error.type}: {error.message}"
        if error.missing_module is None:
            return what
        place = f" at {error.file}:{error.line}" if error.file else ""
        listed_in = dependency_inputs(Path(self.context.runner.snapshot)).listed_in
        return f"{what}{place}; {line_to_add(error.missing_module, listed_in)}"

    def _call(self, param: int, target: str, n_succeeded: int, log: LogSink) -> AggregateOutcome:
        return self.runtime.pool.aggregate(
            self.context.runner,
            target,
            params=self.context.parameters[param].canonical,
            param=param,
            n=n_succeeded,
            rows=self.reader.rows(param),
            target=self.context.manifest.is_target(target),
            target_data=self.context.manifest.target_data,
            stop=self.attempt.stop,
            log=log,
        )

    def _count(self, status: ReplicateStatus, error: ReplicateError) -> None:
        before = self.failures.get(error.fingerprint)
        example = ErrorExample(
            fingerprint=error.fingerprint,
            status=status,
            error_type=error.type,
            message=error.message,
            traceback=error.traceback,
            stderr=error.stderr,
        )
        self.failures[error.fingerprint] = FailureCount(
            example=before.example if before else example, count=(before.count if before else 0) + 1
        )


def _receipt(runtime: WorkerRuntime, chunk: AggregateChunk, **what: object) -> AggregateReceipt:
    return AggregateReceipt(
        job=chunk.job,
        attempt=chunk.attempt,
        worker=runtime.address,
        host=runtime.host,
        **what,  # type: ignore[arg-type]  # one constructor, three callers
    )
