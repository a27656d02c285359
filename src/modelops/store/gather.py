"""From committed segments to the cells of a table: which stored row lies where, in bounded memory.

Tables are made of groups of at most 65,536 rows in result order, fewer where rows are wide. A group needs some
rows of some segments; segments are loaded when a group asks for them and kept, while they fit a budget, until all
their rows were asked for. What cannot be a column (arrays, lists, tables, whatever is in a pack) is dropped when a
segment is loaded; only the reason stays.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from modelops.store import columns
from modelops.store.segment_body import FLOAT
from modelops.store.views import Cells, dropped_label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from modelops.store.segment_table import FloatTable, OutputsColumn
    from modelops.study.ranges import Range

CACHE_BYTES: Final = 24 << 20
_LOOK: Final = 1_024  # rows; most often the first one has succeeded
_CELL_BYTES: Final = 32  # a longer text counts as so many outputs more
_LONGEST_TAGGED: Final = 512  # bytes; of what a column can hold only {"$np":["U",...]} is a longer object
_KINDS: Final = ("json", FLOAT, "npy0")
T = TypeVar("T")


class Stored:
    """The outputs of a stored table that may become columns, flat and by row.

    Attributes
    ----------
    key
        int64, sorted: the index (or parameter set) of each row.
    labels
        What was dropped: reasons by output.
    n_bytes
        About what the outputs take.
    """

    def __init__(
        self, key: npt.NDArray[np.int64], succeeded: npt.NDArray[np.bool_], outputs: OutputsColumn
    ) -> None:
        self.key, self.succeeded, self._outputs = key, succeeded, outputs
        self.labels: defaultdict[str, set[str]] = defaultdict(set)
        row = np.repeat(np.arange(len(key)), np.diff(outputs.ends))
        keep = succeeded[row] & self._may_be_columns(succeeded[row])
        self._row, self._name, self._kind = row[keep], outputs.name[keep], outputs.kind[keep]
        self._data = outputs.data if keep.all() else outputs.data.filter(columns.bools(keep))
        self.names: list[str] = outputs.names
        found = np.unique(self._kind).tolist()
        self._one_kind = outputs.kinds[found[0]] if len(found) == 1 else None
        self.n_bytes = self._data.nbytes + self._row.nbytes + self._name.nbytes + self._kind.nbytes

    def names_of(self, row: int) -> list[str]:
        """Return the outputs of a row, in the order of the model's dict."""
        o = self._outputs
        return [o.names[code] for code in o.name[o.ends[row] : o.ends[row + 1]].tolist()]

    def pick(self, rows: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> Piece:
        """Return the outputs of these rows, which lie at these rows of a group. Both ascend."""
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            lo, hi = np.searchsorted(self._row, (rows[0], rows[-1] + 1)).tolist()
            chosen: Any = slice(lo, hi)
            data = self._data.slice(lo, hi - lo)
        else:
            wanted = np.zeros(len(self.key), np.bool_)
            wanted[rows] = True
            chosen = np.flatnonzero(wanted[self._row])
            data = self._data.take(columns.fixed(chosen, pa.int64()))
        where = at[np.searchsorted(rows, self._row[chosen])]
        kinds = self._one_kind or [self._outputs.kinds[k] for k in self._kind[chosen].tolist()]
        return Piece(where, self._name[chosen], self.names, kinds, data)

    def weight(self, row: int) -> int:
        """Return how much a row takes, as a number of outputs: those that may become columns, long texts more."""
        _, sizes = columns.starts_and_sizes(self.pick(np.array([row]), np.zeros(1, np.int64)).data)
        return int((1 + sizes // _CELL_BYTES).sum())

    def _may_be_columns(self, counts: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Say which outputs to keep; note the reasons of the others, where the row counts."""
        o = self._outputs
        good_kind = np.array([kind in _KINDS for kind in o.kinds], np.bool_)[o.kind]
        keep = good_kind & o.inline()
        starts, sizes = columns.starts_and_sizes(o.data)
        if len(starts):
            first = columns.bytes_at(o.data, starts)
            is_json = np.array([kind == "json" for kind in o.kinds], np.bool_)[o.kind]
            numpy_text = (columns.bytes_at(o.data, starts + 2) == ord("$")) & (
                columns.bytes_at(o.data, starts + 3) == ord("n")
            )
            long_object = (first == ord("{")) & (sizes > _LONGEST_TAGGED) & ~numpy_text
            keep &= ~(is_json & ((first == ord("[")) | long_object))
        for i in _one_of_each(o, ~keep & counts, starts):
            head = o.data[i].as_py() if o.data[i].is_valid else None
            self.labels[o.names[o.name[i]]].add(dropped_label(o.kinds[o.kind[i]], head))
        return np.asarray(keep, np.bool_)


def _one_of_each(
    o: OutputsColumn, dropped: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]
) -> list[int]:
    """Return dropped outputs such that every combination of name, kind and first bytes occurs."""
    where = np.flatnonzero(dropped)
    if not len(where):
        return []
    marks = np.zeros((len(where), 11), np.int64)
    marks[:, 0], marks[:, 1], marks[:, 2] = o.name[where], o.kind[where], o.inline()[where]
    for i in range(8):  # enough to tell tags apart
        marks[:, 3 + i] = columns.bytes_at(o.data, starts[where] + i)
    return [int(i) for i in where[np.unique(marks, axis=0, return_index=True)[1]]]


class StoredFloats:
    """In place of `Stored` where all outputs are floats of the same names: they are columns as they are stored."""

    def __init__(
        self, key: npt.NDArray[np.int64], succeeded: npt.NDArray[np.bool_], floats: FloatTable
    ) -> None:
        self.key, self.succeeded, self._floats = key, succeeded, floats
        self.labels: dict[str, set[str]] = {}
        self.n_bytes = floats.bits.nbytes + floats.place.nbytes

    def names_of(self, _row: int) -> Sequence[str]:
        """Return the outputs of a row, in the order of the model's dict."""
        return self._floats.names

    def weight(self, _row: int) -> int:
        """Return how many outputs a row has."""
        return len(self._floats.names)

    def pick(self, rows: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> FloatPiece:
        """Return the outputs of these rows, which lie at these rows of a group. Both ascend."""
        good = self.succeeded[rows]
        return FloatPiece(at[good], self._floats.names, self._floats.bits[self._floats.place[rows[good]]])


class FloatPiece(NamedTuple):
    """What a group took from a segment of floats; ``bits``: of each, shape ``(len(at), len(names))``."""

    at: npt.NDArray[np.int64]
    names: Sequence[str]
    bits: npt.NDArray[np.uint64]

    def general(self) -> Piece:
        """Return the same as other outputs are kept."""
        n, k = self.bits.shape
        sizes = np.full(n * k, self.bits.itemsize, np.int64)
        name = np.tile(np.arange(k, dtype=np.int32), n)
        data = columns.cut(self.bits.tobytes(), sizes)
        return Piece(np.repeat(self.at, k), name, list(self.names), FLOAT, data)


class Piece(NamedTuple):
    """What a group took from a segment, output by output."""

    at: npt.NDArray[np.int64]
    name: npt.NDArray[np.int32]
    names: list[str]
    kinds: str | list[str]  # one for all, or one each
    data: pa.Array


def cells_of(taken: Sequence[Piece | FloatPiece]) -> dict[str, Cells]:
    """Join what a group took from several segments into cells by output, rows ascending."""
    floats = [piece for piece in taken if isinstance(piece, FloatPiece)]
    if floats and len(floats) == len(taken) and len({tuple(piece.names) for piece in floats}) == 1:
        return _cells_of_floats(floats)
    pieces = [piece.general() if isinstance(piece, FloatPiece) else piece for piece in taken]
    codes: dict[str, int] = {}
    names = []
    for piece in pieces:
        known = np.array([codes.setdefault(name, len(codes)) for name in piece.names], np.int64)
        names.append(known[piece.name] if len(known) else np.zeros(0, np.int64))
    if not codes:
        return {}
    at, name = np.concatenate([piece.at for piece in pieces]), np.concatenate(names)
    data = pa.concat_arrays([piece.data for piece in pieces])
    of_all = {piece.kinds if isinstance(piece.kinds, str) else "" for piece in pieces if len(piece.at)}
    kinds = None
    if len(of_all) > 1 or "" in of_all:
        each = ([p.kinds] * len(p.at) if isinstance(p.kinds, str) else p.kinds for p in pieces)
        kinds = np.array([kind for part in each for kind in part], object)
    ascending = bool((np.diff(at) >= 0).all())
    out = {}
    for word, code in codes.items():
        where = np.flatnonzero(name == code)
        if not ascending:
            where = where[np.argsort(at[where], kind="stable")]
        if not len(where):
            continue
        of_these: str | list[str] = next(iter(of_all)) if kinds is None else kinds[where].tolist()
        if not isinstance(of_these, str) and len(set(of_these)) == 1:
            of_these = of_these[0]
        out[word] = Cells(at[where], of_these, data.take(columns.fixed(where, pa.int64())))
    return out


def _cells_of_floats(pieces: Sequence[FloatPiece]) -> dict[str, Cells]:
    at, bits = np.concatenate([p.at for p in pieces]), np.concatenate([p.bits for p in pieces])
    if not len(at):
        return {}
    if not (np.diff(at) >= 0).all():
        order = np.argsort(at, kind="stable")
        at, bits = at[order], bits[order]
    numbers = bits.view("<f8").astype(np.float64, copy=False)
    return {
        name: Cells(at, FLOAT, columns.fixed(numbers[:, k], pa.float64()))
        for k, name in enumerate(pieces[0].names)
    }


class Cover(Generic[T]):
    """Which of some stored tables holds a key. Loads them on demand, keeps the last ones within a budget.

    A table all of whose keys were found is let go: most often nobody asks for a key twice.

    Parameters
    ----------
    ranges
        Those of each table; disjoint.
    load, size
        Load table number ``i``; say how many bytes it takes.
    """

    def __init__(
        self, ranges: Sequence[Sequence[Range]], load: Callable[[int], T], size: Callable[[T], int]
    ) -> None:
        flat = sorted((lo, hi, i) for i, pairs in enumerate(ranges) for lo, hi in pairs)
        self._lo, self._hi, self._which = np.array(flat, np.int64).reshape(-1, 3).T
        self._left = np.zeros(len(ranges), np.int64)  # keys of each table that were not found yet
        np.add.at(self._left, self._which, self._hi - self._lo)
        self._load, self._size = load, size
        self._kept: OrderedDict[int, T] = OrderedDict()
        self._kept_bytes = 0

    def find(
        self, keys: npt.NDArray[np.int64], *, once_more: bool = False
    ) -> Iterator[tuple[T, npt.NDArray[np.int64]]]:
        """Yield each table that holds some of the keys, with their positions in ``keys``, ascending.

        ``once_more``: these keys will be asked for again.
        """
        if not len(self._lo):
            return
        nearest = np.maximum(np.searchsorted(self._lo, keys, side="right") - 1, 0)
        held = (self._lo[nearest] <= keys) & (keys < self._hi[nearest])
        at = np.flatnonzero(held)
        which = self._which[nearest[at]]
        order = np.argsort(which, kind="stable")
        at, which = at[order], which[order]
        edges = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(which)]
        for lo, hi in pairwise(edges):
            if lo < hi:
                i = int(which[lo])
                if not once_more:
                    self._left[i] -= hi - lo
                yield self._get(i), at[lo:hi]

    def _get(self, i: int) -> T:
        table = self._kept.pop(i, None)
        if table is None:
            table = self._load(i)
        else:
            self._kept_bytes -= self._size(table)
        if self._left[i] > 0:
            self._kept[i] = table
            self._kept_bytes += self._size(table)
        while self._kept_bytes > CACHE_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._size(self._kept.popitem(last=False)[1])
        return table


def held_rows(
    key: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], at: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which rows of a table, and which of a group, are those of ``keys[at]`` that the sorted ``key`` holds."""
    if not len(key):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    of = np.minimum(np.searchsorted(key, keys[at]), len(key) - 1)
    held = key[of] == keys[at]
    return of[held], at[held]


def first_weight(cover: Cover[Any], keys: npt.NDArray[np.int64]) -> int:
    """Return how much the first of these rows takes that succeeded, see `Stored.weight`; 0 if none did.

    ``cover``: of tables whose outputs are in ``stored``; the keys can be asked for afterwards as if for the first time.
    """
    for lo in range(0, len(keys), _LOOK):
        part = keys[lo : lo + _LOOK]
        first, weight = len(part), 0
        for table, at in cover.find(part, once_more=True):
            of, rows = held_rows(table.stored.key, part, at)
            good = np.flatnonzero(table.stored.succeeded[of])
            if len(good) and rows[good[0]] < first:
                first, weight = int(rows[good[0]]), table.stored.weight(int(of[good[0]]))
        if first < len(part):
            return weight
    return 0
