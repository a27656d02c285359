"""What is committed of a job at one moment: where every table and every output is read from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from modelops.errors import IntegrityError, NotFoundError
from modelops.states import FINAL_JOB_STATES, STORED, JobState, ReplicateStatus
from modelops.store.parameter_view import LostParameters, ParameterView
from modelops.store.parameters import Parameters
from modelops.store.segment_table import SegmentTable, StoredOutput, decoded, read_segment
from modelops.study.ranges import EMPTY, Ranges
from modelops.study.spec import JobSpec, recorded_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.store.objects import Objects
    from modelops.store.records import Records
    from modelops.study.ids import JobId
    from modelops.worker.messages import AggregateRef, SegmentRef

MAX_ROWS_NOT_RUN: Final = 1_000_000  # of replicates that did not run, in a table; three seconds of writing
NO_ROWS: Final = "modelops.no_rows"
PARAMETERS_LOST: Final = "modelops.parameters_lost"
_NOT_NEEDED: Final = {ReplicateStatus.NOT_NEEDED}
_REST: Final = {
    JobState.CANCELLING: ReplicateStatus.CANCELLED,
    JobState.CANCELLED: ReplicateStatus.CANCELLED,
    **dict.fromkeys(
        (JobState.FINALIZING, JobState.SUCCEEDED, JobState.PARTIAL, JobState.FAILED), ReplicateStatus.NOT_RUN
    ),
}


def rest_of(state: JobState) -> ReplicateStatus:
    """Return the status of the replicates of a job in this state that have no outcome and do not run."""
    return _REST.get(state, ReplicateStatus.PENDING)


@dataclass(frozen=True)
class JobContents:
    """What is committed of a job at one moment.

    ``rest``: the status of replicates without a committed outcome. ``running``: those of them that a live
    attempt holds. ``lost_parameters``: why the parameters cannot be read, if tables are to do without. ``made_view``:
    of the parameters, if it has been made already.
    """

    objects: Objects
    job: JobId
    spec: JobSpec
    segments: Sequence[SegmentRef]
    aggregates: Sequence[AggregateRef] = ()
    rest: ReplicateStatus = ReplicateStatus.PENDING
    running: Ranges = field(default=EMPTY)
    lost_parameters: str = ""
    made_view: ParameterView | None = None

    @classmethod
    def of(
        cls,
        objects: Objects,
        records: Records,
        job: JobId,
        running: Ranges = EMPTY,
        *,
        view: ParameterView | None = None,
    ) -> JobContents:
        """Look at a job's records, after ``running`` was asked for. Raises NotFoundError."""
        row, segments, aggregates = records.committed(job)
        if row.state in FINAL_JOB_STATES:
            running = EMPTY  # what ran when it was asked for runs no longer
        return cls(
            objects,
            job,
            recorded_spec(row.spec, row.job),
            segments,
            aggregates,
            rest_of(row.state),
            running,
            made_view=view,
        )

    @cached_property
    def no_rows(self) -> Ranges:
        """The replicates that no table has a row of: all that have not run to an end, if those are very many.

        Otherwise a cancelled job of 4,000,000,000 replicates would be written for hours, to say nothing of them.
        """
        ended = (ref.ranges for ref in self.segments if ref.counts.keys() != _NOT_NEEDED)
        left = self.spec.line.all() - Ranges(pair for ranges in ended for pair in ranges)
        return left if len(left) > MAX_ROWS_NOT_RUN else EMPTY

    def without_parameters(self) -> JobContents | None:
        """Return the same contents for tables without parameters, if these cannot be read; None if they can."""
        try:
            _ = self.view
        except (IntegrityError, NotFoundError) as error:
            return replace(self, lost_parameters=str(error))
        return None

    def remarks(self, *, of_rows: bool = True) -> dict[str, str]:
        """Return what a table's schema says of what it lacks: parameters, why; `no_rows`, how many of which status.

        ``of_rows``: whether the table would have rows of those.
        """
        lost = {PARAMETERS_LOST: self.lost_parameters} if self.lost_parameters else {}
        if not of_rows or not self.no_rows:
            return lost
        n = {
            ReplicateStatus.NOT_NEEDED: sum(
                sum(ref.counts.values()) for ref in self.segments if ref.counts.keys() == _NOT_NEEDED
            ),
            ReplicateStatus.RUNNING: len(self.running & self.no_rows),
        }
        n[self.rest] = len(self.no_rows) - sum(n.values())
        return lost | {NO_ROWS: json.dumps({str(status): n for status, n in n.items() if n})}

    @cached_property
    def parameters(self) -> Parameters:
        """The job's parameter sets."""
        return Parameters(self.objects, self.job, self.spec.parameters)

    @cached_property
    def view(self) -> ParameterView | LostParameters:
        """The job's parameters as columns."""
        if self.lost_parameters:
            return LostParameters()
        return self.made_view or ParameterView(self.parameters)

    def read(self, number: int) -> SegmentTable:
        """Read segment ``number`` of ``segments``, verified."""
        return read_segment(self.objects, self.job, self.segments[number])

    def output(self, param: int | str, replicate: int, name: str | None = None) -> Any:
        """Return what the model returned for one replicate: one output, or all as it returned them.

        Parameters
        ----------
        param
            Ordinal or ``param_id``.

        Raises
        ------
        KeyError
            There is no such replicate or output, or it has not succeeded; the text says which.
        """
        returned_dict, outputs = self.stored(param, replicate, name)
        if name is None:
            return decoded(self.objects, returned_dict, outputs)
        return decoded(self.objects, True, outputs)[name]

    def stored(
        self, param: int | str, replicate: int, name: str | None = None
    ) -> tuple[bool, list[StoredOutput]]:
        """Return what `output` decodes: whether the model returned a dict, and the outputs as they are stored."""
        ordinal = self.parameters.param_of(param) if isinstance(param, str) else param
        try:
            index = self.spec.line.index(ordinal, replicate)
        except IndexError:
            raise KeyError(f"job {self.job} has no replicate {replicate} of parameter set {param}") from None
        for number, ref in enumerate(self.segments):
            if any(lo <= index < hi for lo, hi in ref.ranges):
                segment = self.read(number)
                status = STORED[segment.status[segment.row_of(index)]]
                break
        else:
            status = ReplicateStatus.RUNNING if index in self.running else self.rest
        if status != ReplicateStatus.SUCCEEDED:
            raise KeyError(f"replicate {replicate} of parameter set {param} is {status}: it has no outputs")
        return segment.stored(index, name)
