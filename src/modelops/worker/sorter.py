"""Sort the outcomes of one chunk as they arrive: into a segment, to be tried again, or the sign of a missing module.

What has ended may be taken out while the chunk goes on, see `parts`; whatever ends later is then collected anew.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.bundles.missing import line_to_add
from modelops.counters import Measured, add_durations
from modelops.environments import dependency_inputs
from modelops.states import FAILURES, ReplicateStatus
from modelops.store import Execution, FloatRows, SegmentWriter
from modelops.store.segments import ranges_of
from modelops.store.watched import NoNumberError, number_in, numbers_in
from modelops.study.ranges import EMPTY, Ranges
from modelops.worker.messages import ErrorExample, FailureCount, Receipt
from modelops.worker.stored import stored_error, stored_outputs

if TYPE_CHECKING:
    from modelops.processes import FloatOutcomes, Outcome
    from modelops.processes.stop import StopSignal
    from modelops.study.ids import AttemptId
    from modelops.study.ranges import Range
    from modelops.worker.desk import Desk
    from modelops.worker.job_context import JobContext
    from modelops.worker.messages import Chunk
    from modelops.worker.runtime import WorkerRuntime

log = logging.getLogger(__name__)
MAX_FINGERPRINTS = 100  # in one receipt; the segment holds every error


@dataclass
class Tally:
    """What has ended and was not handed in yet.

    ``ended``: in the order in which they did, consecutive ones together. ``settled``: checkpoints that are of no use
    once it counts. ``has_files``: an output is too large to be in a message.
    """

    attempt: AttemptId
    writer: SegmentWriter
    began: float
    ended: list[Range] = field(default_factory=list)
    n_ended: int = 0
    retry: dict[ReplicateStatus, list[int]] = field(default_factory=dict)
    examples: dict[str, ErrorExample] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    settled: list[str] = field(default_factory=list)
    model_seconds: float = 0.0
    has_files: bool = False
    last_ended: float = 0.0

    def note_ended(self, lo: int, hi: int) -> None:
        """Note that these have ended."""
        self.n_ended += hi - lo
        if self.ended and self.ended[-1][1] == lo:
            lo = self.ended.pop()[0]
        self.ended.append((lo, hi))

    def count_failure(self, outcome: Outcome) -> bool:
        """Count a failure by its fingerprint, and keep the first one of each; return whether it is that."""
        error = outcome.error
        fingerprint = error.fingerprint if error else ""
        if fingerprint not in self.examples:
            if len(self.examples) >= MAX_FINGERPRINTS:
                return False
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
        return self.counts[fingerprint] == 1

    def receipt(self, runtime: WorkerRuntime, chunk: Chunk, **more: Any) -> Receipt:
        """Return what became of these replicates; ``more``: the segment, and what else is to be said."""
        segment = more.get("segment")
        if segment is not None and segment.durations is not None:
            add_durations(Measured.REPLICATES, segment.durations)
        return Receipt(
            job=chunk.job,
            attempt=self.attempt,
            worker=runtime.address,
            host=runtime.host,
            retry=tuple((status, Ranges.of(ks).pairs) for status, ks in self.retry.items()),
            failures=tuple(FailureCount(example=x, count=self.counts[f]) for f, x in self.examples.items()),
            model_seconds=self.model_seconds,
            **more,
        )


class Sorter:
    """Takes the outcomes of one chunk, in order of index. `take` and `cut` may be called from different threads."""

    def __init__(
        self,
        runtime: WorkerRuntime,
        chunk: Chunk,
        context: JobContext,
        *,
        stop: StopSignal,
        desk: Desk,
    ) -> None:
        self._context, self._spec = context, context.spec
        self._runtime, self.chunk, self.desk, self._stop = runtime, chunk, desk, stop
        self._lock = threading.Lock()
        self.indices = Ranges(chunk.ranges)  # what this attempt is to give outcomes of; shrinks by `cut`
        self._given_back = EMPTY
        self.lacking: list[int] = []  # replicates that ended as none of this job can
        self.missing_import: str | None = None
        self.set_aside: str | None = (
            None  # what a replicate met because its environment, or bundle, was not there any more
        )
        self.tally = self._new_tally(chunk.attempt)

    def _new_tally(self, attempt: AttemptId) -> Tally:
        runtime = self._runtime
        writer = SegmentWriter(
            runtime.objects,
            self.chunk.job,
            attempt,
            worker=runtime.address,
            host=runtime.host,
            pid=os.getpid(),
            watches=self._spec.until is not None,
        )
        return Tally(attempt, writer, began=time.perf_counter())

    @property
    def n_ended(self) -> int:
        """How many have ended and were not taken out."""
        return self.tally.n_ended

    def left(self) -> Ranges:
        """Return the indices without an outcome."""
        return self.indices - (Ranges(self.tally.ended) | Ranges.of(self.lacking))

    def take(self, outcome: Outcome) -> None:
        """Take the outcome of the next replicate."""
        with self._lock:
            if self._given_back and outcome.index in self._given_back:
                return  # it had begun when it was given back: it is somebody else's
            self._take(outcome, self.tally)

    def _take(self, outcome: Outcome, tally: Tally) -> None:
        tally.model_seconds += outcome.seconds
        tally.last_ended = time.perf_counter()
        desk = self.desk
        if outcome.index == desk.current:
            desk.ended(succeeded=outcome.status is ReplicateStatus.SUCCEEDED)
        error = outcome.error
        if outcome.status in FAILURES and not self._runtime.still_has_files(self._context):
            self.set_aside = f"{error.type}: {error.message}" if error is not None else str(outcome.status)
            self._lacks(outcome.index)
            return
        if error is not None and error.missing_module:
            self.note_missing(error.missing_module, error.traceback or error.message)
            self._lacks(outcome.index)
            return
        watched: float | str = math.nan
        if self._spec.until is not None and outcome.status is ReplicateStatus.SUCCEEDED:
            try:
                watched = number_in(stored_outputs(outcome.outputs), self._spec.until.of)
            except NoNumberError as no:
                watched = str(no)
        tally.note_ended(outcome.index, outcome.index + 1)
        if outcome.status in FAILURES and tally.count_failure(outcome):
            self._log_failure(outcome)
        execution = Execution(
            outcome.started_at,
            outcome.seconds,
            outcome.cpu_seconds,
            outcome.max_rss_bytes,
            self.chunk.attempt_number,
        )
        if outcome.status in self.chunk.retry_on:
            tally.retry.setdefault(outcome.status, []).append(outcome.index)
            tally.writer.add_execution_only(outcome.index, outcome.status, execution)
        else:
            outputs = stored_outputs(outcome.outputs)
            tally.has_files = tally.has_files or outputs is not outcome.outputs
            tally.writer.add(
                outcome.index,
                outcome.status,
                outcome.returned_dict,
                outputs,
                stored_error(error),
                execution,
                watched,
            )

    def note_missing(self, module: str, where: str) -> None:
        """Note the one error of the job: what the bundle lacks, no replicate can do without."""
        snapshot = Path(self._context.runner.snapshot)
        advice = line_to_add(module, dependency_inputs(snapshot).listed_in)
        self.missing_import = (
            f"No module named '{module}'\n{where.rstrip()}\n{advice} (or the package that provides it)"
        )

    def _lacks(self, index: int) -> None:
        self.lacking.append(index)
        self._stop.stop(hard=True)

    def _log_failure(self, outcome: Outcome) -> None:
        """Log the first replicate of an attempt that failed so; the job's records have all."""
        param, replicate = self._spec.line.locate(outcome.index)
        error = outcome.error
        said = "" if error is None else f": {error.type}: {error.message}"
        log.info(
            "a replicate ended as %s%s", outcome.status, said, extra={"param": param, "replicate": replicate}
        )

    def take_floats(self, batch: FloatOutcomes) -> None:
        """Take the outcomes of the next replicates, which returned nothing but floats."""
        with self._lock:
            if self._given_back:
                kept = [i for i, k in enumerate(batch.indices.tolist()) if k not in self._given_back]
                if not kept:
                    return
                batch = batch.of(kept)
            rows = FloatRows(
                batch.names,
                batch.indices,
                batch.values,
                batch.started_at,
                batch.seconds,
                batch.cpu_seconds,
                batch.max_rss_bytes,
                self.chunk.attempt_number,
            )
            tally = self.tally
            tally.model_seconds += float(batch.seconds.sum())
            tally.last_ended = time.perf_counter()
            if self.desk.current is not None and self.desk.current in batch.indices:
                self.desk.ended(succeeded=True)
            watched: list[float] | list[str] = []
            if self._spec.until is not None:
                try:
                    watched = numbers_in(rows, self._spec.until.of)
                except NoNumberError as no:
                    watched = [str(no)] * len(rows.indices)
            for lo, hi in ranges_of(batch.indices).pairs:
                tally.note_ended(lo, hi)
            tally.writer.add_floats(rows, watched)

    def cut(self, part: AttemptId) -> tuple[Tally, Ranges] | None:
        """Take out what has ended, and give back all but the replicate that is next: it runs, or is about to.

        Returns
        -------
            What has ended, under the id ``part``, and what is given back; None if that is nothing, or if the chunk
            is about to end anyway.
        """
        with self._lock:
            left = self.left()
            if not left or self.lacking:
                return None
            first = left.pairs[0][0]
            rest = left - Ranges(((first, first + 1),))
            old = self.tally
            if not old.ended and not rest:
                return None
            self.tally = self._new_tally(self.chunk.attempt)
            self._given_back, self.indices = rest, Ranges(((first, first + 1),))
            old.attempt = part
            old.writer.rename(part)
            old.settled, self.desk.settled = self.desk.settled, []
            return old, rest
