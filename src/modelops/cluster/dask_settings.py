"""The Dask settings that ModelOps relies on, in one place, with the reason for each."""

from __future__ import annotations

from typing import Any, Final

HEALTH_ONLY: Final = ["modelops.cluster.health"]

DASK_SETTINGS: Final[dict[str, Any]] = {
    # One layer retries, and it is the driver.
    "distributed.scheduler.allowed-failures": 0,
    # The driver pins each chunk to a worker and keeps the window itself.
    "distributed.scheduler.work-stealing": False,
    # These routes listen even when the dashboard is off, and they need no certificate.
    "distributed.scheduler.http.routes": HEALTH_ONLY,
    "distributed.worker.http.routes": HEALTH_ONLY,
    # Receipts are small; memory belongs to runner processes, which Dask's limits do not see.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.admin.tick.limit": "30s",
    # How late the loop is matters in seconds here; the default looks fifty times in each, in every process.
    "distributed.admin.tick.interval": "5s",
    "distributed.admin.tick.cycle": "60s",
    "distributed.comm.timeouts.connect": "60s",
    # A nanny starts its worker again, however often it dies and however long that takes. With the default the
    # cluster gives up a worker, for good, that happens to be down some time after an earlier death.
    "distributed.deploy.lost-worker-timeout": "365 days",
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.interval": "30s",
    # There are no copies of results that it could remove: nothing depends on them, and the driver takes them at once.
    "distributed.scheduler.active-memory-manager.start": False,
    # What a client then knows of the scheduler is read by nobody here.
    "distributed.client.scheduler-info-interval": "10m",
    # So many messages, and events of each topic, stay in memory for a look; receipts, too, are among them.
    "distributed.admin.low-level-log-length": 100,
}
