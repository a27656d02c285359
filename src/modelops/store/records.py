"""The records of jobs: each method is one transaction.

A driver writes with the epoch of its lease. Every such transaction first updates the job's row where
the epoch still is that one: this takes the row's lock, so commits to one job follow one another, and no
row means "I am no longer the driver" (`LeaseLostError`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError as SqlIntegrityError

from modelops.counters import Counted, count
from modelops.errors import InternalError
from modelops.states import JobEvent, JobState, ReplicateStatus, next_state
from modelops.store import schema
from modelops.store.database import Database
from modelops.store.driving import DrivingRecords
from modelops.store.objects import AlreadyExistsError
from modelops.store.rows import (
    ChangedMeanwhileError,
    EventRow,
    JobRow,
    LeaseLostError,
    append_event,
    hold,
    insert_event,
    insert_job,
    insert_lease,
    job_row,
    last_alike,
    new_row,
    read_held,
    read_job,
    update_job,
)
from modelops.store.runs import BEGINS_RUN, VOIDED, Runs, expect
from modelops.store.statements import Statement
from modelops.store.withdrawal import Kept, drop_stale, trim
from modelops.study.ids import AttemptId, JobId
from modelops.study.ranges import Range, Ranges
from modelops.study.spec import recorded_spec
from modelops.study.wording import spelt_out
from modelops.worker.messages import AggregateRef, SegmentRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["ChangedMeanwhileError", "EventRow", "JobRow", "LeaseLostError", "Records"]


class _Commits:
    """The statements about what is committed, of segments or of aggregates."""

    def __init__(self, table: sa.Table, ranges: sa.Table) -> None:
        r = ranges.c
        job: sa.BindParameter[str] = sa.bindparam("of_job")
        attempt: sa.BindParameter[str] = sa.bindparam("of_attempt")
        below = sa.select(r.hi).where(r.job == job, r.lo < sa.bindparam("below"))
        over = sa.select(r.attempt).where(r.job == job, r.lo < sa.bindparam("below"))
        digest = sa.select(table.c.digest).where(table.c.job == job, table.c.attempt == attempt)
        last_end = below.order_by(r.lo.desc()).limit(1)
        self.all = Statement(sa.select(table).where(table.c.job == job))
        self.all_ranges = Statement(sa.select(r.attempt, r.lo, r.hi).where(r.job == job).order_by(r.lo))
        self.ranges = Statement(sa.select(r.lo, r.hi).where(r.job == job, r.attempt == attempt))
        self.last_end = Statement(last_end)
        self.before = Statement(
            sa.select(digest.scalar_subquery().label("digest"), last_end.scalar_subquery().label("end"))
        )
        self.over = Statement(over.where(r.hi > sa.bindparam("above")))
        self.insert, self.insert_ranges = Statement(table.insert()), Statement(ranges.insert())


_SEGMENTS = _Commits(schema.segments, schema.segment_ranges)
_AGGREGATES = _Commits(schema.aggregates, schema.aggregate_ranges)
# A driver that takes the job over comes to these by itself; what it commits before and after makes them durable.
_COMES_AGAIN: Final = (JobEvent.ENVIRONMENT_READY, JobEvent.SETTLED)


class Records(DrivingRecords, Runs):
    """The jobs of one database. Safe to use from many threads, and from many processes at once."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Records:
        """Open ``sqlite:////path/to/file`` (created and migrated as needed); errors as `Database.open`."""
        return cls(Database.open(url), clock)

    def close(self) -> None:
        """Close every connection."""
        self._database.close()

    @property
    def database(self) -> Database:
        """The database, for what makes transactions of its own."""
        return self._database

    @property
    def on_one_machine(self) -> bool:
        """Whether the database is a file (SQLite), so that all who use it are on this machine."""
        return self._database.engine.dialect.name == "sqlite"

    def now(self) -> datetime:
        """Return the time by which events are recorded."""
        return self._clock()

    # Jobs

    def create_job(
        self, job: JobId, spec: bytes, *, name: str = "", bundle: str = "", who: str = "user", why: str = ""
    ) -> JobRow:
        """Record a new job, ``queued``, with its first event ``created``.

        Raises
        ------
        AlreadyExistsError
            There is a job of that id.
        """
        row = new_row(job, spec, name=name, bundle=bundle, at=self._clock())
        try:
            with self._database.writing() as sql:
                insert_job(sql, row, who, why)
        except SqlIntegrityError as e:
            raise AlreadyExistsError(f"there is a job {job} already") from e
        return row

    def job(self, job: JobId) -> JobRow:
        """Return one job. Raises NotFoundError."""
        with self._database.reading() as sql:
            return read_job(sql, job)

    def jobs(self, *, states: Iterable[JobState] | None = None) -> list[JobRow]:
        """Return all jobs (in these states), newest first."""
        query = sa.select(schema.jobs).order_by(schema.jobs.c.created_at.desc(), schema.jobs.c.job.desc())
        if states is not None:
            query = query.where(schema.jobs.c.state.in_(list(states)))
        with self._database.reading() as sql:
            return [job_row(row) for row in sql.execute(query).mappings()]

    def take_lease(self, job: JobId, owner: str) -> int:
        """Take the job over and return the new epoch. Whoever held it before can write no more.

        Parameters
        ----------
        owner
            Who drives from now on, for the record: host, process id.
        """
        now = self._clock()
        with self._database.writing() as sql:
            return insert_lease(sql, job, now, owner)

    def change_state(
        self,
        job: JobId,
        event: JobEvent,
        *,
        who: str,
        why: str = "",
        epoch: int | None = None,
        expected_version: int | None = None,
        expected_state: JobState | None = None,
    ) -> JobRow:
        """Move a job along `modelops.states.JOB_NEXT`, with an event that says who, when and why.

        ``why`` becomes the job's reason. ``resumed``, ``extended`` and ``repaired`` begin a new run.

        Raises
        ------
        LeaseLostError
            ``epoch`` is given and is not the job's.
        ChangedMeanwhileError
            Version or state is not the expected one.
        InternalError
            The table has no such transition.
        """
        if event is JobEvent.ENVIRONMENT_FAILED:
            count(Counted.ENVIRONMENT_FAILURES)
        if event in BEGINS_RUN:
            return self.begin_run(
                job, event, who=who, why=why, epoch=epoch, expected_version=expected_version,
                expected_state=expected_state,
            )  # fmt: skip
        writing = self._database.writing
        if epoch is not None and event in _COMES_AGAIN:
            writing = self._database.writing_with_next
        with writing() as sql:
            old = read_held(sql, job, epoch)
            expect(old, expected_version, expected_state)
            state = next_state(old.state, event)
            at, why = self._clock(), spelt_out(why)
            number, version = old.n_events + 1, old.version + 1
            update_job(
                sql, job, state=state, reason=why, version=version, changed_at=at, n_events=number, stalled=""
            )
            insert_event(sql, job, number, at, who, event, why, {"from": old.state, "to": state})
            return msgspec.structs.replace(
                old, state=state, reason=why, version=version, changed_at=at, n_events=number, stalled=""
            )

    # Events

    def add_event(
        self,
        job: JobId,
        who: str,
        kind: str,
        text: str,
        data: Mapping[str, Any] | None = None,
        *,
        epoch: int | None = None,
        unless_there: bool = False,
    ) -> int:
        """Append to the job's story; return the event's number. ``data``: anything JSON can hold.

        ``unless_there``: not if the same is among the last events, because the answer to writing it was lost.
        """
        with self._database.writing() as sql:
            if unless_there:
                if epoch is not None:
                    hold(sql, job, epoch)
                number = last_alike(sql, job, who, kind, text, dict(data or {}))
                if number is not None:
                    return number
            return append_event(sql, job, self._clock(), who, kind, text, dict(data or {}), epoch=epoch)

    def events(self, job: JobId, after: int = 0, limit: int | None = None) -> list[EventRow]:
        """Return the events with a number above ``after``, in order, at most ``limit``."""
        e = schema.events.c
        query = sa.select(e.number, e.at, e.who, e.kind, e.text, e.data)
        query = query.where(e.job == job, e.number > after).order_by(e.number).limit(limit)
        with self._database.reading() as sql:
            return [EventRow(**row) for row in sql.execute(query).mappings()]

    # Segments and aggregates

    def commit_segment(self, job: JobId, epoch: int, ref: SegmentRef) -> bool:
        """Make a stored segment count: the first to cover an index wins, a repeated commit is accepted.

        Returns
        -------
            True: this attempt's segment counts, now or already. False: another covers one of its indices;
            nothing was written, and the segment is an orphan.

        Raises
        ------
        LeaseLostError
            ``epoch`` is not the job's.
        """
        return self.commit_segments(job, epoch, [ref])[0]

    def commit_segments(self, job: JobId, epoch: int, refs: Sequence[SegmentRef]) -> list[bool]:
        """Commit several segments in one transaction, each by the rules of `commit_segment`, in order."""
        with self._database.writing() as sql:
            hold(sql, job, epoch)
            return [self._commit_segment(sql, job, epoch, ref) for ref in refs]

    def _commit_segment(self, sql: sa.Connection, job: JobId, epoch: int, ref: SegmentRef) -> bool:
        columns = {
            "counts": {str(k): n for k, n in ref.counts.items()},
            "execution": ref.execution,
            "pool": ref.pool,
        }
        ranges = Ranges(ref.ranges)
        return self._commit(sql, job, epoch, ref, ranges, columns, _SEGMENTS)

    def commit_not_needed(
        self, job: JobId, epoch: int, ref: SegmentRef, kept: Mapping[AttemptId, Kept]
    ) -> bool:
        """Make a segment count that says what is not needed, in place of outcomes of such that count already.

        Parameters
        ----------
        kept
            What counts from now on of each segment that has such outcomes. By the rules of `commit_segment` otherwise.
        """
        columns = {"counts": {str(k): n for k, n in ref.counts.items()}, "execution": None, "pool": None}
        with self._database.writing() as sql:
            hold(sql, job, epoch)
            trim(sql, job, kept)
            return self._commit(sql, job, epoch, ref, Ranges(ref.ranges), columns, _SEGMENTS)

    def segments_over(self, job: JobId, indices: Ranges) -> list[SegmentRef]:
        """Return the committed segments that hold any of these indices, by their smallest index."""
        return [ref for ref in self.segments(job) if not indices.isdisjoint(Ranges(ref.ranges))]

    def commit_aggregates(self, job: JobId, epoch: int, ref: AggregateRef) -> bool:
        """Make a stored aggregate segment count, by the rules of `commit_segment`.

        Aggregates of the same parameter sets that have become stale give way, in the same transaction.
        """
        columns = {"counts": ref.counts, "inputs": list(ref.inputs)}
        params = Ranges(ref.params)
        with self._database.writing() as sql:
            hold(sql, job, epoch)
            rivals = _rivals(sql, job, params)
            if rivals - {ref.attempt}:
                drop_stale(sql, job, recorded_spec(read_job(sql, job).spec, job).line, [*rivals])
            return self._commit(sql, job, epoch, ref, params, columns, _AGGREGATES)

    def _commit(
        self,
        sql: sa.Connection,
        job: JobId,
        epoch: int,
        ref: SegmentRef | AggregateRef,
        covers: Ranges,
        columns: Mapping[str, Any],
        statements: _Commits,
    ) -> bool:
        if not covers:
            raise InternalError(f"attempt {ref.attempt} wants to commit a segment that covers nothing")
        which = {"of_job": job, "of_attempt": ref.attempt}
        first, *others = covers.pairs
        ((digest, end),) = statements.before.rows(sql, {**which, "below": first[1]})
        if digest is not None:  # this attempt is known
            held = statements.ranges.rows(sql, which)
            return bool(digest == ref.digest) and Ranges((lo, hi) for lo, hi in held) == covers
        if _overlaps(end, first[0]):
            return False
        if any(_covered(sql, statements, job, lo, hi) for lo, hi in others):
            return False
        values = {
            "job": job, "epoch": epoch, "attempt": ref.attempt, "name": ref.name, "digest": ref.digest,
            "n_bytes": ref.n_bytes, "pack": ref.pack, "pack_bytes": ref.pack_bytes,
            "committed_at": self._clock(), **columns,
        }  # fmt: skip
        statements.insert.run(sql, values)
        rows = [{"job": job, "lo": lo, "hi": hi, "attempt": ref.attempt} for lo, hi in covers.pairs]
        statements.insert_ranges.run_each(sql, rows)
        return True

    def void_results(self, job: JobId, epoch: int, who: str, why: str) -> int:
        """Make nothing of a job's results count any more, with the event ``results_voided`` that says why.

        The stored objects become orphans; the indices can be covered again.

        Returns
        -------
            How many replicates had an outcome.

        Raises
        ------
        LeaseLostError
            ``epoch`` is not the job's.
        """
        with self._database.writing() as sql:
            hold(sql, job, epoch)
            r = schema.segment_ranges.c
            n = sql.scalar(sa.select(sa.func.coalesce(sa.func.sum(r.hi - r.lo), 0)).where(r.job == job)) or 0
            for table in (
                schema.segment_ranges,
                schema.segments,
                schema.aggregate_ranges,
                schema.aggregates,
            ):
                sql.execute(table.delete().where(table.c.job == job))
            append_event(sql, job, self._clock(), who, VOIDED, why, {"replicates": int(n), "epoch": epoch})
        return int(n)

    def voided_epoch(self, job: JobId) -> int:
        """Return the epoch in which a job's results were last made to count no more; 0 if they never were."""
        e = schema.events.c
        query = sa.select(e.data).where(e.job == job, e.kind == VOIDED).order_by(e.number.desc()).limit(1)
        with self._database.reading() as sql:
            return int((sql.scalar(query) or {}).get("epoch", 0))

    def segments(self, job: JobId) -> list[SegmentRef]:
        """Return the committed segments of a job, by their smallest index."""
        with self._database.reading() as sql:
            return _segments(sql, job)

    def aggregates(self, job: JobId) -> list[AggregateRef]:
        """Return the committed aggregate segments of a job, by their smallest parameter set."""
        with self._database.reading() as sql:
            return _aggregates(sql, job)

    def committed(self, job: JobId) -> tuple[JobRow, list[SegmentRef], list[AggregateRef]]:
        """Return a job with all that counts of it, as it is at one moment. Raises NotFoundError."""
        with self._database.reading() as sql:
            return read_job(sql, job), _segments(sql, job), _aggregates(sql, job)

    def covered(self, job: JobId) -> Ranges:
        """Return the indices whose outcome is committed."""
        r = schema.segment_ranges.c
        with self._database.reading() as sql:
            return Ranges((lo, hi) for lo, hi in sql.execute(sa.select(r.lo, r.hi).where(r.job == job)))

    def counts(self, job: JobId) -> dict[ReplicateStatus, int]:
        """Return how many committed replicates ended how; outcomes that did not occur are left out."""
        total: Counter[ReplicateStatus] = Counter()
        with self._database.reading() as sql:
            for counts in sql.scalars(
                sa.select(schema.segments.c.counts).where(schema.segments.c.job == job)
            ):
                total.update({ReplicateStatus(k): n for k, n in counts.items()})
        return {status: n for status, n in total.items() if n}


