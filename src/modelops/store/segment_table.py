"""Reading segments back: the digest first, then rows, values and errors."""

from __future__ import annotations

from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from modelops.errors import IntegrityError, RequestError
from modelops.states import ReplicateStatus
from modelops.store import columns
from modelops.store.segment_body import FLOAT, FLOAT_BYTES, StoredError
from modelops.store.segments import NOT_NEEDED_FORMAT, OUTCOME_CODE, PackSlice, job_folder, ranges_of
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from modelops.store.objects import Objects
    from modelops.study.ids import JobId
    from modelops.worker.messages import AggregateRef, SegmentRef

# Segments are small: handing their columns to threads costs more than decompressing them.
_READ: Final = pa.ipc.IpcReadOptions(use_threads=False)
StoredOutput = tuple[str, str, bytes | PackSlice]


class OutputsColumn:
    """The ``outputs`` of a stored table, row after row in flat arrays.

    Attributes
    ----------
    ends
        int64, ``ends[row]:ends[row + 1]`` are the outputs of a row.
    name, kind
        Codes, positions in ``names`` and ``kinds``.
    data
        large_binary; null where the bytes are in the pack.
    """

    def __init__(self, table: pa.Table, pack: str) -> None:
        column = columns.only_chunk(table, "outputs")
        struct = column.values
        self.pack = pack
        self.ends: npt.NDArray[np.int64] = columns.fixed_values(column.offsets).astype(np.int64)
        name, kind = struct.field("name"), struct.field("kind")
        self.name, self.names = columns.fixed_values(name.indices), name.dictionary.to_pylist()
        self.kind, self.kinds = columns.fixed_values(kind.indices), kind.dictionary.to_pylist()
        self.data = struct.field("data")
        self._struct = struct

    def rows(self) -> list[list[StoredOutput]]:
        """Return ``(name, kind, bytes or PackSlice)`` of every output of every row."""
        names = [self.names[i] for i in self.name.tolist()]
        kinds = [self.kinds[i] for i in self.kind.tolist()]
        data: list[bytes | PackSlice] = list(columns.binary_values(self.data))
        if self.data.null_count:
            for i in np.flatnonzero(~self.inline()).tolist():
                data[i] = self.slice_of(i)
        flat = list(zip(names, kinds, data, strict=True))
        ends = self.ends.tolist()
        return [flat[lo:hi] for lo, hi in pairwise(ends)]

    def inline(self) -> npt.NDArray[np.bool_]:
        """Say of each output whether its bytes are in ``data``."""
        return columns.bool_values(self.data.is_valid())

    def slice_of(self, i: int) -> PackSlice:
        """Return where the bytes of a large output lie."""
        o = self._struct[i].as_py()
        return PackSlice(self.pack, o["offset"], o["length"], o["digest"])


class FloatTable(NamedTuple):
    """Rows whose outputs are floats of the same names.

    ``bits``: of each float, shape ``(n_succeeded, n_names)``. ``place``: for each row of the segment that succeeded,
    where it is in ``bits``.
    """

    names: tuple[str, ...]
    bits: npt.NDArray[np.uint64]
    place: npt.NDArray[np.int64]


class SegmentTable:
    """The rows of a verified segment.

    Attributes
    ----------
    table
        The Arrow table as stored.
    index, status
        Its first columns as arrays: int64, sorted; positions in ``STORED``.
    """

    def __init__(self, objects: Objects, job: JobId, ref: SegmentRef, table: pa.Table) -> None:
        self._objects = objects
        self.pack = f"{job_folder(job)}/{ref.pack}"
        self.ref, self.table = ref, table
        self.index: npt.NDArray[np.int64] = columns.fixed_values(columns.only_chunk(table, "index"))
        self.status: npt.NDArray[np.uint8] = columns.fixed_values(columns.only_chunk(table, "status"))

    def __len__(self) -> int:
        return len(self.index)

    def row_of(self, index: int) -> int:
        """Return the row that holds an index. Raises KeyError."""
        row = int(np.searchsorted(self.index, index))
        if row == len(self.index) or self.index[row] != index:
            raise KeyError(index)
        return row

    def rows(
        self, indices: Ranges | None = None, *, succeeded_only: bool = True
    ) -> Iterator[tuple[int, bool, list[StoredOutput]]]:
        """Yield ``(index, returned_dict, outputs)`` in order of index; large outputs as `PackSlice`.

        Of indices that the segment does not hold nothing is said.
        """
        chosen = np.ones(len(self), np.bool_)
        if indices is not None:
            chosen[:] = False
            for pair in indices.pairs:
                lo, hi = np.searchsorted(self.index, pair).tolist()
                chosen[lo:hi] = True
        if succeeded_only:
            chosen &= self.status == OUTCOME_CODE[ReplicateStatus.SUCCEEDED]
        table = (
            self.table if chosen.all() else self.table.take(columns.fixed(np.flatnonzero(chosen), pa.int64()))
        )
        returned = table["returned"].to_pylist()
        outputs = OutputsColumn(table, self.pack).rows()
        yield from zip(self.index[chosen].tolist(), returned, outputs, strict=True)

    def outputs_of(self, index: int) -> Any:
        """Return what the model returned for a replicate that succeeded, as it returned it.

        Raises
        ------
        KeyError
            The index is not in this segment, or its replicate did not succeed.
        """
        return decoded(self._objects, *self.stored(index))

    def output_of(self, index: int, name: str) -> Any:
        """Return one output of a replicate that succeeded. Raises KeyError, also if it has no such output."""
        _, outputs = self.stored(index, name)
        return decoded(self._objects, True, outputs)[name]

    def stored(self, index: int, name: str | None = None) -> tuple[bool, list[StoredOutput]]:
        """Return what `output_of` (without a name: `outputs_of`) decodes: whether it was a dict, and the outputs."""
        row = self.row_of(index)
        if self.status[row] != OUTCOME_CODE[ReplicateStatus.SUCCEEDED]:
            raise KeyError(index)
        one = self.table.take(columns.fixed(np.array([row]), pa.int64()))
        outputs = OutputsColumn(one, self.pack).rows()[0]
        if name is not None and name not in (found := [output[0] for output in outputs]):
            raise KeyError(f"there is no output {name!r}; there are: {', '.join(found) or 'none'}")
        return one["returned"][0].as_py(), [o for o in outputs if name is None or o[0] == name]

    @cached_property
    def floats(self) -> FloatTable | None:
        """The outputs of the succeeded rows, if all of these are floats of the same names; None if not."""
        outputs = OutputsColumn(self.table, self.pack)
        lengths = np.diff(outputs.ends)
        has = self.status == OUTCOME_CODE[ReplicateStatus.SUCCEEDED]
        k = int(lengths.max(initial=0))
        if not k or outputs.data.null_count or (lengths != np.where(has, k, 0)).any():
            return None
        names = outputs.name.reshape(-1, k)
        _, sizes = columns.starts_and_sizes(outputs.data)
        kinds = np.unique(outputs.kind).tolist()
        if (
            [outputs.kinds[kind] for kind in kinds] != [FLOAT]
            or (sizes != FLOAT_BYTES).any()
            or (names != names[0]).any()
            or not columns.bool_values(columns.only_chunk(self.table, "returned"))[has].all()
        ):
            return None
        starts, _ = columns.starts_and_sizes(outputs.data)
        bits = outputs.data.buffers()[2].slice(int(starts[0]), len(starts) * FLOAT_BYTES)
        return FloatTable(
            tuple(outputs.names[code] for code in names[0].tolist()),
            np.frombuffer(bits, "<u8").reshape(-1, k),
            np.cumsum(has) - 1,
        )

    def error_of(self, index: int) -> StoredError | None:
        """Return why a replicate did not succeed; None if it did. Raises KeyError."""
        fields = self.table["error"][self.row_of(index)].as_py()
        return None if fields is None else StoredError(**fields)


