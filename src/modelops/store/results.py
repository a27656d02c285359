"""Results of a job: tables of what is committed, during the job and after it, and the files at its end.

Everything is computed from committed segments, verified as they are read; see docs/reference/results.md.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from modelops.states import OUTCOMES, AggregateStatus, JobState, ReplicateStatus
from modelops.store import columns
from modelops.store.aggregate_rows import aggregate_fields, aggregate_groups, aggregate_order
from modelops.store.gather import Cover, Stored, cells_of
from modelops.store.order import ResultOrder, Rows
from modelops.store.parameter_view import ParameterView
from modelops.store.parameters import Parameters
from modelops.store.segment_table import OutputsColumn, SegmentTable, read_segment
from modelops.store.segments import job_folder
from modelops.store.view_writer import ROW_GROUP, Group, MemorySink, ParquetSink, write_view
from modelops.store.views import column_names
from modelops.study.ranges import EMPTY, Ranges
from modelops.study.seeds import seed_key, seeds_at
from modelops.study.spec import JobSpec, decode_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from modelops.store.objects import Objects
    from modelops.store.records import Records
    from modelops.study.ids import JobId
    from modelops.worker.messages import AggregateRef, SegmentRef

_SUCCEEDED: Final = OUTCOMES.index(ReplicateStatus.SUCCEEDED)
_REST: Final = {
    JobState.CANCELLING: ReplicateStatus.CANCELLED,
    JobState.CANCELLED: ReplicateStatus.CANCELLED,
    **dict.fromkeys(
        (JobState.FINALIZING, JobState.SUCCEEDED, JobState.PARTIAL, JobState.FAILED), ReplicateStatus.NOT_RUN
    ),
}


@dataclass(frozen=True)
class JobContents:
    """What is committed of a job at one moment.

    ``rest``: the status of replicates without a committed outcome. ``running``: those of them that a live
    attempt holds.
    """

    objects: Objects
    job: JobId
    spec: JobSpec
    segments: Sequence[SegmentRef]
    aggregates: Sequence[AggregateRef] = ()
    rest: ReplicateStatus = ReplicateStatus.PENDING
    running: Ranges = field(default=EMPTY)

    @classmethod
    def of(cls, objects: Objects, records: Records, job: JobId, running: Ranges = EMPTY) -> JobContents:
        """Look at a job's records. Raises NotFoundError."""
        row = records.job(job)
        return cls(
            objects,
            job,
            decode_spec(row.spec),
            records.segments(job),
            records.aggregates(job),
            _REST.get(row.state, ReplicateStatus.PENDING),
            running,
        )

    @cached_property
    def parameters(self) -> Parameters:
        """The job's parameter sets."""
        return Parameters(self.objects, self.job)

    @cached_property
    def view(self) -> ParameterView:
        """The job's parameters as columns."""
        return ParameterView(self.parameters)

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
        ordinal = self.parameters.param_of(param) if isinstance(param, str) else param
        try:
            index = self.spec.line.index(ordinal, replicate)
        except IndexError:
            raise KeyError(f"job {self.job} has no replicate {replicate} of parameter set {param}") from None
        for number, ref in enumerate(self.segments):
            if any(lo <= index < hi for lo, hi in ref.ranges):
                segment = self.read(number)
                status = OUTCOMES[segment.status[segment.row_of(index)]]
                break
        else:
            status = ReplicateStatus.RUNNING if index in self.running else self.rest
        if status != ReplicateStatus.SUCCEEDED:
            raise KeyError(f"replicate {replicate} of parameter set {param} is {status}: it has no outputs")
        if name is None:
            return segment.outputs_of(index)
        return segment.output_of(index, name)


def replicates_table(contents: JobContents) -> pa.Table:
    """Return one row per replicate, sorted by (parameter set, replicate)."""
    return _in_memory(lambda open_sink: _write_replicates(contents, open_sink, None))


def aggregates_table(contents: JobContents) -> pa.Table:
    """Return one row per parameter set, in order; no rows if the job has no aggregate."""
    return _in_memory(lambda open_sink: _write_aggregates(contents, open_sink))


