"""What a worker has, of all jobs: for whoever compares that with what drivers and records say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.worker.tasks import runtime_of

if TYPE_CHECKING:
    from distributed import Worker

Line = tuple[str, str, bool]


async def held(dask_worker: Worker) -> list[Line]:
    """Return ``(job, attempt, live)`` of every attempt that is here. Runs on the event loop, and changes nothing.

    ``live``: it runs, and nobody has told it to stop. Others wait for a slot, are about to stop, or have ended and
    their receipt is kept.
    """
    table = runtime_of(dask_worker).attempts
    lines: dict[tuple[str, str], bool] = {}
    for key in dask_worker.state.tasks:
        job, slash, attempt = str(key).partition("/")
        if slash:
            lines[job, attempt] = False
    lines |= {(ended.job, ended.attempt): False for ended in table.kept()}
    lines |= {(attempt.job, attempt.attempt): not attempt.stop.stopped for attempt in table}
    return [(job, attempt, live) for (job, attempt), live in lines.items()]
