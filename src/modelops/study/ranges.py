"""Sets of integers as sorted, disjoint, half-open ranges.

All work in ModelOps is such a set of the index line: a chunk, a segment, what is missing.
Cost goes with the number of ranges, never with the number of integers in them.
"""

from __future__ import annotations

from bisect import bisect_right
from operator import itemgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Range = tuple[int, int]
FEW: Final = 16  # pairs that are looked through sooner than searched
_end = itemgetter(1)


class Ranges:
    """An immutable set of integers, stored as ``((lo, hi), ...)`` with ``lo < hi``, sorted, never touching.

    Parameters
    ----------
    pairs
        Any half-open ranges, in any order; they may overlap and may be empty.
    """

    __slots__ = ("_count", "pairs")

    pairs: tuple[Range, ...]

    def __init__(self, pairs: Iterable[Range] = ()) -> None:
        given = tuple(pairs)
        if len(given) == 1:  # most often
            lo, hi = given[0]
            self._count = n = hi - lo if lo < hi else 0
            self.pairs = given if n else ()
            return
        merged: list[Range] = []
        for lo, hi in sorted(given):
            if lo >= hi:
                continue
            if merged and lo <= merged[-1][1]:
                if hi > merged[-1][1]:
                    merged[-1] = (merged[-1][0], hi)
            else:
                merged.append((lo, hi))
        n = 0
        for lo, hi in merged:
            n += hi - lo
        self.pairs, self._count = tuple(merged), n

    @classmethod
    def _trusted(cls, pairs: Iterable[Range]) -> Ranges:
        """Wrap pairs that are known to be sorted, disjoint and not touching."""
        self = cls.__new__(cls)
        self.pairs = tuple(pairs)
        n = 0
        for lo, hi in self.pairs:
            n += hi - lo
        self._count = n
        return self

    @classmethod
    def of(cls, indices: Iterable[int]) -> Ranges:
        """Return the set of these single integers."""
        return cls((k, k + 1) for k in indices)

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return self._count > 0

    def __iter__(self) -> Iterator[int]:
        for lo, hi in self.pairs:
            yield from range(lo, hi)

    def __contains__(self, k: object) -> bool:
        if not isinstance(k, int):
            return False
        i = bisect_right(self.pairs, k, key=lambda p: p[0]) - 1
        return i >= 0 and k < self.pairs[i][1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self.pairs == other.pairs

    def __hash__(self) -> int:
        return hash(self.pairs)

    def __repr__(self) -> str:
        return f"Ranges({', '.join(f'{lo}:{hi}' for lo, hi in self.pairs)})"

    def __or__(self, other: Ranges) -> Ranges:
        if not other.pairs:
            return self
        if not self.pairs:
            return other
        return Ranges((*self.pairs, *other.pairs))

    def _is_apart(self, other: Ranges) -> bool:
        """Say whether one ends before the other begins. Nearly always so, or else both are the same."""
        mine, others = self.pairs, other.pairs
        return not mine or not others or mine[-1][1] <= others[0][0] or others[-1][1] <= mine[0][0]

    def __and__(self, other: Ranges) -> Ranges:
        mine, others = self.pairs, other.pairs
        if not mine or not others or mine[-1][1] <= others[0][0] or others[-1][1] <= mine[0][0]:
            return EMPTY  # nearly always, or else both are the same
        if mine == others:
            return self
        out: list[Range] = []
        i, j = _first_beyond(self.pairs, other.pairs[0][0]), _first_beyond(other.pairs, self.pairs[0][0])
        while i < len(self.pairs) and j < len(other.pairs):
            lo = max(self.pairs[i][0], other.pairs[j][0])
            hi = min(self.pairs[i][1], other.pairs[j][1])
            if lo < hi:
                out.append((lo, hi))
            if self.pairs[i][1] < other.pairs[j][1]:
                i += 1
            else:
                j += 1
        return Ranges._trusted(out)

    def __sub__(self, other: Ranges) -> Ranges:
        mine, others = self.pairs, other.pairs
        if not mine or not others or mine[-1][1] <= others[0][0] or others[-1][1] <= mine[0][0]:
            return self  # as above
        if mine == others:
            return EMPTY
        out: list[Range] = []
        j = _first_beyond(other.pairs, self.pairs[0][0])
        for start, hi in self.pairs:
            lo = start
            while j < len(other.pairs) and other.pairs[j][1] <= lo:
                j += 1
            i = j
            while i < len(other.pairs) and other.pairs[i][0] < hi:
                if other.pairs[i][0] > lo:
                    out.append((lo, other.pairs[i][0]))
                lo = max(lo, other.pairs[i][1])
                i += 1
            if lo < hi:
                out.append((lo, hi))
        return Ranges._trusted(out)

    def isdisjoint(self, other: Ranges) -> bool:
        """Say whether no integer is in both."""
        return self._is_apart(other) or not (self & other).pairs

    def take(self, n: int) -> tuple[Ranges, Ranges]:
        """Split into the ``n`` smallest integers (or all, if fewer) and the rest."""
        if n >= self._count:
            return self, EMPTY
        head: list[Range] = []
        for i, (lo, hi) in enumerate(self.pairs):
            if hi - lo > n:
                if n:
                    head.append((lo, lo + n))
                return Ranges._trusted(head), Ranges._trusted(((lo + n, hi), *self.pairs[i + 1 :]))
            head.append((lo, hi))
            n -= hi - lo
            if n == 0:
                return Ranges._trusted(head), Ranges._trusted(self.pairs[i + 1 :])
        return self, EMPTY  # pragma: no cover - n < count always returns above

    def at(self, position: int) -> int:
        """Return the integer at this position of the sorted set (0 is the smallest).

        Raises
        ------
        IndexError
            ``position`` is not in ``0 <= position < len(self)``.
        """
        if position >= 0:
            for lo, hi in self.pairs:
                if position < hi - lo:
                    return lo + position
                position -= hi - lo
        raise IndexError(position)


def _first_beyond(pairs: tuple[Range, ...], k: int) -> int:
    """Return the position of the first pair that does not end at or before ``k``."""
    return bisect_right(pairs, k, key=_end) if len(pairs) > FEW else 0


EMPTY = Ranges()
