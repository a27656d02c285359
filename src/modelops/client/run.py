"""``mo.run``: run a study and wait: on the server, or in this process on a cluster that the call owns or was given."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Self

from modelops.client.beside import Beside
from modelops.client.job import Job
from modelops.errors import RequestError
from modelops.home import Home
from modelops.settings import usable_cores

if TYPE_CHECKING:
    from modelops.client.status import JobStatus
    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.driver.machine import Machine
    from modelops.server.drive import JobDriver
    from modelops.study import Study
    from modelops.study.spec import JobSpec


log = logging.getLogger(__name__)
LOOK_FIRST_S = (
    0.3  # for a failure that is remembered, before workers are started; what is prepared takes less
)
MAX_S_WITHOUT_WORKER = 300.0  # a worker that died is started again in seconds


class Watcher:
    """What is told while a job runs; the default says nothing. The CLI draws a progress bar with it."""

    def prepared(self, job: Job, n_replicates: int) -> None:
        """Hear that the job is recorded and has an id."""

    def stage(self, text: str) -> None:
        """Hear what is being done before replicates run: resolving, installing, starting workers."""

    def waiting(self, text: str) -> None:
        """Hear what database or storage said, as one of them does not do its part: the job waits, and goes on after."""
        log.warning("waiting: %s", text)

    def changed(self, machine: Machine) -> None:
        """Hear that counts may have changed. Called often; must be cheap."""

    def seen(self, status: JobStatus) -> None:
        """Hear what the server says of a job that it runs; also that it is away."""

    def cancelling(self, hard: bool) -> None:
        """Hear that Ctrl-C was pressed."""


def run(
    study: Study,
    *,
    workers: int | None = None,
    cluster: EmbeddedCluster | None = None,
    progress: bool | None = None,
    watcher: Watcher | None = None,
) -> Job:
    """Run a study and wait for it.

    The server runs it, see `modelops.submit`: the job goes on when this process dies. With ``workers`` or ``cluster``
    this process runs it itself, and needs no server.

    Parameters
    ----------
    study
        What to run.
    workers
        Run it here, on so many worker processes of its own, one replicate at a time each.
    cluster
        Run it here, on a started cluster, see `modelops.local_cluster`.
    progress
        Show a progress bar; default: only when stderr is a terminal.
    watcher
        Told what happens, instead of the progress bar.

    Returns
    -------
        The job, in a final state. It does not raise because replicates failed: ask ``job.status()``. After Ctrl-C was
        pressed twice the server may still be stopping it.

    Raises
    ------
    RequestError
        The study or the bundle is wrong; nothing ran.
    ClusterError
        The workers or the server could not be started, or storage does not work.
    ServerUnreachableError
        The server has been away for a minute; the job is recorded, and goes on with it.
    KeyboardInterrupt
        Ctrl-C before there was a job; with ``workers`` or ``cluster``, before the first replicate could run: the job is
        recorded as cancelled.
    """
    from modelops.client.progress import ProgressBar
    from modelops.client.watch import run_on_server

    if watcher is None:
        show = sys.stderr.isatty() if progress is None else progress
        watcher = ProgressBar() if show else Watcher()
    with contextlib.ExitStack() as stack:
        if isinstance(watcher, contextlib.AbstractContextManager):
            stack.enter_context(watcher)
        if workers is None and cluster is None:
            return run_on_server(study, watcher)
        home = cluster.home if cluster is not None else Home.from_environ(os.environ)
        interrupts = stack.enter_context(Interrupts(watcher))
        return _run(study, workers or usable_cores(), cluster, home, watcher, interrupts)


def local_cluster(workers: int | None = None) -> EmbeddedCluster:
    """Return a pool of workers on this machine that several `run` calls can share; use it in a ``with`` block.

    ``workers``: worker processes; default: one for each core that this process may use.
    """
    from modelops.cluster.embedded import EmbeddedCluster

    return EmbeddedCluster(Home.from_environ(os.environ), n_workers=workers or usable_cores())


def _run(
    study: Study,
    workers: int,
    cluster: EmbeddedCluster | None,
    home: Home,
    watcher: Watcher,
    interrupts: Interrupts,
) -> Job:
    from modelops.client.prepare import prepare_job
    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.errors import ClusterError
    from modelops.server.drive import JobDriver
    from modelops.server.give_up import abandon
    from modelops.store import Objects, Records
    from modelops.store.leases import leases_for
    from modelops.store.rows import LeaseLostError
    from modelops.who import this_process, whoami

    with contextlib.ExitStack() as stack:
        objects = Objects.open(home.storage)
        records = stack.enter_context(contextlib.closing(Records.open(home.database_url)))
        leases = leases_for(records, home.state / "leases")
        watcher.stage("preparing the bundle")
        prepared = prepare_job(study, home, records, objects, reserve=leases.reserve, check=_refuse_pools)
        stack.callback(leases.release, prepared.job)
        job = Job(prepared.job, home)
        watcher.prepared(job, prepared.spec.line.size)
        epoch = leases.take(prepared.job, this_process())
        if epoch is None:
            raise ClusterError(
                f"job {job.id} is recorded, and a server has begun to run it: ask for its status"
            )
        driver = JobDriver(
            prepared.job,
            epoch,
            leases=leases,
            records=records,
            objects=objects,
            cache=home.cache,
            who=whoami(),
            on_change=watcher.changed,
            on_stage=watcher.stage,
            on_waiting=watcher.waiting,
            max_s_without_worker=MAX_S_WITHOUT_WORKER,
        )
        try:
            # Resolving and installing, and starting Dask, have nothing to do with each other.
            driver.begin_preparing()
            if cluster is None:
                if driver.fails_at_once(LOOK_FIRST_S):
                    return job
                cluster = stack.enter_context(EmbeddedCluster(home, n_workers=workers))
            interrupts.drive(driver)
            driver.run(cluster)
        except BaseException as error:
            why = f"{type(error).__name__}: {error}".rstrip(": ")
            abandon(records, prepared.job, driver.epoch, whoami(), why)
            raise
        if driver.lease_lost:
            raise LeaseLostError(prepared.job, driver.epoch)
        return job


def _refuse_pools(spec: JobSpec) -> None:
    if spec.asked_pools:
        raise RequestError(
            f"the study asks for the pools {', '.join(spec.asked_pools)}, and the workers of this process are in none; "
            "submit it to a server, or give pools=[] to run it here"
        )


class Interrupts:
    """Ctrl-C once: stop cleanly and keep what is finished; twice: at once. Use as a context manager.

    Before the driver runs, Ctrl-C is a KeyboardInterrupt as everywhere else. Only the main thread gets signals; in
    any other thread this does nothing.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._driver: JobDriver | None = None
        self._presses = 0
        self._beside = Beside(self._pressed)

    def __enter__(self) -> Self:
        self._beside.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._beside.__exit__(*error)

    def drive(self, driver: JobDriver) -> None:
        """Send Ctrl-C to this driver from now on."""
        self._driver = driver

    def _pressed(self, _signum: int, _frame: object) -> None:
        if self._driver is None:
            raise KeyboardInterrupt
        self._presses += 1
        self._beside.do(partial(self._watcher.cancelling, hard=self._presses > 1))
        self._driver.cancel("Ctrl-C")
