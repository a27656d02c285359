"""Making committed results not count any more, inside a transaction: what is damaged, superseded, or stale.

The stored objects are left alone; without a row they are orphans. An aggregate is **stale** when a replicate of its
parameter sets has no outcome, or has one in a segment that the aggregate did not read. A stale one counts for
nothing: whatever changes segments or the line drops, in the same transaction, the aggregates that become stale by it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import sqlalchemy as sa

from modelops.states import ReplicateStatus
from modelops.store import schema
from modelops.study.ids import AttemptId
from modelops.study.ranges import Range, Ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from modelops.study.ids import JobId
    from modelops.study.index_line import IndexLine
    from modelops.worker.messages import SegmentRef


class Kept(NamedTuple):
    """What still counts of a segment: its indices, and how they ended."""

    ranges: tuple[Range, ...]
    counts: Mapping[ReplicateStatus, int]


NOTHING = Kept((), {})


class Withdrawal(msgspec.Struct, frozen=True, kw_only=True):
    """What is not to count any more.

    ``segments``: what of each still counts. ``aggregates``: whole aggregate segments. ``executions``: attempts whose
    outcomes count, but whose execution data is lost. ``epoch``: segments of attempts of epochs up to this that no
    record knows are never to count.
    """

    segments: dict[AttemptId, Kept] = {}
    aggregates: tuple[AttemptId, ...] = ()
    executions: tuple[AttemptId, ...] = ()
    epoch: int = 0

    def __bool__(self) -> bool:
        return bool(self.segments or self.aggregates or self.executions)


def stale_aggregates(
    line: IndexLine,
    segments: Iterable[tuple[str, Iterable[Range]]],
    aggregates: Iterable[tuple[AttemptId, Iterable[Range], Iterable[str]]],
) -> list[AttemptId]:
    """Return the attempts whose aggregates are stale.

    Parameters
    ----------
    segments
        Digest and ranges of indices of each that counts.
    aggregates
        Attempt, ranges of parameter sets, and digests of the segments it read, of each.
    """
    held = sorted((lo, hi, digest) for digest, ranges in segments for lo, hi in ranges)
    lows = [lo for lo, _, _ in held]

    def is_stale(params: Iterable[Range], inputs: set[str]) -> bool:
        for lo, hi in Ranges(
            pair for first, end in params for pair in line.of_params(first, end).pairs
        ).pairs:
            i, at = max(0, bisect_right(lows, lo) - 1), lo
            while at < hi:
                if i == len(held) or held[i][0] > at:
                    return True  # nobody holds index `at`
                if held[i][1] > at:
                    if held[i][2] not in inputs:
                        return True
                    at = held[i][1]
                i += 1
        return False

    return [attempt for attempt, params, inputs in aggregates if is_stale(params, set(inputs))]


def no_longer_unneeded(
    line: IndexLine, segments: Iterable[SegmentRef], lost: Ranges
) -> dict[AttemptId, Kept]:
    """Return what is left of the segments that say what is not needed, when these outcomes do not count any more.

    What a parameter set needs was decided by its outcomes, so it is decided anew.
    """
    undecided = Ranges(pair for lo, hi in line.params_of(lost).pairs for pair in line.of_params(lo, hi).pairs)
    out = {}
    for ref in segments:
        if set(ref.counts) == {ReplicateStatus.NOT_NEEDED}:
            before = Ranges(ref.ranges)
            kept = before - undecided
            if len(kept) < len(before):
                out[ref.attempt] = (
                    Kept(kept.pairs, {ReplicateStatus.NOT_NEEDED: len(kept)}) if kept else NOTHING
                )
    return out


def trim(sql: sa.Connection, job: JobId, kept: Mapping[AttemptId, Kept]) -> None:
    """Let only this count of these segments."""
    for attempt, what in kept.items():
        _trim(sql, job, attempt, what)


def drop_ranges_of_nothing(sql: sa.Connection, job: JobId) -> None:
    """Delete ranges whose segment has no row: they count for nothing, and would keep others from counting.

    The databases see that there are none, but not where somebody deletes rows by hand with that turned off.
    """
    for ranges, rows in (
        (schema.segment_ranges, schema.segments),
        (schema.aggregate_ranges, schema.aggregates),
    ):
        is_there = sa.exists().where(rows.c.job == ranges.c.job, rows.c.attempt == ranges.c.attempt)
        sql.execute(ranges.delete().where(ranges.c.job == job, ~is_there))


def withdraw(sql: sa.Connection, job: JobId, what: Withdrawal) -> dict[str, Any]:
    """Carry a withdrawal out; what becomes stale by it is for `drop_stale`.

    Returns
    -------
        For the event: how many ``replicates`` and ``aggregates`` (parameter sets) lost their outcome, and the
        ``attempts`` whose segments lost any, which ``ranges`` of indices that were, and the withdrawal's ``epoch``.
    """
    before = _ranges(sql, schema.segment_ranges, job) if what.segments else {}
    lost, losers = Ranges(), []
    for attempt, kept in what.segments.items():
        if gone := Ranges(before.get(attempt, ())) - Ranges(kept.ranges):
            lost |= gone
            losers.append(attempt)
        _trim(sql, job, attempt, kept)
    if what.executions:
        s = schema.segments.c
        table = schema.segments.update().where(s.job == job, s.attempt.in_(what.executions))
        sql.execute(table.values(execution=None))
    return {
        "replicates": len(lost),
        "ranges": [list(pair) for pair in lost.pairs],
        "aggregates": _drop_aggregates(sql, job, what.aggregates),
        "attempts": losers,
        **({"epoch": what.epoch} if what.epoch else {}),
    }


def drop_stale(
    sql: sa.Connection, job: JobId, line: IndexLine, among: Sequence[AttemptId] | None = None
) -> int:
    """Drop the aggregates that are stale (of these attempts only); return how many parameter sets lost theirs."""
    a, s = schema.aggregates.c, schema.segments.c
    query = sa.select(a.attempt, a.inputs).where(a.job == job)
    if among is not None:
        query = query.where(a.attempt.in_(among))
    inputs = {AttemptId(attempt): given for attempt, given in sql.execute(query)}
    if not inputs:
        return 0
    params = _ranges(sql, schema.aggregate_ranges, job)
    indices = _ranges(sql, schema.segment_ranges, job)
    segments = sql.execute(sa.select(s.attempt, s.digest).where(s.job == job))
    stale = stale_aggregates(
        line,
        [(digest, indices[attempt]) for attempt, digest in segments],
        [(attempt, params[attempt], given) for attempt, given in inputs.items()],
    )
    return _drop_aggregates(sql, job, stale)


def _trim(sql: sa.Connection, job: JobId, attempt: AttemptId, kept: Kept) -> None:
    r, s = schema.segment_ranges, schema.segments
    sql.execute(r.delete().where(r.c.job == job, r.c.attempt == attempt))
    one = (s.c.job == job, s.c.attempt == attempt)
    if not kept.ranges:
        sql.execute(s.delete().where(*one))
        return
    sql.execute(s.update().where(*one).values(counts={str(k): n for k, n in kept.counts.items()}))
    sql.execute(r.insert(), [{"job": job, "lo": lo, "hi": hi, "attempt": attempt} for lo, hi in kept.ranges])


def _drop_aggregates(sql: sa.Connection, job: JobId, attempts: Sequence[AttemptId]) -> int:
    n = _size(sql, schema.aggregate_ranges, job, attempts)
    for table in (schema.aggregate_ranges, schema.aggregates):
        for attempt in attempts:
            sql.execute(table.delete().where(table.c.job == job, table.c.attempt == attempt))
    return n


def _size(sql: sa.Connection, table: sa.Table, job: JobId, attempts: Sequence[AttemptId]) -> int:
    wanted = set(attempts)
    if not wanted:
        return 0
    c = table.c
    rows = sql.execute(sa.select(c.attempt, c.lo, c.hi).where(c.job == job))
    return sum(hi - lo for attempt, lo, hi in rows if attempt in wanted)


def _ranges(sql: sa.Connection, table: sa.Table, job: JobId) -> defaultdict[str, list[Range]]:
    c = table.c
    out: defaultdict[str, list[Range]] = defaultdict(list)
    for attempt, lo, hi in sql.execute(sa.select(c.attempt, c.lo, c.hi).where(c.job == job)):
        out[attempt].append((lo, hi))
    return out
