"""The driver's ledger: writes what has become true, under the epoch of its lease."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelops.states import JobEvent
from modelops.store.results import finalize
from modelops.store.segments import SegmentWriter, StoredError

if TYPE_CHECKING:
    from modelops.driver.commands import ChangeState, CommitSynthetic, Note
    from modelops.store import Objects, Records
    from modelops.study.ids import JobId
    from modelops.study.spec import JobSpec
    from modelops.worker.messages import AggregateRef, SegmentRef


@dataclass
class StoreLedger:
    """A `modelops.driver.loop.Ledger` over SQL rows and stored objects."""

    job: JobId
    spec: JobSpec
    records: Records
    objects: Objects
    epoch: int
    who: str

    def commit_segment(self, segment: SegmentRef) -> bool:
        """Write the row of a segment; False if its indices are covered already."""
        return self.records.commit_segment(self.job, self.epoch, segment)

    def commit_synthetic(self, command: CommitSynthetic) -> bool:
        """Write and commit a segment that says of each index what no worker could say."""
        writer = SegmentWriter(self.objects, self.job, command.attempt, worker="driver")
        error = StoredError(
            type=command.error.error_type,
            message=command.error.message,
            traceback=command.error.traceback,
            stderr=command.error.stderr,
            fingerprint=command.error.fingerprint,
        )
        for index in command.indices:
            writer.add(index, command.status, True, (), error)
        segment = writer.finish()
        return segment is None or self.records.commit_segment(self.job, self.epoch, segment)

    def commit_aggregates(self, stored: AggregateRef) -> bool:
        """Write the row of an aggregate segment."""
        return self.records.commit_aggregates(self.job, self.epoch, stored)

    def change_state(self, command: ChangeState) -> None:
        """Record a transition."""
        self.records.change_state(self.job, command.event, who=self.who, why=command.reason, epoch=self.epoch)

    def note(self, command: Note) -> None:
        """Append to the job's story."""
        self.records.add_event(self.job, self.who, command.kind, command.text, epoch=self.epoch)

    def abandon(self, why: str) -> None:
        """Record that the job will not be driven: it was interrupted before a replicate could run."""
        for event in (JobEvent.CANCEL_ASKED, JobEvent.STOPPED):
            self.records.change_state(self.job, event, who=self.who, why=why, epoch=self.epoch)

    def finalize(self) -> None:
        """Write the result files."""
        finalize(
            self.objects,
            self.job,
            self.spec,
            self.records.segments(self.job),
            self.records.aggregates(self.job),
        )
