"""``parameters.parquet``: the parameter sets of a job, written once at submission, read by row group.

A job that gets more sets gets another object, which holds all of them.
"""

from __future__ import annotations

import contextlib
import threading
from functools import lru_cache, partial
from hashlib import sha256
from itertools import islice
from tempfile import SpooledTemporaryFile, TemporaryFile
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modelops.errors import IntegrityError, NotFoundError, RequestError
from modelops.store import columns
from modelops.store.behind import Behind
from modelops.store.objects import IN_MEMORY_BYTES, AlreadyExistsError, pieces_of
from modelops.store.segments import FORMAT, job_folder
from modelops.study.canonical import id_bytes, parse_canonical
from modelops.study.ids import ParamId
from modelops.study.spec import FIRST_PARAMETERS
from modelops.volumes import temporary_files_are

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from modelops.store.objects import Objects
    from modelops.study.ids import JobId

ROW_GROUP: Final = 65_536
ID_BYTES: Final = 16
_DIGESTS: Final = "modelops.digests"
ADVICE: Final = (
    "stored outcomes are not lost with it ('modelops jobs sync' copies them), only which parameters they belong to: "
    "put the file back from a backup, or submit the study again"
)
_SCHEMA: Final = pa.schema(
    [("param", pa.int64()), ("param_id", pa.string()), ("canonical", pa.large_string())],
    metadata={"modelops.format": str(FORMAT)},
)


class ParameterSet(NamedTuple):
    """One parameter set: its ordinal, its id, its canonical JSON."""

    param: int
    param_id: ParamId
    canonical: bytes

    def values(self) -> dict[str, Any]:
        """Return names and values."""
        return parse_canonical(self.canonical)

    def raw(self) -> dict[str, Any]:
        """Return the canonical JSON as parsed, tags and all; several times faster than `values`."""
        return msgspec.json.decode(self.canonical)  # type: ignore[no-any-return]  # canonical JSON is an object


class Sets(NamedTuple):
    """Consecutive parameter sets: their canonical forms, large_binary, and their ids, see `id_bytes`."""

    texts: pa.Array
    ids: bytes


