"""The driver's decisions: events in, commands out. No I/O, no clock, no randomness.

The parts: `outbox` (what was ordered), `course` (the job's state and end), `ledger` (what the store accepted),
`places` (where everything else is), `probe`, `dispatch` and `roster` (what goes where next), `intake` (receipts and
commits), `blame` (what took its worker down), `fitness` (which workers cannot), `roll_call` and `recall` (what is on
workers already), `shown` (what it tells who asks). Here they are put together. A method named ``_on_...`` handles one
event; whatever it changed, `handle` then fills the free slots and looks whether the job has come to its end.

Why it is like this: ``docs/explanation/driver.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, assert_never

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.backlog import Kind, Work, next_attempts
from modelops.driver.blame import Blame, condemnation
from modelops.driver.course import Course
from modelops.driver.dispatch import Dispatcher
from modelops.driver.fitness import TIMER as UNFIT_TIMER
from modelops.driver.fitness import Fitness
from modelops.driver.intake import Intake
from modelops.driver.ledger import Ledger
from modelops.driver.losses import ATTEMPTS_LOST, TAKEN_OVER, Losses
from modelops.driver.needs import Needs
from modelops.driver.outbox import Outbox
from modelops.driver.places import Places
from modelops.driver.plan import Plan
from modelops.driver.pools import Pools
from modelops.driver.probe import Probe
from modelops.driver.recall import Recall
from modelops.driver.roll_call import RollCall
from modelops.driver.roster import Attempt, Roster, host_of
from modelops.driver.shown import Shown
from modelops.states import FAILURES, JobEvent, JobState, ReplicateStatus
from modelops.study.ids import AttemptId, JobId, attempt_id, epoch_of
from modelops.study.pools import NO_ALIASES
from modelops.study.ranges import EMPTY, Ranges
from modelops.study.wording import counted

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from modelops.study.pools import Aliases
    from modelops.study.spec import JobSpec
    from modelops.worker.messages import AggregateRef, SegmentRef

PROBE_WAIT_S: Final = 5.0  # then the other slots begin, whatever the probe does
STOP_GRACE_S: Final = 60.0  # for stopped attempts to hand in what they finished

_SIMULATE, _AGGREGATE = Kind.SIMULATE, Kind.AGGREGATE
_RUNNING: Final = JobState.RUNNING


class Machine(Shown):
    """Decides what one job does next.

    Parameters
    ----------
    spec, job
        What is to be run.
    epoch
        Of the driver's lease; part of every attempt id.
    segments, aggregates
        What earlier runs or drivers committed; it is not run again. An aggregate whose inputs have changed
        (its parameter set was extended or repaired) is stale and made anew.
    retried
        What earlier drivers of this run recorded by `RecordRetry`, and how many seconds ago.
    state, reason
        As recorded. A job that was running goes on; one that was stopping is finalized.
    used_s
        How many seconds of the job's timeout earlier drivers used.
    leave
        What is missing and not to be run: this run only repairs something, and ``max_failures`` does not limit it.
    adopt
        Whether to ask workers for attempts of an earlier driver before anything is submitted.
    after_epoch
        Attempts of epochs up to this are of earlier runs of the job, and are stopped, not adopted.
    withdrawn
        Attempts whose outcomes were made not to count, and never will again.
    aliases, pools_waited
        For the names of pools, see `pools`.
    replicates_per_chunk
        How many replicates go into each chunk; by default as many as the clock says, see `chunking`.
    """

    def __init__(
        self,
        spec: JobSpec,
        job: JobId,
        *,
        epoch: int = 1,
        segments: Iterable[SegmentRef] = (),
        aggregates: Iterable[AggregateRef] = (),
        retried: Iterable[tuple[Ranges, int, float]] = (),
        state: JobState = JobState.QUEUED,
        reason: str = "",
        used_s: float = 0.0,
        leave: Ranges | None = None,
        adopt: bool = False,
        after_epoch: int = 0,
        withdrawn: Container[AttemptId] = (),
        aliases: Aliases = NO_ALIASES,
        pools_waited: Mapping[str, float] | None = None,
        replicates_per_chunk: int | None = None,
    ) -> None:
        self.spec, self.job, self.epoch = spec, job, epoch
        self.over = False  # nothing follows: finished, or another driver has the job
        self._expired = self._started = False
        self._used_s = used_s
        self._n_attempts = 0
        self._n_surplus = 0  # attempts that were stopped because of what is not needed
        self._outbox = Outbox()
        self._course = Course(self._outbox, state, reason)
        self._roster = Roster()
        self._pools = Pools(
            spec.asked_pools, self._course, self._outbox, aliases=aliases, waited=pools_waited
        )
        self._ledger = Ledger(spec)
        self._dispatcher = Dispatcher(
            self._roster, self._ledger, spec.retry, replicates_per_chunk=replicates_per_chunk
        )
        self._backlogs = self._dispatcher.backlogs
        self._places = Places(self._ledger, self._roster, self._backlogs)
        self._blame = Blame()
        self._losses = Losses(self._outbox, took_over=adopt and state is JobState.RUNNING)
        self._fitness = Fitness(self._roster, self._course, self._outbox)
        if spec.max_failures is not None or spec.until is not None:
            segments = tuple(segments)
        failed_before = 0
        if spec.max_failures is not None:
            earlier = (ref.counts for ref in segments if epoch_of(ref.attempt) <= after_epoch)
            failed_before = sum(n for counts in earlier for status, n in counts.items() if status in FAILURES)
        looked_at = () if spec.until is None else tuple(segments)
        to_aggregate = self._ledger.adopt(looked_at or segments, aggregates)
        self._plan: Plan | None = None
        if spec.until is not None:
            self._plan = Plan(
                Needs(spec.until, spec.line),
                spec.until,
                ledger=self._ledger,
                places=self._places,
                backlog=self._backlogs[_SIMULATE],
                outbox=self._outbox,
                next_attempt=self._next_attempt_id,
                stop_surplus=self._stop_surplus,
            )
            self._plan.adopt(looked_at)
            to_aggregate &= self._plan.needs.closed
        self._backlogs[_AGGREGATE].add(Work(_AGGREGATE, to_aggregate))
        missing = self._ledger.lacks(_SIMULATE, spec.line.all())
        self._left = left = EMPTY if leave is None else missing & leave
        self._n_left_params = len(spec.line.params_of(left)) if left and spec.aggregates else 0
        missing = missing - left
        self._retried, missing = next_attempts(retried, missing, spec.retry)
        if self._plan is not None:
            missing = self._plan.begin(missing, self._left)
        wanted = spec.fail_fast and not self._ledger.counts[ReplicateStatus.SUCCEEDED]
        self._probe = Probe(missing, wanted=wanted)
        first = self._probe.release() if self._probe.passed else self._probe.indices
        self._backlogs[_SIMULATE].add(Work(_SIMULATE, first))
        self._intake = Intake(
            spec,
            ledger=self._ledger,
            places=self._places,
            dispatcher=self._dispatcher,
            probe=self._probe,
            course=self._course,
            outbox=self._outbox,
            stop=self._stop_early,
            pools=self._pools,
            plan=self._plan,
            failed_before=None if leave is not None else failed_before,
        )

        self._recall = Recall(
            roster=self._roster,
            places=self._places,
            backlogs=self._backlogs,
            meter=self._dispatcher.meters[_SIMULATE],
            outbox=self._outbox,
        )
        self._roll_call = RollCall(
            wanted=adopt,
            after_epoch=after_epoch,
            withdrawn=withdrawn,
            roster=self._roster,
            ledger=self._ledger,
            places=self._places,
            backlog=self._backlogs[_SIMULATE],
            probe=self._probe,
            outbox=self._outbox,
            losses=self._losses,
            needs=None if self._plan is None else self._plan.needs,
        )

    # What drives it.

    def start(self, now: float) -> list[c.Command]:
        """Begin; only the first call does anything."""
        if self._started or self.over:
            return []
        self._started = True
        if self.state is JobState.QUEUED:
            self._course.change(JobEvent.STARTED)
        if not self._course.draining:
            self._pools.begin(now)
            if self.spec.timeout_s is not None:
                self._outbox.set_timer("timeout", now + max(0.0, self.spec.timeout_s - self._used_s))
            for indices, number, in_s in self._retried:
                self._backlogs[_SIMULATE].add_later(Work(_SIMULATE, indices, number), now + in_s)
            self._outbox.order(c.PrepareEnvironment())
            if self._plan is not None:
                self._plan.start()
        self._conclude()
        return self._outbox.fetch()

    def handle(self, event: e.Event, now: float) -> list[c.Command]:
        """Take in one event and return what is to be done, in this order."""
        if self.over:
            return []
        self._on(event, now)
        if not self.over:
            if self._course.may_run and (reason := self._undecidable()):
                self._stop_early(reason, now)
            if self._course.may_run and not self._roll_call.is_open:
                if self._dispatcher.has_work:
                    self._dispatch(now)
                if self._plan is not None and self._probe.passed and self._run_ahead():
                    self._dispatch(now)
                self._recall.order()
            self._conclude()
            self._set_retry_timer()
        return self._outbox.fetch()

    def _undecidable(self) -> str:
        """Say why the rule cannot go on, once all that was decided has its aggregates: no later run would make them."""
        if self._plan is None or not (reason := self._plan.undecidable()):
            return ""
        if self.spec.aggregates:
            decided = self._plan.needs.decided - self.spec.line.params_of(self._left)
            if self._ledger.lacks(_AGGREGATE, decided):
                return ""
        return reason

    def _on(self, event: e.Event, now: float) -> None:
        match event:
            case e.ChunkDone():
                self._note_worked(event.receipt.attempt)
                self._dispatcher.handed_over(event.receipt, now)
                self._intake.chunk(event.receipt, now)
            case e.Committed():
                self._on_committed(event, now)
            case e.AttemptBegun():
                self._recall.begun(event.attempt)
            case e.WorkerJoined():
                if self._pools.join(event, now):
                    self._roll_call.join(event.worker, event.slots, now)
            case e.TimerRang():
                self._on_timer(event.name, now)
            case e.AggregateDone():
                self._dispatcher.handed_over(event.receipt, now)
                self._intake.aggregates(event.receipt, now)
            case e.AttemptsFound():
                draining = self._course.draining
                self._roll_call.answer(event.worker, event.attempts, draining=draining)
            case e.AttemptWaits():
                self._recall.waits(event.attempt, now)
            case e.AttemptRecalled():
                self._recall.recalled(event.attempt, now)
            case e.WorkerLeft():
                self._pools.leave(event.worker, now)
                self._on_worker_left(event.worker, event.died, now)
            case e.AttemptLost():
                self._on_attempt_lost(event, now)
            case e.WorkersRefused():
                self._pools.refused(event.names)
            case e.Checkpointed():
                self._blame.made_progress(event.index)
            case e.ChunkErred():
                self._on_chunk_erred(event, now)
            case e.CancelAsked():
                self._on_cancel(event.who, now)
            case e.EnvironmentReady():
                self._on_environment_ready(now)
            case e.EnvironmentFailed():
                self._on_environment_failed(event, now)
            case e.Finalized():
                self._on_finalized(event.reason)
            case e.ResultsVoided():
                self._on_results_voided(event.reason)
            case e.StoreLost():
                self._outbox.pause(event.what, now)
            case e.StoreBack():
                self._on_store_back(now)
            case e.LeaseLost():
                self.over = True
            case _:
                assert_never(event)

    # The environment.

    def _on_environment_ready(self, now: float) -> None:
        taken_over = self.state is JobState.RUNNING
        if self.state is JobState.PREPARING:
            self._course.change(JobEvent.ENVIRONMENT_READY)
        elif not taken_over or self._course.has_environment:
            return
        self._course.has_environment = True
        if not self._probe.passed:
            self._outbox.set_timer("probe", now + PROBE_WAIT_S)
        if self._expired:
            self._stop_early(self._timed_out, now)
        elif taken_over:  # the driver before may have died just when it was about to
            self._intake.stop_if_too_many_failed(now)

    def _on_environment_failed(self, event: e.EnvironmentFailed, now: float) -> None:
        reason = f"{event.error_type}: {event.message}"
        if self.state not in (JobState.PREPARING, JobState.RUNNING):
            return
        if self._ledger.n_outcomes:
            self._end_early(reason, now)  # what is finished, also by earlier runs, gets its result files
        else:
            self._stop_attempts()
            self._course.change(JobEvent.ENVIRONMENT_FAILED, reason)
            self._finish()

    # Workers and attempts that end without a receipt.

    def _on_worker_left(self, name: str, died: bool, now: float) -> None:
        self._roll_call.leave(name, died=died)
        self._fitness.left(name)
        worker = self._roster.leave(name)
        if worker is None:
            return
        if died and worker.load and not self._course.draining:
            text = f"{name} died while it held {counted(worker.load, 'attempt')}"
            self._outbox.write(c.Note("worker_died", text))
        if not self._course.draining:
            self._losses.lost(worker.running.values(), now)
        beside = bool(self._roster.suspects_beside(name))
        for attempt in worker.running.values():
            work = self._places.give_up(attempt)
            if died:
                alone = attempt.begun and work.suspect
                if alone and self._blame.in_company(host_of(name), now, beside=beside) and not work.apart:
                    work, alone = work._replace(apart=True), False
                self._after_death(work, alone=alone)
            else:
                self._places.requeue(work)
        for attempt in worker.waiting.values():
            self._places.requeue(self._places.give_up(attempt))

    def _on_attempt_lost(self, event: e.AttemptLost, now: float) -> None:
        attempt = self._roster.attempts.get(event.attempt)
        if attempt is None:
            return
        if event.worker_died:  # the others it held are lost as well, and the order of the news is chance
            self._on_worker_left(attempt.worker, died=True, now=now)
        else:
            if not self._course.draining:
                self._losses.lost([attempt], now)
            self._roster.remove(event.attempt)
            self._places.requeue(self._places.give_up(attempt))

    def _after_death(self, work: Work, *, alone: bool) -> None:
        alone = alone and len(work.ranges) == 1  # before what others have is left out
        self._places.begun(work)
        work = self._places.undoubted(work)
        if not work.ranges:
            return
        if self._plan is not None and work.kind is _SIMULATE:
            work = work.of(self._plan.needs.cut(work.ranges))
            if not work.ranges:
                return
        parts = self._blame.parts(work, alone=alone)
        for part in parts:
            self._backlogs[work.kind].add(part)
        if not parts and not self._course.draining:
            attempt = self._next_attempt_id()
            self._intake.commit(attempt, condemnation(work, attempt, self._blame.deaths(work)))

    def _on_chunk_erred(self, event: e.ChunkErred, now: float) -> None:
        attempt = self._roster.remove(event.attempt)
        if attempt is None or self._course.draining:
            return
        reason = f"{event.error_type}: {event.message}"
        if event.unfit:
            self._fitness.failed(attempt.worker, reason, now)
            self._places.requeue(attempt.work)
            if event.final and self._fitness.nobody_is():
                self._stop_early(reason, now)
            return
        if event.final:
            self._stop_early(reason, now)
        self._intake.erred(attempt.work, reason, now)

    def _note_worked(self, attempt_id: AttemptId) -> None:
        attempt = self._roster.attempts.get(attempt_id)
        if attempt is not None:
            self._fitness.worked(attempt.worker)

    # The store.

    def _on_committed(self, event: e.Committed, now: float) -> None:
        work = self._intake.committed(event, now)
        if self._plan is not None and self._left:
            self._left = self._ledger.lacks(_SIMULATE, self._left)
        if work is not None:
            for double in self._places.doubles(work):  # they can no longer be committed
                self._stop_attempt(double)

    def _on_store_back(self, now: float) -> None:
        if not self._outbox.paused:
            return
        self._outbox.resume((commit.command for commit in self._places.commits.values()), now)
        if self._course.finalizing and c.Finalize() not in self._outbox:
            self._outbox.order(c.Finalize())
        self.over = self._course.is_final

    # Ends before the end.

    @property
    def _timed_out(self) -> str:
        return f"timeout of {self.spec.timeout_s:,g} s: 'modelops jobs resume' runs the rest"

    def _stop_early(self, reason: str, now: float) -> None:
        if self.state is JobState.RUNNING:
            self._end_early(reason, now)

    def _end_early(self, reason: str, now: float) -> None:
        self._course.change(JobEvent.STOPPED_EARLY, reason)
        self._drain(now)

    def _on_cancel(self, who: str, now: float) -> None:
        if self.state is JobState.CANCELLING:
            self._abandon()
        elif not self._course.is_final:
            self._course.change(JobEvent.CANCEL_ASKED, f"cancelled by {who}")
            self._drain(now)

    def _drain(self, now: float) -> None:
        if not self._course.draining:
            self._course.draining = True
            if self._roster.attempts:
                self._outbox.set_timer("stop", now + STOP_GRACE_S)
        self._stop_attempts()

    def _stop_attempts(self) -> None:
        for attempt in self._roster.attempts.values():
            self._stop_attempt(attempt)

    def _stop_attempt(self, attempt: Attempt, *, soon: bool = False) -> None:
        if not attempt.stopping:
            attempt.stopping = True
            self._outbox.order(c.StopAttempt(attempt.id, attempt.worker, soon=soon))

    def _stop_surplus(self, indices: Ranges) -> None:
        for attempt in self._places.doubles(Work(_SIMULATE, indices)):
            self._n_surplus += not attempt.stopping
            self._stop_attempt(attempt, soon=True)

    def _abandon(self) -> None:
        """Wait for no attempt any longer."""
        for attempt in list(self._roster.attempts):
            self._roster.remove(attempt)

    def _on_timer(self, name: str, now: float) -> None:
        self._outbox.rang(name)
        if name == "probe" and self.state is JobState.RUNNING:
            self._backlogs[_SIMULATE].add(Work(_SIMULATE, self._probe.release()))
        elif name == "timeout":
            self._expired = True
            self._stop_early(self._timed_out, now)
        elif name == "stop" and self._course.draining:
            self._abandon()
        elif name == "pools":
            self._pools.look(now)
        elif name == UNFIT_TIMER:
            self._fitness.look(now)
        elif name == ATTEMPTS_LOST:
            self._losses.tell()
        elif name == TAKEN_OVER:
            self._losses.tell_of_before()
        elif name == "roll_call":
            self._roll_call.close()
        elif name == "retry":
            for backlog in self._backlogs.values():
                backlog.release(now)

    # Filling the slots.

    def _dispatch(self, now: float) -> None:
        for planned, worker in self._dispatcher.placements():
            work = planned
            if self._plan is not None and work.kind is _SIMULATE:
                work = work.of(self._plan.needs.cut(work.ranges))
                if not work.ranges:
                    continue
            attempt = Attempt(self._next_attempt_id(), work, worker.name)
            self._roster.place(attempt, now)
            begun = self._places.may_have_begun(work)
            self._outbox.order(
                self._dispatcher.order(
                    work, worker.name, attempt.id, self.job, self.epoch, may_have_begun=begun
                )
            )

    def _run_ahead(self) -> bool:
        """Let parameter sets go on before their next look, as slots are free; return whether one does."""
        backlog = self._backlogs[_SIMULATE]
        while self._plan is not None and not backlog.n_ready and self._roster.idle() is not None:
            ahead = self._plan.run_ahead()
            if not ahead:
                return False
            backlog.add(Work(_SIMULATE, ahead))
        return bool(backlog.n_ready)

    def _next_attempt_id(self) -> AttemptId:
        self._n_attempts += 1
        return attempt_id(self.epoch, self._n_attempts)

    def _set_retry_timer(self) -> None:
        simulate, aggregate = self._backlogs[_SIMULATE].next_at, self._backlogs[_AGGREGATE].next_at
        if simulate is None and aggregate is None:  # nearly always
            return
        if not self._course.draining:
            self._outbox.set_timer("retry", min(at for at in (simulate, aggregate) if at is not None))

    # The end.

    def _conclude(self) -> None:
        """Begin to finalize when nothing is left to do."""
        course = self._course
        if self._places.commits or course.finalizing or self.over:
            return
        if course.draining:
            if self._roster.attempts:
                return
        elif course.state is not _RUNNING or not self._ledger.is_settled_but(
            len(self._left), self._n_left_params
        ):
            return
        else:
            self._stop_attempts()  # only doubles of what is committed
            course.change(JobEvent.SETTLED)
        self._losses.tell()
        self._losses.tell_of_before()
        if self._n_surplus:
            n, self._n_surplus = self._n_surplus, 0
            attempts = "an attempt was" if n == 1 else f"{n} attempts were"
            self._outbox.write(
                c.Note("surplus", f"{attempts} stopped because of replicates that are not needed")
            )
        course.finalize()

    def _on_finalized(self, reason: str) -> None:
        if self._course.finalizing:
            undecidable = self._plan is not None and bool(self._plan.undecidable())
            self._course.end(self._ledger, reason, undecidable=undecidable)
            self.over = not self._outbox.paused

    def _on_results_voided(self, reason: str) -> None:
        if not self._course.finalizing:
            return
        self._ledger = Ledger(self.spec)
        cancelled = self.state is JobState.CANCELLING
        self._course.change(JobEvent.STOPPED if cancelled else JobEvent.NONE_SUCCEEDED, reason)
        self._finish()

    def _finish(self) -> None:
        self._course.finish()
        self.over = not self._outbox.paused