def _segments(sql: sa.Connection, job: JobId) -> list[SegmentRef]:
    rows, covers = _stored(sql, job, _SEGMENTS)
    refs = [
        SegmentRef(
            attempt=AttemptId(row.attempt), name=row.name, digest=row.digest, n_bytes=row.n_bytes,
            ranges=covers.get(row.attempt, ()), counts={ReplicateStatus(k): n for k, n in row.counts.items()},
            pack=row.pack, pack_bytes=row.pack_bytes, execution=row.execution, pool=row.pool,
        )
        for row in rows
    ]  # fmt: skip
    return sorted(refs, key=lambda ref: ref.ranges)


def _aggregates(sql: sa.Connection, job: JobId) -> list[AggregateRef]:
    rows, covers = _stored(sql, job, _AGGREGATES)
    refs = [
        AggregateRef(
            attempt=AttemptId(row.attempt), name=row.name, digest=row.digest, n_bytes=row.n_bytes,
            params=covers.get(row.attempt, ()), counts=row.counts, inputs=tuple(row.inputs), pack=row.pack,
            pack_bytes=row.pack_bytes,
        )
        for row in rows
    ]  # fmt: skip
    return sorted(refs, key=lambda ref: ref.params)


def _stored(
    sql: sa.Connection, job: JobId, statements: _Commits
) -> tuple[Sequence[Any], dict[str, tuple[Range, ...]]]:
    rows = statements.all.rows(sql, {"of_job": job})
    covers: defaultdict[str, list[Range]] = defaultdict(list)
    for attempt, lo, hi in statements.all_ranges.rows(sql, {"of_job": job}):
        covers[attempt].append((lo, hi))
    return rows, {attempt: tuple(pairs) for attempt, pairs in covers.items()}


def _rivals(sql: sa.Connection, job: JobId, params: Ranges) -> set[AttemptId]:
    """Return the attempts whose aggregates of any of these parameter sets count."""
    return {
        AttemptId(attempt)
        for lo, hi in params.pairs
        for (attempt,) in _AGGREGATES.over.rows(sql, {"of_job": job, "below": hi, "above": lo})
    }


def _covered(sql: sa.Connection, statements: _Commits, job: JobId, lo: int, hi: int) -> bool:
    """Say whether a committed range overlaps; they are disjoint, so only the last one below ``hi`` can."""
    return _overlaps(statements.last_end.scalar(sql, {"of_job": job, "below": hi}), lo)


def _overlaps(last_end: int | None, lo: int) -> bool:
    return last_end is not None and last_end > lo
