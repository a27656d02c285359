"""Aggregate settled parameter sets: stream their replicates from segments into a runner, store what it returns."""

from __future__ import annotations

import time
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.bundles.missing import line_to_add
from modelops.environments import dependency_inputs
from modelops.errors import SetAsideError, StorageError
from modelops.states import AggregateStatus, ReplicateStatus
from modelops.store.aggregate_segments import AggregateRow, AggregateWriter
from modelops.study.ranges import Ranges
from modelops.worker.job_log import JobLog
from modelops.worker.messages import AggregateReceipt, ErrorExample, FailureCount
from modelops.worker.replicates import ReplicateReader
from modelops.worker.small_sets import MAX_REPLICATES, SmallSets
from modelops.worker.stored import stored_aggregates, stored_error, stored_outputs

MAX_AT_ONCE = 1_000  # parameter sets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.processes import AggregateOutcome, LogSink, Output, ReplicateError
    from modelops.worker.attempts import Attempt
    from modelops.worker.job_context import JobContext
    from modelops.worker.messages import AggregateChunk
    from modelops.worker.runtime import WorkerRuntime
    from modelops.worker.small_sets import SmallTable


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
        runtime.look_at_bundle(context, chunk.attempt, attempt)
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
        self.small = SmallSets(self.reader, context.parameters)
        self._at_once = MAX_AT_ONCE  # few after one that failed: those behind it may fail, too
        self.failures: dict[str, FailureCount] = {}

    def all(self, log: LogSink) -> bool:
        """Make them all; False if the attempt was stopped."""
        for lo, hi in Ranges(self.chunk.params).pairs:
            at = lo
            while at < hi:
                if self.attempt.stop.stopped:
                    return False
                end = self._end_of_batch(at, hi)
                if end - at > 1:
                    n = self._many(at, end, log)
                    self._at_once = 1 if n < end - at else min(2 * self._at_once, MAX_AT_ONCE)
                    at += n
                else:
                    if not self._each(at, log):
                        return False
                    self._at_once, at = min(2 * self._at_once, MAX_AT_ONCE), at + 1
        return True

    def _end_of_batch(self, lo: int, hi: int) -> int:
        """Return up to where the sets from ``lo`` on are made at once."""
        if self.context.runner.isolation == "spawn" or any(
            map(self.context.manifest.is_target, self.context.spec.aggregates)
        ):
            return lo + 1
        n = min(hi - lo, self._at_once)
        while n > 1 and self.small.n_replicates(lo, lo + n) > MAX_REPLICATES:
            n //= 2
        return lo + n

    def _many(self, lo: int, hi: int, log: LogSink) -> int:
        """Make all aggregates of these sets; return for how many sets they were made, up to one that needs care."""
        table = self.small.table(lo, hi)
        if table is not None and all(
            starmap(self._is_enough, set(zip(table.n_succeeded, table.n_replicates, strict=True)))
        ):
            return self._of_table(table, log)
        sets = self.small.read(lo, hi)
        n_made = next((i for i, one in enumerate(sets) if one.data is None), len(sets))
        made: list[AggregateRow] = []
        for target in self.context.spec.aggregates:
            chosen = [one for one in sets[:n_made] if one.n_succeeded >= self._needed(one.n_replicates)]
            outcomes = iter(
                self.runtime.pool.aggregates(
                    self.context.runner,
                    target,
                    [one.data for one in chosen if one.data is not None],
                    target_data=self.context.manifest.target_data,
                    stop=self.attempt.stop,
                    log=log,
                )
                if chosen
                else ()
            )
            for i, one in enumerate(sets[:n_made]):
                if one.n_succeeded < self._needed(one.n_replicates):
                    made.append(self._skipped(one.param, target, one.n_succeeded, one.n_replicates))
                elif (outcome := next(outcomes, None)) is not None:
                    made.append(
                        _succeeded(
                            one.param,
                            target,
                            one.n_succeeded,
                            one.n_replicates,
                            outcome.returned_dict,
                            outcome.outputs,
                        )
                    )
                else:
                    n_made = i
                    break
        for row in made:
            if row.param < lo + n_made:
                self.writer.add(row)
        return n_made

    def _of_table(self, table: SmallTable, log: LogSink) -> int:
        """Make all aggregates of these sets, which all have enough replicates; return as `_many` does."""
        n_made = len(table.n_replicates)
        made = []
        for target in self.context.spec.aggregates:
            found = self.runtime.pool.aggregate_table(
                self.context.runner,
                target,
                table.data,
                target_data=self.context.manifest.target_data,
                stop=self.attempt.stop,
                log=log,
            )
            made.append((target, found))
            n_made = min(n_made, len(found))
        for target, found in made:
            self.writer.add_succeeded(
                table.data.param,
                target,
                table.n_succeeded[:n_made],
                table.n_replicates[:n_made],
                stored_aggregates(found.first(n_made)),
            )
        return n_made

    def _is_enough(self, n_succeeded: int, n: int) -> bool:
        return n_succeeded >= self._needed(n)

    def _needed(self, n: int) -> int:
        return self.context.spec.needed(n)

    def _skipped(self, param: int, target: str, n_succeeded: int, n: int) -> AggregateRow:
        reason = f"{n_succeeded} of {n} replicates succeeded, min_success needs {self._needed(n)}"
        return AggregateRow(param, target, AggregateStatus.SKIPPED, n_succeeded, n, reason)

    def _each(self, param: int, log: LogSink) -> bool:
        """Make the aggregates of one parameter set; False if the attempt was stopped."""
        return all(
            not self.attempt.stop.stopped and self._one(param, target, log)
            for target in self.context.spec.aggregates
        )

    def _one(self, param: int, target: str, log: LogSink) -> bool:
        spec = self.context.spec
        n, n_succeeded = len(spec.line.of_param(param)), self.reader.count(param, ReplicateStatus.SUCCEEDED)
        if spec.until is not None:
            n -= self.reader.count(param, ReplicateStatus.NOT_NEEDED)
        if n_succeeded < self._needed(n):
            self.writer.add(self._skipped(param, target, n_succeeded, n))
            return True
        outcome = self._call(param, target, n_succeeded, log)
        if outcome.stopped:
            return False
        error = outcome.error
        if error is None:
            row = _succeeded(param, target, n_succeeded, n, outcome.returned_dict, outcome.outputs)
            self.writer.add(row)
        elif not self.runtime.still_has_files(self.context):
            raise SetAsideError(f"{error.type}: {error.message}")
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


def _succeeded(
    param: int, target: str, n_succeeded: int, n: int, returned_dict: bool, outputs: Sequence[Output]
) -> AggregateRow:
    return AggregateRow(
        param,
        target,
        AggregateStatus.SUCCEEDED,
        n_succeeded,
        n,
        returned_dict=returned_dict,
        outputs=stored_outputs(outputs),
    )


def _receipt(runtime: WorkerRuntime, chunk: AggregateChunk, **what: object) -> AggregateReceipt:
    return AggregateReceipt(
        job=chunk.job,
        attempt=chunk.attempt,
        worker=runtime.address,
        host=runtime.host,
        **what,  # type: ignore[arg-type]  # one constructor, three callers
    )
