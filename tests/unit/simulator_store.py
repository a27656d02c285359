"""The store of a simulation: what it accepted survives every driver. It refuses whoever has lost the lease.

In every tenth schedule the real records (SQLite in memory) are given each write too, and must answer alike.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from modelops.driver import commands as c
from modelops.driver.needs import Watched
from modelops.states import (
    FAILURES,
    FINAL_JOB_STATES,
    STORED,
    JobEvent,
    JobState,
    ReplicateStatus,
    next_state,
)
from modelops.store.records import LeaseLostError, Records
from modelops.store.withdrawal import NOTHING, Kept, Withdrawal, no_longer_unneeded
from modelops.study.ids import JobId
from modelops.study.ranges import EMPTY, Ranges
from modelops.worker.messages import NO_NUMBER, AggregateRef, SegmentRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from modelops.study.ids import AttemptId
    from modelops.study.ranges import Range
    from modelops.study.spec import JobSpec
    from modelops.study.stopping import Until
    from modelops.worker.messages import NoNumbers

Commit = (
    c.CommitSegment | c.CommitSynthetic | c.CommitNotNeeded | c.CommitAggregates | c.CommitSyntheticAggregates
)
OF_OUTCOMES = (c.CommitSegment, c.CommitSynthetic, c.CommitNotNeeded)
SUCCEEDED, NOT_NEEDED = ReplicateStatus.SUCCEEDED, ReplicateStatus.NOT_NEEDED


class Store:
    """Rows in dictionaries. ``outcome`` says how a replicate ended in its attempt of this number."""

    def __init__(self, spec: JobSpec, outcome: Callable[[int, int], ReplicateStatus]) -> None:
        self._spec, self._outcome = spec, outcome
        self.up = True
        self.epoch = self.after_epoch = 0
        self.state, self.reason = JobState.QUEUED, ""
        self.outcomes: dict[int, ReplicateStatus] = {}
        self.segments: dict[AttemptId, SegmentRef] = {}
        self.aggregated: dict[int, AttemptId] = {}
        self.aggregates: dict[AttemptId, AggregateRef] = {}
        self.aggregate_rows: defaultdict[str, int] = defaultdict(int)
        self.numbers: dict[AttemptId, int] = {}  # of attempts, for the truth about outcomes
        self.retried: list[tuple[Ranges, int, float]] = []  # and when
        self.failed_attempts: defaultdict[int, int] = defaultdict(int)
        self.not_before: dict[int, float] = {}
        self.left: set[int] | None = None  # what this run is not to run, if it only repairs
        self.failed_before = 0  # in earlier runs

    # Every one of these raises LeaseLostError.

    def hold(self, epoch: int) -> None:
        """Refuse a driver that has lost the lease."""
        if epoch != self.epoch:
            raise LeaseLostError(JobId("job_simulated"), epoch)

    def change_state(self, epoch: int, command: c.ChangeState) -> None:
        """Record a transition; InternalError if it is illegal."""
        self.hold(epoch)
        self.state = next_state(self.state, command.event)
        self.reason = command.reason

    def record_retry(self, epoch: int, command: c.RecordRetry, now: float) -> None:
        """Remember which attempt is next, and when."""
        self.hold(epoch)
        self.retried.append((command.indices, command.number, now))
        at = now + self._spec.retry.delay_s(command.number - 1)
        for k in command.indices:
            self.failed_attempts[k] += 1
            self.not_before[k] = at

    def commit(
        self, epoch: int, command: Commit, attempt: AttemptId, items: Sequence[int]
    ) -> tuple[bool, SegmentRef | None]:
        """Idempotent by attempt, refused if any index is covered. Who calls it has asked `hold`."""
        if attempt in self.segments or attempt in self.aggregates:
            return True, self.segments.get(attempt)
        if isinstance(command, c.CommitNotNeeded):
            return True, self._drop(command)
        if isinstance(command, OF_OUTCOMES):
            return self._commit_outcomes(command, attempt, items)
        if any(p in self.aggregated for p in items):
            return False, None
        stored = (
            self._failed_aggregates(command)
            if isinstance(command, c.CommitSyntheticAggregates)
            else command.stored
        )
        self._add_aggregates(epoch, stored)
        self.aggregated.update((p, attempt) for p in items)
        self.aggregates[attempt] = stored
        for row, n in stored.counts.items():
            self.aggregate_rows[row] += n
        return True, None

    def _commit_outcomes(
        self, command: c.CommitSegment | c.CommitSynthetic, attempt: AttemptId, items: Sequence[int]
    ) -> tuple[bool, SegmentRef | None]:
        if not self.outcomes.keys().isdisjoint(items):
            return False, None
        if isinstance(command, c.CommitSegment):
            segment, number = command.segment, self.numbers[attempt]
            for k in items:
                self.outcomes[k] = self._outcome(k, number)
        else:
            segment = segment_of(attempt, command.indices.pairs, {command.status: len(items)})
            self.outcomes.update(dict.fromkeys(items, command.status))
        self.segments[attempt] = segment
        return True, segment

    def _drop(self, command: c.CommitNotNeeded) -> SegmentRef:
        """Write down what is not needed, in place of outcomes of it."""
        for attempt, kept in self.trimmed(command).items():
            if kept.ranges:
                before = self.segments[attempt]
                counts = dict(kept.counts)
                self.segments[attempt] = msgspec.structs.replace(before, ranges=kept.ranges, counts=counts)
            else:
                del self.segments[attempt]
        n = len(command.indices)
        segment = segment_of(command.attempt, command.indices.pairs, {NOT_NEEDED: n})
        self.segments[command.attempt] = segment
        self.outcomes.update(dict.fromkeys(command.indices, NOT_NEEDED))
        return segment

    def trimmed(self, command: c.CommitNotNeeded) -> dict[AttemptId, Kept]:
        """Return what is left of segments that hold some of these."""
        out = {}
        for attempt, ref in self.segments.items():
            left = Ranges(ref.ranges) - command.indices
            if attempt != command.attempt and left != Ranges(ref.ranges):
                out[attempt] = Kept(left.pairs, Counter(self.outcomes[k] for k in left))
        return out

    def _failed_aggregates(self, command: c.CommitSyntheticAggregates) -> AggregateRef:
        n = len(command.params) * len(self._spec.aggregates)
        held = Ranges(pair for p in command.params for pair in self._spec.line.of_param(p).pairs)
        return AggregateRef(
            attempt=command.attempt,
            name="a",
            digest="d",
            n_bytes=1,
            params=command.params.pairs,
            counts={"failed": n},
            inputs=tuple(s.digest for s in self.segments.values() if not held.isdisjoint(Ranges(s.ranges))),
        )

    def _add_aggregates(self, _epoch: int, _stored: AggregateRef) -> None:
        """For those who keep more than this."""

    def _record_repair(
        self, _damaged: SegmentRef | None, _undone: dict[AttemptId, Kept], _lost: Ranges
    ) -> None:
        """For those who keep more than this."""

    def take_lease(self) -> int:
        """Make somebody else the driver, and return the new epoch."""
        self.epoch += 1
        return self.epoch

    def begin_again(self) -> None:
        """Resume a job that has ended."""
        assert self.state in FINAL_JOB_STATES
        self._begin(JobEvent.RESUMED)

    def repair(self) -> None:
        """Find a segment damaged, and have only that run again."""
        before = set(self.outcomes)
        damaged = next(iter(self.segments.values()), None)
        undone: dict[AttemptId, Kept] = {}
        if damaged is not None:
            del self.segments[damaged.attempt]
            for k in integers(damaged.ranges):
                del self.outcomes[k]
            undone = no_longer_unneeded(self._spec.line, self.segments.values(), Ranges(damaged.ranges))
            for attempt, kept in undone.items():
                ref = self.segments.pop(attempt)
                for k in Ranges(ref.ranges) - Ranges(kept.ranges):
                    del self.outcomes[k]
                if kept.ranges:
                    self.segments[attempt] = segment_of(attempt, kept.ranges, dict(kept.counts))
            self._drop_aggregates(self._spec.line.params_of(Ranges(damaged.ranges)))
        self._begin(JobEvent.REPAIRED)
        self.left = set(range(self._spec.line.size)) - before
        self._record_repair(damaged, undone, Ranges.of(before - self.outcomes.keys()))

    def extend(self, spec: JobSpec) -> None:
        """Let a job that has ended be more; aggregates that lack replicates then do not count."""
        added = Ranges([(self._spec.line.size, spec.line.size)])
        self._spec = spec
        self._drop_aggregates(spec.line.params_of(added))
        self._begin(JobEvent.EXTENDED)

    def _drop_aggregates(self, touched: Ranges) -> None:
        for stale in [a for a in self.aggregates.values() if touched & Ranges(a.params)]:
            del self.aggregates[stale.attempt]
            for row, n in stale.counts.items():
                self.aggregate_rows[row] -= n
            for p in integers(stale.params):
                del self.aggregated[p]

    def _begin(self, event: JobEvent) -> None:
        self.state, self.reason = next_state(self.state, event), ""
        self.left = None
        self.failed_before = self.n_failed
        self.after_epoch = self.epoch
        self.retried.clear()
        self.failed_attempts.clear()
        self.not_before.clear()

    def known(
        self, now: float
    ) -> tuple[list[SegmentRef], list[AggregateRef], list[tuple[Ranges, int, float]]]:
        """Return what a new driver is given: segments, aggregates, and what is to be tried again."""
        return (
            [self._watched(ref) for ref in self.segments.values()],
            list(self.aggregates.values()),
            [(indices, number, now - at) for indices, number, at in self.retried],
        )

    def _watched(self, ref: SegmentRef) -> SegmentRef:
        """Return a segment with what a driver with ``until`` goes by, as read from what is stored."""
        if self._spec.until is None or NOT_NEEDED in ref.counts:
            return ref
        outcomes = [(k, self.outcomes[k]) for k in integers(ref.ranges)]
        watched, no_numbers = watched_of(outcomes, self._spec.until)
        return msgspec.structs.replace(ref, watched=watched, no_numbers=no_numbers)

    @property
    def n_failed(self) -> int:
        """How many replicates have failed."""
        return sum(status in FAILURES for status in self.outcomes.values())

    @property
    def n_succeeded(self) -> int:
        """How many replicates have succeeded."""
        return [*self.outcomes.values()].count(SUCCEEDED)


class RealStore(Store):
    """The same beside real records: both must give the same answers."""

    def __init__(self, spec: JobSpec, outcome: Callable[[int, int], ReplicateStatus]) -> None:
        super().__init__(spec, outcome)
        self._records, n = _records(), len(_JOBS)
        self._job = JobId(f"job_{n}")
        _JOBS.append(self._job)
        self._records.create_job(self._job, msgspec.json.encode(spec))

    def change_state(self, epoch: int, command: c.ChangeState) -> None:
        """Record it twice."""
        lost = self._is_lost(
            lambda: self._records.change_state(
                self._job, command.event, who="driver", why=command.reason, epoch=epoch
            )
        )
        assert lost == (epoch != self.epoch)
        super().change_state(epoch, command)

    def commit(
        self, epoch: int, command: Commit, attempt: AttemptId, items: Sequence[int]
    ) -> tuple[bool, SegmentRef | None]:
        """Commit it twice."""
        trimmed = self.trimmed(command) if isinstance(command, c.CommitNotNeeded) else {}
        accepted, segment = super().commit(epoch, command, attempt, items)
        if segment is None and isinstance(command, c.CommitSegment):
            segment = command.segment
        if isinstance(command, c.CommitNotNeeded):
            assert segment is not None
            assert self._records.commit_not_needed(self._job, epoch, segment, trimmed)
        elif isinstance(command, OF_OUTCOMES) and segment is not None:
            assert self._records.commit_segment(self._job, epoch, segment) == accepted
        return accepted, segment

    def hold(self, epoch: int) -> None:
        """Ask both."""
        if epoch != self.epoch:
            assert self._is_lost(
                lambda: self._records.add_event(self._job, "driver", "note", "", epoch=epoch)
            )
        super().hold(epoch)

    def record_retry(self, epoch: int, command: c.RecordRetry, now: float) -> None:
        """Record it twice."""
        super().record_retry(epoch, command, now)
        self._records.record_retry(self._job, epoch, "driver", command.indices, command.number)

    def _add_aggregates(self, epoch: int, stored: AggregateRef) -> None:
        assert self._records.commit_aggregates(self._job, epoch, stored)

    def take_lease(self) -> int:
        """Take both."""
        epoch = self._records.take_lease(self._job, "driver")
        assert epoch == super().take_lease()
        return epoch

    def begin_again(self) -> None:
        """Resume both."""
        self._records.change_state(self._job, JobEvent.RESUMED, who="user")
        super().begin_again()

    def extend(self, spec: JobSpec) -> None:
        """Extend both."""
        super().extend(spec)
        self._records.begin_run(self._job, JobEvent.EXTENDED, who="user", spec=msgspec.json.encode(spec))
        assert {a.attempt for a in self._records.aggregates(self._job)} == self.aggregates.keys()

    def _record_repair(self, damaged: SegmentRef | None, undone: dict[AttemptId, Kept], lost: Ranges) -> None:
        withdrawal = Withdrawal(segments={damaged.attempt: NOTHING, **undone}) if damaged else None
        ranges = lost if damaged else EMPTY
        self._records.begin_run(self._job, JobEvent.REPAIRED, who="user", withdrawal=withdrawal, only=ranges)
        assert self._records.scope(self._job) == (ranges, self.after_epoch)
        assert {a.attempt for a in self._records.aggregates(self._job)} == self.aggregates.keys()

    def known(
        self, now: float
    ) -> tuple[list[SegmentRef], list[AggregateRef], list[tuple[Ranges, int, float]]]:
        """Return what the real records know. Their clock stands still."""
        row, segments, aggregates = self._records.committed(self._job)
        assert (row.epoch, row.state, row.reason) == (self.epoch, self.state, self.reason)
        retried = self._records.retried(self._job)
        assert retried == [(indices, number, 0.0) for indices, number, _ in self.retried]
        since = super().known(now)[2]
        return [self._watched(ref) for ref in segments], aggregates, since

    def _is_lost(self, write: Callable[[], object]) -> bool:
        try:
            write()
        except LeaseLostError:
            return True
        return False


_JOBS: list[JobId] = []


@cache
def _records() -> Records:
    """Open real records in memory: one database for the process, as making one takes longer than a schedule.

    Its only connection is not looked for and given back with each transaction.
    """
    import sqlalchemy as sa
    from sqlalchemy.pool import StaticPool

    from modelops.store import database, schema

    engine = sa.create_engine("sqlite://", poolclass=StaticPool)
    sa.event.listen(engine, "connect", database._prepare_sqlite)
    schema.metadata.create_all(engine)
    connection = engine.connect()

    class InMemory(database.Database):
        @contextmanager
        def reading(self) -> Iterator[sa.Connection]:
            with self.writing() as sql:
                yield sql

        @contextmanager
        def writing(self) -> Iterator[sa.Connection]:
            with self._as_ours(), connection.begin():
                self._begin(connection, "BEGIN IMMEDIATE")
                yield connection

        writing_with_next = writing

    return Records(InMemory(engine), lambda: datetime(2026, 1, 1, tzinfo=UTC))


def segment_of(
    attempt: AttemptId,
    ranges: tuple[Range, ...],
    counts: dict[ReplicateStatus, int],
    watched: tuple[bytes | None, NoNumbers] = (None, ()),
    pack_bytes: int = 0,
) -> SegmentRef:
    """Return the segment that an attempt has stored."""
    return SegmentRef(
        attempt=attempt,
        name="s",
        digest=f"digest {attempt}",
        n_bytes=1,
        ranges=ranges,
        counts=counts,
        pack_bytes=pack_bytes,
        watched=watched[0],
        no_numbers=watched[1],
    )


def number_of(k: int) -> float:
    """Return the output of a replicate that ``until`` watches."""
    return float(k * 7919 % 101 % 7)


def has_number(k: int, until: Until) -> bool:
    """Say whether the output of a replicate that ``until`` watches is a number; in some jobs it is not in a few."""
    return until.half_width not in (0.7, 4.0) or k * 7919 % 101 % (7 * until.min) != 3


def watched_of(outcomes: Sequence[tuple[int, ReplicateStatus]], until: Until) -> tuple[bytes, NoNumbers]:
    """Return what a worker tells a driver of outcomes."""
    good = [status is SUCCEEDED and has_number(k, until) for k, status in outcomes]
    numbers = [number_of(k) if ok else math.nan for ok, (k, _) in zip(good, outcomes, strict=True)]
    none = [k for ok, (k, status) in zip(good, outcomes, strict=True) if status is SUCCEEDED and not ok]
    codes = bytes(NO_NUMBER if k in none else STORED.index(status) for k, status in outcomes)
    said = {k: f"says {k % 3}" for k in none}
    texts = tuple(
        (text, Ranges.of(k for k in none if said[k] == text).pairs) for text in sorted({*said.values()})
    )
    return Watched(codes, np.array(numbers)).encode(), texts


def committed_attempt(command: Commit) -> AttemptId:
    """Return the attempt that a commit is of."""
    if isinstance(command, c.CommitSegment):
        return command.segment.attempt
    return command.stored.attempt if isinstance(command, c.CommitAggregates) else command.attempt


def committed_items(command: Commit) -> Sequence[int]:
    """Return the indices, or parameter sets, that a commit is of."""
    if isinstance(command, c.CommitSegment):
        return integers(command.segment.ranges)
    if isinstance(command, c.CommitAggregates):
        return integers(command.stored.params)
    ranges = command.params if isinstance(command, c.CommitSyntheticAggregates) else command.indices
    return integers(ranges.pairs)


def integers(pairs: tuple[Range, ...]) -> Sequence[int]:
    """Return what is in these ranges; mostly there is one."""
    if len(pairs) == 1:
        return range(*pairs[0])
    return [k for lo, hi in pairs for k in range(lo, hi)]


def ranges_of(items: Sequence[int]) -> Ranges:
    """Return the ranges in which these are."""
    return Ranges(((items.start, items.stop),)) if isinstance(items, range) else Ranges.of(items)
