"""Segments: the final outcomes of a set of indices, one Arrow file each. Format: docs/reference/segments.md.

A writer only appends to a list while replicates finish; the columns are built once, in `finish`. Bytes go
first (pack, execution data, segment), the row in the database follows, and until it does the segment is
an orphan that harms nobody. Its name has a part of its digest, so that it can be verified without its row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from modelops.counters import EDGES, Durations, Measured
from modelops.errors import IntegrityError, InternalError
from modelops.states import STORED, ReplicateStatus
from modelops.store import columns
from modelops.store.objects import COPY_BYTES, Objects
from modelops.store.order import indices_in
from modelops.store.segment_body import (
    Body,
    Floats,
    Listed,
    Output,
    StoredError,
)
from modelops.study.ranges import Ranges
from modelops.worker.messages import NO_NUMBER, NoNumbers, SegmentRef

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from modelops.study.ids import AttemptId, JobId

FORMAT: Final = 1
FLOATS_FORMAT: Final = 2  # of segments with outputs of kind `f8`, which a reader of format 1 does not know
NOT_NEEDED_FORMAT: Final = 3  # of segments that say of replicates that they are not needed
DIGITS_IN_NAME: Final = 32  # of the SHA-256 of a segment
OUTCOME_CODE: Final = {status: code for code, status in enumerate(STORED)}


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


class FloatRows(NamedTuple):
    """Replicates that succeeded and returned a dict of floats, and how they were run.

    ``values``: 8 bytes for each name of each replicate, IEEE 754, little-endian. The others have one entry for each
    replicate, but for ``max_rss_bytes`` and ``attempt_number``, which are of all.
    """

    names: tuple[str, ...]
    indices: Sequence[int] | npt.NDArray[np.int64]
    values: bytes
    started_unix_s: Sequence[float] | npt.NDArray[np.float64]
    seconds: Sequence[float] | npt.NDArray[np.float64]
    cpu_seconds: Sequence[float] | npt.NDArray[np.float64]
    max_rss_bytes: int | None = None
    attempt_number: int = 1


class SegmentWriter:
    """Collects the outcomes of one attempt and stores them as a segment.

    Parameters
    ----------
    worker, host, pid
        Who ran the replicates; stored with the execution data.
    watches
        Whether each outcome comes with a number for the driver, see `modelops.store.watched`.
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
        watches: bool = False,
    ) -> None:
        self._watched: dict[int, float | str] | None = {} if watches else None
        self._objects, self._job, self._attempt = objects, job, attempt
        self._who = {"modelops.worker": worker, "modelops.host": host, "modelops.pid": str(pid)}
        self._parts: list[list[_Row] | FloatRows] = []
        self._executions: list[list[tuple[int, ReplicateStatus, Execution]] | FloatRows] = []
        self._n = 0

    def __len__(self) -> int:
        return self._n

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
        watched: float | str = math.nan,
    ) -> None:
        """Take the final outcome of one replicate; the order of calls does not matter.

        Parameters
        ----------
        outputs
            ``(name, kind, data)`` in the order of the model's dict, kinds as in docs/reference/values.md.
            Kept as it is: it must not change until `finish`.
        watched
            The number of the output that ``until`` watches, or in words what it is instead.
        """
        if not self._parts or type(self._parts[-1]) is not list:
            self._parts.append([])
        self._parts[-1].append((index, status, returned_dict, outputs, error))  # type: ignore[union-attr]
        self._n += 1
        if self._watched is not None:
            self._watched[index] = watched
        if execution is not None:
            self.add_execution_only(index, status, execution)

    def add_floats(self, rows: FloatRows, watched: Iterable[float] | Iterable[str] = ()) -> None:
        """Take the outcomes of many replicates that returned nothing but floats. ``watched``: as in `add`, of each."""
        if self._watched is not None:
            self._watched.update(zip(np.asarray(rows.indices).tolist(), watched, strict=True))
        self._parts.append(rows)
        self._executions.append(rows)
        self._n += len(rows.indices)

    def add_execution_only(self, index: int, status: ReplicateStatus, execution: Execution) -> None:
        """Take the execution data of a replicate that will be tried again; its outcome is not stored."""
        if not self._executions or type(self._executions[-1]) is not list:
            self._executions.append([])
        self._executions[-1].append((index, status, execution))  # type: ignore[union-attr]

    def finish(self) -> SegmentRef | None:
        """Store the pack, then execution data and segment together, and return what to commit.

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
        name, data, durations = self._execution_data()
        execution = {} if data is None else {f"{job_folder(self._job)}/{name}": data}
        if not self._n:
            self._objects.put_together(execution, unknown=True)
            return None
        parts = self._parts
        indices = _indices_of(parts)
        if not (np.diff(indices) > 0).all():
            parts = [_in_order(parts)]
            indices = _indices_of(parts)
            if not (np.diff(indices) > 0).all():
                raise InternalError(f"attempt {self._attempt} has two outcomes for one index")
        body = Body(
            self._objects,
            job_folder(self._job),
            f"packs/{self._attempt}.pack",
            [_body_part(p) for p in parts],
        )
        codes = np.concatenate(
            [
                _succeeded(len(part.indices)) if isinstance(part, FloatRows) else _codes_of(part)
                for part in parts
            ]
        )
        stored = store_table(
            self._objects,
            self._job,
            self._attempt,
            "segments",
            {
                "index": columns.fixed(indices, pa.int64()),
                "status": columns.fixed(codes, pa.uint8()),
                **body.columns,
            },
            FLOATS_FORMAT if any(isinstance(part, FloatRows) for part in parts) else FORMAT,
            first=execution,
        )
        body.remove_spooled()
        counts = np.bincount(codes, minlength=len(STORED)).tolist()
        watched: bytes | None = None
        no_numbers: NoNumbers = ()
        if self._watched is not None:
            found = [self._watched[k] for k in indices.tolist()]
            watched, no_numbers = watched_bytes(codes, indices, found)
        return SegmentRef(
            attempt=self._attempt,
            name=stored.name,
            digest=stored.digest,
            n_bytes=stored.n_bytes,
            ranges=ranges_of(indices).pairs,
            counts={status: n for status, n in zip(STORED, counts, strict=True) if n},
            pack=body.pack,
            pack_bytes=body.pack_bytes,
            execution=name,
            durations=durations,
            watched=watched,
            no_numbers=no_numbers,
        )

    def _execution_data(self) -> tuple[str | None, bytes | None, Durations | None]:
        """Return the name and the content of the object with the execution data, if there is any, and durations.

        Dask may run a task again whose receipt was lost. The outcomes are the same then, the times are not, and those
        of the first run stay: they have the same name.
        """
        if not self._executions:
            return None, None, None
        parts = [_execution_columns(part) for part in self._executions]
        index, status, number, started_us, seconds, cpu_seconds, rss = map(
            np.concatenate, zip(*parts, strict=True)
        )
        table = {
            "index": columns.fixed(index, pa.int64()),
            "status": columns.fixed(status, pa.uint8()),
            "attempt_number": columns.fixed(number, pa.int32()),
            "started_at": columns.fixed(started_us, pa.timestamp("us", tz="UTC")),
            "seconds": columns.fixed(seconds, pa.float64()),
            "cpu_seconds": columns.fixed(cpu_seconds, pa.float64()),
            "max_rss_bytes": columns.fixed(np.maximum(rss, 0), pa.int64(), rss >= 0),
        }
        if self._n and len(index) > self._n:  # those that will be tried again have no outcome yet
            seconds = seconds[np.isin(index, _indices_of(self._parts))]
        data = _table_bytes(self._job, self._attempt, table, self._who)
        return f"executions/{self._attempt}.arrow", data, _durations_of(seconds)


def _durations_of(seconds: npt.NDArray[np.float64]) -> Durations:
    edges = EDGES[Measured.REPLICATES]
    places = np.searchsorted(edges, seconds)
    counts = np.bincount(places, minlength=len(edges) + 1)
    return Durations(tuple(counts.tolist()), float(seconds.sum()))


def store_not_needed(objects: Objects, job: JobId, attempt: AttemptId, indices: Ranges) -> SegmentRef:
    """Store a segment that says of these replicates, and of no others, that they are not needed."""
    n = len(indices)
    index = indices_in(indices.pairs)
    codes = np.full(n, OUTCOME_CODE[ReplicateStatus.NOT_NEEDED], np.uint8)
    named = {
        "index": columns.fixed(index, pa.int64()),
        "status": columns.fixed(codes, pa.uint8()),
        **Body(objects, job_folder(job), "", [Floats(n, (), b"")]).columns,
    }
    stored = store_table(objects, job, attempt, "segments", named, NOT_NEEDED_FORMAT)
    return SegmentRef(
        attempt=attempt,
        name=stored.name,
        digest=stored.digest,
        n_bytes=stored.n_bytes,
        ranges=indices.pairs,
        counts={ReplicateStatus.NOT_NEEDED: n},
    )


def watched_bytes(
    codes: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64], found: Sequence[float | str]
) -> tuple[bytes, NoNumbers]:
    """Return what `modelops.driver.needs` reads: a code for each outcome, then a number for each outcome.

    ``found``: the number of each, or in words what there is instead; which ones that is said of is returned, too.
    """
    said: defaultdict[str, list[int]] = defaultdict(list)
    numbers, codes = np.full(len(found), math.nan), codes.astype(np.uint8)
    for i, one in enumerate(found):
        if isinstance(one, str):
            said[one].append(int(indices[i]))
            codes[i] = NO_NUMBER
        else:
            numbers[i] = one
    no_numbers = tuple((text, Ranges.of(ks).pairs) for text, ks in said.items())
    return codes.tobytes() + numbers.astype("<f8").tobytes(), no_numbers


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


class Stored(NamedTuple):
    """A file that was stored; ``name``: below the job's folder."""

    name: str
    digest: str
    n_bytes: int


