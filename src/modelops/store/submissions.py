"""New jobs that clients ask for, each recorded in one transaction with the key of the request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy.exc import IntegrityError as SqlIntegrityError

from modelops.errors import ConflictError, QueueFullError
from modelops.states import OPEN_JOB_STATES
from modelops.store import schema
from modelops.store.objects import AlreadyExistsError
from modelops.store.rows import insert_job, read_job, record_request
from modelops.study.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.store.records import Records
    from modelops.store.rows import JobRow, Submission

# Statements are built once: building one takes SQLAlchemy ten times as long as running it.
_OF_KEY = sa.select(schema.submissions.c.digest, schema.submissions.c.job).where(
    schema.submissions.c.key == sa.bindparam("of_key")
)
_UNFINISHED = sa.select(sa.func.count()).where(schema.jobs.c.state.in_(sorted(OPEN_JOB_STATES)))


def submitted(records: Records, submission: Submission) -> JobRow | None:
    """Return the job that this request made, or let begin again, when it came before; or None.

    Raises
    ------
    ConflictError
        The key was used for another request.
    """
    with records.database.reading() as sql:
        return _submitted(sql, submission)


def record_submission(
    records: Records,
    row: JobRow,
    submission: Submission | None,
    *,
    who: str,
    why: str,
    limit: int,
    begin: Callable[[sa.Connection], int] | None = None,
) -> JobRow:
    """Record a new job together with the request that asked for it.

    Parameters
    ----------
    row
        The new job, see `modelops.store.rows.new_row`.
    limit
        How many jobs that have not ended there may be.
    begin
        Takes the new job's first lease within the same transaction, which adds an event, and returns the epoch.

    Returns
    -------
        The row as it is recorded; that of another job if the same request made one meanwhile.

    Raises
    ------
    ConflictError
        The key was used for another request.
    QueueFullError
        There are as many jobs as there may be.
    """
    try:
        with records.database.writing() as sql:
            known = submission and _submitted(sql, submission)
            if known:
                return known
            _refuse_beyond(sql, limit)
            insert_job(sql, row, who, why)
            if submission is not None:
                record_request(sql, submission, row.job, row.created_at)
            if begin is not None:
                return replace(row, epoch=begin(sql), n_events=row.n_events + 1)
        return row
    except SqlIntegrityError as e:
        # Two transactions of one key may run at once on PostgreSQL; the one that is second learns it here.
        known = submission and submitted(records, submission)
        if known:
            return known
        raise AlreadyExistsError(f"there is a job {row.job} already") from e


def refuse_when_full(records: Records, limit: int) -> None:
    """Raise QueueFullError if there is no room for one more job."""
    with records.database.reading() as sql:
        _refuse_beyond(sql, limit)


def _submitted(sql: sa.Connection, submission: Submission) -> JobRow | None:
    known = sql.execute(_OF_KEY, {"of_key": submission.key}).first()
    if known is None:
        return None
    if known.digest != submission.digest:
        raise ConflictError(
            f"the key {submission.key!r} was used for another request, which was about job {known.job}; "
            "use a new key for a new request"
        )
    return read_job(sql, JobId(known.job))


def _refuse_beyond(sql: sa.Connection, limit: int) -> None:
    n_jobs = sql.scalar(_UNFINISHED) or 0
    if n_jobs >= limit:
        raise QueueFullError(
            f"the queue is full: {n_jobs} jobs have not ended, and this server keeps at most {limit}. "
            "Submit again when some have ended, or cancel some"
        )
