"""The scheduler tells every client which workers come and go, and whether they died."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from distributed.diagnostics.plugin import SchedulerPlugin

from modelops.cluster.needless_timers import stop_needless_timers
from modelops.cluster.versions import VERSIONS, ours

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

WORKERS_TOPIC: Final = "modelops-workers"
MEMBERSHIP: Final = "modelops_pool"  # what a worker says of its pool when it joins
# How Dask calls the reasons of a worker that was asked to go, or went of its own will.
_EXPECTED: Final = ("retire-workers", "close-worker", "restart", "worker-close-gracefully")


class AnnounceWorkers(SchedulerPlugin):
    """Tell every client which workers come and go, and those that ask the versions of the scheduler."""

    name = "modelops-announce-workers"

    async def start(self, scheduler: Scheduler) -> None:
        """Leave the versions where `Client.get_metadata` finds them, also a client of another version.

        And let it rest while nothing happens.
        """
        scheduler.set_metadata([VERSIONS], msgspec.to_builtins(ours()))
        stop_needless_timers(scheduler)

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Announce a worker with the number of its threads."""
        state = scheduler.workers[worker]
        said = {key: state.extra.get(key) for key in (MEMBERSHIP, VERSIONS)}
        scheduler.log_event(
            WORKERS_TOPIC, {"event": "joined", "worker": worker, "slots": state.nthreads, **said}
        )

    def remove_worker(self, scheduler: Scheduler, worker: str, *, stimulus_id: str, **_: Any) -> None:
        """Announce that a worker is gone, and whether it was asked to go."""
        died = not stimulus_id.startswith(_EXPECTED)
        scheduler.log_event(WORKERS_TOPIC, {"event": "left", "worker": worker, "died": died})
