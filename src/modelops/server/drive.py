"""Drive one job: from its records to a driver's loop, and again when the job's bundle was changed under it."""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, TypeVar

from modelops.driver import events as e
from modelops.driver.commands import ChangeState, Note
from modelops.driver.loop import DriverLoop
from modelops.driver.machine import Machine
from modelops.driver.pools import JOINED, PATIENCE_S, WAITS, joined_text, says_waits
from modelops.errors import IntegrityError, ModelOpsError, NotFoundError, StorageError
from modelops.logs import about
from modelops.server.job_files import JobFiles
from modelops.server.lookout import Lookout
from modelops.server.mend import mend_job
from modelops.server.store_ledger import StoreLedger
from modelops.server.undecided import with_watched
from modelops.server.workers import ask_workers
from modelops.states import FINAL_JOB_STATES, JobEvent, JobState
from modelops.store.answers import since_text
from modelops.store.bundle_changes import said_changed
from modelops.store.rows import LeaseLostError
from modelops.store.runs import Scope
from modelops.study.ids import epoch_of
from modelops.study.pools import NO_ALIASES
from modelops.study.ranges import Ranges
from modelops.study.spec import decode_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from modelops.driver.hands import Pool
    from modelops.environments import Lock
    from modelops.server.ahead import Ahead
    from modelops.server.live import LiveView
    from modelops.server.reconcile import Finding
    from modelops.store import JobRow, Objects, Records
    from modelops.store.leases import Leases
    from modelops.study.ids import AttemptId, JobId
    from modelops.study.pools import Aliases
    from modelops.study.spec import JobSpec
    from modelops.worker.messages import AggregateRef, SegmentRef

log = logging.getLogger(__name__)
MAX_MENDED: Final = 3  # times that one driver begins anew because of damage
LONGEST_PAUSE_S: Final = 2.0  # between two looks whether storage is back
T = TypeVar("T")


