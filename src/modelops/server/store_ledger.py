"""The driver's ledger: writes what has become true, under the epoch of its lease."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from modelops.counters import Counted, Measured, add_durations, count
from modelops.driver.events import Finalized, ResultsVoided
from modelops.driver.fitness import UNFIT
from modelops.errors import InternalError, StorageError
from modelops.server.ahead import Ahead
from modelops.states import FINAL_JOB_STATES, STORED, AggregateStatus, ReplicateStatus
from modelops.store import read_segment
from modelops.store.aggregate_segments import AggregateRow, AggregateWriter
from modelops.store.rows import ChangedMeanwhileError, LeaseLostError
from modelops.store.segment_body import StoredError
from modelops.store.segments import SegmentWriter, store_not_needed
from modelops.store.withdrawal import NOTHING, Kept
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modelops.driver.commands import (
        ChangeState,
        CommitNotNeeded,
        CommitSynthetic,
        CommitSyntheticAggregates,
        Note,
        RecordRetry,
    )
    from modelops.store import Objects, Records
    from modelops.study.ids import JobId
    from modelops.study.spec import JobSpec
    from modelops.worker.messages import AggregateRef, ErrorExample, SegmentRef

log = logging.getLogger(__name__)
MAX_NAMED: Final = 5  # changed files in a message


@dataclass
class StoreLedger:
    """A `modelops.driver.loop.Ledger` over SQL rows and stored objects.

    ``version``: of the job's row, as this driver found it; every change of state counts it up, and only the driver
    changes the state of a job that has not ended. ``bundle_changes`` returns how the bundle's snapshot differs from
    what it was at the beginning.
    ``on_recorded``: told after each change of state, and whether it is final. ``voided``: it did; nothing of this run
    of the job counts.
    """

    job: JobId
    spec: JobSpec
    records: Records
    objects: Objects
    epoch: int
    who: str
    version: int
    bundle_changes: Callable[[], list[str]] = list
    voided: bool = False
    on_recorded: Callable[[bool], None] = lambda _ended: None

    def __post_init__(self) -> None:
        self.ahead = Ahead(self.objects, self.job, self.spec)

    def commit_segments(self, segments: Sequence[SegmentRef]) -> list[bool]:
        """Write the rows of segments in one transaction; False for each whose indices are covered already."""
        accepted = self.records.commit_segments(self.job, self.epoch, segments)
        for segment, ok in zip(segments, accepted, strict=True):
            if ok and segment.durations is not None:
                add_durations(Measured.REPLICATES, segment.durations)
        return accepted

    def commit_synthetic(self, command: CommitSynthetic) -> tuple[bool, SegmentRef]:
        """Write and commit a segment that says of each index what no worker could say."""
        writer = SegmentWriter(self.objects, self.job, command.attempt, worker="driver")
        for index in command.indices:
            writer.add(index, command.status, True, (), _stored(command.error))
        segment = writer.finish()
        if segment is None:
            raise InternalError(f"attempt {command.attempt} was to commit outcomes of no replicate")
        return self.records.commit_segment(self.job, self.epoch, segment), segment

    def commit_not_needed(self, command: CommitNotNeeded) -> tuple[bool, SegmentRef]:
        """Write and commit that these are not needed; outcomes of them that count already count no more."""
        stored = store_not_needed(self.objects, self.job, command.attempt, command.indices)
        kept = {}
        for ref in self.records.segments_over(self.job, command.displaced) if command.displaced else ():
            if ref.attempt != command.attempt:
                left = Ranges(ref.ranges) - command.indices
                trimmed = replace(ref, ranges=left.pairs)
                kept[ref.attempt] = Kept(left.pairs, self._counts(trimmed)) if left else NOTHING
        return self.records.commit_not_needed(self.job, self.epoch, stored, kept), stored

    def _counts(self, ref: SegmentRef) -> dict[ReplicateStatus, int]:
        found = Counter(read_segment(self.objects, self.job, ref).status.tolist())
        return {STORED[code]: n for code, n in sorted(found.items())}

    def commit_synthetic_aggregates(self, command: CommitSyntheticAggregates) -> bool:
        """Write and commit aggregates that failed without a worker that could say so."""
        writer = AggregateWriter(self.objects, self.job, command.attempt)
        error = _stored(command.error)
        segments = self.records.segments(self.job)
        not_needed = Ranges(
            pair for ref in segments if ReplicateStatus.NOT_NEEDED in ref.counts for pair in ref.ranges
        )
        for param in command.params:
            n = len(self.spec.line.of_param(param) - not_needed)
            for target in self.spec.aggregates:
                reason = f"{error.type}: {error.message}"
                writer.add(AggregateRow(param, target, AggregateStatus.FAILED, 0, n, reason, error=error))
        held = Ranges(pair for param in command.params for pair in self.spec.line.of_param(param).pairs)
        # Of the same segments as if it had read them: a later driver or run must not take it for stale.
        inputs = tuple(ref.digest for ref in segments if not held.isdisjoint(Ranges(ref.ranges)))
        return self.commit_aggregates(writer.finish(inputs=inputs))

    def commit_aggregates(self, stored: AggregateRef) -> bool:
        """Write the row of an aggregate segment."""
        return self.records.commit_aggregates(self.job, self.epoch, stored)

    def change_state(self, command: ChangeState) -> None:
        """Record a transition, once, however often it is given.

        Raises
        ------
        LeaseLostError
            Also if the job is not as this driver left it: whoever looks again will see how it is.
        """
        try:
            row = self.records.change_state(
                self.job,
                command.event,
                who=self.who,
                why=command.reason,
                epoch=self.epoch,
                expected_version=self.version,
            )
        except ChangedMeanwhileError:
            row = self.records.job(self.job)
            if (row.version, row.state, row.epoch) != (self.version + 1, command.state, self.epoch):
                raise LeaseLostError(self.job, self.epoch) from None
        self.version = row.version
        reason = f": {command.reason}" if command.reason else ""
        log.info("job %s is %s%s", self.job, row.state, reason, extra={"job": self.job})
        self.on_recorded(row.state in FINAL_JOB_STATES)

    def note(self, command: Note, *, again: bool = False) -> None:
        """Append to the job's story; if it may be there already (``again``), only if it is not."""
        log.info("job %s: %s: %s", self.job, command.kind, command.text, extra={"job": self.job})
        self.records.add_event(
            self.job, self.who, command.kind, command.text, epoch=self.epoch, unless_there=again
        )
        if command.kind == UNFIT:
            count(Counted.WORKERS_UNFIT)

    def record_retry(self, command: RecordRetry, *, again: bool = False) -> None:
        """Record which replicates are tried again, for a later driver. Twice is as good as once."""
        self.records.record_retry(self.job, self.epoch, self.who, command.indices, command.number)

    def record_use(self, used_s: float, *, lasting: bool = True) -> None:
        """Record the seconds of the job's timeout that this run has used."""
        self.records.record_use(self.job, self.epoch, used_s, lasting=lasting)

    def cancel_asked_by(self) -> str | None:
        """Return who asked for the end of this run, whoever they told."""
        return self.records.cancel_asked_by(self.job)

    def finalize(self) -> Finalized | ResultsVoided:
        """Write the result files; if the bundle was changed while it ran, make nothing count."""
        from modelops.driver.commands import Note
        from modelops.store.attempts import n_surplus
        from modelops.store.checkpoints import remove_all, remove_settled
        from modelops.store.contents import JobContents
        from modelops.store.most_frequent import most_frequent_failure
        from modelops.store.results import finalize

        if changes := self.bundle_changes():
            more = f" (and {len(changes) - MAX_NAMED} more)" if len(changes) > MAX_NAMED else ""
            why = (
                f"the bundle was changed while the job ran: {'; '.join(changes[:MAX_NAMED])}{more}. "
                "Its files are read-only for models; write to the working directory or TMPDIR"
            )
            remove_all(self.objects, self.job)  # what the changed bundle has left is nothing to go on from
            n = self.records.void_results(self.job, self.epoch, self.who, why)
            log.warning("%s; %d finished replicates do not count", why, n)
            self.voided = True
            return ResultsVoided(why)
        self.records.hold(self.job, self.epoch)  # whoever slept past its lease must not write files, either
        contents = JobContents.of(self.objects, self.records, self.job, view=self.ahead.view())
        failed = most_frequent_failure(contents)
        files = finalize(contents)
        self.records.record_results(self.job, self.who, files, epoch=self.epoch, end_follows=True)
        if self.spec.until is not None:
            n = n_surplus(contents)
            ran = "1 replicate was" if n == 1 else f"{n:,} replicates were"
            self.note(Note("surplus", f"{ran} run to the end that {'is' if n == 1 else 'are'} not needed"))
        try:
            remove_settled(contents)
        except StorageError as error:  # it may be allowed to write and not to delete; the results are there
            log.warning("checkpoints of %s are left in storage: %s", self.job, error)
        return Finalized(failed)


def _stored(error: ErrorExample) -> StoredError:
    return StoredError(
        type=error.error_type,
        message=error.message,
        traceback=error.traceback,
        stderr=error.stderr,
        fingerprint=error.fingerprint,
    )
