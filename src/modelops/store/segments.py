"""Segments: the final outcomes of a set of indices, one Arrow file each. Format: docs/reference/segments.md.

A writer only appends to a list while replicates finish; the columns are built once, in `finish`. Bytes go
first (pack, execution data, segment), the row in the database follows, and until it does the segment is
an orphan that harms nobody. A reader verifies the digest before it looks at anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelops.errors import IntegrityError, InternalError, RequestError
from modelops.states import OUTCOMES, AggregateStatus, ReplicateStatus
from modelops.store.objects import AlreadyExistsError, Objects
from modelops.study.ids import AttemptId, JobId
from modelops.study.ranges import Ranges
from modelops.worker.messages import AggregateRef, SegmentRef

FORMAT: Final = 1
INLINE_LIMIT_BYTES: Final = 65_536
AGGREGATE_OUTCOMES: Final = tuple(AggregateStatus)  # the position is the code in the file, never renumbered
_CODE: Final = {status: code for code, status in enumerate(OUTCOMES)}
_AGGREGATE_CODE: Final = {status: code for code, status in enumerate(AGGREGATE_OUTCOMES)}

ERROR_TYPE: Final = pa.struct(
    [
        *((name, pa.string()) for name in ("type", "message", "traceback", "stderr", "fingerprint")),
        ("exit", pa.int32()),
    ]
)
OUTPUT_TYPE: Final = pa.struct(
    [
        ("name", pa.dictionary(pa.int32(), pa.string())),
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        ("data", pa.large_binary()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("digest", pa.binary(32)),
    ]
)
_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)


class SpooledFile(NamedTuple):
    """A large output that the runner wrote; the file belongs to the writer, which moves it into the pack.

    ``sha256``: hexadecimal.
    """

    path: Path
    n_bytes: int
    sha256: str


class StoredError(NamedTuple):
    """Why a replicate or an aggregate did not succeed. ``exit``: as Popen reports a death, None if it was none."""

    type: str
    message: str
    traceback: str = ""
    stderr: str = ""
    fingerprint: str = ""
    exit: int | None = None


class Execution(NamedTuple):
    """How a replicate was run; never part of a result. ``started_unix_s``: seconds since the epoch, UTC."""

    started_unix_s: float
    seconds: float
    cpu_seconds: float
    max_rss_bytes: int | None = None
    attempt_number: int = 1


class PackSlice(NamedTuple):
    """Where a large output lies: a slice of a pack object, and the SHA-256 of its bytes."""

    pack: str
    offset: int
    length: int
    digest: bytes

    def read(self, objects: Objects) -> bytes:
        """Return the bytes. Raises IntegrityError if they are not those that were stored."""
        data = objects.read(self.pack, self.offset, self.length)
        if sha256(data).digest() != self.digest:
            raise IntegrityError(
                f"{self.pack} does not hold at {self.offset} the bytes that were stored there"
            )
        return data


OutputData = bytes | SpooledFile  # what a writer takes; any buffer of bytes will do, e.g. msgspec.Raw
Output = tuple[str, str, OutputData]
StoredOutput = tuple[str, str, bytes | PackSlice]


class SegmentWriter:
    """Collects the outcomes of one attempt and stores them as a segment.

    Parameters
    ----------
    worker, host, pid
        Who ran the replicates; stored with the execution data.
    """

    def __init__(
        self,
        objects: Objects,
        job: JobId,
        attempt: AttemptId,
        *,
        worker: str = "",
        host: str = "",
        pid: int = 0,
    ) -> None:
        self._objects, self._job, self._attempt = objects, job, attempt
        self._who = {"modelops.worker": worker, "modelops.host": host, "modelops.pid": str(pid)}
        self._rows: list[tuple[int, ReplicateStatus, bool, Iterable[Output], StoredError | None]] = []
        self._executions: list[tuple[int, ReplicateStatus, Execution]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        index: int,
        status: ReplicateStatus,
        returned_dict: bool,
        outputs: Iterable[Output],
        error: StoredError | None = None,
        execution: Execution | None = None,
    ) -> None:
        """Take the final outcome of one replicate; the order of calls does not matter.

        Parameters
        ----------
        outputs
            ``(name, kind, data)`` in the order of the model's dict, kinds as in docs/reference/values.md.
            The iterable must not change until `finish`.
        """
        self._rows.append((index, status, returned_dict, outputs, error))
        if execution is not None:
            self._executions.append((index, status, execution))

    def add_execution_only(self, index: int, status: ReplicateStatus, execution: Execution) -> None:
        """Take the execution data of a replicate that will be tried again; its outcome is not stored."""
        self._executions.append((index, status, execution))

    def finish(self) -> SegmentRef | None:
        """Store pack, execution data and segment, in this order, and return what to commit.

        Spooled files are removed once the segment is durable. Calling it again after an error is safe.

        Returns
        -------
            None if no final outcome was added (only execution data was stored).

        Raises
        ------
        StorageError
            Storage did not take the bytes.
        IntegrityError
            A spooled file is not what the runner said it wrote.
        """
        execution = self._store_executions()
        if not self._rows:
            return None
        rows = sorted(self._rows, key=lambda row: row[0])
        indices = np.array([row[0] for row in rows], np.int64)
        if len(rows) > 1 and not (np.diff(indices) > 0).all():
            raise InternalError(f"attempt {self._attempt} has two outcomes for one index")
        body = _Body(
            self._objects,
            self._job,
            self._attempt,
            [(r[2], r[3], r[4]) for r in rows],
            f"packs/{self._attempt}.pack",
        )
        columns = {
            "index": pa.array(indices),
            "status": pa.array([_CODE[row[1]] for row in rows], pa.uint8()),
            **body.columns,
        }
        name = f"segments/{self._attempt}.arrow"
        data = _ipc_file(columns, {**_identity(self._job, self._attempt)})
        _store_once(self._objects, f"{job_folder(self._job)}/{name}", data)
        body.remove_spooled()
        return SegmentRef(
            attempt=self._attempt,
            name=name,
            digest=sha256(data).hexdigest(),
            n_bytes=len(data),
            ranges=_ranges_of(indices).pairs,
            counts=dict(Counter(row[1] for row in rows)),
            pack=body.pack,
            pack_bytes=body.pack_bytes,
            execution=execution,
        )

    def _store_executions(self) -> str | None:
        rows = self._executions
        if not rows:
            return None
        started_us = np.round(np.array([e.started_unix_s for _, _, e in rows]) * 1e6).astype(np.int64)
        columns = {
            "index": pa.array([index for index, _, _ in rows], pa.int64()),
            "status": pa.array([_CODE[status] for _, status, _ in rows], pa.uint8()),
            "attempt_number": pa.array([e.attempt_number for _, _, e in rows], pa.int32()),
            "started_at": pa.array(started_us).cast(pa.timestamp("us", tz="UTC")),
            "seconds": pa.array([e.seconds for _, _, e in rows], pa.float64()),
            "cpu_seconds": pa.array([e.cpu_seconds for _, _, e in rows], pa.float64()),
            "max_rss_bytes": pa.array([e.max_rss_bytes for _, _, e in rows], pa.int64()),
        }
        name = f"executions/{self._attempt}.arrow"
        data = _ipc_file(columns, {**_identity(self._job, self._attempt), **self._who})
        _store_once(self._objects, f"{job_folder(self._job)}/{name}", data)
        return name


class AggregateWriter:
    """Collects the aggregates of some parameter sets and stores them as an aggregate segment."""

    def __init__(self, objects: Objects, job: JobId, attempt: AttemptId) -> None:
        self._objects, self._job, self._attempt = objects, job, attempt
        self._rows: list[
            tuple[int, str, AggregateStatus, int, int, str, bool, list[Output], StoredError | None]
        ]
        self._rows = []

    def add(
        self,
        param: int,
        target: str,
        status: AggregateStatus,
        *,
        n_succeeded: int,
        n_replicates: int,
        reason: str = "",
        returned_dict: bool = True,
        outputs: Iterable[Output] = (),
        error: StoredError | None = None,
    ) -> None:
        """Take how the aggregate ``target`` (an entry point) of one parameter set ended."""
        self._rows.append(
            (param, target, status, n_succeeded, n_replicates, reason, returned_dict, list(outputs), error)
        )

    def finish(self, inputs: Iterable[str]) -> AggregateRef:
        """Store pack and segment and return what to commit; ``inputs``: digests of the segments it read."""
        rows = sorted(self._rows, key=lambda row: row[:2])
        if len({row[:2] for row in rows}) < len(rows):
            raise InternalError(
                f"attempt {self._attempt} has two aggregates for one parameter set and target"
            )
        body = _Body(
            self._objects, self._job, self._attempt, [row[6:] for row in rows], f"packs/{self._attempt}.pack"
        )
        params = np.array([row[0] for row in rows], np.int64)
        targets = pa.array([row[1] for row in rows], pa.string()).dictionary_encode()
        columns = {
            "param": pa.array(params),
            "target": targets.cast(pa.dictionary(pa.int8(), pa.string())),
            "status": pa.array([_AGGREGATE_CODE[row[2]] for row in rows], pa.uint8()),
            "n_succeeded": pa.array([row[3] for row in rows], pa.int64()),
            "n_replicates": pa.array([row[4] for row in rows], pa.int64()),
            "reason": pa.array([_valid_text(row[5]) for row in rows], pa.string()),
            **body.columns,
        }
        name = f"aggregates/{self._attempt}.arrow"
        data = _ipc_file(columns, _identity(self._job, self._attempt))
        _store_once(self._objects, f"{job_folder(self._job)}/{name}", data)
        body.remove_spooled()
        return AggregateRef(
            attempt=self._attempt,
            name=name,
            digest=sha256(data).hexdigest(),
            n_bytes=len(data),
            params=_ranges_of(np.unique(params)).pairs,
            counts=dict(Counter(str(row[2]) for row in rows)),
            inputs=tuple(inputs),
            pack=body.pack,
            pack_bytes=body.pack_bytes,
        )


class _Body:
    """The columns ``returned``, ``error`` and ``outputs`` of some rows; large outputs are stored in a pack."""

    def __init__(
        self,
        objects: Objects,
        job: JobId,
        attempt: AttemptId,
        rows: list[tuple[bool, Iterable[Output], StoredError | None]],
        pack: str,
    ) -> None:
        flat = [output for _, outputs, _ in rows for output in outputs]
        lengths = [len(outputs) if isinstance(outputs, list | tuple) else -1 for _, outputs, _ in rows]
        if -1 in lengths:
            raise InternalError("outputs must be lists or tuples")
        values: list[Any] = [data for _, _, data in flat]
        self._large = [
            (i, data)
            for i, data in enumerate(values)
            if isinstance(data, SpooledFile) or len(data) > INLINE_LIMIT_BYTES
        ]
        self.pack: str | None = pack if self._large else None
        self.pack_bytes = sum(_size(data) for _, data in self._large)
        n = len(flat)
        offsets, sizes = np.zeros(n, np.int64), np.zeros(n, np.int64)
        digests: list[bytes | None] = [None] * n
        inline = np.ones(n, bool)
        at = 0
        for i, data in self._large:
            values[i], inline[i] = b"", False
            offsets[i], sizes[i] = at, _size(data)
            digests[i] = (
                bytes.fromhex(data.sha256) if isinstance(data, SpooledFile) else sha256(data).digest()
            )
            at += _size(data)
        if self._large:
            _store_once(objects, f"{job_folder(job)}/{pack}", _Pack(self._large, self.pack_bytes))
        names = pa.array([name for name, _, _ in flat], pa.string()).dictionary_encode()
        kinds = pa.array([kind for _, kind, _ in flat], pa.string()).dictionary_encode()
        outputs = pa.StructArray.from_arrays(
            [
                names.cast(pa.dictionary(pa.int32(), pa.string())),
                kinds.cast(pa.dictionary(pa.int8(), pa.string())),
                _large_binary(values, inline),
                pa.array(offsets, mask=inline),
                pa.array(sizes, mask=inline),
                pa.array(digests, pa.binary(32)),
            ],
            fields=list(OUTPUT_TYPE),
        )
        ends = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=ends[1:])
        self.columns = {
            "returned": pa.array([returned for returned, _, _ in rows], pa.bool_()),
            "error": pa.array([_error_fields(error) for _, _, error in rows], ERROR_TYPE),
            "outputs": pa.ListArray.from_arrays(pa.array(ends), outputs),
        }

    def remove_spooled(self) -> None:
        for _, data in self._large:
            if isinstance(data, SpooledFile):
                data.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Pack:
    """The bytes of a pack, read from spooled files as they are asked for; can be iterated again."""

    large: list[tuple[int, Any]]
    n_bytes: int

    def __iter__(self) -> Iterator[bytes]:
        for _, data in self.large:
            if isinstance(data, SpooledFile):
                yield from _spooled(data)
            else:
                yield bytes(data)


class SegmentTable:
    """The rows of a verified segment.

    Attributes
    ----------
    table
        The Arrow table as stored.
    index, status
        Its first columns as arrays: int64, sorted; positions in ``OUTCOMES``.
    """

    def __init__(self, objects: Objects, job: JobId, ref: SegmentRef, table: pa.Table) -> None:
        self._objects = objects
        self._pack = f"{job_folder(job)}/{ref.pack}"
        self.ref, self.table = ref, table
        self.index: npt.NDArray[np.int64] = table["index"].to_numpy()
        self.status: npt.NDArray[np.uint8] = table["status"].to_numpy()

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
        """Yield ``(index, returned_dict, outputs)`` in order of index; large outputs as `PackSlice`."""
        keep = (
            np.ones(len(self), bool)
            if not succeeded_only
            else self.status == _CODE[ReplicateStatus.SUCCEEDED]
        )
        if indices is not None:
            inside = np.zeros(len(self), bool)
            for lo, hi in indices.pairs:
                inside[slice(*np.searchsorted(self.index, (lo, hi)))] = True
            keep &= inside
        chosen = self.table if keep.all() else self.table.filter(pa.array(keep))
        for batch in chosen.select(["index", "returned", "outputs"]).to_batches(max_chunksize=4096):
            columns = (batch.column(i).to_pylist() for i in range(3))
            for index, returned, outputs in zip(*columns, strict=True):
                yield index, returned, [self._output(o) for o in outputs]

    def outputs_of(self, index: int) -> Any:
        """Return what the model returned for a replicate that succeeded, as it returned it.

        Raises
        ------
        KeyError
            The index is not in this segment, or its replicate did not succeed.
        """
        row = self.row_of(index)
        if self.status[row] != _CODE[ReplicateStatus.SUCCEEDED]:
            raise KeyError(index)
        outputs = [self._output(o) for o in self.table["outputs"][row].as_py()]
        return decoded(self._objects, bool(self.table["returned"][row].as_py()), outputs)

    def error_of(self, index: int) -> StoredError | None:
        """Return why a replicate did not succeed; None if it did. Raises KeyError."""
        fields = self.table["error"][self.row_of(index)].as_py()
        return None if fields is None else StoredError(**fields)

    def _output(self, o: dict[str, Any]) -> StoredOutput:
        if o["data"] is not None:
            return o["name"], o["kind"], o["data"]
        return o["name"], o["kind"], PackSlice(self._pack, o["offset"], o["length"], o["digest"])


def decoded(objects: Objects, returned_dict: bool, outputs: Iterable[StoredOutput]) -> Any:
    """Return the value that a model or an aggregate returned, from its stored outputs."""
    from modelops_runner.values import decode  # the bundle's side of the same contract

    values = {
        name: decode(kind, data.read(objects) if isinstance(data, PackSlice) else data)
        for name, kind, data in outputs
    }
    return values if returned_dict else values["value"]


def read_segment(objects: Objects, job: JobId, ref: SegmentRef) -> SegmentTable:
    """Read a committed segment.

    Raises
    ------
    IntegrityError
        The stored bytes are not those that were committed, or they hold other indices.
    NotFoundError
        The object is gone.
    """
    table = SegmentTable(objects, job, ref, _read_table(objects, job, ref))
    if _ranges_of(table.index).pairs != tuple(ref.ranges):
        raise IntegrityError(f"segment {ref.name} of job {job} does not hold the indices that were committed")
    return table


def read_aggregates(objects: Objects, job: JobId, ref: AggregateRef) -> pa.Table:
    """Read a committed aggregate segment, verified as `read_segment` does."""
    return _read_table(objects, job, ref)


def _read_table(objects: Objects, job: JobId, ref: SegmentRef | AggregateRef) -> pa.Table:
    name = f"{job_folder(job)}/{ref.name}"
    data = objects.get(name)
    if len(data) != ref.n_bytes or sha256(data).hexdigest() != ref.digest:
        raise IntegrityError(
            f"{name} is damaged: {len(data)} bytes with another digest than the {ref.n_bytes} bytes committed "
            f"by attempt {ref.attempt}"
        )
    return open_table(data, name)


def open_table(data: bytes, name: str) -> pa.Table:
    """Read an Arrow file of ours whose digest was verified, or which has none (execution data)."""
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    except (pa.ArrowInvalid, OSError) as e:
        raise IntegrityError(f"{name} is damaged: {e}") from e
    metadata = table.schema.metadata or {}
    found = int(metadata.get(b"modelops.format", b"0"))
    if found > FORMAT:
        raise RequestError(
            f"{name} was written by a newer ModelOps (format {found}, this one reads up to {FORMAT}); "
            "upgrade modelops"
        )
    return table


def job_folder(job: JobId) -> str:
    """Return the name below which the objects of a job lie."""
    return f"v1/jobs/{job}"


def _identity(job: JobId, attempt: AttemptId) -> dict[str, str]:
    return {"modelops.format": str(FORMAT), "modelops.job": job, "modelops.attempt": attempt}


def _ipc_file(columns: dict[str, pa.Array], metadata: dict[str, str]) -> bytes:
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    batch = batch.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=_OPTIONS) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _store_once(objects: Objects, name: str, content: bytes | _Pack) -> None:
    """Store under the attempt's own name; the same bytes there already are a repeat whose answer was lost."""
    try:
        objects.put_new(name, content)
    except AlreadyExistsError:
        digest = sha256()
        for piece in [content] if isinstance(content, bytes) else content:
            digest.update(piece)
        stored = sha256()
        for piece in objects.stream(name):
            stored.update(piece)
        if stored.digest() != digest.digest():
            raise


