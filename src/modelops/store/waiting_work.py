"""How much work waits, over all jobs: what an autoscaler and an operator look at."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import msgspec
import sqlalchemy as sa

from modelops.states import FINAL_JOB_STATES, JobState
from modelops.store import schema
from modelops.study.ids import JobId
from modelops.study.spec import read_or_why

if TYPE_CHECKING:
    from modelops.store.records import Records

_WAITS: Final = (JobState.QUEUED, JobState.PREPARING)


class WaitingWork(msgspec.Struct, frozen=True):
    """At one moment.

    ``by_pools``: replicates without an outcome, of jobs that have not ended, by the names of pools that these ask for.
    ``stalled``: jobs that do not get on though they should. ``waits``: for how many seconds each job has waited whose
    turn has not come, or whose environment is not ready. ``without_outcome``: for how many seconds replicates of each
    job may have run none of which has an outcome; whoever drives it knows whether some do run.
    """

    by_pools: dict[tuple[str, ...], int]
    stalled: int
    waits: dict[JobId, float]
    without_outcome: dict[JobId, float]

    @property
    def replicates(self) -> int:
        """How many, whatever they ask for."""
        return sum(self.by_pools.values())


def waiting_work(records: Records) -> WaitingWork:
    """Look at all jobs that have not ended."""
    j, r = schema.jobs.c, schema.segment_ranges.c
    is_open = j.state.not_in([*FINAL_JOB_STATES, JobState.CANCELLING])
    covered = (
        sa.select(r.job, sa.func.sum(r.hi - r.lo))
        .select_from(schema.segment_ranges.join(schema.jobs, r.job == j.job))
        .where(is_open)
        .group_by(r.job)
    )
    with records.database.reading() as sql:
        rows = list(sql.execute(sa.select(j.job, j.spec, j.state, j.changed_at, j.stalled).where(is_open)))
        done = {job: int(n) for job, n in sql.execute(covered)}
    by_pools: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        size, asked = _size_and_pools(row.spec)
        by_pools[asked] += max(0, size - done.get(row.job, 0))
    now = records.now()
    since = {JobId(row.job): max(0.0, (now - row.changed_at).total_seconds()) for row in rows}
    return WaitingWork(
        by_pools=dict(by_pools),
        stalled=sum(bool(row.stalled) for row in rows),
        waits={row.job: since[row.job] for row in rows if row.state in _WAITS},
        without_outcome={
            row.job: since[row.job]
            for row in rows
            if row.state == JobState.RUNNING and not done.get(row.job, 0)
        },
    )


@lru_cache(maxsize=10_000)
def _size_and_pools(data: bytes) -> tuple[int, tuple[str, ...]]:
    spec, _ = read_or_why(data)
    if spec is None:  # nobody here knows what it wants
        return 0, ()
    return spec.line.size, spec.asked_pools