class JobDriver:
    """Drives one job whose lease was taken, in the thread that calls `run`. All other methods: from any thread.

    Parameters
    ----------
    epoch
        Of the lease, which must be among ``leases``.
    cache
        For bundles and environments.
    who
        Goes into the job's story.
    on_change, on_stage, on_waiting
        Told what happens, for a progress bar: the machine after events, what is done before replicates run, and what
        database or storage said when the job waits for one of them (default: that goes into the log).
    on_recorded
        Told after each change of the job's state, and whether it has ended.
    aliases
        Which names of pools mean the same.
    max_s_without_worker
        Raise ClusterError when there has been no worker for so long; default: wait for one as long as it takes.
    """

    def __init__(
        self,
        job: JobId,
        epoch: int,
        *,
        leases: Leases,
        records: Records,
        objects: Objects,
        cache: Path,
        who: str,
        on_change: Callable[[Machine], None] = lambda _machine: None,
        on_stage: Callable[[str], None] = lambda _text: None,
        on_waiting: Callable[[str], None] | None = None,
        aliases: Aliases = NO_ALIASES,
        on_recorded: Callable[[bool], None] = lambda _ended: None,
        max_s_without_worker: float | None = None,
    ) -> None:
        self._on_recorded = on_recorded
        self.job, self.epoch, self.lease_lost = job, epoch, False
        self._leases, self._records, self._objects, self._cache = leases, records, objects, cache
        self._who, self._on_change, self._on_stage = who, on_change, on_stage
        self._on_waiting = on_waiting or (lambda text: log.warning("job %s waits: %s", job, text))
        self._max_s_without_worker, self._aliases = max_s_without_worker, aliases
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._inbox: queue.SimpleQueue[Any] = (
            queue.SimpleQueue()
        )  # a signal handler may put, and take no lock
        self._loop: DriverLoop | None = None
        self._ahead: Ahead | None = None
        self._files: JobFiles | None = None
        self._preparing: Future[str] | None = None
        self._lookout = Lookout()
        self._waiting_for, self._away = "", ""  # outside of the loop; with and without since when
        self._thread = 0
        self._has_looked = False

    # The thread that drives.

    def run(self, pool: Pool, row: JobRow | None = None) -> JobState:
        """Drive until the job is final, another driver has it (``lease_lost``), or `stop`; return its state.

        Parameters
        ----------
        row
            The job's, if it has just been recorded.

        Raises
        ------
        ModelOpsError
            What the driver cannot deal with; the job is as the store says.
        """
        self._thread = threading.get_ident()
        try:
            return self._run(pool, row)
        except LeaseLostError:
            self.lease_lost = True
            return self._lookout.state

    def _run(self, pool: Pool, known: JobRow | None) -> JobState:
        voided, n_mended = False, 0
        while self._patiently(lambda: self._mend(pool)) is not None:
            row, known = known or self._patiently(lambda: self._records.job(self.job)), None
            if row is None or row.state in FINAL_JOB_STATES:
                return row.state if row is not None else JobState.QUEUED
            # Nothing has run, so the bundle is as it was; what else is to be read need not be waited for.
            if self.epoch == 1:
                self.begin_preparing(row.bundle)
            try:
                ledger, loop = self._begin(row, pool)
                if loop is None:
                    return row.state
                loop.raises_damage = n_mended < MAX_MENDED
                state = self._drive(loop)
            except (IntegrityError, NotFoundError) as error:
                if n_mended == MAX_MENDED:
                    raise
                log.warning("job %s: %s", self.job, error)
                mended = self._patiently(lambda: self._mend(pool, deep=True))
                n_mended = n_mended + 1 if mended else MAX_MENDED  # what cannot be mended is not met twice
                self._patiently(self._take_again)
            else:
                if ledger.voided and not voided and state is JobState.FAILED:
                    # A model wrote into its own bundle. Once more from the stored bundle; if it does so again, that
                    # is it.
                    voided = True
                    self._patiently(self._repair)
                elif not n_mended or self.lease_lost or self._stopped.is_set():
                    return state
                else:
                    n_mended = 0  # what was found damaged at the end is run now, in a run of its own
                    if not self._patiently(self._owes_repair):
                        return state
                    loop.hands.forget_job()
                    self._patiently(self._take_again)
            if self.lease_lost or self._stopped.is_set():
                return JobState.QUEUED
        return JobState.QUEUED

    def _mend(self, pool: Pool, *, deep: bool = False) -> list[Finding]:
        """Make the records agree with what is stored, before anybody goes by them."""
        if self.epoch == 1 and not deep:
            return []  # nothing is stored yet

        def held() -> frozenset[AttemptId] | None:
            answers = ask_workers(pool)
            if answers is None or None in answers.values():
                return None
            return frozenset(
                h.attempt for lines in answers.values() for h in lines or () if h.job == self.job
            )

        above = None if self._has_looked else self._take_above
        found = mend_job(
            self._records, self._objects, self.job, self.epoch, self._who, held=held, above=above, deep=deep
        )
        self._has_looked = True
        return found

    def _take_above(self, epoch: int) -> int:
        while self.epoch <= epoch:
            self._take_again()
            if self.lease_lost:
                raise LeaseLostError(self.job, self.epoch)
        return self.epoch

    def _owes_repair(self) -> bool:
        return self._records.owed(self.job) is not None

    def _begin(self, row: JobRow, pool: Pool) -> tuple[StoreLedger, DriverLoop | None]:
        spec, records, job = decode_spec(row.spec), self._records, self.job
        ledger = StoreLedger(
            job, spec, records, self._objects, self.epoch, self._who, row.version, self._bundle_changes,
            on_recorded=self._on_recorded,
        )  # fmt: skip
        self._ahead = ledger.ahead

        def look() -> tuple[
            list[SegmentRef],
            list[AggregateRef],
            list[tuple[Ranges, int, float]],
            Scope,
            frozenset[AttemptId],
        ]:
            if self.epoch == 1:  # nobody has driven it before, so there is nothing to go on from
                return [], [], [], Scope(None, 0), frozenset()
            segments, aggregates = records.segments(job), records.aggregates(job)
            withdrawn = records.withdrawn(job).attempts
            return segments, aggregates, records.retried(job), records.scope(job), withdrawn

        known = self._patiently(lambda: (*look(), self._pools_waited(spec)))
        if known is None:
            return ledger, None
        recorded, aggregates, retried, scope, withdrawn, waited = known
        segments = self._patiently(lambda: with_watched(self._objects, job, spec, recorded))
        if segments is None:
            return ledger, None
        if self._files is None:
            self._files = JobFiles(job, row.bundle, self._objects, self._cache, has_outcomes=bool(segments))
        covered = Ranges(pair for ref in segments for pair in ref.ranges)
        machine = Machine(
            spec,
            job,
            epoch=self.epoch,
            segments=segments,
            aggregates=aggregates,
            retried=retried,
            state=row.state,
            reason=self._reason(row, scope, spec.line.all() - covered),
            used_s=row.used_s,
            leave=None if scope.only is None else spec.line.all() - scope.only,
            adopt=self.epoch > 1,
            after_epoch=scope.after_epoch,
            withdrawn=withdrawn,
            aliases=self._aliases,
            pools_waited=waited,
        )
        loop = DriverLoop(
            job=job,
            machine=machine,
            ledger=ledger,
            pool=pool,
            prepare=lambda: self._prepared(ledger),
            is_prepared=lambda: row.cancel_by is None and self._is_prepared(),
            on_change=self._changed,
            on_waiting=self._on_waiting,
            max_s_without_worker=self._max_s_without_worker,
            used_s=row.used_s,
            when_idle=ledger.ahead.begin_with_few,
            study=row.study,
            study_digest=sha256(row.spec).hexdigest(),
            inbox=self._inbox,
        )
        return ledger, loop

    def _reason(self, row: JobRow, scope: Scope, missing: Ranges) -> str:
        """Return why the run ends as it does, as far as that is known already."""
        if row.state is not JobState.QUEUED:
            return row.reason
        if scope.only is None or not missing - scope.only:
            return ""  # why a run begins is not why it ends
        return self._records.last_end(self.job)  # a repair leaves what did not run for that reason

    def _pools_waited(self, spec: JobSpec) -> dict[str, float]:
        """Return for how many seconds pools have had no worker of which the job's story says that."""
        if not spec.asked_pools:
            return {}
        at = dict(self._records.said_last(self.job, (WAITS, JOINED)))
        said = list(at)  # the last at the end
        now, waited = self._records.now(), {}
        for name in spec.asked_pools:
            joined = joined_text(name)
            waits = next((text for text in reversed(said) if says_waits(text, name)), None)
            if waits and (joined not in said or said.index(joined) < said.index(waits)):
                waited[name] = max(0.0, (now - at[waits]).total_seconds()) + PATIENCE_S
        return waited

    def _drive(self, loop: DriverLoop) -> JobState:
        self._loop = loop
        if self._stopped.is_set():
            loop.stop()
        try:
            return loop.run()
        finally:
            self._look(loop.machine)
            self._loop = None
            self.lease_lost = loop.lease_lost

    def _repair(self) -> None:
        """Let the job begin again after its bundle was changed."""
        why = "its replicates run again from a fresh copy of the bundle"
        if (
            self._records.job(self.job).state is JobState.FAILED
        ):  # not if it was done, and the answer was lost
            self._records.change_state(self.job, JobEvent.REPAIRED, who=self._who, why=why, epoch=self.epoch)
        self._files = self._preparing = None
        self._take_again()

    def _take_again(self) -> None:
        """Go on under an epoch of its own: the attempts of another machine have other ids."""
        epoch = self._leases.take(self.job, self._who)
        before, self._inbox = self._inbox, queue.SimpleQueue()
        while not before.empty():  # what concerned the run that is over; a cancel concerns this one, too
            if isinstance(news := before.get(), e.CancelAsked):
                self._inbox.put(news)
        if epoch is None:
            self.lease_lost = True
        else:
            self.epoch = epoch

    def _patiently(self, act: Callable[[], T]) -> T | None:
        """Do it as soon as the database and the storage allow; None if `stop` was called before."""
        pause_s, began = 0.1, datetime.now(UTC)
        while not self._stopped.is_set():
            try:
                done = act()
            except StorageError as error:
                if str(error) != self._away:
                    self._away = str(error)
                    self._waiting_for = f"{error} {since_text(began)}"
                    self._on_waiting(self._waiting_for)
                self._stopped.wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self._waiting_for = self._away = ""
                return done
        return None

    # Bundle and environment.

    def begin_preparing(self, bundle: str | None = None, lock: Lock | None = None) -> None:
        """Fetch the bundle and build the environment already now, while the pool may still be starting.

        ``bundle``, ``lock``: of the job, if they are known.
        """
        if self._files is None:
            bundle = bundle or self._records.job(self.job).bundle
            self._files = JobFiles(self.job, bundle, self._objects, self._cache, lock=lock)
        with self._lock:
            if self._preparing is None:
                self._preparing = Future()
                args = (self._files, self._preparing)
                threading.Thread(
                    target=self._prepare, args=args, name="modelops-prepare", daemon=True
                ).start()

    def fails_at_once(self, wait_s: float) -> bool:
        """End the job, which needs no workers for that, if preparing has failed by then; say whether it has.

        A failure that is remembered is known in a moment, and workers take seconds to start.
        """
        preparing = self._preparing
        try:
            error = None if preparing is None else preparing.exception(wait_s)
        except TimeoutError:
            return False
        if not isinstance(error, ModelOpsError):
            return False
        row = self._records.job(self.job)
        spec = decode_spec(row.spec)
        ledger = StoreLedger(self.job, spec, self._records, self._objects, self.epoch, self._who, row.version)
        machine = Machine(spec, self.job, epoch=self.epoch)
        failed = e.EnvironmentFailed(type(error).__name__, str(error))
        for command in (*machine.start(0.0), *machine.handle(failed, 0.0)):
            if isinstance(command, ChangeState):
                ledger.change_state(command)
        self._changed(machine)
        return True

    def _prepared(self, ledger: StoreLedger) -> None:
        self.begin_preparing()
        preparing = self._preparing
        if preparing is not None and (text := preparing.result()):
            self._patiently(lambda: ledger.note(Note("note", text)))

    def _is_prepared(self) -> bool:
        """Say whether it is, with nothing to tell, and nobody has called `stop`."""
        preparing = self._preparing
        if preparing is None or not preparing.done() or preparing.exception() is not None:
            return False
        return not preparing.result() and not self._stopped.is_set()

    def _prepare(self, files: JobFiles, answer: Future[str]) -> None:
        """Answer with what the job's story should say of it, if anything."""
        try:
            with about(job=self.job):
                environment = self._patiently(lambda: files.prepare(self._stage))
        except BaseException as error:  # noqa: BLE001  whoever waits for the answer gets it
            answer.set_exception(error)
            return
        finally:
            self._lookout.doing = ""
        damage = "" if environment is None else environment.damage
        seconds = 0.0 if environment is None else environment.seconds
        answer.set_result(f"{damage}; rebuilt in {seconds:.1f} s" if damage else "")

    def _stage(self, text: str) -> None:
        self._lookout.doing = text
        self._on_stage(text)

    def _bundle_changes(self) -> list[str]:
        """Return how the bundle differs from what it was when this run began: where models ran, or else here."""
        if said := said_changed(self._objects, self.job):
            before = max(self._records.scope(self.job).after_epoch, self._records.voided_epoch(self.job))
            if lines := {line for attempt in said if epoch_of(attempt) > before for line in said[attempt]}:
                return sorted(lines)
        return [] if self._files is None else self._files.changes()

    # From any thread.

    def cancel(self, who: str) -> None:
        """End the job as cancelled, keeping what is finished; asked twice: wait for nothing."""
        self._inbox.put(e.CancelAsked(who))

    def abandon(self, who: str) -> None:
        """End the job as cancelled and wait for nothing, whether it was asked to end before or not."""
        self.cancel(who)
        self.cancel(who)

    def wake(self) -> None:
        """Look at once whether a cancel was recorded."""
        if (loop := self._loop) is not None:
            loop.wake()

    def stop(self) -> None:
        """Drive no further and record nothing; what runs goes on, and the next driver adopts it."""
        self._stopped.set()
        if (loop := self._loop) is not None:
            loop.stop()

    def lose_lease(self) -> None:
        """Hear that another driver has the job."""
        self._inbox.put(e.LeaseLost())

    def lose(self, attempt: AttemptId) -> None:
        """Hear that nobody runs an attempt any more."""
        self._inbox.put(e.AttemptLost(attempt, worker_died=False))

    def attempts(self) -> Mapping[AttemptId, str]:
        """Return the worker of every attempt that was submitted or adopted and has not ended."""
        loop = self._loop
        return {} if loop is None else loop.hands.attempts()

    def view(self) -> LiveView | None:
        """Return what is known now; None before the job's records were read."""
        return self._lookout.view(self._waiting_for or self._unanswered())

    def flag(self, stalled: str) -> None:
        """Show why the job stands still, or that it does not: also when the database does not take it."""
        self._lookout.stalled = stalled

    def _unanswered(self) -> str:
        """Say that the thread that drives waits for the database, which has not yet failed."""
        database = self._records.database
        since = database.answers.silent_since(self._thread)
        return "" if since is None else f"{database.waits(self._thread)} {since_text(since)}"

    def _changed(self, machine: Machine) -> None:
        self._on_change(machine)
        if self._lookout.is_due(machine):
            self._look(machine)

    def _look(self, machine: Machine) -> None:
        view = self._lookout.look(machine, self._loop, self._records.now())
        if self._ahead is not None:
            self._ahead.consider(view.eta)
