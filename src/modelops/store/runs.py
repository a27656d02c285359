"""The runs of a job: a final job begins again, with what is missing, added, or made not to count."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import sqlalchemy as sa

from modelops.states import FINAL_JOB_STATES, STATE_AFTER, JobEvent, JobState, next_state
from modelops.store import schema
from modelops.store.result_file import ResultFile
from modelops.store.rows import (
    ChangedMeanwhileError,
    EventRow,
    Submission,
    append_event,
    hold,
    read_held,
    read_job,
    record_request,
    update_job,
)
from modelops.store.withdrawal import Withdrawal, drop_ranges_of_nothing, drop_stale, withdraw
from modelops.study.ids import AttemptId, JobId
from modelops.study.ranges import Ranges
from modelops.study.spec import recorded_spec
from modelops.study.wording import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from modelops.store.database import Database
    from modelops.store.rows import JobRow

BEGINS_RUN: Final = frozenset({JobEvent.RESUMED, JobEvent.EXTENDED, JobEvent.REPAIRED})
WITHDRAWN: Final = "segments_withdrawn"
VOIDED: Final = "results_voided"
WRITTEN: Final = "results_written"
MISMATCH: Final = "mismatch"
_ENDS: Final = tuple(sorted(event for event, state in STATE_AFTER.items() if state in FINAL_JOB_STATES))


class Withdrawn(NamedTuple):
    """Attempts whose segments do not count: these, and all of epochs up to ``epoch``."""

    attempts: frozenset[AttemptId]
    epoch: int


class Scope(NamedTuple):
    """What a run may run, and take over.

    ``only``: the indices that it may run; None: whatever is missing. ``after_epoch``: attempts of epochs up to this
    belong to earlier runs, and what these have not recorded counts for nothing any more.
    """

    only: Ranges | None
    after_epoch: int


class Note(NamedTuple):
    """An event to write along with a change."""

    kind: str
    text: str
    data: Mapping[str, Any]


class Runs:
    """The part of `modelops.store.Records` about runs; every method is one transaction."""

    _database: Database
    _clock: Callable[[], datetime]

    def begin_run(
        self,
        job: JobId,
        event: JobEvent,
        *,
        who: str,
        why: str = "",
        spec: bytes | None = None,
        study: str | None = None,
        withdrawal: Withdrawal | None = None,
        only: Ranges | None = None,
        notes: Sequence[Note] = (),
        epoch: int | None = None,
        after_epoch: int = 0,
        expected_version: int | None = None,
        expected_state: JobState | None = None,
        asked: Submission | None = None,
    ) -> JobRow:
        """Let a final job begin again by ``resumed``, ``extended`` or ``repaired``; its run number is one more.

        What the run before used of the timeout, and who asked for its end, is forgotten. Aggregates that are stale
        after it count no more.

        Parameters
        ----------
        spec, study
            What the job is from now on, and the object that holds it for workers.
        withdrawal
            What does not count any more; an event of its own says so.
        asked
            The request that wants it, recorded so that it can come again and begins nothing twice.
        only
            Of what is missing, the run is to run these indices and no others; default: everything.
        notes
            Further events, written before the one that begins the run.
        after_epoch
            Attempts of epochs up to this, if it is higher than the job's, are not of this run either.

        Raises
        ------
        LeaseLostError
            ``epoch`` is given and is not the job's.
        ChangedMeanwhileError
            Version or state is not the expected one.
        InternalError
            The job is not final.
        """
        with self._database.writing() as sql:
            old = read_held(sql, job, epoch)
            expect(old, expected_version, expected_state)
            values = {
                "state": next_state(old.state, event), "reason": why, "version": old.version + 1,
                "run": old.run + 1, "changed_at": self._clock(), "used_s": 0.0, "cancel_by": None, "stalled": "",
                "spec": old.spec if spec is None else spec, "study": old.study if study is None else study,
            }  # fmt: skip
            update_job(sql, job, **values)
            if asked is not None:
                record_request(sql, asked, job, self._clock())
            self._withdraw(sql, old, who, why, withdrawal, notes)
            data = {
                "from": old.state, "to": values["state"], "run": old.run + 1, "study": values["study"],
                "after_epoch": max(old.epoch, after_epoch),
            }  # fmt: skip
            if only is not None:
                data["only"] = [list(pair) for pair in only.pairs]
            append_event(sql, job, self._clock(), who, event, why, data)
            return read_job(sql, job)

    def withdraw(
        self,
        job: JobId,
        epoch: int,
        withdrawal: Withdrawal,
        *,
        who: str,
        why: str,
        notes: Sequence[Note] = (),
    ) -> None:
        """Make something of a job count no more, without a new run; whoever holds its lease does that.

        ``notes``: further events, written before.

        Raises
        ------
        LeaseLostError
            ``epoch`` is not the job's.
        """
        with self._database.writing() as sql:
            hold(sql, job, epoch)
            self._withdraw(sql, read_job(sql, job), who, why, withdrawal, notes)

    def scope(self, job: JobId) -> Scope:
        """Return what the job's current run may run, and take over."""
        e, began = schema.events.c, self.run_began(job)
        query = sa.select(e.data).where(e.job == job, e.number == began)
        withdrawn = sa.select(e.data).where(e.job == job, e.kind == WITHDRAWN, e.number > began)
        with self._database.reading() as sql:
            data = sql.scalar(query) or {}
            lost = list(sql.scalars(withdrawn)) if "only" in data else []
        if "only" not in data:
            return Scope(None, data.get("after_epoch", 0))
        # It runs what it finds damaged itself, too. What its end finds is owed to the next run.
        found = (each for each in lost if each.get("state") != JobState.FINALIZING)
        pairs = [*data["only"], *(pair for each in found for pair in each.get("ranges", ()))]
        return Scope(Ranges((lo, hi) for lo, hi in pairs), data.get("after_epoch", 0))

    def owed(self, job: JobId) -> Ranges | None:
        """Return the indices that were withdrawn when this run only had its end before it; None: nothing was."""
        e = schema.events.c
        query = sa.select(e.data).where(e.job == job, e.kind == WITHDRAWN, e.number > self.run_began(job))
        with self._database.reading() as sql:
            late = [data for data in sql.scalars(query) if data.get("state") == JobState.FINALIZING]
        found = [data for data in late if data["replicates"] or data["aggregates"]]
        return Ranges((lo, hi) for data in found for lo, hi in data.get("ranges", ())) if found else None

    def settled(self, job: JobId) -> bool:
        """Say whether the job's current run has ended because everything it was to run had its outcome."""
        e = schema.events.c
        query = sa.select(e.number).where(
            e.job == job, e.kind == JobEvent.SETTLED, e.number > self.run_began(job)
        )
        with self._database.reading() as sql:
            return sql.scalar(query.limit(1)) is not None

    def record_stalled(self, job: JobId, reason: str, *, who: str, text: str) -> None:
        """Flag a job that has not ended as standing still, or (no reason) as going on; an event says so, once."""
        with self._database.writing() as sql:
            row = read_job(sql, job, lock=True)
            if row.stalled != reason and row.state not in FINAL_JOB_STATES:
                update_job(sql, job, stalled=reason)
                append_event(sql, job, self._clock(), who, "stalled" if reason else "going_on", text, {})

    def restore_state(self, job: JobId, *, who: str, mismatch: str) -> str:
        """Make the job's state what its story says, if somebody has written another one; an event says so.

        Every change of a state writes its event in the same transaction, so both can only differ by a hand from
        outside. The version stays: whoever drives the job goes on, as if nothing had happened.

        Parameters
        ----------
        mismatch
            What kind of disagreement the event is to name.

        Returns
        -------
            What was wrong; empty: nothing.
        """
        with self._database.reading() as sql:
            if _told_state(sql, job) is read_job(sql, job).state:
                return ""
        with self._database.writing() as sql:
            row, told = read_job(sql, job, lock=True), _told_state(sql, job)
            if told is row.state:
                return ""
            text = f"the record says {row.state}, and the story {told}; it is {told}"
            update_job(sql, job, state=told)
            data = {"kind": mismatch, "n": 1, "what": [row.state]}
            append_event(sql, job, self._clock(), who, MISMATCH, text, data)
            return text

    def mismatches(self) -> dict[str, int]:
        """Return how many disagreements of each kind were found, of all jobs, ever."""
        e = schema.events.c
        total: Counter[str] = Counter()
        with self._database.reading() as sql:
            for data in sql.scalars(sa.select(e.data).where(schema.IS_MISMATCH)):
                total[data["kind"]] += data["n"]
        return dict(total)

    def mismatches_since(self, since: datetime, job: JobId | None = None) -> list[tuple[JobId, EventRow]]:
        """Return the events that say what was not as recorded, of one job or of all, from a time on, in order."""
        e = schema.events.c
        query = sa.select(e.job, e.number, e.at, e.who, e.kind, e.text, e.data).where(
            schema.IS_MISMATCH, e.at >= since
        )
        query = query.order_by(e.at, e.job, e.number)
        if job is not None:
            query = query.where(e.job == job)
        with self._database.reading() as sql:
            rows = [{**row} for row in sql.execute(query).mappings()]
        return [(JobId(row.pop("job")), EventRow(**row)) for row in rows]

    def last_end(self, job: JobId) -> str:
        """Return why the last run that has ended did so; empty if it gave no reason, or none has."""
        e = schema.events.c
        query = sa.select(e.text).where(e.job == job, e.kind.in_(_ENDS)).order_by(e.number.desc()).limit(1)
        with self._database.reading() as sql:
            return sql.scalar(query) or ""

    def run_began(self, job: JobId) -> int:
        """Return the number of the event that began the job's current run."""
        e = schema.events.c
        kinds = ["created", *map(str, BEGINS_RUN)]
        query = sa.select(sa.func.max(e.number)).where(e.job == job, e.kind.in_(kinds))
        with self._database.reading() as sql:
            return sql.scalar(query) or 0

    def record_results(
        self,
        job: JobId,
        who: str,
        files: Sequence[ResultFile],
        *,
        epoch: int | None = None,
        why: str = "",
        end_follows: bool = False,
    ) -> None:
        """Record what the result files of this run are, so that it can be told later whether they still are it.

        ``end_follows``: the job's end is recorded next, and makes this durable too.
        """
        data = {"files": msgspec.to_builtins(files)}
        text = why or f"{', '.join(file.name for file in files)} are written"
        # A driver that does not find this writes the same files again, and that the job has ended is recorded after it.
        writing = self._database.writing_with_next if end_follows else self._database.writing
        with writing() as sql:
            append_event(sql, job, self._clock(), who, WRITTEN, text, data, epoch=epoch)

    def result_files(self, job: JobId) -> tuple[ResultFile, ...]:
        """Return what the result files of the job's current run are; none as long as none are written."""
        e = schema.events.c
        query = sa.select(e.data).where(e.job == job, e.kind == WRITTEN, e.number > self.run_began(job))
        with self._database.reading() as sql:
            data = sql.scalar(query.order_by(e.number.desc()).limit(1))
        return () if data is None else msgspec.convert(data["files"], tuple[ResultFile, ...])

    def withdrawn(self, job: JobId) -> Withdrawn:
        """Return the attempts whose segments were made not to count, wholly or in part; they never will again."""
        e = schema.events.c
        query = sa.select(e.data).where(e.job == job, e.kind.in_([WITHDRAWN, VOIDED]))
        with self._database.reading() as sql:
            found = list(sql.scalars(query))
        return Withdrawn(
            frozenset(AttemptId(attempt) for data in found for attempt in data.get("attempts", ())),
            max((data.get("epoch", 0) for data in found), default=0),
        )

    def _withdraw(
        self,
        sql: sa.Connection,
        row: JobRow,
        who: str,
        why: str,
        what: Withdrawal | None,
        notes: Sequence[Note],
    ) -> None:
        job = row.job
        for note in notes:
            append_event(sql, job, self._clock(), who, note.kind, note.text, dict(note.data))
        drop_ranges_of_nothing(sql, job)
        data: dict[str, Any] = withdraw(sql, job, what) if what else {}
        stale = 0
        if sql.scalar(sa.select(schema.aggregates.c.attempt).where(schema.aggregates.c.job == job).limit(1)):
            stale = drop_stale(sql, job, recorded_spec(read_job(sql, job).spec, job).line)
        if what or stale:
            data = {
                "state": row.state,
                "replicates": 0,
                **data,
                "aggregates": data.get("aggregates", 0) + stale,
            }
            append_event(sql, job, self._clock(), who, WITHDRAWN, _said(data, what, why), data)


