"""Run a chunk: outcomes as they come go into a segment; what is to be tried again does not."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelops.states import FAILURES, ReplicateStatus
from modelops.store.segments import SegmentWriter
from modelops.study.ranges import Ranges
from modelops.worker.attempts import Attempt
from modelops.worker.job_log import JobLog
from modelops.worker.messages import Chunk, ErrorExample, FailureCount, Receipt

if TYPE_CHECKING:
    from modelops.processes import Outcome
    from modelops.worker.runtime import WorkerRuntime

MAX_FINGERPRINTS = 100  # in one receipt; the segment holds every error


@dataclass
class _Chunk:
    """Sorts the outcomes of one chunk as they arrive."""

    chunk: Chunk
    writer: SegmentWriter
    retry: dict[ReplicateStatus, list[int]] = field(default_factory=dict)
    examples: dict[str, ErrorExample] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    model_seconds: float = 0.0
    n_final: int = 0

    def take(self, outcome: Outcome) -> None:
        self.model_seconds += outcome.seconds
        if outcome.status in FAILURES:
            self._count_failure(outcome)
        execution = (
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
            self.n_final += 1
            self.writer.add(
                outcome.index, outcome.status, outcome.returned_dict, outcome.outputs, outcome.error, execution
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


def simulate_chunk(runtime: WorkerRuntime, chunk: Chunk) -> Receipt:
    """Run the replicates of a chunk and store its segment; the receipt says what became of each index."""
    began = time.perf_counter()
    attempt = Attempt(chunk.job, chunk.attempt, chunk.epoch, chunk.ranges)
    if not runtime.attempts.enter(attempt):
        return _receipt(runtime, chunk, unstarted=chunk.ranges)
    try:
        context = runtime.job(chunk.job)
        writer = SegmentWriter(runtime.objects, chunk.job, chunk.attempt, worker=runtime.address, host=runtime.host)
        sorter = _Chunk(chunk, writer)
        with JobLog(runtime.objects, chunk.job, chunk.attempt) as job_log:
            end = runtime.pool.run(
                context.runner,
                context.spec.model,
                context.sets(Ranges(chunk.ranges)),
                on_outcome=sorter.take,
                stop=attempt.stop,
                log=job_log.write,
            )
        segment = writer.finish()
        return _receipt(
            runtime,
            chunk,
            segment=segment if sorter.n_final else None,
            retry=tuple((status, Ranges.of(ks).pairs) for status, ks in sorter.retry.items()),
            unstarted=Ranges(end.unstarted).pairs,
            failures=tuple(FailureCount(example=x, count=sorter.counts[f]) for f, x in sorter.examples.items()),
            model_seconds=sorter.model_seconds,
            wall_seconds=time.perf_counter() - began,
        )
    finally:
        runtime.attempts.leave(attempt)


def _receipt(runtime: WorkerRuntime, chunk: Chunk, **what: object) -> Receipt:
    return Receipt(
        job=chunk.job, attempt=chunk.attempt, worker=runtime.address, host=runtime.host, **what  # type: ignore[arg-type]  # one constructor, two callers
    )
