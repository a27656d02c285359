"""What waits to be run: plain work in order, work that has a history, and work that must wait a while."""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from heapq import heapify, heappop, heappush
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from modelops.driver.range_sets import RangeQueue
from modelops.study.ranges import Range, Ranges

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelops.study.spec import RetryPolicy

SUSPECT_AFTER_DEATHS = 2
SPLIT_INTO = 8
DELAY_PARTS = 16  # what is left of a delay is known to such a part of it


class Kind(StrEnum):
    """What is done with a range: of indices, or of parameter sets."""

    SIMULATE = "simulate"
    AGGREGATE = "aggregate"


class Work(NamedTuple):
    """Indices (or, to aggregate, parameter sets) that share a history.

    ``number``: of the attempt, by the count of failed ones. ``deaths``: workers that died while they ran it.
    ``errors``: how often the machinery around it failed. ``apart``: no other suspect may run on its host, see `blame`.
    """

    kind: Kind
    ranges: Ranges
    number: int = 1
    deaths: int = 0
    errors: int = 0
    apart: bool = False

    @property
    def suspect(self) -> bool:
        """Whether it must run alone on a worker, so that a further death can be blamed on it.

        A single item already after one death: that costs next to nothing.
        """
        deaths = self.deaths
        return deaths > 0 and (deaths >= SUSPECT_AFTER_DEATHS or len(self.ranges) == 1)

    def of(self, ranges: Ranges) -> Work:
        """Return the part of it that is of these."""
        return self if ranges is self.ranges or ranges == self.ranges else self._replace(ranges=ranges)

    def split(self) -> list[Work]:
        """Cut into parts, in order: eighths, or single items when there are no more than eight."""
        size = -(-len(self.ranges) // SPLIT_INTO)
        parts, rest = [], self.ranges
        while rest:
            part, rest = rest.take(size)
            parts.append(self._replace(ranges=part))
        return parts


class Backlog:
    """The work of one kind that no worker has."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.suspects: deque[Work] = deque()
        self.n_ready = 0  # items that could go out now, suspects left out
        self.next_at: float | None = None  # when the next delayed work is due
        self._special: deque[Work] = deque()  # keeps its history: not merged with other work
        self._ready: dict[int, RangeQueue] = {}  # by attempt number; none is empty
        self._waiting: list[tuple[float, int, Work]] = []
        self._n_waits = 0

    def add(self, work: Work) -> None:
        """Take in what is to be run as soon as there is room."""
        if not work.ranges:
            return
        if work.suspect:
            self.suspects.append(work)
            return
        self.n_ready += len(work.ranges)
        if work.deaths or work.errors:
            self._special.append(work)
        else:
            queue = self._ready.get(work.number)
            if queue is None:
                queue = self._ready[work.number] = RangeQueue()
            queue.add(work.ranges)

    def take_suspect(self, *, beside: bool) -> Work | None:
        """Take out the next suspect; ``beside`` others on a host, so none that is to be apart. None: there is none."""
        for i, work in enumerate(self.suspects):
            if not (beside and work.apart):
                del self.suspects[i]
                return work
        return None

    def add_later(self, work: Work, at: float) -> None:
        """Take in what is to be run when the clock shows ``at``."""
        if work.ranges:
            self._n_waits += 1
            heappush(self._waiting, (at, self._n_waits, work))
            self.next_at = self._waiting[0][0]

    def release(self, now: float) -> None:
        """Make ready what was delayed until now."""
        while self._waiting and self._waiting[0][0] <= now:
            self.add(heappop(self._waiting)[2])
        self.next_at = self._waiting[0][0] if self._waiting else None

    @property
    def waits_only_for_retries(self) -> bool:
        """Whether nothing of what is delayed has a history but failed attempts."""
        return not any(w.deaths or w.errors for _, _, w in self._waiting)

    def take(self, n: int) -> Work | None:
        """Take out work for one chunk: about ``n`` items of one attempt number, the smallest first."""
        if self._special:
            work = self._special.popleft()
        elif self._ready:
            number, queue = self._foremost()
            work = Work(self.kind, queue.take(n), number)
            if not queue.n:
                del self._ready[number]
        else:
            return None
        self.n_ready -= len(work.ranges)
        return work

    def _foremost(self) -> tuple[int, RangeQueue]:
        if len(self._ready) == 1:  # most often
            ((number, queue),) = self._ready.items()
            return number, queue
        return min(self._ready.items(), key=lambda entry: entry[1].first)

    def numbered(self, number: int) -> Ranges:
        """Return the items whose next attempt is of this number. Costs the whole backlog: for rare events."""
        works = [*self._special, *self.suspects, *(entry[2] for entry in self._waiting)]
        pairs = [pair for work in works if work.number == number for pair in work.ranges.pairs]
        if number in self._ready:
            pairs += self._ready[number].snapshot().pairs
        return Ranges(pairs)

    def withdraw(self, ranges: Ranges) -> None:
        """Take these out wherever they are. Costs the whole backlog: for rare events."""
        for number, queue in [*self._ready.items()]:
            self.n_ready -= queue.withdraw(ranges)
            if not queue.n:
                del self._ready[number]
        if self._special:
            self.n_ready -= sum(len(w.ranges) for w in self._special)
            left, self._special = _without(self._special, ranges), deque()
            for work in left:  # of which one may be left that must run alone now
                self.add(work)
        if self.suspects:
            self.suspects = _without(self.suspects, ranges)
        if self._waiting:
            kept = [(at, i, w.of(w.ranges - ranges)) for at, i, w in self._waiting]
            self._waiting = [entry for entry in kept if entry[2].ranges]
            heapify(self._waiting)
            self.next_at = self._waiting[0][0] if self._waiting else None


def _without(works: deque[Work], ranges: Ranges) -> deque[Work]:
    kept = (w.of(w.ranges - ranges) for w in works)
    return deque(w for w in kept if w.ranges)


def next_attempts(
    retried: Iterable[tuple[Ranges, int, float]], missing: Ranges, retry: RetryPolicy
) -> tuple[list[tuple[Ranges, int, float]], Ranges]:
    """Return what of the missing indices will be tried again, as which attempt and in how many seconds; and the others.

    Parameters
    ----------
    retried
        Indices, the number of their next attempt, and how many seconds ago that was recorded, in that order. Numbers
        only grow: of an index, the highest counts.
    retry
        How long they wait in all. Of what is left of it, a sixteenth at most is added, so that there are few groups.
    """
    pairs: dict[tuple[int, int], list[Range]] = {}
    for indices, number, waited_s in retried:
        delay_s = retry.delay_s(number - 1)
        left = 1.0 - max(0.0, waited_s) / delay_s if delay_s else 0.0
        pairs.setdefault((number, max(0, ceil(DELAY_PARTS * left))), []).extend(indices.pairs)
    found: list[tuple[Ranges, int, float]] = []
    others = missing
    for number, parts in sorted(pairs, reverse=True):
        if indices := others & Ranges(pairs[number, parts]):
            found.append((indices, number, retry.delay_s(number - 1) * parts / DELAY_PARTS))
            others = others - indices
    return found, others
