"""The columns of what replicates and aggregates gave, ``returned``, ``error`` and ``outputs``, and the pack.

Rows come in parts: lists of outputs, whatever they are, or replicates that returned nothing but floats as one
buffer, which becomes a column as it is. Outputs that are too large for a column go into the pack.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from hashlib import file_digest, sha256
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from modelops.errors import IntegrityError
from modelops.store import columns
from modelops.store.objects import COPY_BYTES, AlreadyExistsError, Objects
from modelops.store.untouched import is_untouched

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

INLINE_LIMIT_BYTES: Final = 65_536
FLOAT: Final = "f8"
JSON: Final = "json"
FLOAT_BYTES: Final = 8
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

    ``sha256``: hexadecimal. ``stamp``: what `is_untouched` wants to know, if the runner told it.
    """

    path: Path
    n_bytes: int
    sha256: str
    stamp: tuple[int, int] | None = None


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


OutputData = bytes | SpooledFile  # bytes: any buffer of bytes will do, e.g. msgspec.Raw
Output = tuple[str, str, OutputData]


class Listed(NamedTuple):
    """Rows with any outputs. ``returned``: whether it was a dict. One entry per row each."""

    returned: list[bool]
    outputs: Sequence[Sequence[Output]]
    errors: list[StoredError | None]

    def __len__(self) -> int:
        return len(self.returned)


class Floats(NamedTuple):
    """``n`` rows that returned a dict of floats of these names. ``values``: 8 bytes each, little-endian."""

    n: int
    names: tuple[str, ...]
    values: bytes

    def __len__(self) -> int:
        return self.n

    def listed(self) -> Listed:
        """Return the same, output by output."""
        cells = [self.values[at : at + FLOAT_BYTES] for at in range(0, len(self.values), FLOAT_BYTES)]
        k = len(self.names)
        rows = [
            [(name, FLOAT, cell) for name, cell in zip(self.names, cells[i * k : (i + 1) * k], strict=True)]
            for i in range(self.n)
        ]
        return Listed([True] * self.n, rows, [None] * self.n)


class Cells(NamedTuple):
    """``n`` rows that returned a dict of these names, all values inline JSON, row by row. ``sizes``: bytes of each."""

    n: int
    names: tuple[str, ...]
    data: bytes
    sizes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return self.n

    def listed(self) -> Listed:
        """Return the same, output by output."""
        ends, k = np.cumsum(self.sizes).tolist(), len(self.names)
        cells = [self.data[lo:hi] for lo, hi in zip([0, *ends], ends, strict=False)]
        rows = [
            [(name, JSON, cell) for name, cell in zip(self.names, cells[i * k : (i + 1) * k], strict=True)]
            for i in range(self.n)
        ]
        return Listed([True] * self.n, rows, [None] * self.n)


Part = Listed | Floats | Cells


class Body:
    """The columns of some parts, in their order; storing the large outputs in a pack, called ``pack_name``.

    Attributes
    ----------
    pack
        ``pack_name`` if there is a pack, else None.
    """

    def __init__(self, objects: Objects, folder: str, pack_name: str, parts: Sequence[Part]) -> None:
        names, kinds = _Words(pa.int32()), _Words(pa.int8())
        lengths: list[npt.NDArray[np.int32]] = []
        sizes: list[npt.NDArray[np.int64]] = []
        data: list[bytes] = []
        self._large: list[tuple[int, Any]] = []  # by position among all outputs
        n = 0
        for part in parts:
            if isinstance(part, Cells) and (part.sizes > INLINE_LIMIT_BYTES).any():
                part = part.listed()
            if isinstance(part, Cells):
                k = len(part.names)
                lengths.append(np.full(part.n, k, np.int32))
                names.add(part.names, part.n)
                kinds.add((JSON,), part.n * k)
                sizes.append(part.sizes)
                data.append(part.data)
                n += part.n * k
                continue
            if isinstance(part, Floats):
                k = len(part.names)
                lengths.append(np.full(part.n, k, np.int32))
                names.add(part.names, part.n)
                kinds.add((FLOAT,), part.n * k)
                sizes.append(np.full(part.n * k, FLOAT_BYTES, np.int64))
                data.append(part.values)
                n += part.n * k
                continue
            lengths.append(np.fromiter(map(len, part.outputs), np.int32, len(part)))
            flat = list(chain.from_iterable(part.outputs))
            names.add(list(map(itemgetter(0), flat)))
            kinds.add(list(map(itemgetter(1), flat)))
            values: list[Any] = list(map(itemgetter(2), flat))
            self._large += [(n + i, value) for i, value in _take_large(values)]
            sizes.append(np.fromiter(map(len, values), np.int64, len(values)))
            data.append(b"".join(values))
            n += len(flat)
        self.pack: str | None = pack_name if self._large else None
        self.pack_bytes = 0
        slices = self._place_large(n)
        if self.pack:
            _store_once(objects, f"{folder}/{self.pack}", _Pack(self._large))
        packed = slices[0]
        fields = [
            names.column(),
            kinds.column(),
            columns.cut(b"".join(data), np.concatenate([np.zeros(0, np.int64), *sizes]), ~packed),
            columns.fixed(slices[1], pa.int64(), packed),
            columns.fixed(slices[2], pa.int64(), packed),
            columns.fixed(slices[3], pa.binary(32), packed),
        ]
        outputs = pa.StructArray.from_arrays(fields, fields=list(OUTPUT_TYPE))
        n_rows = sum(map(len, parts))
        self.columns = {
            "returned": columns.bools(_returned(parts)),
            "error": _errors(parts, n_rows),
            "outputs": columns.lists(np.concatenate([np.zeros(0, np.int32), *lengths]), n_rows, outputs),
        }

    def remove_spooled(self) -> None:
        """Remove the files whose bytes are in the pack now."""
        for _, data in self._large:
            if isinstance(data, SpooledFile):
                data.path.unlink(missing_ok=True)

    def _place_large(self, n: int) -> tuple[npt.NDArray[Any], ...]:
        """Return which of ``n`` outputs are in the pack, and offset, length and digest of each."""
        packed = np.zeros(n, np.bool_)
        offsets, sizes, digests = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, 32), np.uint8)
        for i, value in self._large:
            packed[i], offsets[i], sizes[i] = True, self.pack_bytes, _size(value)
            digests[i] = np.frombuffer(_digest(value), np.uint8)
            self.pack_bytes += _size(value)
        return packed, offsets, sizes, digests


