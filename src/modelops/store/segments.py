"""Segments: the final outcomes of a set of indices, one Arrow file each. Format: docs/reference/segments.md.

A writer only appends to a list while replicates finish; the columns are built once, in `finish`. Bytes go
first (pack, execution data, segment), the row in the database follows, and until it does the segment is
an orphan that harms nobody. Its name has a part of its digest, so that it can be verified without its row.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from modelops.errors import IntegrityError, InternalError
from modelops.states import OUTCOMES, AggregateStatus, ReplicateStatus
from modelops.store import columns
from modelops.store.objects import COPY_BYTES, AlreadyExistsError, Objects
from modelops.study.ranges import Ranges
from modelops.worker.messages import AggregateRef, SegmentRef

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from modelops.study.ids import AttemptId, JobId

FORMAT: Final = 1
DIGITS_IN_NAME: Final = 32  # of the SHA-256 of a segment
INLINE_LIMIT_BYTES: Final = 65_536
AGGREGATE_OUTCOMES: Final = tuple(AggregateStatus)  # the position is the code in the file, never renumbered
OUTCOME_CODE: Final = {status: code for code, status in enumerate(OUTCOMES)}
AGGREGATE_CODE: Final = {status: code for code, status in enumerate(AGGREGATE_OUTCOMES)}

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


class SpooledFile(NamedTuple):
    """A large output in a file that the runner wrote and that belongs to the segment's writer now.

    ``sha256``: hexadecimal.
    """

    path: Path
    n_bytes: int
    sha256: str


class StoredError(NamedTuple):
    """Why a replicate or an aggregate did not succeed.

    ``exit``: how the process died, as Popen reports it; None if it was no death.
    """

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
            raise IntegrityError(f"{self.pack} does not hold the {self.length} bytes stored at {self.offset}")
        return data

    def verify(self, objects: Objects) -> None:
        """Read the bytes, a piece at a time. Raises IntegrityError as `read` does."""
        digest = sha256()
        for at in range(0, self.length, COPY_BYTES):
            digest.update(objects.read(self.pack, self.offset + at, min(COPY_BYTES, self.length - at)))
        if digest.digest() != self.digest:
            raise IntegrityError(f"{self.pack} does not hold the {self.length} bytes stored at {self.offset}")

    def copy_to(self, objects: Objects, path: Path) -> None:
        """Write the bytes to a new file, a piece at a time. Raises IntegrityError as `read` does."""
        try:
            with path.open("xb") as f:
                f.writelines(self.pieces(objects))
        except IntegrityError:
            path.unlink()
            raise

    def pieces(self, objects: Objects) -> Iterator[bytes]:
        """Yield the bytes piece by piece. Raises IntegrityError at the end if they are not those that were stored."""
        digest = sha256()
        for at in range(0, self.length, COPY_BYTES):
            piece = objects.read(self.pack, self.offset + at, min(COPY_BYTES, self.length - at))
            digest.update(piece)
            yield piece
        if digest.digest() != self.digest:
            raise IntegrityError(f"{self.pack} does not hold the {self.length} bytes stored at {self.offset}")


OutputData = bytes | SpooledFile  # bytes: any buffer of bytes will do, e.g. msgspec.Raw
Output = tuple[str, str, OutputData]


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
        self._rows: list[tuple[int, ReplicateStatus, bool, Sequence[Output], StoredError | None]] = []
        self._executions: list[tuple[int, ReplicateStatus, Execution]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def rename(self, attempt: AttemptId) -> None:
        """Store it under the id of another attempt; before `finish`."""
        self._attempt = attempt

    def add(
        self,
        index: int,
        status: ReplicateStatus,
        returned_dict: bool,
        outputs: Sequence[Output],
        error: StoredError | None = None,
        execution: Execution | None = None,
    ) -> None:
        """Take the final outcome of one replicate; the order of calls does not matter.

        Parameters
        ----------
        outputs
            ``(name, kind, data)`` in the order of the model's dict, kinds as in docs/reference/values.md.
            Kept as it is: it must not change until `finish`.
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
        rows = sorted(self._rows, key=itemgetter(0))
        indices = _column(rows, 0, np.int64)
        if not (np.diff(indices) > 0).all():
            raise InternalError(f"attempt {self._attempt} has two outcomes for one index")
        body = _Body(
            self._objects,
            self._job,
            self._attempt,
            [r[2] for r in rows],
            [r[3] for r in rows],
            [r[4] for r in rows],
        )
        codes = np.fromiter((OUTCOME_CODE[row[1]] for row in rows), np.uint8, len(rows))
        stored = _store_table(
            self._objects,
            self._job,
            self._attempt,
            "segments",
            {
                "index": columns.fixed(indices, pa.int64()),
                "status": columns.fixed(codes, pa.uint8()),
                **body.columns,
            },
        )
        body.remove_spooled()
        counts = np.bincount(codes, minlength=len(OUTCOMES)).tolist()
        return SegmentRef(
            attempt=self._attempt,
            name=stored.name,
            digest=stored.digest,
            n_bytes=stored.n_bytes,
            ranges=ranges_of(indices).pairs,
            counts={status: n for status, n in zip(OUTCOMES, counts, strict=True) if n},
            pack=body.pack,
            pack_bytes=body.pack_bytes,
            execution=execution,
        )

    def _store_executions(self) -> str | None:
        rows, n = self._executions, len(self._executions)
        if not rows:
            return None
        runs = [execution for _, _, execution in rows]
        rss = [e.max_rss_bytes for e in runs]
        known = np.fromiter((r is not None for r in rss), np.bool_, n)
        started_us = np.round(_column(runs, 0, np.float64) * 1e6).astype(np.int64)
        table = {
            "index": columns.fixed(_column(rows, 0, np.int64), pa.int64()),
            "status": columns.fixed(
                np.fromiter((OUTCOME_CODE[status] for _, status, _ in rows), np.uint8, n), pa.uint8()
            ),
            "attempt_number": columns.fixed(_column(runs, 4, np.int32), pa.int32()),
            "started_at": columns.fixed(started_us, pa.timestamp("us", tz="UTC")),
            "seconds": columns.fixed(_column(runs, 1, np.float64), pa.float64()),
            "cpu_seconds": columns.fixed(_column(runs, 2, np.float64), pa.float64()),
            "max_rss_bytes": columns.fixed(np.array([r or 0 for r in rss], np.int64), pa.int64(), known),
        }
        name = f"executions/{self._attempt}.arrow"
        # Dask may run a task again whose receipt was lost. The outcomes are the same then, the times are not:
        # those of the first run stay.
        with contextlib.suppress(AlreadyExistsError):
            data = _table_bytes(self._job, self._attempt, table, self._who)
            self._objects.put_new(f"{job_folder(self._job)}/{name}", data)
        return name


