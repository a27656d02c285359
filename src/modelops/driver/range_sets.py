"""Mutable sets of ranges whose operations cost the ranges they touch, not the integers in them.

`RangeQueue` hands out its smallest integers first; `RangeSet` only grows and knows what it lacks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from heapq import heappop, heappush, heapreplace

from modelops.study.ranges import Range, Ranges


class RangeQueue:
    """A set of integers handed out smallest first. What is added must not be in it already."""

    __slots__ = ("_heap", "n")

    def __init__(self, ranges: Ranges | None = None) -> None:
        self._heap: list[Range] = list(ranges.pairs) if ranges else []  # sorted, so a heap
        self.n = len(ranges) if ranges else 0

    def __len__(self) -> int:
        return self.n

    @property
    def first(self) -> int:
        """The smallest integer. Raises IndexError if there is none."""
        return self._heap[0][0]

    def add(self, ranges: Ranges) -> None:
        """Put these in."""
        if self._heap:
            for pair in ranges.pairs:
                heappush(self._heap, pair)
        else:
            self._heap.extend(ranges.pairs)
        self.n += len(ranges)

    def take(self, n: int) -> Ranges:
        """Take the ``n`` smallest out, or all if there are fewer."""
        heap = self._heap
        if heap:  # most often one range has them all
            lo, hi = heap[0]
            if lo + n <= hi:
                if lo + n < hi:
                    heapreplace(heap, (lo + n, hi))
                else:
                    heappop(heap)
                self.n -= n
                return Ranges(((lo, lo + n),))
        n = left = min(n, self.n)
        taken: list[Range] = []
        while left:
            lo, hi = heap[0]
            if hi - lo > left:
                hi = lo + left
                heapreplace(heap, (hi, heap[0][1]))
            else:
                heappop(heap)
            if taken and taken[-1][1] == lo:
                taken[-1] = (taken[-1][0], hi)
            else:
                taken.append((lo, hi))
            left -= hi - lo
        self.n -= n
        return Ranges(taken)

    def snapshot(self) -> Ranges:
        """Return the set as it is now."""
        return Ranges(self._heap)

    def withdraw(self, ranges: Ranges) -> int:
        """Take these out wherever they are, and return how many were in. Costs all the ranges of the queue."""
        pairs = ranges.pairs
        if not pairs or all(hi <= pairs[0][0] or lo >= pairs[-1][1] for lo, hi in self._heap):
            return 0
        left = Ranges(self._heap) - ranges
        n, self.n = self.n - len(left), len(left)
        self._heap = list(left.pairs)  # sorted, so a heap
        return n


class RangeSet:
    """A set of integers that only grows, and says what of others it lacks."""

    __slots__ = ("_highs", "_lows", "_n")

    def __init__(self) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def ranges(self) -> Ranges:
        """The set as it is now."""
        return Ranges(zip(self._lows, self._highs, strict=True))

    def add(self, lo: int, hi: int) -> Range:
        """Put ``lo <= k < hi`` in, and return the whole range in which it now lies."""
        lows, highs = self._lows, self._highs
        if not highs or highs[-1] < lo:  # it is beyond all
            lows.append(lo)
            highs.append(hi)
            self._n += hi - lo
            return lo, hi
        i = bisect_left(highs, lo)
        j = bisect_right(lows, hi, i)
        if i == j:  # it touches nothing
            lows.insert(i, lo)
            highs.insert(i, hi)
        else:
            if lows[i] < lo:
                lo = lows[i]
            if highs[j - 1] > hi:
                hi = highs[j - 1]
            self._n -= highs[i] - lows[i]
            if j > i + 1:
                self._n -= sum(highs[i + 1 : j]) - sum(lows[i + 1 : j])
                del lows[i + 1 : j], highs[i + 1 : j]
            lows[i], highs[i] = lo, hi
        self._n += hi - lo
        return lo, hi

    def lacks(self, ranges: Ranges) -> Ranges:
        """Return those of ``ranges`` that are not in the set."""
        if not self._lows or not ranges.pairs or self._highs[-1] <= ranges.pairs[0][0]:
            return ranges
        missing: list[Range] = []
        for start, hi in ranges.pairs:
            lo = start
            i = bisect_right(self._highs, lo)
            while i < len(self._lows) and self._lows[i] < hi:
                if self._lows[i] > lo:
                    missing.append((lo, self._lows[i]))
                lo = self._highs[i]
                i += 1
            if lo < hi:
                missing.append((lo, hi))
        return Ranges(missing)

    def snapshot(self) -> Ranges:
        """Return the set as it is now."""
        return Ranges(zip(self._lows, self._highs, strict=True))
