"""A cluster of this process: Dask scheduler here, workers as child processes, TLS between them.

Certificates are made at start and never touch a disk, so another user of the machine gets in nowhere.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Self

import dask
from distributed import Client, LocalCluster
from distributed.security import Security

from modelops.cluster.announce import WORKERS_TOPIC, AnnounceWorkers
from modelops.cluster.dask_settings import DASK_SETTINGS
from modelops.cluster.listeners import Listeners
from modelops.cluster.nanny import DetachedNanny
from modelops.errors import ClusterError
from modelops.study.pools import NO_POOL
from modelops.worker.plugin import ModelOpsWorker
from modelops.worker.sending import send_whatever_the_clock_says
from modelops.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.home import Home
    from modelops.study.pools import Membership


class EmbeddedCluster:
    """A pool on this machine: ``n_workers`` processes with ``threads`` slots each. Use it in a ``with`` block.

    Raises
    ------
    ClusterError
        The workers did not start.
    """

    def __init__(self, home: Home, *, n_workers: int, threads: int = 1) -> None:
        self.home = home
        self._settings = WorkerSettings.of_home(home)
        self._n_workers, self._threads = n_workers, threads
        self._stack = contextlib.ExitStack()
        self._listeners = Listeners()
        self.on_workers = self._listeners.on_workers
        self.on_topic = self._listeners.on_topic
        self.client: Client

    def start(self) -> Self:
        """Start scheduler and workers and install the worker plugin; returns when all workers are there."""
        try:
            self._stack.enter_context(dask.config.set(DASK_SETTINGS))
            self._stack.enter_context(_quiet_dask())
            send_whatever_the_clock_says()
            security = Security.temporary()
            cluster = self._stack.enter_context(
                LocalCluster(
                    worker_class=DetachedNanny,
                    n_workers=self._n_workers,
                    threads_per_worker=self._threads,
                    processes=True,
                    host="127.0.0.1",
                    protocol="tls://",
                    security=security,
                    dashboard_address="127.0.0.1:0",  # health and nothing else; an address alone asks for a dashboard
                    worker_dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                    memory_limit=0,
                    local_directory=str(self._settings.scratch),
                    silence_logs=logging.CRITICAL,
                    scheduler_sync_interval="10m",  # nobody looks at what the cluster would know by that
                )
            )
            self.client = self._stack.enter_context(Client(cluster, set_as_default=False))
            self.client.register_plugin(ModelOpsWorker(self._settings))
            self.client.register_plugin(AnnounceWorkers())
            self.client.subscribe_topic(WORKERS_TOPIC, self._heard)
            self._listeners.listen_to(self.client)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop workers and scheduler; runner processes end with their workers."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def workers(self) -> dict[str, int]:
        """Return the address of each worker and the number of its slots."""
        scheduler = self.client.scheduler
        if scheduler is None:
            raise ClusterError("the cluster is closed")
        # Not `Client.scheduler_info`: a timer of the client replaces what that returns by one without workers.
        found = self.client.sync(scheduler.identity, n_workers=-1)["workers"]
        return {address: int(info["nthreads"]) for address, info in found.items()}

    def membership(self, _worker: str) -> Membership:
        """Return that these workers are in no pool."""
        return NO_POOL

    def refused(self) -> dict[str, str]:
        """Return that all workers fit: they are of this process."""
        return {}

    def _heard(self, event: tuple[float, dict[str, Any]]) -> None:
        message = event[1]
        if message["event"] == "joined":
            self._listeners.joined(message["worker"], int(message["slots"]))
        else:
            self._listeners.left(message["worker"], bool(message["died"]))


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    """Keep Dask's own log lines off the terminal: what they report reaches the driver as events."""
    loggers = [
        logging.getLogger(name) for name in ("distributed", "distributed.scheduler", "distributed.nanny")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
