"""What the embedded cluster says of itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from distributed import Scheduler

from modelops.cluster.announce import AnnounceWorkers

if TYPE_CHECKING:
    from modelops.cluster.embedded import EmbeddedCluster


def test_workers_are_listed_while_dask_refreshes_what_it_knows_of_the_scheduler(
    cluster: EmbeddedCluster,
) -> None:
    """Dask's client does so every two seconds, without workers; a job that began just then found none."""
    client = cluster.client
    assert client.loop is not None

    async def refresh_all_the_time() -> None:
        while True:
            await client._update_scheduler_info()

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(refresh_all_the_time())

    refreshing = client.sync(begin)
    try:
        assert all(cluster.workers() for _ in range(30))
    finally:
        client.loop.add_callback(refreshing.cancel)


def test_the_scheduler_does_not_look_for_times_that_nobody_has_set(cluster: EmbeddedCluster) -> None:
    assert cluster.client.cluster is not None
    scheduler = cluster.client.cluster.scheduler
    assert not {"idle-timeout", "no-workers-timeout"} & scheduler.periodic_callbacks.keys()
    assert scheduler.check_idle() is None or scheduler.idle_since


def test_a_time_that_is_set_is_looked_for() -> None:
    async def timers(**options: Any) -> set[str]:
        async with Scheduler(
            dashboard=False, dashboard_address=":0", host="127.0.0.1", plugins=[AnnounceWorkers()], **options
        ) as scheduler:
            return {name for name, timer in scheduler.periodic_callbacks.items() if timer.is_running()}

    assert "idle-timeout" in asyncio.run(timers(idle_timeout="1h"))
    assert "idle-timeout" not in asyncio.run(timers())