class AggregateRow(NamedTuple):
    """How one aggregate (``target``, an entry point) of one parameter set ended."""

    param: int
    target: str
    status: AggregateStatus
    n_succeeded: int
    n_replicates: int
    reason: str = ""
    returned_dict: bool = True
    outputs: Sequence[Output] = ()
    error: StoredError | None = None


class AggregateWriter:
    """Collects the aggregates of some parameter sets and stores them as an aggregate segment."""

    def __init__(self, objects: Objects, job: JobId, attempt: AttemptId) -> None:
        self._objects, self._job, self._attempt = objects, job, attempt
        self._rows: list[AggregateRow] = []

    def add(self, row: AggregateRow) -> None:
        """Take one row; the order of calls does not matter."""
        self._rows.append(row)

    def finish(self, inputs: Iterable[str]) -> AggregateRef:
        """Store pack and segment and return what to commit. ``inputs``: digests of the segments it read."""
        rows = sorted(self._rows, key=itemgetter(0, 1))
        if len({row[:2] for row in rows}) < len(rows):
            raise InternalError(f"attempt {self._attempt} has two rows for one parameter set and target")
        body = _Body(
            self._objects,
            self._job,
            self._attempt,
            [row.returned_dict for row in rows],
            [row.outputs for row in rows],
            [row.error for row in rows],
        )
        params = _column(rows, 0, np.int64)
        codes = np.fromiter((AGGREGATE_CODE[row.status] for row in rows), np.uint8, len(rows))
        stored = _store_table(
            self._objects,
            self._job,
            self._attempt,
            "aggregates",
            {
                "param": columns.fixed(params, pa.int64()),
                "target": columns.words([row.target for row in rows], pa.int8()),
                "status": columns.fixed(codes, pa.uint8()),
                "n_succeeded": columns.fixed(_column(rows, 3, np.int64), pa.int64()),
                "n_replicates": columns.fixed(_column(rows, 4, np.int64), pa.int64()),
                "reason": columns.text([row.reason for row in rows]),
                **body.columns,
            },
        )
        body.remove_spooled()
        return AggregateRef(
            attempt=self._attempt,
            name=stored.name,
            digest=stored.digest,
            n_bytes=stored.n_bytes,
            params=ranges_of(np.unique(params)).pairs,
            counts=dict(Counter(str(row.status) for row in rows)),
            inputs=tuple(inputs),
            pack=body.pack,
            pack_bytes=body.pack_bytes,
        )


