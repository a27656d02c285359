"""The drivers of a server, from its first moment: Dask takes longer to import than a client should wait."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from modelops.errors import ClusterError
from modelops.store.leases import leases_for
from modelops.study.pools import NO_ALIASES, NO_POOL
from modelops.who import this_process

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from modelops.cluster.connected import ConnectedCluster
    from modelops.environments import Lock
    from modelops.home import Home
    from modelops.server.beginning import Beginning
    from modelops.server.reconcile import Finding
    from modelops.server.reconciler import Reconciler
    from modelops.server.stall_watch import StallWatch
    from modelops.server.supervisor import Supervisor
    from modelops.server.views import Live
    from modelops.store import Objects, Records
    from modelops.study.ids import JobId
    from modelops.study.pools import Aliases, Membership


class Drivers:
    """Becomes the supervisor as soon as that is there; until then nothing is driven and the scheduler is away.

    Parameters
    ----------
    find_scheduler
        Returns the address of the scheduler, None as long as it is not known.
    tls
        The folder of the certificates that the scheduler asks for; None: those that Dask's configuration names.
    aliases
        Which names of pools mean the same.
    failed
        Called, on a thread of its own, if it cannot begin.
    """

    def __init__(
        self,
        records: Records,
        objects: Objects,
        home: Home,
        find_scheduler: Callable[[], str | None],
        tls: Path | None,
        failed: Callable[[BaseException], None],
        aliases: Aliases = NO_ALIASES,
    ) -> None:
        self._records, self._objects, self._home = records, objects, home
        self._find_scheduler, self._tls, self._failed = find_scheduler, tls, failed
        self.aliases = aliases
        self._pool: ConnectedCluster | None = None
        self._supervisor: Supervisor | None = None
        self._reconciler: Reconciler | None = None
        self._stall_watch: StallWatch | None = None
        self._listener: Callable[[JobId, bool], None] = lambda _job, _ended: None
        self._thread = threading.Thread(target=self._begin, name="modelops-drivers", daemon=True)

    def start(self) -> None:
        """Begin to connect and to drive, beside what else the server does."""
        self._thread.start()

    def stop(self) -> None:
        """Stop driving; what runs on workers goes on."""
        self._thread.join()
        for beside in (self._stall_watch, self._reconciler):
            if beside is not None:
                beside.stop()
        if self._supervisor is not None:
            self._supervisor.stop()
        if self._pool is not None:
            self._pool.close()

    def wake(self) -> None:
        """Look for jobs to drive, and for what was asked of them, now."""
        if self._supervisor is not None:  # which looks at all jobs when it begins
            self._supervisor.wake()

    def beginning(
        self, job: JobId, bundle: str, lock: Lock | None
    ) -> AbstractContextManager[Beginning | None]:
        """Drive a new job as soon as it is recorded; see `modelops.server.supervisor.Supervisor.beginning`."""
        if self._supervisor is None:
            return contextlib.nullcontext()
        return self._supervisor.beginning(job, bundle, lock)

    def abandon(self, job: JobId, who: str) -> None:
        """End a job as cancelled, if it is driven here, without waiting for what its workers could still hand in."""
        if self._supervisor is not None:
            self._supervisor.abandon(job, who)

    def view(self, job: JobId) -> Live | None:
        """Return what the driver of a job sees; None if it is not driven here."""
        return self._supervisor.view(job) if self._supervisor is not None else None

    def goes_on(self, job: JobId) -> bool:
        """Say whether a job is driven here and its end is not recorded; whoever listens will be told of that."""
        return self._supervisor is not None and self._supervisor.goes_on(job)

    def driven(self) -> Collection[JobId]:
        """Return the jobs that are driven here."""
        return self._supervisor.driven() if self._supervisor is not None else ()

    def workers(self) -> dict[str, int]:
        """Return the workers' addresses, and how many replicates each runs at a time."""
        return self._pool.workers() if self._pool is not None else {}

    def membership(self, worker: str) -> Membership:
        """Return what a worker says of its pool."""
        return self._pool.membership(worker) if self._pool is not None else NO_POOL

    def refused(self) -> dict[str, str]:
        """Return the workers that get no work as their versions do not fit, and a table of these."""
        return self._pool.refused() if self._pool is not None else {}

    def connected(self) -> bool:
        """Say whether the Dask scheduler answers."""
        return self._pool is not None and self._pool.connected

    def listen(self, listener: Callable[[JobId, bool], None]) -> None:
        """Let this one be told, on any thread, of each change of a job's state, and whether it has ended."""
        self._listener = listener

    def run(self, job: JobId | None) -> Sequence[Finding]:
        """Compare records, stored bytes and what runs; see `modelops.server.reconciler.Reconciler.run`."""
        self._thread.join()
        if self._reconciler is None:
            raise ClusterError("the server cannot compare anything: it could not begin to drive jobs")
        return self._reconciler.run(job)

    def _begin(self) -> None:
        try:
            from modelops.cluster.connected import ConnectedCluster
            from modelops.server.reconciler import Reconciler
            from modelops.server.stall_watch import StallWatch
            from modelops.server.supervisor import Supervisor

            pool = ConnectedCluster(self._find_scheduler, self._tls)
            supervisor = Supervisor(
                records=self._records,
                objects=self._objects,
                cache=self._home.cache,
                pool=pool,
                leases=leases_for(self._records, self._home.state / "leases"),
                who=this_process(),
                aliases=self.aliases,
                on_recorded=lambda job, ended: self._listener(job, ended),
            )
            self._pool = pool.start()
            supervisor.start()
            self._supervisor = supervisor
            self._reconciler = Reconciler(self._records, self._objects, supervisor, pool, this_process())
            self._reconciler.start()
            self._stall_watch = StallWatch(self._records, supervisor, this_process())
            self._stall_watch.start()
        except BaseException as error:  # noqa: BLE001  the top of a thread: the server ends with it
            self._failed(error)
