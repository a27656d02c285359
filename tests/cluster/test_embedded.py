"""What the embedded cluster says of itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

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