def job_folder(job: JobId) -> str:
    """Return the name below which the objects of a job lie."""
    return f"v1/jobs/{job}"


def ranges_of(indices: npt.NDArray[np.int64]) -> Ranges:
    """Return sorted, distinct integers as ranges."""
    if not len(indices):
        return Ranges()
    breaks = np.flatnonzero(np.diff(indices) != 1)
    starts = indices[np.concatenate(([0], breaks + 1))]
    ends = indices[np.concatenate((breaks, [len(indices) - 1]))] + 1
    return Ranges(zip(starts.tolist(), ends.tolist(), strict=True))


class _Body:
    """The columns ``returned``, ``error`` and ``outputs``; storing the large outputs in a pack."""

    def __init__(
        self,
        objects: Objects,
        job: JobId,
        attempt: AttemptId,
        returned: list[bool],
        outputs: list[Sequence[Output]],
        errors: list[StoredError | None],
    ) -> None:
        flat = list(chain.from_iterable(outputs))
        n = len(flat)
        data: list[Any] = [value for _, _, value in flat]
        self._large = _take_large(data)
        self.pack: str | None = f"packs/{attempt}.pack" if self._large else None
        self.pack_bytes = 0
        packed = np.zeros(n, np.bool_)
        offsets, sizes, digests = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, 32), np.uint8)
        for i, value in self._large:
            packed[i], offsets[i], sizes[i] = True, self.pack_bytes, _size(value)
            digests[i] = np.frombuffer(_digest(value), np.uint8)
            self.pack_bytes += _size(value)
        if self.pack:
            _store_once(objects, f"{job_folder(job)}/{self.pack}", _Pack(self._large))
        fields = [
            columns.words([name for name, _, _ in flat], pa.int32()),
            columns.words([kind for _, kind, _ in flat], pa.int8()),
            columns.binary(data, ~packed),
            columns.fixed(offsets, pa.int64(), packed),
            columns.fixed(sizes, pa.int64(), packed),
            columns.fixed(digests, pa.binary(32), packed),
        ]
        self.columns = {
            "returned": columns.bools(returned),
            "error": _errors(errors),
            "outputs": columns.lists(
                map(len, outputs), len(outputs), pa.StructArray.from_arrays(fields, fields=list(OUTPUT_TYPE))
            ),
        }

    def remove_spooled(self) -> None:
        for _, data in self._large:
            if isinstance(data, SpooledFile):
                data.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Pack:
    """The bytes of a pack, read from spooled files as they are asked for; can be iterated again."""

    large: list[tuple[int, Any]]

    def __iter__(self) -> Iterator[bytes]:
        for _, data in self.large:
            if isinstance(data, SpooledFile):
                yield from _spooled(data)
            else:
                yield bytes(data)