def decoded(objects: Objects, returned_dict: bool, outputs: Iterable[StoredOutput]) -> Any:
    """Return the value that a model or an aggregate returned, from its stored outputs."""
    from modelops_runner.values import decode  # the bundle's side of the same contract

    values = {
        name: decode(kind, data.read(objects) if isinstance(data, PackSlice) else data)
        for name, kind, data in outputs
    }
    return values if returned_dict else values["value"]


def read_segment(objects: Objects, job: JobId, ref: SegmentRef) -> SegmentTable:
    """Read a committed segment: those of its rows that count.

    Others are in it when it was committed for a part of its indices only, or a part was superseded since.

    Raises
    ------
    IntegrityError
        The stored bytes are not those that were committed, or they lack indices.
    NotFoundError
        The object is gone.
    """
    segment = SegmentTable(objects, job, ref, _read_verified(objects, job, ref))
    stored, counting = ranges_of(segment.index), Ranges(ref.ranges)
    if stored == counting:
        return segment
    if counting - stored:
        raise IntegrityError(f"segment {ref.name} of job {job} does not hold the indices that were committed")
    edges = np.array(counting.pairs, np.int64).ravel()
    rows = np.flatnonzero(np.searchsorted(edges, segment.index, side="right") % 2 == 1)
    return SegmentTable(
        objects, job, ref, segment.table.take(columns.fixed(rows, pa.int64())).combine_chunks()
    )


def read_aggregates(objects: Objects, job: JobId, ref: AggregateRef) -> pa.Table:
    """Read a committed aggregate segment, verified as `read_segment` does."""
    return _read_verified(objects, job, ref)


def open_table(data: bytes, name: str) -> pa.Table:
    """Read an Arrow file of ours; a newer format is refused with a sentence."""
    try:
        table = pa.ipc.open_file(pa.py_buffer(data), options=_READ).read_all()
        found = int((table.schema.metadata or {}).get(b"modelops.format", b"0"))
    except (pa.ArrowException, OSError, ValueError) as e:
        raise IntegrityError(f"{name} is damaged: {e}") from e
    if found > NOT_NEEDED_FORMAT:
        raise RequestError(
            f"{name} was written by a newer ModelOps (format {found}, this one reads up to {NOT_NEEDED_FORMAT}); "
            "upgrade modelops"
        )
    return table


def open_execution(data: bytes, name: str) -> pa.Table:
    """Read execution data, of which nobody has a digest: what cannot be such data is refused."""
    table = open_table(data, name)
    try:
        table.validate(full=True)
    except (pa.ArrowException, ValueError) as e:
        raise IntegrityError(f"{name} is damaged: {e}") from e
    return table


def _read_verified(objects: Objects, job: JobId, ref: SegmentRef | AggregateRef) -> pa.Table:
    name = f"{job_folder(job)}/{ref.name}"
    data = objects.get(name)
    if len(data) != ref.n_bytes:
        raise IntegrityError(
            f"{name} is damaged: it has {len(data)} bytes, and attempt {ref.attempt} stored {ref.n_bytes}"
        )
    if (digest := sha256(data).hexdigest()) != ref.digest:
        raise IntegrityError(
            f"{name} is damaged: its digest is {digest[:12]}..., and attempt {ref.attempt} stored {ref.digest[:12]}..."
        )
    table = open_table(data, name)
    if (owner := (table.schema.metadata or {}).get(b"modelops.job", b"")) != job.encode():
        raise IntegrityError(
            f"{name} is damaged: it was stored for job {owner.decode(errors='replace') or '(none)'}"
        )
    return table
