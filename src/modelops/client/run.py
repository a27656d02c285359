"""``mo.run``: drive one job to its end on this machine, on a cluster that the call owns or was given."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from modelops.client.job import Job
from modelops.home import Home
from modelops.settings import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.client.prepare import PreparedJob
    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.driver.loop import DriverLoop
    from modelops.driver.machine import Machine
    from modelops.server.store_ledger import StoreLedger
    from modelops.store import Objects, Records
    from modelops.study import Study


MAX_S_WITHOUT_WORKER = 300.0  # a worker that died is started again in seconds


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
    study: Study,
    *,
    workers: int | None = None,
    cluster: EmbeddedCluster | None = None,
    progress: bool | None = None,
    watcher: Watcher | None = None,
) -> Job:
    """Run a study on this machine and wait for it.

    Parameters
    ----------
    study
        What to run.
    workers
        Worker processes, one replicate at a time each; default: one for each core that this process may use.
    cluster
        A started cluster to use, see `modelops.local_cluster`; default: one for the length of this call.
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
    KeyboardInterrupt
        Ctrl-C before the first replicate could run; the job is recorded as cancelled.
    """
    from modelops.client.progress import ProgressBar

    if watcher is None:
        show = sys.stderr.isatty() if progress is None else progress
        watcher = ProgressBar() if show else Watcher()
    home = cluster.home if cluster is not None else Home.from_environ(os.environ)
    with contextlib.ExitStack() as stack:
        if isinstance(watcher, contextlib.AbstractContextManager):
            stack.enter_context(watcher)
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
    from modelops.client.prepare import prepare_job, whoami
    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.states import JobEvent, JobState
    from modelops.store import Objects, Records

    with contextlib.ExitStack() as stack:
        objects = Objects.open(home.storage)
        records = stack.enter_context(contextlib.closing(Records.open(home.database_url)))
        watcher.stage("preparing the bundle")
        prepared = prepare_job(study, home, records, objects)
        job = Job(prepared.job, home)
        watcher.prepared(job, prepared.spec.line.size)
        preparer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="modelops-prepare"))
        for again in (True, False):
            ledger = _ledger(prepared, records, objects)
            with contextlib.ExitStack() as listening:
                try:
                    # Resolving and installing, and starting Dask, have nothing to do with each other.
                    environment = preparer.submit(_prepare_environment, prepared, ledger, home, watcher)
                    if cluster is None:
                        cluster = stack.enter_context(EmbeddedCluster(home, n_workers=workers))
                    loop = _driver(prepared, ledger, cluster, environment.result, watcher, listening)
                    interrupts.drive(loop)
                    state = loop.run()
                except BaseException as error:
                    ledger.abandon(why=f"{type(error).__name__}: {error}".rstrip(": "))
                    raise
            if not (again and ledger.voided and state is JobState.FAILED):
                break
            # A model wrote into its own bundle. Once more from the stored bundle; if it does so again, that is it.
            prepared = prepared.with_fresh_snapshot(home, objects)
            why = "its replicates run again from a fresh copy of the bundle"
            records.change_state(prepared.job, JobEvent.REPAIRED, who=whoami(), why=why, epoch=ledger.epoch)
        return job


def _ledger(prepared: PreparedJob, records: Records, objects: Objects) -> StoreLedger:
    from modelops.client.prepare import whoami
    from modelops.server.store_ledger import StoreLedger

    epoch = records.take_lease(prepared.job, whoami())
    return StoreLedger(
        prepared.job, prepared.spec, records, objects, epoch, whoami(), prepared.bundle_changes
    )


def _prepare_environment(prepared: PreparedJob, ledger: StoreLedger, home: Home, watcher: Watcher) -> None:
    from modelops.driver.commands import Note
    from modelops.environments import Environments
    from modelops.store import AlreadyExistsError
    from modelops.store.segments import job_folder

    environments = Environments(home.cache)
    lock = environments.resolve(prepared.snapshot, on_progress=watcher.stage)
    with contextlib.suppress(AlreadyExistsError):  # the job's first run stored it; it is the same
        ledger.objects.put_new(f"{job_folder(prepared.job)}/lock", lock.text.encode())
    environment = environments.ensure(lock, bundle_root=prepared.snapshot, on_progress=watcher.stage)
    if environment.damage:
        ledger.note(Note("note", f"{environment.damage}; rebuilt in {environment.seconds:.1f} s"))


def _driver(
    prepared: PreparedJob,
    ledger: StoreLedger,
    cluster: EmbeddedCluster,
    prepare: Callable[[], None],
    watcher: Watcher,
    listening: contextlib.ExitStack,
) -> DriverLoop:
    from modelops.driver import events as e
    from modelops.driver.loop import DriverLoop
    from modelops.driver.machine import Machine

    loop = DriverLoop(
        job=prepared.job,
        machine=Machine(prepared.spec, prepared.job, epoch=ledger.epoch),
        ledger=ledger,
        client=cluster.client,
        prepare=prepare,
        max_s_without_worker=MAX_S_WITHOUT_WORKER,
        on_change=watcher.changed,
    )
    listening.enter_context(
        cluster.on_workers(
            joined=lambda worker, slots: loop.tell(e.WorkerJoined(worker, slots)),
            left=lambda worker, died: loop.tell(e.WorkerLeft(worker, died)),
        )
    )
    # There may be none just now: those that died are being started again, and the loop waits for them.
    for worker, slots in cluster.workers().items():
        loop.tell(e.WorkerJoined(worker, slots))
    return loop


class Interrupts:
    """Ctrl-C once: stop cleanly and keep what is finished; twice: at once. Use as a context manager.

    Before the driver runs, Ctrl-C is a KeyboardInterrupt as everywhere else. Only the main thread gets signals; in
    any other thread this does nothing.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._loop: DriverLoop | None = None
        self._presses = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._pressed) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us before

    def drive(self, loop: DriverLoop) -> None:
        """Send Ctrl-C to this loop from now on; also one that came too late for the loop before."""
        from modelops.driver import events as e

        self._loop = loop
        if self._presses:
            loop.tell(e.CancelAsked("Ctrl-C"))

    def _pressed(self, _signum: int, _frame: object) -> None:
        from modelops.driver import events as e

        if self._loop is None:
            raise KeyboardInterrupt
        self._presses += 1
        self._watcher.cancelling(hard=self._presses > 1)
        self._loop.tell(e.CancelAsked("Ctrl-C"))
