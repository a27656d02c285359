"""The replicates of many small parameter sets at once, ready to be sent to a runner to be aggregated.

Read set by set (`ReplicateReader.rows`), a set of one replicate costs as much as one of a hundred. Sets that are
large, or have outputs that lie in a pack, are left to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from modelops.processes import AggregateSet, AggregateTable
from modelops.rpc.messages import encode_output
from modelops.states import STORED, ReplicateStatus
from modelops.store import PackSlice
from modelops.store.order import ResultOrder
from modelops.store.segments import ranges_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.store import SegmentTable
    from modelops.store.order import Rows
    from modelops.store.parameters import Parameters
    from modelops.store.segment_table import StoredOutput
    from modelops.worker.replicates import ReplicateReader

MAX_REPLICATES: Final = 2_000  # of sets that are read at once
MAX_BYTES: Final = 1 << 20  # of the outputs of a small set, as they travel
MAX_BYTES_AT_ONCE: Final = 8 << 20  # which is what the protocol lets a frame of rows have
_SUCCEEDED: Final = STORED.index(ReplicateStatus.SUCCEEDED)
_NOT_NEEDED: Final = STORED.index(ReplicateStatus.NOT_NEEDED)


@dataclass(frozen=True)
class SmallSet:
    """A parameter set with its replicates.

    ``n_replicates``: without those that were not needed. ``data``: None if it is not small after all.
    """

    param: int
    n_replicates: int
    n_succeeded: int
    data: AggregateSet | None


@dataclass(frozen=True)
class SmallTable:
    """Consecutive parameter sets with their replicates. The counts are of each set, and as in a `SmallSet`."""

    n_replicates: list[int]
    n_succeeded: list[int]
    data: AggregateTable


class SmallSets:
    """Reads the replicates of consecutive parameter sets of a job."""

    def __init__(self, reader: ReplicateReader, parameters: Parameters) -> None:
        self._reader, self._parameters = reader, parameters
        self._order = ResultOrder(reader.line)

    def n_replicates(self, lo: int, hi: int) -> int:
        """Return how many replicates the sets ``lo <= param < hi`` have."""
        return self._order.first_row(hi) - self._order.first_row(lo)

    def read(self, lo: int, hi: int) -> list[SmallSet]:
        """Return the sets ``lo <= param < hi``. Raises what `ReplicateReader.rows` raises."""
        rows, held, succeeded, n_rows, n_good = self._counted(lo, hi)
        tables, found = [table for table, _ in held], [place for _, place in held]
        data = self._floats(tables, found, succeeded, n_good) or self._listed(tables, rows, succeeded, n_good)
        sets = self._parameters.read(lo, hi)
        return [
            SmallSet(
                one.param,
                n,
                good,
                None
                if more is None
                else msgspec.structs.replace(more, param=one.param, params=msgspec.Raw(one.canonical)),
            )
            for one, n, good, more in zip(sets, n_rows.tolist(), n_good.tolist(), data, strict=True)
        ]

    def table(self, lo: int, hi: int) -> SmallTable | None:
        """Return the same sets in one piece; None if they must be read one by one. Raises as `read` does."""
        _rows, found, succeeded, n_rows, n_good = self._counted(lo, hi)
        bits = self._bits([table for table, _ in found], [place for _, place in found], succeeded)
        if bits is None:
            return None
        names, values = bits
        _, texts = self._parameters.columns(lo, hi)
        return SmallTable(
            n_rows.tolist(),
            n_good.tolist(),
            AggregateTable(
                param=lo,
                params=tuple(map(msgspec.Raw, texts)),
                names=names,
                counts=tuple(n_good.tolist()),
                floats=values.tobytes().hex(),
            ),
        )

    def _counted(
        self, lo: int, hi: int
    ) -> tuple[Rows, list[tuple[SegmentTable, _Found]], _Mask, _Counts, _Counts]:
        """Return rows, where they are, which succeeded, and how many there are and have succeeded of each set."""
        rows = self._order.rows(self._order.first_row(lo), self._order.first_row(hi))
        tables = [table for table, _ in self._reader.tables(ranges_of(np.sort(rows.index)))]
        found = [(table, _found(table, rows)) for table in tables]
        succeeded, needed = np.zeros(len(rows.index), np.bool_), np.ones(len(rows.index), np.bool_)
        for table, (at, row) in found:
            succeeded[at] = table.status[row] == _SUCCEEDED
            needed[at] = table.status[row] != _NOT_NEEDED
        n_rows = np.bincount(rows.param[needed] - lo, minlength=hi - lo)
        n_good = np.bincount(rows.param[succeeded] - lo, minlength=hi - lo)
        return rows, found, succeeded, n_rows, n_good

    def _bits(
        self, tables: Sequence[SegmentTable], found: Sequence[_Found], succeeded: _Mask
    ) -> tuple[tuple[str, ...], _Bits] | None:
        """Return names and values of the succeeded rows, if all of them hold floats of the same names."""
        floats = [table.floats for table in tables]
        names = next((part.names for part in floats if part is not None), None)
        if names is None:
            return None
        bits = np.zeros((len(succeeded), len(names)), np.uint64)
        for part, (at, row) in zip(floats, found, strict=True):
            good = succeeded[at]
            if not good.any():
                continue  # a segment of which nothing succeeded holds no floats
            if part is None or part.names != names:
                return None
            bits[at[good]] = part.bits[part.place[row[good]]]
        return None if 2 * bits.nbytes > MAX_BYTES_AT_ONCE else (names, bits[succeeded])

    def _floats(
        self, tables: Sequence[SegmentTable], found: Sequence[_Found], succeeded: _Mask, n_good: _Counts
    ) -> list[AggregateSet | None] | None:
        """Return the outputs as floats, if all of these segments hold floats of the same names."""
        bits = self._bits(tables, found, succeeded)
        if bits is None:
            return None
        names, values = bits
        text = values.tobytes().hex()
        ends = (np.cumsum(n_good) * (16 * len(names))).tolist()
        return [
            AggregateSet(param=0, params=_NOTHING, names=names, floats=text[start:end])
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def _listed(
        self, tables: Sequence[SegmentTable], rows: Rows, succeeded: _Mask, n_good: _Counts
    ) -> list[AggregateSet | None]:
        wanted = ranges_of(np.sort(rows.index[succeeded]))
        by_index = {
            index: (returned_dict, outputs)
            for table in tables
            for index, returned_dict, outputs in table.rows(wanted)
        }
        found: list[AggregateSet | None] = []
        indices = iter(rows.index[succeeded].tolist())
        total = 0
        for n in n_good.tolist():
            replicates = [(index, *by_index.pop(index)) for index in islice(indices, n)]
            size = sum(_n_bytes(outputs) for _, _, outputs in replicates)
            total += min(size, MAX_BYTES)
            if size > MAX_BYTES or total > MAX_BYTES_AT_ONCE:
                found.append(None)
                continue
            encoded = [
                (
                    index,
                    "dict" if returned_dict else "value",
                    tuple([(name, kind, encode_output(kind, data)) for name, kind, data in outputs]),  # type: ignore[arg-type]  # a pack's are not small
                )
                for index, returned_dict, outputs in replicates
            ]
            found.append(AggregateSet(param=0, params=_NOTHING, rows=tuple(encoded)))
        return found


_NOTHING: Final = msgspec.Raw(b"{}")
_Bits = np.ndarray[tuple[int, int], np.dtype[np.uint64]]
_Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]
_Counts = np.ndarray[tuple[int], np.dtype[np.int64]]
_Found = tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]


def _n_bytes(outputs: Sequence[StoredOutput]) -> int:
    """Return about how many bytes the outputs of a replicate take as they travel."""
    return sum(
        MAX_BYTES + 1 if isinstance(data, PackSlice) else len(data) * 4 // 3 + len(name) + 32
        for name, _, data in outputs
    )


def _found(table: SegmentTable, rows: Rows) -> _Found:
    """Return which of these rows a segment holds, and which of its rows they are."""
    row = np.minimum(np.searchsorted(table.index, rows.index), len(table) - 1)
    at = np.flatnonzero(table.index[row] == rows.index)
    return at, row[at]
