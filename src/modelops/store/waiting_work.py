"""How much work waits, over all jobs: what an autoscaler and an operator look at."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import msgspec
import sqlalchemy as sa

from modelops.states import FINAL_JOB_STATES, JobState
from modelops.store import schema
from modelops.study.spec import decode_spec

if TYPE_CHECKING:
    from modelops.store.records import Records

_WAITS: Final = (JobState.QUEUED, JobState.PREPARING)


class WaitingWork(msgspec.Struct, frozen=True):
    """At one moment.

    ``replicates``: of jobs that have not ended, without an outcome. ``stalled``: jobs that do not get on though they
    should. ``longest_wait_s``: since when the job that waits longest to run replicates has waited; 0 if none does.
    """

    replicates: int
    stalled: int
    longest_wait_s: float


def waiting_work(records: Records) -> WaitingWork:
    """Look at all jobs that have not ended."""
    j, r = schema.jobs.c, schema.segment_ranges.c
    is_open = j.state.not_in([*FINAL_JOB_STATES, JobState.CANCELLING])
    covered = (
        sa.select(sa.func.coalesce(sa.func.sum(r.hi - r.lo), 0))
        .select_from(schema.segment_ranges.join(schema.jobs, r.job == j.job))
        .where(is_open)
    )
    with records.database.reading() as sql:
        rows = list(sql.execute(sa.select(j.spec, j.state, j.changed_at, j.stalled).where(is_open)))
        done = int(sql.scalar(covered) or 0)
    now = records.now()
    waits = [(now - row.changed_at).total_seconds() for row in rows if row.state in _WAITS]
    return WaitingWork(
        replicates=max(0, sum(_size(row.spec) for row in rows) - done),
        stalled=sum(bool(row.stalled) for row in rows),
        longest_wait_s=max(0.0, *waits) if waits else 0.0,
    )


@lru_cache(maxsize=10_000)
def _size(spec: bytes) -> int:
    return decode_spec(spec).line.size