def finalize(contents: JobContents, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Write ``results/{replicates,aggregates,attempts}.parquet``, in memory that does not grow with the job.

    Parameters
    ----------
    progress
        Called with rows done and rows in all, after each row group of replicates.

    Raises
    ------
    IntegrityError
        A committed segment is damaged; nothing was written for its table.
    """
    from modelops.store.attempts import write_attempts

    _to_file(contents, "replicates", lambda open_sink: _write_replicates(contents, open_sink, progress))
    _to_file(contents, "aggregates", lambda open_sink: _write_aggregates(contents, open_sink))
    _to_file(contents, "attempts", lambda open_sink: write_attempts(contents, open_sink))


OpenSink = "Callable[[pa.Schema], Any]"


def _in_memory(write: Callable[[Callable[[pa.Schema], MemorySink]], None]) -> pa.Table:
    sinks: list[MemorySink] = []

    def open_sink(schema: pa.Schema) -> MemorySink:
        sinks[:] = [MemorySink(schema)]
        return sinks[0]

    write(open_sink)
    return sinks[0].table()


def _to_file(contents: JobContents, name: str, write: Callable[[Callable[[pa.Schema], ParquetSink]], None]) -> None:
    sinks: list[ParquetSink] = []
    with TemporaryFile() as file:

        def open_sink(schema: pa.Schema) -> ParquetSink:
            for sink in sinks:  # an earlier attempt at the same table: its bytes are cut off
                sink.close()
            sinks[:] = [ParquetSink(file, schema)]
            return sinks[0]

        write(open_sink)
        sinks[0].close()
        file.seek(0)
        contents.objects.put(
            f"{job_folder(contents.job)}/results/{name}.parquet", iter(lambda: file.read(1 << 20), b"")
        )


def replicate_fields(contents: JobContents) -> tuple[list[pa.Field], dict[str, str]]:
    """Return the columns that every row of a replicate has, and the column of each parameter."""
    fixed = [
        pa.field("param", pa.int64()),
        pa.field("param_id", pa.string()),
        pa.field("replicate", pa.int64()),
        pa.field("seed", pa.int64()),
        pa.field("status", pa.string()),
    ]
    types = contents.view.types()
    names = column_names(types, [f.name for f in fixed], "parameter.")
    return [*fixed, *(pa.field(names[name], types[name]) for name in types)], names


def base_columns(contents: JobContents, rows: Rows, status: pa.Array) -> dict[str, pa.Array]:
    """Return the columns of `replicate_fields` for some rows."""
    _, names = replicate_fields(contents)
    lo, hi = (int(rows.param.min()), int(rows.param.max()) + 1) if len(rows.param) else (0, 0)
    sets, parameters = contents.view.read(lo, hi)
    nth = rows.param - lo
    at = columns.fixed(nth, pa.int64())
    return {
        "param": columns.fixed(rows.param, pa.int64()),
        "param_id": columns.text([s.param_id for s in sets]).take(at),
        "replicate": columns.fixed(rows.replicate, pa.int64()),
        "seed": columns.fixed(_seeds(contents.spec, [s.param_id for s in sets], nth, rows.replicate), pa.int64()),
        "status": status,
        **{names[name]: column.take(at) for name, column in parameters.items()},
    }


def _seeds(
    spec: JobSpec, param_ids: Sequence[Any], nth: npt.NDArray[np.int64], replicate: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    if spec.seeds is not None:
        return np.array(spec.seeds, np.int64)[replicate]
    if spec.common_random_numbers:
        key = seed_key(spec.study_seed, None)
        return seeds_at(np.uint32(key.a), np.uint32(key.b), replicate)
    keys = np.array([seed_key(spec.study_seed, p) for p in param_ids], np.uint32).reshape(-1, 2)
    return seeds_at(keys[nth, 0], keys[nth, 1], replicate)


def replicate_statuses(contents: JobContents) -> tuple[list[str], int, int]:
    """Return the words of the status column, and the codes of ``rest`` and ``running``; outcomes come first."""
    return [*OUTCOMES, contents.rest, ReplicateStatus.RUNNING], len(OUTCOMES), len(OUTCOMES) + 1


def status_column(contents: JobContents, codes: npt.NDArray[np.int64]) -> pa.Array:
    """Return the statuses as text."""
    words, _, _ = replicate_statuses(contents)
    return columns.text([str(w) for w in words]).take(columns.fixed(codes, pa.int64()))


def in_ranges(ranges: Ranges, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Say of each index whether it is in the set."""
    if not ranges:
        return np.zeros(len(indices), np.bool_)
    edges = np.array(ranges.pairs, np.int64).ravel()
    return np.searchsorted(edges, indices, side="right") % 2 == 1


def _write_replicates(
    contents: JobContents, open_sink: Callable[[pa.Schema], Any], progress: Callable[[int, int], None] | None
) -> None:
    fields, _ = replicate_fields(contents)
    write_view(fields, lambda: _replicate_groups(contents, progress), open_sink)


def _replicate_groups(
    contents: JobContents, progress: Callable[[int, int], None] | None
) -> Iterator[Group]:
    order = ResultOrder(contents.spec.line)
    cover: Cover[_Loaded] = Cover(
        [ref.ranges for ref in contents.segments], lambda i: _Loaded(contents.read(i)), lambda loaded: loaded.n_bytes
    )
    _, rest, running = replicate_statuses(contents)
    for lo in range(0, order.size, ROW_GROUP):
        rows = order.rows(lo, lo + ROW_GROUP)
        codes = np.where(in_ranges(contents.running, rows.index), running, rest)
        pieces, first_at, first = [], len(codes), None
        dropped: defaultdict[str, set[str]] = defaultdict(set)
        for loaded, at in cover.find(rows.index):
            of = np.searchsorted(loaded.stored.key, rows.index[at])
            codes[at] = loaded.status[of]
            by_row = np.argsort(of, kind="stable")  # blocks may interleave on the line
            pieces.append(loaded.stored.pick(of[by_row], at[by_row]))
            good = np.flatnonzero(codes[at] == _SUCCEEDED)
            if len(good) and at[good[0]] < first_at:
                first_at, first = int(at[good[0]]), loaded.stored.names_of(int(of[good[0]]))
            for name, labels in loaded.stored.labels.items():
                dropped[name] |= labels
        yield Group(base_columns(contents, rows, status_column(contents, codes)), cells_of(pieces), dropped, first)
        if progress is not None:
            progress(min(lo + ROW_GROUP, order.size), order.size)


class _Loaded:
    def __init__(self, segment: SegmentTable) -> None:
        self.status = segment.status
        self.n_bytes = segment.table.nbytes
        self.stored = Stored(
            segment.index, segment.status == _SUCCEEDED, OutputsColumn(segment.table, segment.pack)
        )


def _write_aggregates(contents: JobContents, open_sink: Callable[[pa.Schema], Any]) -> None:
    fields, names = aggregate_fields(contents)
    write_view(
        fields, lambda: aggregate_groups(contents, names), open_sink, lambda found: aggregate_order(contents, found)
    )


__all__ = [
    "AggregateStatus",
    "JobContents",
    "aggregates_table",
    "finalize",
    "replicates_table",
]
