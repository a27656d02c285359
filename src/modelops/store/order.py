"""The order of result rows, (parameter set, replicate), over an index line of several blocks; all in arrays.

The axis of parameter sets is cut where a block begins or ends. Within such a band the same blocks cover
every parameter set, so place and index of the row at a given rank are a division and a table look-up.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from modelops.study.index_line import Block, IndexLine
    from modelops.study.ranges import Range


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a result: parameter set, replicate and index of each. Shape ``(n,)``, int64."""

    param: npt.NDArray[np.int64]
    replicate: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]


class _Band(NamedTuple):
    first_row: int
    first_param: int
    blocks: tuple[Block, ...]  # by replicate number
    per_param: int


class ResultOrder:
    """Every replicate of a line, sorted by (parameter set, replicate)."""

    def __init__(self, line: IndexLine) -> None:
        blocks = [b for b in line.blocks if b.end > b.base]
        cuts = sorted({b.p0 for b in blocks} | {b.p0 + b.n_params for b in blocks})
        self._bands: list[_Band] = []
        self.size = 0
        for lo, hi in pairwise(cuts):
            inside = sorted((b for b in blocks if b.p0 <= lo < b.p0 + b.n_params), key=lambda b: b.r0)
            per_param = sum(b.n_replicates for b in inside)
            if per_param:
                self._bands.append(_Band(self.size, lo, tuple(inside), per_param))
                self.size += per_param * (hi - lo)

    def first_row(self, param: int) -> int:
        """Return the first row of a parameter set, or where it would be."""
        at = bisect_right(self._bands, param, key=lambda band: band.first_param) - 1
        if at < 0:
            return 0
        band = self._bands[at]
        end = self._bands[at + 1].first_row if at + 1 < len(self._bands) else self.size
        return min(end, band.first_row + (param - band.first_param) * band.per_param)

    def rows(self, lo: int, hi: int) -> Rows:
        """Return the rows ``lo <= row < hi``."""
        return self.at(np.arange(lo, min(hi, self.size), dtype=np.int64))

    def at(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """Return the rows of these numbers, which ascend."""
        edges = np.searchsorted(numbers, [band.first_row for band in self._bands]).tolist()
        parts = [
            _rows_of_band(band, numbers[lo:hi])
            for band, lo, hi in zip(self._bands, edges, [*edges[1:], len(numbers)], strict=True)
            if lo < hi
        ]
        if not parts:
            nothing = np.zeros(0, np.int64)
            return Rows(nothing, nothing, nothing)
        return Rows(
            np.concatenate([part.param for part in parts]),
            np.concatenate([part.replicate for part in parts]),
            np.concatenate([part.index for part in parts]),
        )

    def numbers_of(self, indices: Ranges) -> Ranges:
        """Return the numbers of the rows of these indices."""
        return Ranges(
            pair
            for band, end in zip(
                self._bands, [*(b.first_row for b in self._bands[1:]), self.size], strict=True
            )
            for pair in _numbers_in_band(band, (end - band.first_row) // band.per_param, indices)
        )


def _numbers_in_band(band: _Band, n_params: int, indices: Ranges) -> Iterator[Range]:
    at = band.first_row
    for block in band.blocks:
        n = block.n_replicates
        base = block.base + (band.first_param - block.p0) * n
        for lo, hi in (indices & Ranges([(base, base + n_params * n)])).pairs:
            if n == band.per_param:  # nothing of another block lies in between
                yield at + lo - base, at + hi - base
                continue
            for nth in range((lo - base) // n, (hi - 1 - base) // n + 1):
                first = base + nth * n
                start = at + nth * band.per_param - first
                yield start + max(lo, first), start + min(hi, first + n)
        at += n


def _rows_of_band(band: _Band, numbers: npt.NDArray[np.int64]) -> Rows:
    nth, within = np.divmod(numbers - band.first_row, band.per_param)
    param = nth + band.first_param
    starts = np.cumsum([0, *(b.n_replicates for b in band.blocks)])
    block = np.searchsorted(starts, within, side="right") - 1
    column = np.array([(b.base, b.p0, b.r0, b.n_replicates) for b in band.blocks], np.int64)[block].T
    offset = within - starts[block]
    return Rows(param, column[2] + offset, column[0] + (param - column[1]) * column[3] + offset)


def indices_in(pairs: Iterable[Range]) -> npt.NDArray[np.int64]:
    """Return the indices of some ranges, one range after another."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(lo, hi, dtype=np.int64) for lo, hi in pairs)])


def places(line: IndexLine, indices: npt.NDArray[np.int64]) -> Rows:
    """Return parameter set and replicate of each index; `IndexLine.locate` for arrays.

    Raises
    ------
    IndexError
        An index is not on the line.
    """
    if len(indices) and not (indices.min() >= 0 and indices.max() < line.size):
        raise IndexError(f"an index outside 0..{line.size - 1}")
    blocks = np.array(
        [(b.base, b.p0, b.r0, b.n_replicates) for b in line.blocks if b.end > b.base] or [(0, 0, 0, 1)],
        np.int64,
    )
    base, p0, r0, n = blocks[np.searchsorted(blocks[:, 0], indices, side="right") - 1].T
    nth, within = np.divmod(indices - base, n)
    return Rows(p0 + nth, r0 + within, indices)
