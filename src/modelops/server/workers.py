"""Ask workers what they have, within a bounded time: one that hangs does not answer, and nothing is known of it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from modelops.errors import ClusterError
from modelops.server.reconcile import Held
from modelops.study.ids import AttemptId, JobId
from modelops.worker import tasks
from modelops.worker.held import held

if TYPE_CHECKING:
    from distributed import Client

    from modelops.driver.hands import Pool

log = logging.getLogger(__name__)
ANSWER_WITHIN_S: Final = 5.0


def ask_workers(pool: Pool, *, within_s: float = ANSWER_WITHIN_S) -> dict[str, list[Held] | None] | None:
    """Return what each worker has; None for one that did not answer. None: there is no connection to any."""
    workers = list(pool.workers())
    try:
        client = pool.client
        return client.sync(_ask_all, client, workers, within_s)  # type: ignore[no-any-return]
    except (ClusterError, OSError, ValueError, RuntimeError) as error:
        log.info("workers could not be asked what they have: %s", error)
        return None


def stop_attempt(pool: Pool, job: JobId, attempt: AttemptId, worker: str) -> None:
    """Tell a worker to stop an attempt."""
    try:
        pool.client.run(tasks.stop, job, attempt, None, workers=[worker], wait=False)
    except (ClusterError, OSError, ValueError) as error:
        log.info(
            "could not ask %s to stop %s: %s", worker, attempt, error, extra={"job": job, "attempt": attempt}
        )


async def _ask_all(client: Client, workers: list[str], within_s: float) -> dict[str, list[Held] | None]:
    answers = await asyncio.gather(*(_ask(client, worker, within_s) for worker in workers))
    return dict(zip(workers, answers, strict=True))


async def _ask(client: Client, worker: str, within_s: float) -> list[Held] | None:
    try:
        answers = await asyncio.wait_for(client.run(held, workers=[worker]), within_s)
    except (OSError, ValueError, TimeoutError) as error:
        log.info("could not ask %s what it has: %s", worker, error)
        return None
    return [Held(JobId(job), AttemptId(attempt), worker, live) for job, attempt, live in answers[worker]]
