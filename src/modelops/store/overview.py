"""Looking at jobs without touching them: each picture is of one moment, and costs nothing per replicate.

Counts are added up by the database from the rows of committed segments, one group per distinct text, so
that a job of many segments sends few rows.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from modelops.states import FINAL_JOB_STATES, JobState
from modelops.store import schema
from modelops.store.rows import JobRow, job_row, read_job

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from modelops.store.records import Records
    from modelops.study.ids import JobId

# Statements are built once: building one takes SQLAlchemy ten times as long as running it.
_SEGMENT_COUNTS = sa.cast(schema.segments.c.counts, sa.Text)  # PostgreSQL cannot group by JSON
_AGGREGATE_COUNTS = sa.cast(schema.aggregates.c.counts, sa.Text)
_ALL_SEGMENTS = sa.select(_SEGMENT_COUNTS, sa.func.count()).group_by(_SEGMENT_COUNTS)
_POOLS_OF_JOB = (
    sa.select(schema.segments.c.pool, _SEGMENT_COUNTS, sa.func.count())
    .where(schema.segments.c.job == sa.bindparam("of_job"))
    .group_by(schema.segments.c.pool, _SEGMENT_COUNTS)
)
_AGGREGATES_OF_JOB = (
    sa.select(_AGGREGATE_COUNTS, sa.func.count())
    .where(schema.aggregates.c.job == sa.bindparam("of_job"))
    .group_by(_AGGREGATE_COUNTS)
)


class Picture(msgspec.Struct, frozen=True):
    """A job at one moment. ``counts``, ``aggregates``: what is committed, by status; zeros are left out.

    ``pools``: likewise of the replicates, by the pool in which they ran.
    """

    row: JobRow
    counts: dict[str, int]
    aggregates: dict[str, int]
    pools: dict[str, dict[str, int]] = {}


class StoredFile(msgspec.Struct, frozen=True):
    """A committed object of a job. ``sha256``: hexadecimal, empty where none is recorded."""

    name: str
    n_bytes: int
    sha256: str = ""


def picture(records: Records, job: JobId) -> Picture:
    """Look at one job. Raises NotFoundError."""
    with records.database.reading() as sql:
        return _picture(sql, read_job(sql, job))


def page_of_jobs(
    records: Records,
    *,
    states: Collection[JobState] = (),
    match: str = "",
    before: str = "",
    limit: int,
) -> list[Picture]:
    """Return jobs by id, which is newest first.

    Parameters
    ----------
    states
        Only jobs in one of these; none means any.
    match
        Only jobs whose id, with or without ``job_``, begins with this text, or ends with it.
    before
        Go on after this job of an earlier page.
    """
    jobs = schema.jobs.c
    query = sa.select(schema.jobs).order_by(jobs.job.desc()).limit(limit)
    if states:
        query = query.where(jobs.state.in_(list(states)))
    if before:
        query = query.where(jobs.job < before)
    if match:
        ends = (jobs.job.startswith(f"{head}{match}", autoescape=True) for head in ("", "job_"))
        query = query.where(sa.or_(*ends, jobs.job.endswith(match, autoescape=True)))
    with records.database.reading() as sql:
        return [_picture(sql, job_row(row)) for row in sql.execute(query).mappings().all()]


def jobs_by_state(records: Records) -> dict[JobState, int]:
    """Return how many jobs are in each state; those with none are left out."""
    jobs = schema.jobs.c
    with records.database.reading() as sql:
        found = sql.execute(sa.select(jobs.state, sa.func.count()).group_by(jobs.state))
        return {JobState(state): n for state, n in found}


def n_unfinished(records: Records) -> int:
    """Return how many jobs have not ended."""
    return sum(n for state, n in jobs_by_state(records).items() if state not in FINAL_JOB_STATES)


def replicates_by_status(records: Records) -> dict[str, int]:
    """Return how many committed replicates of all jobs ended how."""
    with records.database.reading() as sql:
        return _total(sql.execute(_ALL_SEGMENTS))


def committed_files(records: Records, job: JobId) -> list[StoredFile]:
    """Return the segments of a job that count, and their packs, in the order of their names."""
    with records.database.reading() as sql:
        read_job(sql, job)
        found = [_files(sql, table, table.c.job == job) for table in (schema.segments, schema.aggregates)]
    return sorted((file for files in found for file in files), key=lambda file: file.name)


def committed_file(records: Records, job: JobId, name: str) -> StoredFile | None:
    """Return the one of `committed_files` that has this name, or None."""
    with records.database.reading() as sql:
        read_job(sql, job)
        for table in (schema.segments, schema.aggregates):
            t = table.c
            for file in _files(sql, table, sa.and_(t.job == job, sa.or_(t.name == name, t.pack == name))):
                if file.name == name:
                    return file
    return None


def _picture(sql: sa.Connection, row: JobRow) -> Picture:
    pools = _by_pool(sql, row)
    counts: Counter[str] = Counter()
    for of_pool in pools.values():
        counts.update(of_pool)
    return Picture(
        row,
        {status: n for status, n in sorted(counts.items()) if n},
        _total(sql.execute(_AGGREGATES_OF_JOB, {"of_job": row.job})),
        {name: of_pool for name, of_pool in sorted(pools.items()) if name},
    )


def _by_pool(sql: sa.Connection, row: JobRow) -> dict[str, dict[str, int]]:
    """Add up the ``counts`` of a job's segments by pool; those of none under an empty name."""
    pools: dict[str, Counter[str]] = {}
    for pool, counts, times in sql.execute(_POOLS_OF_JOB, {"of_job": row.job}):
        total = pools.setdefault(pool or "", Counter())
        for status, n in _counts_in(counts).items():
            total[status] += times * n
    return {name: {status: n for status, n in total.items() if n} for name, total in pools.items()}


def _counts_in(text: str) -> dict[str, int]:
    """Return stored counts; of those that are damaged none, until the reconciler has put them right."""
    try:
        return schema.whole_counts(msgspec.json.decode(text))
    except msgspec.DecodeError:
        return {}


def _total(rows: Iterable[Any]) -> dict[str, int]:
    """Add up ``counts``, each as often as it is there."""
    total: Counter[str] = Counter()
    for counts, n in rows:
        for status, times in _counts_in(counts).items():
            total[status] += times * n
    return {str(status): n for status, n in sorted(total.items()) if n}


def _files(sql: sa.Connection, table: sa.Table, where: Any) -> list[StoredFile]:
    t = table.c
    query = sa.select(t.name, t.n_bytes, t.digest, t.pack, t.pack_bytes).where(where)
    files = []
    for name, n_bytes, digest, pack, pack_bytes in sql.execute(query):
        files.append(StoredFile(name, n_bytes, digest))
        if pack is not None:
            files.append(StoredFile(pack, pack_bytes))
    return files
