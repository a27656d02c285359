"""Rows of jobs and events as values, and what every transaction on a job does: lock its row, append to its story."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import sqlalchemy as sa

from modelops.errors import ModelOpsError, NotFoundError, RetryableError
from modelops.states import JobState
from modelops.store import schema
from modelops.store.statements import Statement
from modelops.study.ids import JobId
from modelops.study.wording import spelt_out

if TYPE_CHECKING:
    from collections.abc import Mapping

LAST_EVENTS = 16  # among which an event is looked for whose writing was not answered

_OF_JOB = schema.jobs.c.job == sa.bindparam("of_job")
_OF_EPOCH = schema.jobs.c.epoch == sa.bindparam("of_epoch")
_HOLDING = schema.jobs.update().where(_OF_JOB, _OF_EPOCH).values(epoch=sa.bindparam("of_epoch"))
_COUNTING = (
    schema.jobs.update()
    .where(_OF_JOB)
    .values(n_events=schema.jobs.c.n_events + 1)
    .returning(schema.jobs.c.n_events)
)
_READ_JOB = Statement(sa.select(schema.jobs).where(_OF_JOB))
_LOCK_JOB = Statement(sa.select(schema.jobs).where(_OF_JOB).with_for_update())
_HOLD = Statement(_HOLDING)
_READ_HELD = Statement(_HOLDING.returning(*schema.jobs.c))
_COUNT_EVENT = Statement(_COUNTING)
_COUNT_HELD_EVENT = Statement(_COUNTING.where(_OF_EPOCH))
_NEXT_EPOCH = Statement(_COUNTING.values(epoch=schema.jobs.c.epoch + 1).returning(schema.jobs.c.epoch))
_INSERT_JOB = Statement(schema.jobs.insert())
_INSERT_EVENT = Statement(schema.events.insert())
_INSERT_LEASE = Statement(schema.leases.insert())
_UPDATE_JOB = Statement(schema.jobs.update().where(_OF_JOB))


class LeaseLostError(ModelOpsError):
    """Another driver has taken the job over; this one writes nothing more and stops."""

    def __init__(self, job: JobId, epoch: int) -> None:
        super().__init__(job, epoch)
        self.job, self.epoch = job, epoch

    def __str__(self) -> str:
        return f"another driver holds job {self.job}; the lease of epoch {self.epoch} is over"


class ChangedMeanwhileError(RetryableError):
    """The job is no longer as the caller saw it: look again, then decide again."""


class JobRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded of a job. ``spec``: the bytes of its ``study.json``; times are aware, UTC."""

    job: JobId
    name: str
    bundle: str
    spec: bytes
    state: JobState
    reason: str
    run: int
    version: int
    epoch: int
    n_events: int
    created_at: datetime
    changed_at: datetime
    study: str = "study.json"
    used_s: float = 0.0
    cancel_by: str | None = None
    stalled: str = ""


class EventRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's story. ``number``: 1, 2, 3, ... within the job; pass it as ``after`` to read on."""

    number: int
    at: datetime
    who: str
    kind: str
    text: str
    data: dict[str, Any]


class Submission(msgspec.Struct, frozen=True):
    """A request that may come again. ``key``: chosen by the client; ``digest``: of what it asked for."""

    key: str
    digest: str


def new_row(job: JobId, spec: bytes, *, name: str, bundle: str, at: datetime) -> JobRow:
    """Return the row of a new job, which is ``queued``."""
    return JobRow(
        job=job, name=spelt_out(name), bundle=bundle, spec=spec, state=JobState.QUEUED, reason="", run=1,
        version=1, epoch=0, n_events=1, created_at=at, changed_at=at,
    )  # fmt: skip


def insert_job(sql: sa.Connection, row: JobRow, who: str, why: str) -> None:
    """Write the row of a new job, with its first event, ``created``."""
    _INSERT_JOB.run(sql, msgspec.structs.asdict(row))
    insert_event(sql, row.job, 1, row.created_at, who, "created", why, {})


def record_request(sql: sa.Connection, asked: Submission, job: JobId, at: datetime) -> None:
    """Record that a request was carried out, and on which job."""
    values = {"key": asked.key, "digest": asked.digest, "job": job, "created_at": at}
    sql.execute(schema.submissions.insert().values(values))


