"""What a driver asks the records and leaves there for the next one: open jobs, time used, cancels, retries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
import sqlalchemy as sa

from modelops.states import FINAL_JOB_STATES, OPEN_JOB_STATES, JobState
from modelops.store import schema
from modelops.store.rows import append_event, hold, read_job, update_job
from modelops.store.runs import BEGINS_RUN
from modelops.store.statements import Statement
from modelops.study.ids import JobId
from modelops.study.ranges import Ranges
from modelops.study.spec import unreadable
from modelops.study.wording import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime

    from modelops.store.database import Database

MOST_AT_ONCE: Final = 500  # ids in one statement
RETRY: Final = "retry"  # the kind of event by which a driver records that replicates will be tried again


def _retried() -> sa.Select[tuple[Any, datetime]]:
    e = schema.events.c
    job: sa.BindParameter[str] = sa.bindparam("of_job")
    begins = sa.or_(
        *(e.kind == str(event) for event in sorted(BEGINS_RUN))
    )  # an IN is expanded at each execution
    began = sa.select(sa.func.coalesce(sa.func.max(e.number), 0)).where(e.job == job, begins)
    query = sa.select(e.data, e.at).where(e.job == job, e.kind == RETRY, e.number > began.scalar_subquery())
    return query.order_by(e.number)


_RETRIED: Final = Statement(_retried())


class OpenJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job that has not ended, as far as one must know to choose which to drive."""

    job: JobId
    state: JobState
    cancel_by: str | None


class _Pools(msgspec.Struct):
    """The part of a spec that says where a job may run."""

    pools: tuple[str, ...] = ()


def _pools(spec: bytes) -> tuple[str, ...]:
    try:
        return msgspec.json.decode(spec, type=_Pools).pools
    except (msgspec.DecodeError, UnicodeDecodeError):  # whoever wants to drive it says so
        return ()


_JOBS = schema.jobs.c
_OPEN_JOBS = (
    sa.select(_JOBS.job, _JOBS.state, _JOBS.cancel_by)
    .where(_JOBS.state.in_(sorted(OPEN_JOB_STATES)))
    .order_by(_JOBS.created_at, _JOBS.job)
)
_CANCEL_ASKED = sa.select(_JOBS.cancel_by).where(_JOBS.job == sa.bindparam("of_job"))


class DrivingRecords:
    """The part of `Records` that only drivers need."""

    _database: Database
    _clock: Callable[[], datetime]

    def open_jobs(self) -> list[OpenJob]:
        """Return the jobs that have not ended, oldest first."""
        with self._database.reading() as sql:
            rows = sql.execute(_OPEN_JOBS).all()
        return [
            OpenJob(job=JobId(row.job), state=JobState(row.state), cancel_by=row.cancel_by) for row in rows
        ]

    def pools_of(self, jobs: Sequence[JobId]) -> dict[JobId, tuple[str, ...]]:
        """Return which pools jobs ask for; none: they run everywhere. A job that does not exist is left out."""
        found: dict[JobId, tuple[str, ...]] = {}
        with self._database.reading() as sql:
            for lo in range(0, len(jobs), MOST_AT_ONCE):
                query = sa.select(_JOBS.job, _JOBS.spec).where(_JOBS.job.in_(jobs[lo : lo + MOST_AT_ONCE]))
                for job, spec in sql.execute(query):
                    found[JobId(job)] = _pools(spec)
        return found

    def unreadable(self, job: JobId) -> str:
        """Say why this version cannot read a job's study; empty if it can. Raises NotFoundError."""
        with self._database.reading() as sql:
            return unreadable(read_job(sql, job).spec)

    def hold(self, job: JobId, epoch: int) -> None:
        """Raise LeaseLostError unless this is still the epoch of the job's driver; write nothing."""
        with self._database.writing_with_next() as sql:
            hold(sql, job, epoch)

    def record_use(self, job: JobId, epoch: int, used_s: float, *, lasting: bool = True) -> None:
        """Record how many seconds of the job's timeout this run has used. Raises LeaseLostError.

        ``lasting``: as all else is. Otherwise it need only survive the death of whoever records it.
        """
        writing = self._database.writing if lasting else self._database.writing_with_next
        with writing() as sql:
            hold(sql, job, epoch)
            update_job(sql, job, used_s=used_s)

    def cancel_asked_by(self, job: JobId) -> str | None:
        """Return who asked for the end of this run of the job, if anybody did."""
        with self._database.reading() as sql:
            found = sql.scalar(_CANCEL_ASKED, {"of_job": job})
        return None if found is None else str(found)

    def ask_cancel(self, job: JobId, who: str) -> bool:
        """Ask whoever drives the job, now or later, to end it; False if it has ended. Raises NotFoundError."""
        with self._database.writing() as sql:
            row = read_job(sql, job, lock=True)
            if row.state in FINAL_JOB_STATES:
                return False
            if row.cancel_by is None:
                update_job(sql, job, cancel_by=who)
                append_event(sql, job, self._clock(), who, "cancel_wanted", "", {})
            return True

    def record_retry(self, job: JobId, epoch: int, who: str, indices: Ranges, number: int) -> None:
        """Record that these replicates will be tried again, as attempt ``number``. Raises LeaseLostError."""
        text = f"{counted(len(indices), 'replicate')} will be tried again, as attempt {number}"
        data = {"ranges": [list(pair) for pair in indices.pairs], "number": number}
        with self._database.writing() as sql:
            append_event(sql, job, self._clock(), who, RETRY, text, data, epoch=epoch)

    def said_last(self, job: JobId, kinds: Collection[str]) -> list[tuple[str, datetime]]:
        """Return what a job's events of these kinds say, each text once with its last time, the last at the end."""
        e = schema.events.c
        query = sa.select(e.text, e.at).where(e.job == job, e.kind.in_(list(kinds))).order_by(e.number)
        found: dict[str, datetime] = {}
        with self._database.reading() as sql:
            for text, at in sql.execute(query):
                found.pop(text, None)
                found[text] = at
        return list(found.items())

    def retried(self, job: JobId) -> list[tuple[Ranges, int, float]]:
        """Return what `record_retry` recorded in this run of the job, in that order, and how many seconds ago."""
        with self._database.reading() as sql:
            found = _RETRIED.rows(sql, {"of_job": job})
        now = self._clock()
        return [
            (
                Ranges((lo, hi) for lo, hi in data["ranges"]),
                int(data["number"]),
                max(0.0, (now - at).total_seconds()),  # a clock may have been set back
            )
            for data, at in found
        ]
