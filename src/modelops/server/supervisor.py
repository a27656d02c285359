"""Drive all jobs that have not ended, as many at once as is sensible, and take over those whose driver died.

One thread looks around, every second and whenever something new is known; each job is driven in a thread of its own.
Nothing is kept here that a restart would lose: what is open is in the records, and who drives it in the leases.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from modelops.errors import ClusterError, IntegrityError, ModelOpsError, StorageError
from modelops.logs import about
from modelops.server import setbacks
from modelops.server.aside import Aside
from modelops.server.beginning import Beginning
from modelops.server.drive import JobDriver
from modelops.server.give_up import abandon, give_up
from modelops.server.live import LiveView
from modelops.server.setbacks import Setback
from modelops.states import FINAL_JOB_STATES, JobState
from modelops.store.leases import RENEW_EVERY_S
from modelops.store.rows import LeaseLostError
from modelops.study.pools import NO_ALIASES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from modelops.driver.hands import Pool
    from modelops.environments import Lock
    from modelops.store import Objects, Records
    from modelops.store.driving import OpenJob
    from modelops.store.leases import Leases
    from modelops.study.ids import AttemptId, JobId
    from modelops.study.pools import Aliases

log = logging.getLogger(__name__)
MAX_DRIVEN: Final = 64
MAX_HELD_UP: Final = 512  # each costs a thread, and a look whether it was cancelled
MAX_WAITING: Final = (
    64  # of those that need a worker of their pools, and of those that sleep; others are kept aside
)
WORTH_SLEEPING_S: Final = 10.0  # to take it up again costs more than to drive it on for a shorter time
LOOK_EVERY_S: Final = 1.0
AFTER_END_S: Final = 0.02  # who waits for a job's end, and asks for its results, comes first
REST: Final = 2.0  # times as long as a look took
LONGEST_REST_S: Final = 0.5
STOP_WITHIN_S: Final = 20.0
FIRST_EPOCH: Final = 1


@dataclass
class _Driven:
    driver: JobDriver
    thread: threading.Thread
    cancel_told: bool = False
    ended: bool = False  # the job, as its driver has recorded
    release: bool = True  # the lease, when the driver has stopped


class Supervisor:
    """Takes the leases of jobs that have not ended and drives them, oldest first.

    Parameters
    ----------
    cache
        For bundles and environments.
    who
        Goes into the stories of jobs: host and process id.
    max_driven
        Jobs at once; the others stay queued, in order. One that is to be cancelled need not wait, and those for which
        workers can do nothing now (of a pool that has none, or with nothing but delayed retries) do not count, up to
        `MAX_HELD_UP` of them. Of either kind, those beyond `MAX_WAITING` are kept aside until a worker, or their time,
        comes.
    renew_every_s
        How often it says that it lives.
    aliases
        Which names of pools mean the same.
    on_recorded
        Told of each change of a job's state and whether it has ended, on the thread of its driver.
    """

    def __init__(
        self,
        *,
        records: Records,
        objects: Objects,
        cache: Path,
        pool: Pool,
        leases: Leases,
        who: str,
        max_driven: int = MAX_DRIVEN,
        renew_every_s: float = RENEW_EVERY_S,
        aliases: Aliases = NO_ALIASES,
        on_recorded: Callable[[JobId, bool], None] = lambda _job, _ended: None,
    ) -> None:
        self._records, self._objects, self._cache = records, objects, cache
        self._pool, self._leases, self._who, self._max_driven = pool, leases, who, max_driven
        self._renew_every_s, self._aliases = renew_every_s, aliases
        self._taking = (
            threading.Lock()
        )  # while a lease is taken, which can take as long as the database wants
        self._lock = threading.Lock()
        self._driven: dict[JobId, _Driven] = {}
        self._pressing = False  # something new, and not only the end of a job
        self._aside, self._crowded = Aside(records, aliases), False
        self._apart: set[JobId] = set()
        self._setbacks: dict[JobId, Setback] = {}
        self._unreadable: dict[
            JobId, float
        ] = {}  # jobs that cannot be driven here, until they are looked at again
        self._to_release: set[JobId] = set()
        self._workers: dict[str, int] = {}
        self._news = threading.Event()
        self._on_recorded = on_recorded
        self._stopping = False
        self._renew_at = 0.0
        self._stack = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._main, name="modelops-supervisor", daemon=True)

    def start(self) -> None:
        """Begin to drive."""
        self._stack.enter_context(self._pool.on_workers(self._joined, self._left))
        for worker, slots in self._pool.workers().items():
            self._workers.setdefault(worker, slots)
        self._thread.start()

    def stop(self) -> None:
        """Stop all drivers and give their leases back; what runs on workers goes on."""
        self._stopping = True
        self._news.set()
        self._thread.join()
        with self._lock:
            driven = list(self._driven.values())
        for one in driven:
            one.driver.stop()
        deadline = time.monotonic() + STOP_WITHIN_S
        for one in driven:
            one.thread.join(max(0.0, deadline - time.monotonic()))
            if one.thread.is_alive():
                log.warning(
                    "the driver of job %s is still busy; its lease ends with this process", one.driver.job
                )
        self._stack.close()
        self._release_leases()

    def wake(self) -> None:
        """Look around now: there is a new job, a cancel or a resume."""
        self._pressing = True
        self._news.set()

    def abandon(self, job: JobId, who: str) -> None:
        """End a job as cancelled, if it is driven here, without waiting for what its workers could still hand in."""
        with self._lock:
            one = self._driven.get(job)
        if one is not None:
            one.driver.abandon(who)

    def view(self, job: JobId) -> LiveView | None:
        """Return what the driver of a job knows, or knew when it was kept aside; None if neither is so here."""
        with self._lock:
            one = self._driven.get(job)
        if one is not None:
            return one.driver.view()
        setback = self._setbacks.get(job)
        if setback is not None and setback.said:
            in_s = max(0.0, setback.not_before - time.monotonic())
            return LiveView(
                JobState.QUEUED, doing=f"tried again in {in_s:.0f} s, as its driver failed: {setback.said}"
            )
        return self._aside.view(job)

    def flag(self, job: JobId, stalled: str) -> None:
        """Show of a job that is driven here why it stands still, or (empty) that it does not."""
        with self._lock:
            one = self._driven.get(job)
        if one is not None:
            one.driver.flag(stalled)

    @property
    def is_full(self) -> bool:
        """Whether further jobs wait until one that is driven has ended."""
        with self._lock:
            driven = [one.driver for one in self._driven.values()]
        if len(driven) < self._max_driven:
            return False
        held_up = sum(1 for driver in driven if (view := driver.view()) is not None and view.held_up)
        return len(driven) - min(held_up, MAX_HELD_UP) >= self._max_driven

    def goes_on(self, job: JobId) -> bool:
        """Say whether a job is driven here and its end is not recorded; ``on_recorded`` will be told of that."""
        with self._lock:
            one = self._driven.get(job)
            return one is not None and not one.ended

    def driven(self) -> list[JobId]:
        """Return the jobs that are driven here."""
        with self._lock:
            return list(self._driven)

    def workers(self) -> dict[str, int]:
        """Return the slots of each worker."""
        return dict(self._workers)

    def refused(self) -> dict[str, str]:
        """Return the workers that get no work as their versions do not fit, and a table of these."""
        return self._pool.refused()

    def connected(self) -> bool:
        """Say whether there is a scheduler."""
        try:
            return bool(self._pool.client.status == "running")
        except ClusterError:
            return False

    # For whoever compares records with what runs.

    def attempts(self, job: JobId) -> Mapping[AttemptId, str]:
        """Return the worker of every attempt that the job's driver here waits for."""
        with self._lock:
            one = self._driven.get(job)
        return {} if one is None else one.driver.attempts()

    def lost(self, job: JobId, attempt: AttemptId) -> None:
        """Tell the job's driver that nobody runs this attempt any more."""
        with self._lock:
            one = self._driven.get(job)
        if one is not None:
            one.driver.lose(attempt)

    @contextlib.contextmanager
    def apart(self, job: JobId) -> Iterator[int | None]:
        """Drive a job not within this block; its attempts go on, and are adopted afterwards.

        Yields
        ------
            The epoch to write with; None if somebody else drives the job.
        """
        with self._taking:
            self._apart.add(job)
        try:
            with self._lock:
                one = self._driven.get(job)
                if one is not None:
                    one.release = False
            if one is not None:
                one.driver.stop()
                one.thread.join()
            with self._taking:
                epoch = self._leases.take(job, self._who)
                self._to_release.discard(job)
            try:
                yield epoch
            finally:
                if epoch is not None:
                    self._to_release.add(job)
                    self._release_leases()
        finally:
            self._apart.discard(job)
            self.wake()

    @contextlib.contextmanager
    def beginning(self, job: JobId, bundle: str, lock: Lock | None) -> Iterator[Beginning | None]:
        """Drive a new job as soon as it is recorded, which happens within this block.

        Yields
        ------
            What takes its lease by the same transaction, and is told when that was carried out; None if the job must
            wait its turn.
        """
        new = self._reserved(Beginning(job, bundle, lock, self._leases, self._who))
        try:
            yield new
        finally:
            if new is not None:
                new.give_up()

    def _reserved(self, new: Beginning) -> Beginning | None:
        with self._taking:
            if self._stopping or self._crowded or self.is_full:
                return None  # the thread that looks around decides
            try:
                self._leases.reserve(new.job)
                self._begin(new.job, FIRST_EPOCH, new)
            except ClusterError as error:
                log.warning("job %s is taken up later: %s", new.job, error, extra={"job": new.job})
                return None
            return new

    # The thread that looks around.

    def _main(self) -> None:
        pause_s, away = LOOK_EVERY_S, ""
        while not self._stopping:
            began = time.monotonic()
            try:
                self._look()
                if away:
                    log.info("jobs can be taken up again")
                pause_s, away = LOOK_EVERY_S, ""
            except StorageError as error:
                if str(error) != away:
                    log.warning("no job can be taken up: %s", error)
                pause_s, away = LOOK_EVERY_S * 2, str(error)
            except Exception:  # whatever it is, jobs must not stand still because of it
                log.exception("looking for jobs failed")
            # With thousands of jobs a look takes a while, and each submission asks for one: others need the time, too.
            time.sleep(min(LONGEST_REST_S, REST * (time.monotonic() - began)))
            if self._news.wait(pause_s) and not self._pressing:
                time.sleep(AFTER_END_S)
            self._pressing = False
            self._news.clear()

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew_at = now + self._renew_every_s
            for lost in self._leases.renew():
                with self._lock:
                    one = self._driven.get(lost)
                if one is not None:
                    one.driver.lose_lease()
        self._release_leases()
        # Once it is full, nothing else of this look is taken up: of thousands of waiting jobs none need ask.
        n_taken, full = 0, False
        jobs = self._records.open_jobs()
        self._look_aside(jobs)
        for job in jobs:
            if self._stopping:
                return
            with self._lock:
                one = self._driven.get(job.job)
            if one is None:
                if job.job in self._aside:
                    continue
                full = full or self.is_full
                if full and job.cancel_by is None:
                    continue
                if (n_taken := n_taken + 1) == MAX_WAITING:  # first see how these are getting on
                    full = True
                    self.wake()
                try:
                    self._take_up(job, now)
                except StorageError:
                    raise
                except ModelOpsError as error:  # of this job; the others do not wait for it
                    log.warning("job %s cannot be taken up: %s", job.job, error, extra={"job": job.job})
                    self._delay(job.job, str(error), setbacks.LONGEST_DELAY_S)
            elif job.cancel_by is not None and not one.cancel_told:
                one.cancel_told = True
                one.driver.wake()

    def _look_aside(self, jobs: Sequence[OpenJob]) -> None:
        """See to it that of jobs of which nothing can run for a while not many are driven."""
        with self._lock:
            driven = dict(self._driven)
        views = {job: view for job, one in driven.items() if (view := one.driver.view()) is not None}
        waiting = [job for job, view in views.items() if view.needs_worker]  # the oldest first
        soon = time.monotonic() + WORTH_SLEEPING_S
        asleep = [
            job for job, view in views.items() if view.sleeps_until is not None and view.sleeps_until > soon
        ]
        self._crowded = len(waiting) >= MAX_WAITING
        workers = [self._pool.membership(worker) for worker, slots in self._pool.workers().items() if slots]
        undriven = (job for job in jobs if job.job not in driven)
        self._aside.look(jobs, undriven, workers, crowded=self._crowded)
        wanted = {job.job for job in jobs if job.cancel_by is None}
        for job in waiting[MAX_WAITING:] + asleep[MAX_WAITING:]:
            if job in wanted and not driven[job].cancel_told:
                self._aside.put(job, views[job])
                driven[job].driver.stop()

    def _take_up(self, job: OpenJob, now: float) -> None:
        setback = self._setbacks.get(job.job, Setback())
        if now < setback.not_before:
            return
        if job.cancel_by is None and now < self._unreadable.get(job.job, 0.0):
            return
        with self._taking:
            full = self.is_full and job.cancel_by is None
            if full or job.job in self._apart:
                return
            why = self._records.unreadable(job.job)
            if (
                why and job.cancel_by is None
            ):  # a newer version may be able to drive it: its lease is left alone
                log.warning("job %s is not driven: %s", job.job, why, extra={"job": job.job})
                self._unreadable[job.job] = now + setbacks.LONGEST_DELAY_S
                return
            epoch = self._leases.take(job.job, self._who)
            if epoch is None:
                return  # somebody else drives it, and is alive
            self._unreadable.pop(job.job, None)
            if why:
                abandon(self._records, job.job, epoch, job.cancel_by or self._who, f"cancelled; {why}")
                self._to_release.add(job.job)
                return
            if setback.is_hopeless:
                self._setbacks[job.job] = setback.once_more()  # to write its result files
                if give_up(self._records, job.job, epoch, self._who) in FINAL_JOB_STATES:
                    del self._setbacks[job.job]  # should it begin again, something may be otherwise
                    self._to_release.add(job.job)
                    return
            self._begin(job.job, epoch)

    def _begin(self, job: JobId, epoch: int, new: Beginning | None = None) -> None:
        driver = JobDriver(
            job,
            epoch,
            leases=self._leases,
            records=self._records,
            objects=self._objects,
            cache=self._cache,
            who=self._who,
            aliases=self._aliases,
            on_recorded=lambda ended: self._recorded(job, ended),
        )
        thread = threading.Thread(
            target=self._drive, args=(driver, new), name=f"modelops-drive-{job}", daemon=True
        )
        self._to_release.discard(job)  # it may still be there, of the driver before
        with self._lock:  # which the thread needs at its end
            try:
                thread.start()
            except RuntimeError as error:
                self._to_release.add(job)
                raise ClusterError(
                    f"no thread can be started to drive the job ({error}); see how many threads and processes this "
                    "user, or this container, may have"
                ) from error
            self._driven[job] = _Driven(driver, thread)

    def _release_leases(self) -> None:
        for job in list(self._to_release):
            with self._taking:
                if job not in self._to_release:
                    continue  # it is driven again
                try:
                    self._leases.release(job)
                except StorageError as error:  # tried again; it ends by itself, too
                    log.warning("the lease of job %s cannot be released: %s", job, error, extra={"job": job})
                    return
                self._to_release.discard(job)

    # The threads that drive.

    def _drive(self, driver: JobDriver, new: Beginning | None) -> None:
        began = time.monotonic()
        job = driver.job
        try:
            with about(job=job):
                if new is None:
                    driver.run(self._pool)
                else:
                    if new.lock is not None:
                        driver.begin_preparing(new.bundle, new.lock)
                    if (row := new.wait()) is not None:
                        driver.run(self._pool, row)
        except IntegrityError as error:  # what it has met is not mended by waiting
            log.warning("job %s cannot be driven: %s", job, error, extra={"job": job})
            self._failed(job, driver.epoch, error, began)
        except ClusterError as error:
            log.warning("job %s is not driven for a while: %s", job, error, extra={"job": job})
            self._delay(job, str(error))
        except Exception as error:  # the job is taken up again, and ended if that happens again and again
            log.exception("the driver of job %s failed", job, extra={"job": job})
            self._failed(job, driver.epoch, error, began)
        else:
            self._setbacks.pop(job, None)
        finally:
            with self._lock:
                one = self._driven.pop(job)
                if one.release:
                    self._to_release.add(job)
            if not self._stopping:
                self._news.set()

    def _recorded(self, job: JobId, ended: bool) -> None:
        if ended:
            with self._lock:  # before anybody is told: who asks afterwards must look
                self._driven[job].ended = True
        self._on_recorded(job, ended)

    def _delay(self, job: JobId, why: str, in_s: float | None = None) -> None:
        """Try it again later, and say so: what it needs is away, and that is no failure of its driver."""
        before = self._setbacks.get(job, Setback())
        self._setbacks[job] = before.put_off(why, time.monotonic(), in_s)

    def _failed(self, job: JobId, epoch: int, error: Exception, began: float) -> None:
        text = str(error) if isinstance(error, ModelOpsError) else repr(error)
        before = self._setbacks.get(job, Setback())
        self._setbacks[job] = before.failed(error, text, began, time.monotonic())
        try:
            self._records.add_event(
                job, self._who, "driver_failed", f"{type(error).__name__}: {text}", epoch=epoch
            )
        except (StorageError, LeaseLostError) as also:
            log.warning("that the driver of job %s failed is not recorded: %s", job, also, extra={"job": job})

    def _joined(self, worker: str, slots: int) -> None:
        self._workers[worker] = slots

    def _left(self, worker: str, died: bool) -> None:
        self._workers.pop(worker, None)
