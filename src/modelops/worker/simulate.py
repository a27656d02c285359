"""Run a chunk: outcomes as they come go into a segment; what is to be tried again does not."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.bundles.missing import line_to_add
from modelops.environments import dependency_inputs
from modelops.errors import RemoteError, StorageError
from modelops.states import FAILURES, ReplicateStatus
from modelops.store import Execution, SegmentWriter
from modelops.study.ranges import Ranges
from modelops.worker.job_log import JobLog
from modelops.worker.messages import Chunk, ErrorExample, FailureCount, Receipt
from modelops.worker.storage_wait import FIRST_WAIT_S, LONGEST_WAIT_S
from modelops.worker.stored import stored_error, stored_outputs

if TYPE_CHECKING:
    from modelops.processes import Outcome, ReplicateSet
    from modelops.processes.stop import StopSignal
    from modelops.worker.attempts import Attempt
    from modelops.worker.desk import Desk
    from modelops.worker.job_context import JobContext
    from modelops.worker.runtime import WorkerRuntime

MAX_FINGERPRINTS = 100  # in one receipt; the segment holds every error


@dataclass
class _Chunk:
    """Sorts the outcomes of one chunk as they arrive."""

    chunk: Chunk
    writer: SegmentWriter
    stop: StopSignal
    snapshot: str
    desk: Desk
    retry: dict[ReplicateStatus, list[int]] = field(default_factory=dict)
    lacking: list[int] = field(default_factory=list)  # replicates that found a module missing
    ended: list[int] = field(default_factory=list)
    examples: dict[str, ErrorExample] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    model_seconds: float = 0.0
    missing_import: str | None = None

    def take(self, outcome: Outcome) -> None:
        self.model_seconds += outcome.seconds
        self.ended.append(outcome.index)
        if outcome.index == self.desk.current:
            self.desk.ended(succeeded=outcome.status is ReplicateStatus.SUCCEEDED)
        error = outcome.error
        if error is not None and error.missing_module:
            # One error for the job: what the bundle lacks, no replicate can do without.
            self.missing_import = missing_import(
                error.missing_module, error.traceback or error.message, self.snapshot
            )
            self.lacking.append(outcome.index)
            self.stop.stop(hard=True)
            return
        if outcome.status in FAILURES:
            self._count_failure(outcome)
        execution = Execution(
            outcome.started_at,
            outcome.seconds,
            outcome.cpu_seconds,
            outcome.max_rss_bytes,
            self.chunk.attempt_number,
        )
        if outcome.status in self.chunk.retry_on:
            self.retry.setdefault(outcome.status, []).append(outcome.index)
            self.writer.add_execution_only(outcome.index, outcome.status, execution)
        else:
            self.writer.add(
                outcome.index,
                outcome.status,
                outcome.returned_dict,
                stored_outputs(outcome.outputs),
                stored_error(error),
                execution,
            )

    def _count_failure(self, outcome: Outcome) -> None:
        error = outcome.error
        fingerprint = error.fingerprint if error else ""
        if fingerprint not in self.examples:
            if len(self.examples) >= MAX_FINGERPRINTS:
                return
            self.examples[fingerprint] = ErrorExample(
                fingerprint=fingerprint,
                status=outcome.status,
                error_type=error.type if error else "",
                message=error.message if error else "",
                traceback=error.traceback if error else "",
                stderr=error.stderr if error else "",
                index=outcome.index,
            )
        self.counts[fingerprint] += 1


def missing_import(module: str, where: str, snapshot: str) -> str:
    """Return the sentence for a module that the bundle's environment does not have."""
    advice = line_to_add(module, dependency_inputs(Path(snapshot)).listed_in)
    return f"No module named '{module}'\n{where.rstrip()}\n{advice} (or the package that provides it)"


def simulate_chunk(runtime: WorkerRuntime, chunk: Chunk, attempt: Attempt) -> Receipt:
    """Run the replicates of a chunk and store its segment; the receipt says what became of each index.

    While storage is away, what is finished stays here; if the attempt is stopped meanwhile, all is given back.
    """
    if not runtime.attempts.enter(attempt):
        return _receipt(runtime, chunk, unstarted=chunk.ranges)
    runtime.say_begun(attempt)
    try:
        with runtime.using(chunk, attempt) as context:
            return _simulate(runtime, context, chunk, attempt)
    except StorageError:
        if not attempt.stop.stopped:
            raise
        return _receipt(runtime, chunk, unstarted=chunk.ranges)


def _simulate(runtime: WorkerRuntime, context: JobContext, chunk: Chunk, attempt: Attempt) -> Receipt:
    writer = SegmentWriter(
        runtime.objects,
        chunk.job,
        chunk.attempt,
        worker=runtime.address,
        host=runtime.host,
        pid=os.getpid(),
    )
    desk = runtime.desk(chunk, attempt)
    sorter = _Chunk(chunk, writer, attempt.stop, context.runner.snapshot, desk)
    unstarted = Ranges(chunk.ranges)
    sets = runtime.when_storage_allows(lambda: context.sets(unstarted), attempt)
    began = time.perf_counter()
    with JobLog(runtime.objects, chunk.job, chunk.attempt) as job_log, contextlib.closing(desk):
        try:
            left = _run(runtime, context, sorter, sets, attempt, job_log)
        except RemoteError as error:
            if not error.missing_module:
                raise
            sorter.missing_import = missing_import(
                error.missing_module, error.traceback, context.runner.snapshot
            )
        else:
            unstarted = left | Ranges.of(sorter.lacking)
        wall_seconds = time.perf_counter() - began
        runtime.when_storage_allows(job_log.store, attempt)
    runtime.settled.remember(chunk.job, chunk.attempt, desk.settled)
    return _receipt(
        runtime,
        chunk,
        segment=runtime.when_storage_allows(writer.finish, attempt),
        retry=tuple((status, Ranges.of(ks).pairs) for status, ks in sorter.retry.items()),
        unstarted=unstarted.pairs,
        failures=tuple(FailureCount(example=x, count=sorter.counts[f]) for f, x in sorter.examples.items()),
        model_seconds=sorter.model_seconds,
        wall_seconds=wall_seconds,
        missing_import=sorter.missing_import,
        notes=(
            *filter(None, [runtime.pool.not_forked(context.runner)]),
            *runtime.take_notes(chunk.job),
            *desk.notes,
        ),
    )


def _run(
    runtime: WorkerRuntime,
    context: JobContext,
    sorter: _Chunk,
    sets: list[ReplicateSet],
    attempt: Attempt,
    job_log: JobLog,
) -> Ranges:
    """Run the replicates; return those that have no outcome: a stop came, or this machine's volume is full.

    If not even the first one has, for lack of room for its outputs, it is run again as soon as there is some.
    """
    wait_s = FIRST_WAIT_S
    while True:
        try:
            end = runtime.pool.run(
                context.runner,
                context.spec.model,
                sets,
                on_outcome=sorter.take,
                stop=attempt.stop,
                log=job_log.write,
                desk=sorter.desk,
            )
        except StorageError as error:
            if sorter.ended:  # storing them may be what makes room
                return Ranges(sorter.chunk.ranges) - Ranges.of(sorter.ended)
            runtime.when_there_is_room(attempt, error, wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        else:
            return Ranges.of(end.unstarted)


def _receipt(runtime: WorkerRuntime, chunk: Chunk, **what: object) -> Receipt:
    return Receipt(
        job=chunk.job,
        attempt=chunk.attempt,
        worker=runtime.address,
        host=runtime.host,
        **what,  # type: ignore[arg-type]  # one constructor, two callers
    )