def store_table(
    objects: Objects,
    job: JobId,
    attempt: AttemptId,
    folder: str,
    named: Mapping[str, pa.Array],
    number: int = FORMAT,
    *,
    first: Mapping[str, bytes] = MappingProxyType({}),
) -> Stored:
    """Store a table under a name that says what is in it, and beside it, before it, what ``first`` holds."""
    data = _table_bytes(job, attempt, named, {}, number)
    digest = sha256(data).hexdigest()
    name = f"{folder}/{attempt}.{digest[:DIGITS_IN_NAME]}.arrow"
    # One that is taken is the same. After a crash nobody goes by a name: what is not whole has another digest.
    objects.put_together({**first, f"{job_folder(job)}/{name}": data}, unknown=True)
    return Stored(name, digest, len(data))


def _table_bytes(
    job: JobId,
    attempt: AttemptId,
    named: Mapping[str, pa.Array],
    metadata: Mapping[str, str],
    number: int = FORMAT,
) -> bytes:
    identity = {"modelops.format": str(number), "modelops.job": job, "modelops.attempt": attempt}
    schema = pa.schema(
        [pa.field(name, column.type) for name, column in named.items()], {**identity, **metadata}
    )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(named.values()), schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


_Row = tuple[int, ReplicateStatus, bool, Sequence[Output], StoredError | None]
_Part = list[_Row] | FloatRows