class _Stored(NamedTuple):
    name: str
    digest: str
    n_bytes: int


def _store_table(
    objects: Objects, job: JobId, attempt: AttemptId, folder: str, named: Mapping[str, pa.Array]
) -> _Stored:
    data = _table_bytes(job, attempt, named, {})
    digest = sha256(data).hexdigest()
    name = f"{folder}/{attempt}.{digest[:DIGITS_IN_NAME]}.arrow"
    with contextlib.suppress(AlreadyExistsError):  # its name says what is in it
        objects.put_new(f"{job_folder(job)}/{name}", data)
    return _Stored(name, digest, len(data))


def _table_bytes(
    job: JobId, attempt: AttemptId, named: Mapping[str, pa.Array], metadata: Mapping[str, str]
) -> bytes:
    identity = {"modelops.format": str(FORMAT), "modelops.job": job, "modelops.attempt": attempt}
    schema = pa.schema(
        [pa.field(name, column.type) for name, column in named.items()], {**identity, **metadata}
    )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(named.values()), schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _store_once(objects: Objects, name: str, content: _Pack) -> None:
    """Store under the attempt's own name; the same bytes there already are a repeat whose answer was lost."""
    try:
        objects.put_new(name, content)
    except AlreadyExistsError:
        if _digest_of(content) != _digest_of(objects.stream(name)):
            raise


def _digest_of(pieces: Iterable[bytes]) -> bytes:
    digest = sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _take_large(data: list[Any]) -> list[tuple[int, Any]]:
    """Take out of ``data`` what belongs into the pack, leaving ``b""``; return it with its positions."""
    if SpooledFile in set(map(type, data)):
        where = [i for i, v in enumerate(data) if isinstance(v, SpooledFile) or len(v) > INLINE_LIMIT_BYTES]
    else:
        sizes = np.fromiter(map(len, data), np.int64, len(data))
        where = np.flatnonzero(sizes > INLINE_LIMIT_BYTES).tolist()
    large = [(i, data[i]) for i in where]
    for i in where:
        data[i] = b""
    return large


def _errors(errors: list[StoredError | None]) -> pa.Array:
    n = len(errors)
    fields = []
    for i, field in enumerate(ERROR_TYPE):
        values: list[Any] = [None if e is None else e[i] for e in errors]
        if field.type == pa.string():
            fields.append(columns.text(values))
        else:
            known = np.fromiter((v is not None for v in values), np.bool_, n)
            fields.append(columns.fixed(np.array([v or 0 for v in values], np.int32), field.type, known))
    return columns.structs(fields, ERROR_TYPE, np.fromiter((e is not None for e in errors), np.bool_, n))


def _column(rows: Sequence[tuple[Any, ...]], i: int, dtype: Any) -> npt.NDArray[Any]:
    return np.fromiter(map(itemgetter(i), rows), dtype, len(rows))


def _size(data: Any) -> int:
    return data.n_bytes if isinstance(data, SpooledFile) else len(data)


def _digest(data: Any) -> bytes:
    return bytes.fromhex(data.sha256) if isinstance(data, SpooledFile) else sha256(data).digest()


def _spooled(file: SpooledFile) -> Iterator[bytes]:
    digest, n_bytes = sha256(), 0
    with file.path.open("rb") as f:
        while piece := f.read(COPY_BYTES):
            digest.update(piece)
            n_bytes += len(piece)
            yield piece
    if n_bytes != file.n_bytes or digest.hexdigest() != file.sha256:
        raise IntegrityError(f"the spooled output {file.path} is not what the runner said it wrote")