def _large_binary(values: list[Any], inline: npt.NDArray[np.bool_]) -> pa.Array:
    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(v) for v in values], out=ends[1:])
    validity = None if inline.all() else pa.py_buffer(np.packbits(inline, bitorder="little").tobytes())
    buffers = [validity, pa.py_buffer(ends), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


def _error_fields(error: StoredError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {k: _valid_text(v) if isinstance(v, str) else v for k, v in error._asdict().items()}


def _valid_text(text: str) -> str:
    """Return text that UTF-8 can hold; lone surrogates, as ``surrogateescape`` makes them, are spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _size(data: Any) -> int:
    return data.n_bytes if isinstance(data, SpooledFile) else len(data)


def _spooled(file: SpooledFile) -> Iterator[bytes]:
    digest, n_bytes = sha256(), 0
    with file.path.open("rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
            n_bytes += len(piece)
            yield piece
    if n_bytes != file.n_bytes or digest.hexdigest() != file.sha256:
        raise IntegrityError(f"the spooled output {file.path} is not what the runner said it wrote")


def _ranges_of(indices: npt.NDArray[np.int64]) -> Ranges:
    """Return sorted, distinct integers as ranges."""
    breaks = np.flatnonzero(np.diff(indices) != 1)
    starts = indices[np.concatenate(([0], breaks + 1))] if len(indices) else indices
    ends = indices[np.concatenate((breaks, [len(indices) - 1]))] + 1 if len(indices) else indices
    return Ranges(zip(starts.tolist(), ends.tolist(), strict=True))