def update_job(sql: sa.Connection, job: JobId, **values: object) -> None:
    """Change columns of the job's row."""
    _UPDATE_JOB.run(sql, {"of_job": job, **values})


def hold(sql: sa.Connection, job: JobId, epoch: int) -> None:
    """Lock the job's row for this transaction, or learn that the lease is lost."""
    if not _HOLD.run(sql, {"of_job": job, "of_epoch": epoch}):
        _fail_to_hold(sql, job, epoch)


def _fail_to_hold(sql: sa.Connection, job: JobId, epoch: int) -> NoReturn:
    read_job(sql, job)  # a job that does not exist is another error
    raise LeaseLostError(job, epoch)


def read_held(sql: sa.Connection, job: JobId, epoch: int | None) -> JobRow:
    """Return a job's row, locked; with an ``epoch`` as `hold` does."""
    if epoch is None:
        return read_job(sql, job, lock=True)
    row = _READ_HELD.row(sql, {"of_job": job, "of_epoch": epoch})
    if row is None:
        _fail_to_hold(sql, job, epoch)
    return job_row(row._asdict())


def next_epoch(sql: sa.Connection, job: JobId) -> tuple[int, int]:
    """Raise a job's epoch; return it, and the number of the event that is to say so. Raises NotFoundError."""
    row = _NEXT_EPOCH.row(sql, {"of_job": job})
    if row is None:
        raise _not_found(job)
    return row.epoch, row.n_events


def insert_lease(sql: sa.Connection, job: JobId, at: datetime, owner: str) -> int:
    """Raise a job's epoch, and write whose it is and that it was taken; return it. Raises NotFoundError."""
    epoch, number = next_epoch(sql, job)
    _INSERT_LEASE.run(sql, {"job": job, "epoch": epoch, "owner": owner, "taken_at": at})
    insert_event(sql, job, number, at, owner, "lease_taken", f"epoch {epoch}", {"epoch": epoch})
    return epoch


def _not_found(job: JobId) -> NotFoundError:
    return NotFoundError(f"there is no job {job}; 'modelops jobs list --all' shows all")


def read_job(sql: sa.Connection, job: JobId, *, lock: bool = False) -> JobRow:
    """Return a job's row, locked for this transaction if wanted. Raises NotFoundError."""
    row = (_LOCK_JOB if lock else _READ_JOB).row(sql, {"of_job": job})
    if row is None:
        raise _not_found(job)
    return job_row(row._asdict())


def job_row(row: Mapping[Any, Any]) -> JobRow:
    """Return a row as a value."""
    return JobRow(**{**row, "state": JobState(row["state"])})


def insert_event(
    sql: sa.Connection,
    job: JobId,
    number: int,
    at: datetime,
    who: str,
    kind: str,
    text: str,
    data: dict[str, Any],
) -> None:
    """Write an event whose number is known to be free."""
    values = {
        "job": job, "number": number, "at": at, "who": who, "kind": str(kind), "text": text,
        "data": schema.data_spelt_out(data),
    }  # fmt: skip
    _INSERT_EVENT.run(sql, values)


def append_event(
    sql: sa.Connection,
    job: JobId,
    at: datetime,
    who: str,
    kind: str,
    text: str,
    data: dict[str, Any],
    *,
    epoch: int | None = None,
) -> int:
    """Append to a job's story and return the event's number; with an ``epoch``, hold the job as `hold` does."""
    if epoch is None:
        number = _COUNT_EVENT.scalar(sql, {"of_job": job})
        if number is None:
            raise _not_found(job)
    else:
        number = _COUNT_HELD_EVENT.scalar(sql, {"of_job": job, "of_epoch": epoch})
        if number is None:
            _fail_to_hold(sql, job, epoch)
    insert_event(sql, job, number, at, who, kind, text, data)
    return int(number)


def last_alike(
    sql: sa.Connection, job: JobId, who: str, kind: str, text: str, data: dict[str, Any]
) -> int | None:
    """Return the number of an event that says the same, if it is among the last ones."""
    e = schema.events.c
    wanted = (*map(spelt_out, (who, str(kind), text)), schema.data_spelt_out(data))
    query = sa.select(e.number, e.who, e.kind, e.text, e.data).where(e.job == job)
    for row in sql.execute(query.order_by(e.number.desc()).limit(LAST_EVENTS)):
        if (row.who, row.kind, row.text, row.data) == wanted:
            return int(row.number)
    return None