def write_parameters(
    objects: Objects,
    job: JobId,
    canonicals: Iterable[bytes],
    ids: bytes | None = None,
    *,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> int:
    """Store the parameter sets of a job that is not recorded yet, by ordinal, and return how many there are.

    Parameters
    ----------
    canonicals
        What `modelops.study.canonical.canonical_json` made of each; never held all at once.
    ids
        Their ids, if they are known, see `id_bytes`.
    beside
        Further objects of the new job, by their names in its folder.

    Raises
    ------
    AlreadyExistsError
        The job has parameters.
    """
    with temporary_files_are(f"the parameters of {job}"), SpooledTemporaryFile(IN_MEMORY_BYTES) as f:
        n = pour_parameters(f, canonicals, ids)
        put_parameters(objects, job, f, beside=beside)
    return n


def put_parameters(
    objects: Objects, job: JobId, file: IO[bytes], *, beside: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Store what `pour_sets` wrote to a file as the parameters of a new job; otherwise as `write_parameters`."""
    folder = job_folder(job)
    others = {f"{folder}/{name}": data for name, data in beside.items()}
    taken = objects.put_together({f"{folder}/{FIRST_PARAMETERS}": pieces_of(file), **others}, unknown=True)
    if taken:
        raise AlreadyExistsError(f"{', '.join(sorted(taken))} exists already")


def write_more_parameters(objects: Objects, job: JobId, run: int, canonicals: Iterable[bytes]) -> str:
    """Store all parameter sets that a job has from this run on; return the object's name in the job's folder.

    The name says what is in it, so that to do it again after a crash gives the same object.
    """
    with temporary_files_are(f"the parameters of {job}"), TemporaryFile() as f:
        pour_parameters(f, canonicals)
        digest = sha256()
        for piece in pieces_of(f):
            digest.update(piece)
        name = f"parameters.{run}-{digest.hexdigest()[:16]}.parquet"
        with contextlib.suppress(AlreadyExistsError):
            objects.put_new(f"{job_folder(job)}/{name}", pieces_of(f))
    return name


def pour_canonicals(file: IO[bytes], canonicals: Sequence[bytes]) -> None:
    """Write the canonical forms of parameter sets to an open file, for an upload: the server gives them their ids."""
    schema = pa.schema([_SCHEMA.field("canonical")], metadata=_SCHEMA.metadata)
    with (
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer,
        contextlib.closing(Behind("modelops-parquet")) as behind,
    ):
        for at in range(0, len(canonicals), ROW_GROUP):
            texts = columns.binary(canonicals[at : at + ROW_GROUP]).cast(pa.large_string())
            behind.do(writer.write_table, pa.Table.from_arrays([texts], schema=schema), ROW_GROUP)


def pour_parameters(file: IO[bytes], canonicals: Iterable[bytes], ids: bytes | None = None) -> int:
    """Write ``parameters.parquet`` to an open file, and return how many parameter sets it holds.

    ``ids``: those of the parameter sets, if they are known, see `id_bytes`.
    """
    return pour_sets(file, _sets_of(canonicals, ids))


def _sets_of(canonicals: Iterable[bytes], ids: bytes | None) -> Iterator[Sets]:
    it, n = iter(canonicals), 0
    while group := list(islice(it, ROW_GROUP)):
        found = id_bytes(group) if ids is None else ids[n * ID_BYTES : (n + len(group)) * ID_BYTES]
        yield Sets(columns.binary(group), found)
        n += len(group)


def pour_sets(file: IO[bytes], sets: Iterable[Sets]) -> int:
    """Do the same with parameter sets that are columns already, `ROW_GROUP` at a time; only the last may be fewer.

    A whole group is compressed in another thread while the next one is made.
    """
    n = 0
    digests: list[str] = []
    with pq.ParquetWriter(file, _SCHEMA, compression="zstd", use_dictionary=False) as writer:

        def write(group: Sets, first: int) -> None:
            params = columns.fixed(np.arange(first, first + len(group.texts), dtype=np.int64), pa.int64())
            named = columns.same_width(group.ids.hex(), 2 * ID_BYTES)
            texts = group.texts.cast(pa.large_string())
            writer.write_table(pa.Table.from_arrays([params, named, texts], schema=_SCHEMA), ROW_GROUP)
            digests.append(_digest(named, texts))

        with contextlib.closing(Behind("modelops-parquet")) as behind:
            for group in sets:
                if len(group.texts) == ROW_GROUP:
                    behind.do(write, group, n)
                else:  # nothing follows that could be made meanwhile
                    behind.settle()
                    write(group, n)
                n += len(group.texts)
        writer.add_key_value_metadata({_DIGESTS: ",".join(digests)})
    return n


class Parameters:
    """The parameter sets of a job, each verified by its id when it is read. Safe to use from several threads.

    ``name``: the object in the job's folder that holds them, as its spec says.

    Raises
    ------
    NotFoundError
        The job has no parameters.
    IntegrityError
        They are damaged. So say all methods that read.
    RequestError
        A newer ModelOps wrote them.
    """

    def __init__(self, objects: Objects, job: JobId, name: str = FIRST_PARAMETERS) -> None:
        self._name = whole = f"{job_folder(job)}/{name}"
        path = objects.local_path(whole)
        if path is None or not path.exists():
            try:
                data = objects.get(whole)
            except NotFoundError as e:
                raise NotFoundError(f"{whole} is gone; {ADVICE}") from e
            self._file = _open(pa.BufferReader(data), whole)
        else:
            self._file = _open(path, whole)
        self._lock = threading.Lock()
        self._digests = _digests_in(self._file)
        self._group = lru_cache(maxsize=2)(partial(self._verified, locked=True))

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def n_bytes(self) -> int:
        """How many bytes they take, about, when they have been read."""
        groups = self._file.metadata
        return sum(groups.row_group(number).total_byte_size for number in range(groups.num_row_groups))

    def __getitem__(self, param: int) -> ParameterSet:
        if not 0 <= param < len(self):
            raise IndexError(param)
        return self.read(param, param + 1)[0]

    def read(self, lo: int, hi: int) -> list[ParameterSet]:
        """Return the parameter sets ``lo <= param < hi``."""
        ids, texts = self.columns(lo, hi)
        return [
            ParameterSet(lo + i, ParamId(ids[2 * ID_BYTES * i : 2 * ID_BYTES * (i + 1)]), text)
            for i, text in enumerate(texts)
        ]

    def columns(self, lo: int, hi: int) -> tuple[str, list[bytes]]:
        """Return the ids of the parameter sets ``lo <= param < hi``, one after another, and the canonical forms."""
        ids: list[str] = []
        texts: list[bytes] = []
        for some_ids, some_texts in self._slices(lo, hi):
            ids.append(columns.joined(some_ids))
            texts += columns.binary_values(some_texts)
        return "".join(ids), texts

    def listed(self, lo: int, hi: int) -> tuple[str, bytes]:
        """Return the same, the canonical forms as one JSON array: without an object for each."""
        ids: list[str] = []
        parts: list[bytes] = []
        for some_ids, some_texts in self._slices(lo, hi):
            ids.append(columns.joined(some_ids))
            parts.append(columns.with_commas(some_texts))
        return "".join(ids), b"[%b]" % b",".join(parts)

    def _slices(self, lo: int, hi: int) -> Iterator[tuple[pa.Array, pa.Array]]:
        """Yield ids and canonical forms of these parameter sets, of a row group at a time."""
        while lo < min(hi, len(self)):
            group, at = divmod(lo, ROW_GROUP)
            with self._lock:
                ids, texts = self._group(group)
            n = min(hi - lo, len(ids) - at)
            yield ids.slice(at, n), texts.slice(at, n)
            lo += n

    def groups(self) -> Iterator[list[ParameterSet]]:
        """Yield all parameter sets in order, a row group at a time."""
        for group in range(self._file.num_row_groups):
            yield self.read(group * ROW_GROUP, (group + 1) * ROW_GROUP)

    def param_of(self, wanted: str) -> int:
        """Return the ordinal that a ``param_id`` has. Raises KeyError with a sentence."""
        for group in range(self._file.num_row_groups):
            ids: list[str] = self._verified(group)[0].to_pylist()
            if wanted in ids:
                return group * ROW_GROUP + ids.index(wanted)
        raise KeyError(f"there is no parameter set with the id {wanted}")

    def ids(self) -> Iterator[list[str]]:
        """Yield the ``param_id`` of every set in order, a row group at a time; faster than `groups`."""
        for group in range(self._file.num_row_groups):
            yield self._verified(group)[0].to_pylist()

    def verify(self) -> None:
        """Read them all."""
        for group in range(self._file.num_row_groups):
            self._verified(group)

    def texts(self, group: int) -> tuple[pa.Array, pa.Array]:
        """Return the ids, as text, and the canonical forms of a row group, as large_binary."""
        return self._verified(group)

    @property
    def n_groups(self) -> int:
        """How many row groups there are."""
        return int(self._file.num_row_groups)

    def _verified(self, group: int, *, locked: bool = False) -> tuple[pa.Array, pa.Array]:
        """Return ids and canonical forms of a row group, in which each id is that of the form."""
        try:
            with contextlib.nullcontext() if locked else self._lock:
                table = self._file.read_row_group(group, use_threads=False).combine_chunks()
            numbers = columns.fixed_values(columns.only_chunk(table, "param"))
            stored = columns.only_chunk(table, "param_id")
            canonical = columns.only_chunk(table, "canonical")
            texts = canonical.view(pa.large_binary())
        except (pa.ArrowException, OSError, ValueError, LookupError) as e:
            raise IntegrityError(f"{self._name} is damaged: {e}; {ADVICE}") from e
        first = group * ROW_GROUP
        whole = np.array_equal(numbers, np.arange(first, min(first + ROW_GROUP, len(self))))
        if self._digests[group : group + 1] != [_digest(stored, canonical)]:
            whole = whole and stored.equals(_ids_of(texts))
        if not whole:
            raise IntegrityError(
                f"{self._name} is damaged: its ids are not those of its parameters; {ADVICE}"
            )
        return stored, texts


def _ids_of(texts: pa.Array) -> pa.Array:
    return columns.same_width(id_bytes(columns.binary_values(texts)).hex(), 2 * ID_BYTES)


def _digest(ids: pa.Array, texts: pa.Array) -> str:
    """Return the SHA-256 of the ids and canonical forms of a row group: what tells that they are as written."""
    digest = sha256()
    for array, kind in ((ids, np.int32), (texts, np.int64)):
        _, ends_buffer, data = array.buffers()
        ends = np.frombuffer(ends_buffer, kind, len(array) + 1, array.offset * np.dtype(kind).itemsize)
        digest.update(np.diff(ends).astype("<i8").tobytes())
        digest.update(memoryview(data or b"")[int(ends[0]) : int(ends[-1])])
    return digest.hexdigest()


def _digests_in(file: pq.ParquetFile) -> list[str]:
    """Return the digests of the row groups; none if an older ModelOps wrote the file."""
    text = (file.metadata.metadata or {}).get(_DIGESTS.encode(), b"").decode("ascii", "replace")
    return text.split(",") if text else []


def _open(source: Any, name: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(source)
        found = int((file.metadata.metadata or {}).get(b"modelops.format", b"0"))
    except (pa.ArrowException, OSError, ValueError) as e:
        raise IntegrityError(f"{name} is damaged: {e}; {ADVICE}") from e
    if found > FORMAT:
        raise RequestError(
            f"{name} was written by a newer ModelOps (format {found}, this one reads up to {FORMAT}); "
            "upgrade modelops"
        )
    if not file.schema_arrow.equals(_SCHEMA):
        raise IntegrityError(f"{name} is damaged: it has other columns than parameters have; {ADVICE}")
    return file
