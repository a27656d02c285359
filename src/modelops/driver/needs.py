"""Which replicates a job with ``until`` needs: what is released to be run, and what is known not to be needed.

The decision is `modelops.study.stopping`'s, over the outcomes that the store has accepted, in replicate order. So it is
the same in whatever order outcomes come, and a driver that takes over decides the same from what is stored. Only how
far a parameter set is run ahead of its next look depends on how busy the workers are.

A set is *open* until it is decided; then the replicates beyond are *dropped*: nothing of them is begun or committed any
more. Once the store has that (or at once, if all are needed) the set is *closed*, and may be aggregated.

A set is *stuck* if a replicate that it certainly needs has no number to go by: then the job is to end, and to say which
is the first such replicate, by parameter set and number. So nothing of later sets is handed out any more, and the end
waits until each set before it is decided or stuck itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import numpy as np

from modelops.driver.range_sets import RangeSet
from modelops.errors import InternalError
from modelops.states import STORED, ReplicateStatus
from modelops.study.ranges import EMPTY, Range, Ranges
from modelops.study.stopping import next_look
from modelops.worker.messages import NO_NUMBER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from modelops.study.index_line import IndexLine
    from modelops.study.stopping import Until
    from modelops.worker.messages import NoNumbers, SegmentRef

_UNKNOWN: Final = 255
_SUCCEEDED: Final = STORED.index(ReplicateStatus.SUCCEEDED)
_STATUS: Final = {**dict(enumerate(STORED)), NO_NUMBER: ReplicateStatus.SUCCEEDED}
SURELY: Final = 0.9  # of the replicates that a set will probably need are released at once


class Watched(NamedTuple):
    """How the replicates of a segment ended: codes of `STORED`, and the numbers of the output that is watched.

    The code is `NO_NUMBER` where that is none.
    """

    codes: bytes
    numbers: npt.NDArray[np.float64]

    @classmethod
    def of(cls, data: bytes) -> Watched:
        """Read what comes with a segment: a byte per outcome, then an IEEE double, little-endian, per outcome."""
        n = len(data) // 9
        return cls(data[:n], np.frombuffer(data, "<f8", n, n))

    @classmethod
    def failed(cls, status: ReplicateStatus, n: int) -> Watched:
        """Return this for replicates that all ended in one way, without outputs."""
        return cls(bytes([STORED.index(status)]) * n, np.full(n, np.nan))

    def encode(self) -> bytes:
        """Return it as `of` reads it."""
        return self.codes + self.numbers.astype("<f8").tobytes()


class Decision(NamedTuple):
    """A parameter set needs no more. ``dropped``: the indices that this says of, none of which was dropped before."""

    param: int
    dropped: Ranges


class _Set:
    """The outcomes of one parameter set by replicate."""

    __slots__ = ("codes", "end", "expected", "known", "look", "numbers", "released", "settled")

    def __init__(self, look: int, released: int, end: int) -> None:
        self.look = look  # the length of the prefix that is looked at next
        self.released = released
        self.end = end
        self.expected = look
        self.known = self.settled = 0
        self.codes = bytearray([_UNKNOWN]) * released
        self.numbers = np.full(released, np.nan)

    def put(self, first: int, codes: bytes, numbers: npt.NDArray[np.float64]) -> None:
        end = first + len(codes)
        if end > len(self.codes):
            more = max(end - len(self.codes), len(self.codes) // 2)
            self.codes += bytes([_UNKNOWN]) * more
            self.numbers = np.concatenate((self.numbers, np.full(more, np.nan)))
        self.codes[first:end] = codes
        self.numbers[first:end] = numbers
        self.known += len(codes)
        found = self.codes.find(_UNKNOWN, self.settled)
        self.settled = found if found >= 0 else len(self.codes)

    def values(self, n: int) -> list[float]:
        """Return the numbers of those of the first ``n`` replicates that succeeded."""
        good = np.frombuffer(self.codes, np.uint8, n) == _SUCCEEDED
        chosen: list[float] = self.numbers[:n][good].tolist()
        return chosen


class Needs:
    """Decides what the parameter sets of one job need."""

    def __init__(self, until: Until, line: IndexLine) -> None:
        self._until, self._line = until, line
        self._blocks = [b for b in line.blocks if b.end > b.base]
        self._sets: dict[int, _Set] = {}
        self._waiting: dict[int, int] = {}  # decided, and the store does not have it yet: how many it needs
        self._closed, self._dropped, self._taken = RangeSet(), RangeSet(), RangeSet()
        self._missing = EMPTY
        self._ahead: dict[int, None] = {}  # open sets that may be run ahead of their next look
        self._stuck: dict[int, int] = {}  # set: its first replicate without a number
        self._first_stuck: int | None = None
        self._withdrawn_from: int | None = None
        self._left_params = EMPTY
        self._no_numbers: list[tuple[Ranges, str]] = []
        self._n_untouched = line.n_params
        self._expected = 0  # replicates of touched open sets that are expected to be run yet

    # What earlier drivers left.

    def adopt(self, segments: Sequence[SegmentRef]) -> list[Decision]:
        """Take in what counts, before anything is released; return what follows from it and was not committed."""
        not_needed = _not_needed(segments)
        opened = open_params(self._line, segments)
        for lo, hi in (self._line.params_of(self._line.all()) - opened).pairs:
            self._closed.add(lo, hi)
            self._n_untouched -= hi - lo
        for pair in not_needed.pairs:
            self._dropped.add(*pair)
        undecided = Ranges(p for lo, hi in opened.pairs for p in self._line.of_params(lo, hi).pairs)
        touched: dict[int, None] = {}
        for ref in segments:
            if ReplicateStatus.NOT_NEEDED not in ref.counts and not undecided.isdisjoint(Ranges(ref.ranges)):
                if ref.watched is None:
                    raise InternalError(f"segment {ref.name} was given without what is watched")
                self.say(ref.no_numbers)
                touched |= self._put(Ranges(ref.ranges), Watched.of(ref.watched))
        return self._decisions(touched)

    def initial(self, missing: Ranges, left: Ranges = EMPTY) -> Ranges:
        """Return what of the missing may be run before more is decided; nothing else ever will be.

        ``left``: their sets are not decided now.
        """
        self._missing, self._left_params = missing, self._line.params_of(left)
        pairs: list[Range] = []
        for param in self._line.params_of(self._line.all()) - self._closed.snapshot():
            if param not in self._waiting and self._may_go_on(param):
                if (one := self._sets.get(param)) is not None:
                    self._extend(param, one, self._target(one))
                pairs += self._slice(param, 0, self._released(param))
        return self._needed(Ranges(pairs))

    # What is needed.

    @property
    def closed(self) -> Ranges:
        """The parameter sets of which the store has all that they need."""
        return self._closed.snapshot()

    @property
    def decided(self) -> Ranges:
        """These, and those of which the store will soon have it."""
        return self._closed.snapshot() | Ranges((param, param + 1) for param in sorted(self._waiting))

    def cut(self, indices: Ranges) -> Ranges:
        """Return those that are not dropped."""
        return self._dropped.lacks(indices)

    def _needed(self, indices: Ranges) -> Ranges:
        return self._taken.lacks(self._dropped.lacks(indices)) & self._missing

    def cut_segment(self, ref: SegmentRef) -> SegmentRef | None:
        """Return what of a stored segment may be committed; None: nothing."""
        held = Ranges(ref.ranges)
        kept = self._dropped.lacks(held)
        if len(kept) == len(held):
            return ref
        if not kept or ref.watched is None:
            return None
        watched = Watched.of(ref.watched)
        index = np.concatenate([np.arange(lo, hi) for lo, hi in held.pairs])
        edges = np.array(kept.pairs).ravel()
        mine = np.searchsorted(edges, index, side="right") % 2 == 1
        codes = bytes(np.frombuffer(watched.codes, np.uint8)[mine])
        of_codes = Counter(codes.replace(bytes([NO_NUMBER]), bytes([_SUCCEEDED])))
        counts = {STORED[code]: n for code, n in sorted(of_codes.items())}
        encoded = Watched(codes, watched.numbers[mine]).encode()
        return msgspec.structs.replace(ref, ranges=kept.pairs, counts=counts, watched=encoded)

    # Outcomes.

    def add(self, indices: Ranges, watched: Watched) -> list[Decision]:
        """Take in committed outcomes; return what follows."""
        return self._decisions(self._put(indices, watched))

    def say(self, no_numbers: NoNumbers) -> None:
        """Take in what is said of replicates without a number."""
        self._no_numbers += [(Ranges(pairs), text) for text, pairs in no_numbers]

    def undecidable(self) -> tuple[int, int, str] | None:
        """Return the first replicate that a set needs and that has no number, and what is said of it.

        None if there is none, or if a set before it is not decided yet.
        """
        param = self._first_stuck
        if param is None:
            return None
        before = self._closed.lacks(Ranges(((0, param),)) - self._left_params)
        if any(p not in self._waiting for p in before):
            return None
        index = self._line.index(param, self._stuck[param])
        said = next((text for ranges, text in self._no_numbers if index in ranges), "has none")
        return param, self._stuck[param], said

    def beyond(self) -> Ranges:
        """Return, once for each set that is found to be the first that is stuck, what need not be run because of it."""
        if self._first_stuck is None or self._first_stuck == self._withdrawn_from:
            return EMPTY
        self._withdrawn_from = self._first_stuck
        return self._line.of_params(self._first_stuck, self._line.n_params)

    def _may_go_on(self, param: int) -> bool:
        return self._first_stuck is None or param < self._first_stuck

    def release(self, params: Iterable[int]) -> Ranges:
        """Hand out what these sets certainly or probably need beyond what they had; each index once."""
        pairs: list[Range] = []
        for param in params:
            one = self._sets.get(param)
            if one is not None and param not in self._waiting and self._may_go_on(param):
                pairs += self._extend(param, one, self._target(one))
        return self._needed(Ranges(pairs)) if pairs else EMPTY

    def run_ahead(self) -> Ranges:
        """Hand out what one open set may need after its next look, as slots are free; none if none may go ahead."""
        while self._ahead:
            param = next(iter(self._ahead))
            del self._ahead[param]
            one = self._sets[param]
            if one.released <= one.look < one.end and self._may_go_on(param):
                found = self._needed(Ranges(self._extend(param, one, min(next_look(one.look), one.end))))
                if found:
                    return found
        return EMPTY

    def params_of(self, indices: Ranges) -> Ranges:
        """Return the parameter sets that these indices belong to."""
        return self._line.params_of(indices)

    def holds(self, indices: Ranges) -> Ranges:
        """Return those that were not handed out, and may be."""
        pairs = [
            pair
            for p, r, n in self._parts(indices)
            if p not in self._waiting and self._is_open(p)
            for pair in self._slice(p, max(r, self._released(p)), r + n)
        ]
        return self._needed(Ranges(pairs))

    def withdraw(self, indices: Ranges) -> None:
        """Hand these out no more: they are under way already."""
        for pair in indices.pairs:
            self._taken.add(*pair)

    def close(self, indices: Ranges) -> tuple[Ranges, dict[ReplicateStatus, int]]:
        """Note that the store has that these are not needed.

        Returns
        -------
            The parameter sets that are closed by it, and how those of the replicates ended that had ended already.
        """
        displaced: Counter[ReplicateStatus] = Counter()
        params = self._line.params_of(indices)
        for param in params:
            n, one = self._waiting.pop(param), self._sets.pop(param)
            displaced.update(_STATUS[code] for code in one.codes[n:] if code != _UNKNOWN)
            self._closed.add(param, param + 1)
        return params, dict(displaced)

    @property
    def n_expected(self) -> int:
        """How many replicates are probably still to be run."""
        return self._n_untouched * self._until.min + self._expected

    # One set.

    def _put(self, indices: Ranges, watched: Watched) -> dict[int, None]:
        at = 0
        touched: dict[int, None] = {}
        for param, first, n in self._parts(indices):
            if self._is_open(param):
                one = self._sets.get(param) or self._open(param)
                before = max(0, one.expected - one.known)
                one.put(first, watched.codes[at : at + n], watched.numbers[at : at + n])
                if param not in self._waiting:
                    self._expected += max(0, one.expected - one.known) - before
                    touched[param] = None
            at += n
        return touched

    def _open(self, param: int) -> _Set:
        dropped = self._line_of(param) - self._dropped.lacks(self._line_of(param))
        # Nobody drops what is needed; if it happened all the same, a set must not wait for it for ever.
        end = min((self._line.locate(lo).replicate for lo, _ in dropped.pairs), default=self._until.max)
        one = self._sets[param] = _Set(self._until.min, self._until.min, end)
        self._n_untouched -= 1
        self._expected += one.expected
        self._ahead[param] = None
        return one

    def _line_of(self, param: int) -> Ranges:
        return self._line.of_param(param)

    def _is_open(self, param: int) -> bool:
        return bool(self._closed.lacks(Ranges(((param, param + 1),))))

    def _released(self, param: int) -> int:
        one = self._sets.get(param)
        return self._until.min if one is None else one.released

    def _decisions(self, params: Iterable[int]) -> list[Decision]:
        decided = []
        for param in params:
            n = self._look(param, self._sets[param])
            if n is None:
                continue
            one = self._sets[param]
            self._expected -= max(0, one.expected - one.known)
            self._ahead.pop(param, None)
            dropped = self._dropped.lacks(Ranges(self._slice(param, n, self._until.max)))
            for pair in dropped.pairs:
                self._dropped.add(*pair)
            if dropped:
                self._waiting[param] = n
            else:
                self._closed.add(param, param + 1)
                del self._sets[param]
            decided.append(Decision(param, dropped))
        return decided

    def _look(self, param: int, one: _Set) -> int | None:
        """Look at every prefix that is due; return how many replicates are needed, if it is known now."""
        until = self._until
        looked = False
        while True:
            n = min(one.look, one.end)
            if (at := one.codes.find(NO_NUMBER, 0, min(n, one.settled))) >= 0:
                self._stuck[param] = at
                self._first_stuck = min(self._stuck)
                return None
            if one.settled < n:
                break
            if n == one.end or until.is_enough(one.values(n)):
                return n
            one.look, looked = min(next_look(n), one.end), True
        if looked:
            self._ahead[param] = None
            before = max(0, one.expected - one.known)
            one.expected = max(one.look, self._prediction(one))
            self._expected += max(0, one.expected - one.known) - before
        return None

    def _prediction(self, one: _Set) -> int:
        values = one.values(one.settled)
        if not values:
            return one.end
        return min(one.end, round(self._until.predicted(values) * one.settled / len(values)))

    def _target(self, one: _Set) -> int:
        """Return how many replicates a set is to have released: up to its next look, and what it surely needs."""
        target, after = one.look, next_look(one.look)
        while after <= SURELY * one.expected and after <= one.end:
            target, after = after, next_look(after)
        return min(target, one.end)

    def _extend(self, param: int, one: _Set, target: int) -> list[Range]:
        lo, one.released = one.released, max(one.released, target)
        return self._slice(param, lo, one.released)

    # The line.

    def _slice(self, param: int, lo: int, hi: int) -> list[Range]:
        """Return the indices of the replicates ``lo`` to ``hi`` - 1 of a parameter set."""
        out = []
        for b in self._blocks:
            first, last = max(lo, b.r0), min(hi, b.r0 + b.n_replicates)
            if first < last and b.p0 <= param < b.p0 + b.n_params:
                base = b.base + (param - b.p0) * b.n_replicates - b.r0
                out.append((base + first, base + last))
        return out

    def _parts(self, indices: Ranges) -> Iterator[tuple[int, int, int]]:
        """Yield ``(param, first replicate, n)`` of consecutive indices, in their order."""
        for start, hi in indices.pairs:
            lo = start
            i = bisect_right(self._blocks, lo, key=lambda b: b.base) - 1
            while lo < hi:
                b = self._blocks[i]
                p, r = divmod(lo - b.base, b.n_replicates)
                n = min(hi - lo, b.n_replicates - r)
                yield b.p0 + p, b.r0 + r, n
                lo += n
                i += lo == b.end


def open_params(line: IndexLine, segments: Iterable[SegmentRef]) -> Ranges:
    """Return the parameter sets of which it is not known, from what counts, what they need."""
    segments = list(segments)
    missing = line.all() - Ranges(pair for ref in segments for pair in ref.ranges)
    undecided = line.params_of(line.all()) - line.params_of(_not_needed(segments))
    return line.params_of(missing) | undecided


def _not_needed(segments: Iterable[SegmentRef]) -> Ranges:
    return Ranges(p for ref in segments if ReplicateStatus.NOT_NEEDED in ref.counts for p in ref.ranges)
