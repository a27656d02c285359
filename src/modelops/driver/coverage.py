"""Which indices have a final outcome, which parameter sets have settled by that, and where it is stored.

A parameter set has settled when all its indices, in every block of the line, are covered. Everything here
costs the ranges of what is added: a million parameter sets in one segment are one range.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

import msgspec

from modelops.driver.range_sets import RangeSet
from modelops.study.ranges import EMPTY, Range, Ranges

if TYPE_CHECKING:
    from modelops.study.index_line import Block, IndexLine
    from modelops.worker.messages import SegmentRef


class Coverage:
    """The indices of a line that have a final outcome."""

    def __init__(self, line: IndexLine) -> None:
        self._blocks = tuple(b for b in line.blocks if b.end > b.base)
        self._bases = [b.base for b in self._blocks]
        self._ends = [b.end for b in self._blocks]
        self._covered = RangeSet()
        self._settled = [RangeSet() for _ in self._blocks]

    def __len__(self) -> int:
        return len(self._covered)

    def lacks(self, indices: Ranges) -> Ranges:
        """Return those of these indices that have no final outcome."""
        return self._covered.lacks(indices)

    def cover(self, indices: Ranges) -> None:
        """Cover these, where nobody asks which parameter sets have settled; not to be mixed with `add`."""
        for lo, hi in indices.pairs:
            self._covered.add(lo, hi)

    def add(self, indices: Ranges) -> Ranges:
        """Cover these, none of which was covered, and return the parameter sets that settled by it."""
        settled: list[Range] = []
        add, blocks, ends = self._covered.add, self._blocks, self._ends
        n_blocks = len(blocks)
        for added in indices.pairs:
            lo, hi = added
            whole = add(lo, hi)
            i = bisect_right(self._bases, lo) - 1 if n_blocks > 1 else 0
            while i < n_blocks and blocks[i].base < hi:
                params = _filled(blocks[i], ends[i], added, whole)
                if params is not None:
                    if n_blocks == 1:
                        settled.append(params)
                    else:
                        settled.extend(self._settled_everywhere(i, params).pairs)
                i += 1
        return Ranges(settled) if settled else EMPTY

    def _settled_everywhere(self, i: int, params: Range) -> Ranges:
        """Note that block ``i`` is complete for these; return those complete in every other block too."""
        everywhere = Ranges((params,))
        self._settled[i].add(*params)
        for j, other in enumerate(self._blocks):
            if j != i:
                concerned = everywhere & Ranges(((other.p0, other.p0 + other.n_params),))
                everywhere = everywhere - self._settled[j].lacks(concerned)
        return everywhere


def _filled(block: Block, end: int, added: Range, whole: Range) -> Range | None:
    """Return the parameter sets of ``block`` that ``added`` touches and that lie wholly in ``whole``."""
    n, base = block.n_replicates, block.base
    lo, hi = whole
    lo = -((base - lo) // n) if lo > base else 0  # the sets that `whole` has from their first replicate on
    hi = ((hi if hi < end else end) - base) // n
    if lo >= hi:  # most often
        return None
    first, last = added
    touched_lo = (first - base) // n if first > base else 0
    touched_hi = ((last if last < end else end) - base - 1) // n + 1
    lo, hi = max(lo, touched_lo), min(hi, touched_hi)
    return (block.p0 + lo, block.p0 + hi) if lo < hi else None


class SegmentMap:
    """Which committed segment holds which indices, as long as somebody may ask."""

    def __init__(self) -> None:
        self._lows: list[int] = []
        self._entries: list[tuple[int, SegmentRef]] = []  # (one past the last index, segment), beside _lows

    def add(self, segment: SegmentRef) -> None:
        """Note a committed segment; none of its indices is in another."""
        for lo, hi in segment.ranges:
            if not self._lows or self._lows[-1] < lo:
                self._lows.append(lo)
                self._entries.append((hi, segment))
            else:
                i = bisect_right(self._lows, lo)
                self._lows.insert(i, lo)
                self._entries.insert(i, (hi, segment))

    def remove(self, segment: SegmentRef) -> None:
        """Forget a segment."""
        for lo, _ in segment.ranges:
            i = bisect_left(self._lows, lo)
            del self._lows[i], self._entries[i]

    def clear(self) -> None:
        """Forget all."""
        self._lows.clear()
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._lows)

    def trim(self, indices: Ranges) -> None:
        """Let segments hold none of these any more. Costs the whole map: for rare events."""
        segments = {segment.attempt: segment for _, segment in self._entries}
        concerned = {segment.attempt for segment in self.over(indices)}
        self.clear()
        for attempt, segment in segments.items():
            if attempt in concerned:
                kept = Ranges(segment.ranges) - indices
                segment = msgspec.structs.replace(segment, ranges=kept.pairs)
            self.add(segment)

    def over(self, indices: Ranges) -> tuple[SegmentRef, ...]:
        """Return the segments that hold any of these indices, by their first index."""
        found: dict[str, SegmentRef] = {}
        lows, entries = self._lows, self._entries
        for lo, hi in indices.pairs:
            first = bisect_right(lows, lo) - 1
            if first < 0 or entries[first][0] <= lo:
                first += 1
            for _, segment in entries[first : bisect_left(lows, hi, max(first, 0))]:
                found.setdefault(segment.attempt, segment)
        return tuple(found.values())