def expect(row: JobRow, version: int | None, state: JobState | None) -> None:
    """Raise ChangedMeanwhileError if the job is not as the caller saw it."""
    if version not in (None, row.version) or state not in (None, row.state):
        raise ChangedMeanwhileError(
            f"job {row.job} was changed by somebody else just now: it is {row.state}, at version {row.version}; "
            "look at it again, and repeat what you asked for"
        )


def _said(data: Mapping[str, Any], what: Withdrawal | None, why: str) -> str:
    parts = [
        f"outcomes of {counted(data['replicates'], 'replicate')}" if data["replicates"] else "",
        f"aggregates of {counted(data['aggregates'], 'parameter set')}" if data["aggregates"] else "",
        f"execution data of {counted(len(what.executions), 'attempt')}" if what and what.executions else "",
    ]
    text = " and ".join(part for part in parts if part) or "nothing"
    return f"{text} no longer count" + (f": {why}" if why else "")


def _told_state(sql: sa.Connection, job: JobId) -> JobState:
    e = schema.events.c
    query = sa.select(e.kind).where(e.job == job, e.kind.in_(STATE_AFTER)).order_by(e.number.desc()).limit(1)
    kind = sql.scalar(query)
    return JobState.QUEUED if kind is None else STATE_AFTER[JobEvent(kind)]
