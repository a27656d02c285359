"""``mo.run``: own an embedded cluster for the length of the call, drive one job to its end."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from modelops.client.job import Job
from modelops.home import Home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.client.prepare import PreparedJob
    from modelops.driver.loop import DriverLoop
    from modelops.driver.machine import Machine
    from modelops.store import Objects, Records
    from modelops.study import Study


class Watcher:
    """What is told while a job runs; the default says nothing. The CLI draws a progress bar with it."""

    def prepared(self, job: Job, n_replicates: int) -> None:
        """Hear that the job is recorded and has an id."""

    def stage(self, text: str) -> None:
        """Hear what is being done before replicates run: resolving, installing, starting workers."""

    def changed(self, machine: Machine) -> None:
        """Hear that counts may have changed. Called often; must be cheap."""

    def cancelling(self, hard: bool) -> None:
        """Hear that Ctrl-C was pressed."""


def run(
    study: Study, *, workers: int | None = None, progress: bool | None = None, watcher: Watcher | None = None
) -> Job:
    """Run a study on this machine and wait for it.

    Parameters
    ----------
    study
        What to run.
    workers
        Worker processes, one replicate at a time each; default: one for each core that this process may use.
    progress
        Show a progress bar; default: only when stderr is a terminal.
    watcher
        Told what happens, instead of the progress bar.

    Returns
    -------
        The job, in a final state. It does not raise because replicates failed: ask ``job.status()``.

    Raises
    ------
    RequestError
        The study or the bundle is wrong; nothing ran.
    ClusterError
        The workers could not be started, or storage does not work.
    """
    import sys

    from modelops.client.progress import ProgressBar

    if watcher is None:
        show = sys.stderr.isatty() if progress is None else progress
        watcher = ProgressBar() if show else Watcher()
    with contextlib.ExitStack() as stack:
        if isinstance(watcher, contextlib.AbstractContextManager):
            stack.enter_context(watcher)
        return _run(study, workers or usable_cores(), Home.from_environ(os.environ), watcher)


def usable_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(study: Study, workers: int, home: Home, watcher: Watcher) -> Job:
    from modelops.client.prepare import prepare_job
    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.store import Objects, Records
    from modelops.worker.settings import WorkerSettings

    cluster = EmbeddedCluster(WorkerSettings.of_home(home), n_workers=workers)
    # Starting Dask and preparing the job have nothing to do with each other: both take about a second.
    with ThreadPoolExecutor(1, thread_name_prefix="modelops-cluster") as starter, contextlib.ExitStack() as stack:
        watcher.stage("preparing the bundle")
        objects = Objects.open(str(home.objects))
        records = stack.enter_context(contextlib.closing(Records.open(home.database_url)))
        prepared = prepare_job(study, home, records, objects)
        starting = starter.submit(cluster.start)
        stack.callback(cluster.close)
        job = Job(prepared.job, home)
        watcher.prepared(job, prepared.spec.line.size)
        watcher.stage("starting workers")
        loop = _driver(prepared, home, records, objects, starting.result(), watcher)
        with _interrupts(loop, watcher):
            loop.run()
        return job


def _driver(
    prepared: PreparedJob,
    home: Home,
    records: Records,
    objects: Objects,
    cluster: EmbeddedCluster,
    watcher: Watcher,
) -> DriverLoop:
    from modelops.client.ledger import StoreLedger
    from modelops.driver import events as e
    from modelops.driver.loop import DriverLoop, check_workers
    from modelops.driver.machine import Machine
    from modelops.environments import Environments, encode_lock
    from modelops.store.layout import job_object

    who = f"{getpass.getuser()}@{socket.gethostname()}"
    epoch = records.take_lease(prepared.job, who)

    def prepare_environment() -> None:
        environments = Environments(home.cache)
        lock = environments.resolve(prepared.snapshot, on_progress=watcher.stage)
        objects.put_new(job_object(prepared.job, "lock"), encode_lock(lock), existing_ok=True)
        environments.ensure(lock, bundle_root=prepared.snapshot, on_progress=watcher.stage)

    loop = DriverLoop(
        job=prepared.job,
        machine=Machine(prepared.spec, prepared.job, epoch=epoch),
        ledger=StoreLedger(prepared.job, prepared.spec, records, objects, epoch, who),
        client=cluster.client,
        prepare=prepare_environment,
        on_change=watcher.changed,
    )
    cluster.on_workers(
        joined=lambda worker, slots: loop.tell(e.WorkerJoined(worker, slots)),
        left=lambda worker, died: loop.tell(e.WorkerLeft(worker, died)),
    )
    workers = cluster.workers()
    check_workers(workers)
    for worker, slots in workers.items():
        loop.tell(e.WorkerJoined(worker, slots))
    return loop


@contextlib.contextmanager
def _interrupts(loop: DriverLoop, watcher: Watcher) -> Iterator[None]:
    """Ctrl-C once: stop cleanly and keep what is finished; twice: at once. Only the main thread gets signals."""
    from modelops.driver import events as e

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    presses = 0

    def pressed(_signum: int, _frame: object) -> None:
        nonlocal presses
        presses += 1
        watcher.cancelling(hard=presses > 1)
        loop.tell(e.CancelAsked("Ctrl-C"))

    before: list[tuple[int, Callable[..., object] | int | None]] = [
        (s, signal.signal(s, pressed)) for s in (signal.SIGINT, signal.SIGTERM)
    ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