def _column(rows: Sequence[tuple[Any, ...]], i: int, dtype: Any) -> npt.NDArray[Any]:
    return np.fromiter(map(itemgetter(i), rows), dtype, len(rows))


def _indices_of(parts: Sequence[_Part]) -> npt.NDArray[np.int64]:
    return np.concatenate(
        [
            np.array(part.indices, np.int64) if isinstance(part, FloatRows) else _column(part, 0, np.int64)
            for part in parts
        ]
    )


def _codes_of(rows: Sequence[tuple[Any, ...]]) -> npt.NDArray[np.uint8]:
    """Return the codes of the statuses, which come second in each row."""
    return np.fromiter((OUTCOME_CODE[row[1]] for row in rows), np.uint8, len(rows))


def _succeeded(n: int) -> npt.NDArray[np.uint8]:
    return np.full(n, OUTCOME_CODE[ReplicateStatus.SUCCEEDED], np.uint8)


def _body_part(part: _Part) -> Listed | Floats:
    if isinstance(part, FloatRows):
        return Floats(len(part.indices), part.names, part.values)
    return Listed([row[2] for row in part], [row[3] for row in part], [row[4] for row in part])


def _in_order(parts: Sequence[_Part]) -> list[_Row]:
    """Return all rows by index, one by one."""
    rows: list[_Row] = []
    for part in parts:
        if isinstance(part, FloatRows):
            outputs = Floats(len(part.indices), part.names, part.values).listed().outputs
            rows += [
                (int(index), ReplicateStatus.SUCCEEDED, True, out, None)
                for index, out in zip(part.indices, outputs, strict=True)
            ]
        else:
            rows += part
    return sorted(rows, key=itemgetter(0))


def _execution_columns(
    part: list[tuple[int, ReplicateStatus, Execution]] | FloatRows,
) -> tuple[npt.NDArray[Any], ...]:
    """Return index, status, number of the attempt, start (us), seconds, CPU seconds and memory (-1: not known)."""
    if isinstance(part, FloatRows):
        n = len(part.indices)
        rss = -1 if part.max_rss_bytes is None else part.max_rss_bytes
        return (
            np.array(part.indices, np.int64),
            _succeeded(n),
            np.full(n, part.attempt_number, np.int32),
            np.round(np.array(part.started_unix_s, np.float64) * 1e6).astype(np.int64),
            np.array(part.seconds, np.float64),
            np.array(part.cpu_seconds, np.float64),
            np.full(n, rss, np.int64),
        )
    runs = [execution for _, _, execution in part]
    return (
        _column(part, 0, np.int64),
        _codes_of(part),
        _column(runs, 4, np.int32),
        np.round(_column(runs, 0, np.float64) * 1e6).astype(np.int64),
        _column(runs, 1, np.float64),
        _column(runs, 2, np.float64),
        np.array([-1 if e.max_rss_bytes is None else e.max_rss_bytes for e in runs], np.int64),
    )
