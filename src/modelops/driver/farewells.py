"""Tell workers which jobs have ended: at once, or together with others that end in the same second.

A message to each worker for each job, and the scheduler's part in it, is a tenth of what a job of one replicate costs.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from modelops.worker import tasks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distributed import Client

    from modelops.study.ids import JobId

log = logging.getLogger(__name__)
GATHER_S: Final = 1.0


@dataclass
class _Ended:
    """Jobs that have ended, each with its last epoch, and the workers that may keep something of one."""

    epochs: dict[JobId, int] = field(default_factory=dict)
    workers: set[str] = field(default_factory=set)


_gathered: WeakKeyDictionary[Client, _Ended] = WeakKeyDictionary()  # only in the thread of the client's loop


def say_farewell(
    client: Client, workers: Iterable[str], job: JobId, epoch: int, *, in_a_moment: bool
) -> None:
    """Let workers keep nothing of a job that its driver of this epoch has ended. From any thread; waits for nothing.

    ``in_a_moment``: within two seconds, as there is nothing left to run. Not if the job may begin again at once: that
    run would find on the workers what counts no more.
    """
    if client.loop is not None:
        client.loop.add_callback(_take, client, set(workers), job, epoch, in_a_moment=in_a_moment)


async def _take(client: Client, workers: set[str], job: JobId, epoch: int, *, in_a_moment: bool) -> None:
    if not in_a_moment:
        await _send(client, _Ended({job: epoch}, workers))
        return
    is_first = client not in _gathered
    ended = _gathered.setdefault(client, _Ended())
    ended.epochs[job] = max(epoch, ended.epochs.get(job, 0))
    ended.workers |= workers
    if is_first:
        await asyncio.sleep(GATHER_S)
        await _send(client, _gathered.pop(client))


async def _send(client: Client, ended: _Ended) -> None:
    if client.scheduler is None or not ended.workers:
        return  # the client was closed meanwhile, and with a pool of this process its workers have ended
    try:
        await client.run(
            tasks.forget, ended.epochs, workers=sorted(ended.workers), wait=False, on_error="ignore"
        )
    except (OSError, ValueError) as error:
        # The worker is gone; its attempts are told as lost.
        log.info("could not reach %s: %s", ", ".join(sorted(ended.workers)), error)