class _Words:
    """Words that recur, in order of first appearance, as codes."""

    def __init__(self, code: pa.DataType) -> None:
        self._code = code
        self._known: dict[str, int] = {}
        self._codes: list[npt.NDArray[Any]] = []

    def add(self, words: Sequence[str], times: int = 1) -> None:
        """Take these words in this order, and all of them again, ``times`` in all."""
        known = self._known
        for word in dict.fromkeys(words):
            known.setdefault(word, len(known))
        columns.refuse_too_many(len(known), self._code)
        codes = np.fromiter(map(known.__getitem__, words), self._code.to_pandas_dtype(), len(words))
        self._codes.append(np.tile(codes, times) if times != 1 else codes)

    def column(self) -> pa.Array:
        """Return all of them, dictionary-encoded."""
        none = np.zeros(0, self._code.to_pandas_dtype())
        return columns.coded(np.concatenate([none, *self._codes]), list(self._known), self._code)


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


def _store_once(objects: Objects, name: str, content: _Pack) -> None:
    """Store under the attempt's own name; the same bytes there already are a repeat whose answer was lost."""
    only = content.large[0][1]
    try:
        if len(content.large) == 1 and isinstance(only, SpooledFile):
            objects.take_new(name, only.path, partial(_check, only))
        else:
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


def _returned(parts: Sequence[Part]) -> npt.NDArray[np.bool_]:
    return np.concatenate(
        [
            np.zeros(0, np.bool_),
            *(
                np.fromiter(part.returned, np.bool_, len(part))
                if isinstance(part, Listed)
                else np.ones(part.n, np.bool_)
                for part in parts
            ),
        ]
    )


def _errors(parts: Sequence[Part], n: int) -> pa.Array:
    if not any(isinstance(part, Listed) and any(part.errors) for part in parts):
        return pa.nulls(n, ERROR_TYPE)
    errors: list[StoredError | None] = []
    for part in parts:
        errors += part.errors if isinstance(part, Listed) else [None] * part.n
    fields = []
    for i, field in enumerate(ERROR_TYPE):
        values: list[Any] = [None if e is None else e[i] for e in errors]
        if field.type == pa.string():
            fields.append(columns.text(values))
        else:
            known = np.fromiter((v is not None for v in values), np.bool_, n)
            fields.append(columns.fixed(np.array([v or 0 for v in values], np.int32), field.type, known))
    return columns.structs(fields, ERROR_TYPE, np.fromiter((e is not None for e in errors), np.bool_, n))


def _size(data: Any) -> int:
    return data.n_bytes if isinstance(data, SpooledFile) else len(data)


def _digest(data: Any) -> bytes:
    return bytes.fromhex(data.sha256) if isinstance(data, SpooledFile) else sha256(data).digest()


def _check(file: SpooledFile) -> None:
    with file.path.open("rb") as f:
        if file.stamp is not None and is_untouched(f.fileno(), file.n_bytes, file.stamp):
            return
        _compare(file, os.fstat(f.fileno()).st_size, file_digest(f, "sha256").hexdigest())


def _compare(file: SpooledFile, n_bytes: int, digest: str) -> None:
    if n_bytes != file.n_bytes or digest != file.sha256:
        raise IntegrityError(f"the spooled output {file.path} is not what the runner said it wrote")


def _spooled(file: SpooledFile) -> Iterator[bytes]:
    digest, n_bytes = sha256(), 0
    with file.path.open("rb") as f:
        while piece := f.read(COPY_BYTES):
            digest.update(piece)
            n_bytes += len(piece)
            yield piece
    _compare(file, n_bytes, digest.hexdigest())
