"""The index line: every replicate of a job has one integer, given once and never changed.

A job is a list of blocks. In a block, replicate ``r`` of parameter set ``p`` has the index
``k = base + (p - p0) * n + (r - r0)`` (parameter-major). Extending a job appends a block.
The reference is ``docs/reference/index-line.md``.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple

import msgspec

from modelops.study.ranges import Range, Ranges

MAX_INDICES = 2**53  # a dashboard's JavaScript counts exactly up to here


class Place(NamedTuple):
    """Where an index lies: parameter set ordinal and replicate number."""

    param: int
    replicate: int


class Block(msgspec.Struct, frozen=True):
    """A rectangle of parameter sets x replicates on the index line.

    ``base``: first index. ``p0``, ``n_params``: parameter set ordinals ``p0 <= p < p0 + n_params``.
    ``r0``, ``n_replicates``: replicate numbers ``r0 <= r < r0 + n_replicates``.
    """

    base: int
    p0: int
    n_params: int
    r0: int
    n_replicates: int

    @property
    def end(self) -> int:
        """One past the last index of the block."""
        return self.base + self.n_params * self.n_replicates


class IndexLine(msgspec.Struct, frozen=True):
    """The blocks of one job, in the order in which they were added; their bases follow one another."""

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        at = 0
        for block in self.blocks:
            if block.base != at or min(block.p0, block.n_params, block.r0, block.n_replicates) < 0:
                raise ValueError(
                    f"blocks must follow one another on the line: {block} does not begin at {at}"
                )
            at = block.end
        for i, block in enumerate(self.blocks):
            if any(_overlap(block, other) for other in self.blocks[:i]):
                raise ValueError(f"a replicate would have two indices: {block} overlaps an earlier block")

    @classmethod
    def of(cls, n_params: int, n_replicates: int) -> IndexLine:
        """Return the line of a new job: one block that begins at parameter set 0, replicate 0."""
        return cls((Block(0, 0, n_params, 0, n_replicates),))

    @property
    def size(self) -> int:
        """How many indices have been given."""
        return self.blocks[-1].end if self.blocks else 0

    @property
    def n_params(self) -> int:
        """How many parameter sets the line covers."""
        return max((b.p0 + b.n_params for b in self.blocks), default=0)

    def replicates(self) -> list[tuple[int, int, int]]:
        """Return how many replicates the parameter sets have.

        Returns
        -------
            Runs ``(first, end, n)``: the sets ``first <= p < end`` have the replicates 0 to ``n`` - 1 each.
        """
        edges = sorted({edge for b in self.blocks for edge in (b.p0, b.p0 + b.n_params)})
        runs: list[tuple[int, int, int]] = []
        for lo, hi in pairwise(edges):
            n = sum(b.n_replicates for b in self.blocks if b.p0 <= lo < b.p0 + b.n_params)
            if runs and runs[-1][1:] == (lo, n):
                lo = runs.pop()[0]
            runs.append((lo, hi, n))
        return runs

    def extended(self, *, replicates: int | None = None, n_more_params: int = 0) -> IndexLine:
        """Return the line with what is added appended; nothing is renumbered.

        Parameters
        ----------
        replicates
            How many every parameter set has afterwards, old and new; sets that have as many gain none. None:
            the old ones gain none, and new ones get as many as the old one that has most.
        n_more_params
            How many parameter sets follow the last one.

        Raises
        ------
        ValueError
            A parameter set has more replicates than that already, or the line would hold too many.
        """
        runs = self.replicates()
        most = max((n for _, _, n in runs), default=0)
        wanted = most if replicates is None else replicates
        if wanted < most:
            raise ValueError(
                f"a parameter set has {most} replicates already; {wanted} would be fewer. "
                f"Say how many each set is to have in all: {most + 1} or more"
            )
        gains = [(lo, hi, n) for lo, hi, n in runs if replicates is not None and n < replicates]
        gains += [(self.n_params, self.n_params + n_more_params, 0)] if n_more_params else []
        blocks = list(self.blocks)
        for lo, hi, n in gains:
            blocks.append(Block(blocks[-1].end if blocks else 0, lo, hi - lo, n, wanted - n))
        line = IndexLine(tuple(blocks))
        if line.size > MAX_INDICES:
            raise ValueError(f"{line.size} replicates are more than one job can hold")
        return line

    def all(self) -> Ranges:
        """Return every index of the line."""
        return Ranges([(0, self.size)])

    def block_of(self, k: int) -> Block:
        """Return the block that holds index ``k``. Raises IndexError if no block does."""
        i = bisect_right(self.blocks, k, key=lambda b: b.base) - 1
        while i >= 0 and self.blocks[i].end == self.blocks[i].base:
            i -= 1
        if i < 0 or not self.blocks[i].base <= k < self.blocks[i].end:
            raise IndexError(k)
        return self.blocks[i]

    def locate(self, k: int) -> Place:
        """Return parameter set and replicate of index ``k``. Raises IndexError outside the line."""
        block = self.block_of(k)
        p, r = divmod(k - block.base, block.n_replicates)
        return Place(block.p0 + p, block.r0 + r)

    def index(self, param: int, replicate: int) -> int:
        """Return the index of a replicate. Raises IndexError if the line does not hold it."""
        for b in self.blocks:
            p, r = param - b.p0, replicate - b.r0
            if 0 <= p < b.n_params and 0 <= r < b.n_replicates:
                return b.base + p * b.n_replicates + r
        raise IndexError((param, replicate))

    def of_param(self, param: int) -> Ranges:
        """Return all indices of one parameter set."""
        return self.of_params(param, param + 1)

    def of_params(self, lo: int, hi: int) -> Ranges:
        """Return all indices of the parameter sets ``lo <= p < hi``."""
        out = []
        for b in self.blocks:
            first, last, n = lo - b.p0, hi - b.p0, b.n_replicates
            if first < 0:
                first = 0
            if last > b.n_params:
                last = b.n_params
            if first < last:
                out.append((b.base + first * n, b.base + last * n))
        return Ranges(out)

    def params_of(self, indices: Ranges) -> Ranges:
        """Return the ordinals of the parameter sets that these indices belong to."""
        out: list[Range] = []
        given = indices.pairs
        for b in self.blocks if given else ():
            base, end, n = b.base, b.end, b.n_replicates
            if not n:
                continue
            inside = given  # most often
            if given[0][0] < base or given[-1][1] > end:
                inside = (indices & Ranges(((base, end),))).pairs
            for lo, hi in inside:
                out.append((b.p0 + (lo - base) // n, b.p0 + (hi - 1 - base) // n + 1))
        return Ranges(out)

    def ordered(self, lo_param: int, hi_param: int) -> list[tuple[int, int, int, int]]:
        """Return the rows of these parameter sets in result order: (parameter set, replicate).

        Returns
        -------
            Runs ``(param, first_replicate, first_index, n)``: ``n`` consecutive indices that are
            ``n`` consecutive replicates of one parameter set.
        """
        runs = []
        for b in self.blocks:
            for p in range(max(lo_param, b.p0), min(hi_param, b.p0 + b.n_params)):
                if b.n_replicates:
                    runs.append((p, b.r0, b.base + (p - b.p0) * b.n_replicates, b.n_replicates))
        return sorted(runs)


def _overlap(a: Block, b: Block) -> bool:
    n_params = min(a.p0 + a.n_params, b.p0 + b.n_params) - max(a.p0, b.p0)
    n_replicates = min(a.r0 + a.n_replicates, b.r0 + b.n_replicates) - max(a.r0, b.r0)
    return n_params > 0 and n_replicates > 0
