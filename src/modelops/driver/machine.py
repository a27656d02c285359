"""The driver's decisions: events in, commands out. No I/O, no clock, no randomness.

Rules of this file:

- An index has a final outcome when the store said so (`Committed`), never before.
- An index that has none is in exactly one place: held back by the probe, in the backlog, in an attempt, or
  in a commit that is under way. (Only a receipt that comes after its attempt was given up can put one in two
  places; from then on `_nobody_has` is asked before anything is run again.)
- A method named ``_on_...`` handles one event. Whatever it changed, `handle` then fills the free slots and
  looks whether the job has come to its end.

Why it is like this: ``docs/explanation/driver.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, assert_never

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.backlog import Kind, Work
from modelops.driver.dispatch import Dispatcher
from modelops.driver.ledger import Ledger
from modelops.driver.probe import Probe
from modelops.driver.roster import Attempt, Roster, Worker
from modelops.states import (
    FINAL_JOB_STATES,
    AggregateStatus,
    JobEvent,
    JobState,
    ReplicateStatus,
    next_state,
)
from modelops.study.ids import AttemptId, JobId, attempt_id
from modelops.study.ranges import EMPTY, Ranges
from modelops.worker.messages import (
    AggregateChunk,
    AggregateReceipt,
    AggregateRef,
    Chunk,
    ErrorExample,
    Receipt,
    SegmentRef,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from modelops.study.spec import JobSpec

PROBE_WAIT_S: Final = 5.0  # then the other slots begin, whatever the probe does
STOP_GRACE_S: Final = 60.0  # for stopped attempts to hand in what they finished
MAX_ERRORS: Final = 3  # of the machinery around one chunk, before the job stops
ERROR_DELAY_S: Final = 1.0  # before the first repetition; times four for each further one
GIVEN_BACK_DELAY_S: Final = 1.0  # when a worker returns a chunk untouched, unasked
DEADLY: Final = 3  # worker deaths of a replicate that ran alone

_WRITES = (
    c.CommitSegment,
    c.CommitSynthetic,
    c.CommitSyntheticAggregates,
    c.CommitAggregates,
    c.ChangeState,
    c.Note,
    c.Finalize,
    c.Finish,
)
_SIMULATE, _AGGREGATE = Kind.SIMULATE, Kind.AGGREGATE


@dataclass(slots=True, eq=False)
class _Commit:
    """A write that the store has not answered yet. ``late``: its attempt had been given up."""

    work: Work
    command: c.CommitSegment | c.CommitSynthetic | c.CommitAggregates | c.CommitSyntheticAggregates
    examples: list[ErrorExample]
    late: bool = False


class Machine:
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
        replicates_per_chunk: int | None = None,
    ) -> None:
        self.spec, self.job, self.epoch = spec, job, epoch
        self.state = JobState.QUEUED
        self.reason = ""
        self.over = False  # nothing follows: finished, or another driver has the job
        self._out: list[c.Command] = []
        self._held: list[c.Command] = []  # writes that wait for the store
        self._paused = False
        self._draining = False  # nothing new is started; what runs is stopped
        self._finalizing = False
        self._expired = False
        self._n_attempts = 0
        self._timers: dict[str, float] = {}
        self._roster = Roster()
        self._commits: dict[AttemptId, _Commit] = {}
        self._given_up: dict[AttemptId, Work] = {}
        self._noted: set[str] = set()
        self._overlaps = False  # an index may be in two places
        self._strikes: dict[tuple[Kind, int], int] = {}
        self._ledger = Ledger(spec)
        self._dispatcher = Dispatcher(self._roster, self._ledger, replicates_per_chunk=replicates_per_chunk)
        self._backlogs, self._meters = self._dispatcher.backlogs, self._dispatcher.meters
        self._retry_on = tuple(sorted(spec.retry.on))
        to_aggregate = self._ledger.adopt(segments, aggregates)
        self._backlogs[_AGGREGATE].add(Work(_AGGREGATE, to_aggregate))
        missing = self._ledger.lacks(_SIMULATE, spec.line.all())
        wanted = spec.fail_fast and not self._ledger.counts[ReplicateStatus.SUCCEEDED]
        self._probe = Probe(missing, wanted=wanted)
        if self._probe.passed:
            self._backlogs[_SIMULATE].add(Work(_SIMULATE, self._probe.release()))
        else:
            self._backlogs[_SIMULATE].add(Work(_SIMULATE, self._probe.indices))

    # What it shows. Cheap, changes nothing.

    def counts(self) -> dict[ReplicateStatus, int]:
        """Return how many replicates have each status; they add up to the size of the line."""
        n_open = self._ledger.n_open
        is_final = self.state in FINAL_JOB_STATES
        running = 0 if is_final else min(n_open, self._n_running())
        return {
            ReplicateStatus.PENDING: 0 if is_final else n_open - running,
            ReplicateStatus.RUNNING: running,
            **self._ledger.counts,
            ReplicateStatus.NOT_RUN: n_open if is_final and self.state is not JobState.CANCELLED else 0,
            ReplicateStatus.CANCELLED: n_open if self.state is JobState.CANCELLED else 0,
        }

    def aggregate_counts(self) -> dict[AggregateStatus, int]:
        """Return how many aggregates ended how; those not made are `not_run` once the job is over."""
        counts = dict(self._ledger.aggregate_counts)
        if self.state in FINAL_JOB_STATES:
            counts[AggregateStatus.NOT_RUN] += self.n_aggregates - sum(counts.values())
        return counts

    @property
    def n_aggregates(self) -> int:
        """How many aggregates the job has: parameter sets times entry points."""
        return self._ledger.n_aggregates

    @property
    def progress(self) -> float:
        """The fraction of replicates that have a final outcome (1.0 for an empty job)."""
        size = self.spec.line.size
        return self._ledger.n_outcomes / size if size else 1.0

    def eta(self, now: float) -> float | None:
        """Return the expected seconds to the end, or None while nothing is known."""
        if self.state in FINAL_JOB_STATES:
            return 0.0
        if self._paused or not self._roster.slots:
            return None
        seconds = self._dispatcher.seconds_left(_SIMULATE, self._ledger.n_open)
        if seconds is None:
            if self._ledger.n_open:
                return None
            seconds = 0.0
        seconds += self._dispatcher.seconds_left(_AGGREGATE, self._ledger.n_open_params) or 0.0
        due = self._backlogs[_SIMULATE].next_at()
        return max(seconds, due - now) if due is not None else seconds

    @property
    def n_live(self) -> int:
        """How many attempts workers hold."""
        return len(self._roster.attempts)

    # What drives it.

    def start(self, now: float) -> list[c.Command]:
        """Begin; only the first call does anything."""
        if self.state is not JobState.QUEUED or self.over:
            return []
        self._change(JobEvent.STARTED)
        if self.spec.timeout_s is not None:
            self._set_timer("timeout", now + self.spec.timeout_s)
        self._out.append(c.PrepareEnvironment())
        return self._flush()

    def handle(self, event: e.Event, now: float) -> list[c.Command]:
        """Take in one event and return what is to be done, in this order."""
        if self.over:
            return []
        self._on(event, now)
        if not self.over:
            self._dispatch()
            self._conclude()
            self._set_retry_timer()
        return self._flush()

    def _on(self, event: e.Event, now: float) -> None:
        match event:
            case e.ChunkDone():
                self._on_chunk_done(event.receipt, now)
            case e.Committed():
                self._on_committed(event, now)
            case e.AggregateDone():
                self._on_aggregate_done(event.receipt, now)
            case e.WorkerJoined():
                self._roster.join(event.worker, event.slots)
            case e.WorkerLeft():
                self._on_worker_left(event.worker, event.died)
            case e.AttemptLost():
                self._on_attempt_lost(event)
            case e.ChunkErred():
                self._on_chunk_erred(event, now)
            case e.TimerRang():
                self._on_timer(event.name, now)
            case e.CancelAsked():
                self._on_cancel(event.who, now)
            case e.EnvironmentReady():
                self._on_environment_ready(now)
            case e.EnvironmentFailed():
                self._on_environment_failed(event, now)
            case e.Finalized():
                self._on_finalized()
            case e.ResultsVoided():
                self._on_results_voided(event.reason)
            case e.StoreLost():
                self._on_store_lost(event.what)
            case e.StoreBack():
                self._on_store_back()
            case e.LeaseLost():
                self.over = True
            case _:
                assert_never(event)

    # The environment.

    def _on_environment_ready(self, now: float) -> None:
        if self.state is not JobState.PREPARING:
            return
        self._change(JobEvent.ENVIRONMENT_READY)
        if not self._probe.passed:
            self._set_timer("probe", now + PROBE_WAIT_S)
        if self._expired:
            self._stop_early("timeout", now)

    def _on_environment_failed(self, event: e.EnvironmentFailed, now: float) -> None:
        reason = f"{event.error_type}: {event.message}"
        if self.state is JobState.RUNNING and self._ledger.n_outcomes:
            self._stop_early(reason, now)  # what is finished gets its result files
        elif self.state in (JobState.PREPARING, JobState.RUNNING):
            self._stop_attempts()
            self._change(JobEvent.ENVIRONMENT_FAILED, reason)
            self._finish()

    # Workers and lost attempts.

    def _on_worker_left(self, name: str, died: bool) -> None:
        worker = self._roster.leave(name)
        if worker is None:
            return
        if died and worker.load and not self._draining:
            self._write(c.Note("worker_died", f"{name} died while it held {worker.load} attempts"))
        for attempt in worker.running.values():
            self._give_up(attempt)
            if died:
                self._blame(attempt.work, alone=len(worker.running) == 1)
            else:
                self._requeue(attempt.work)
        for attempt in worker.waiting.values():
            self._give_up(attempt)
            self._requeue(attempt.work)

    def _on_attempt_lost(self, event: e.AttemptLost) -> None:
        attempt = self._roster.attempts.get(event.attempt)
        if attempt is None:
            return
        if event.worker_died:  # the others it held are lost as well, and the order of the news is chance
            self._on_worker_left(attempt.worker, died=True)
        else:
            self._roster.remove(event.attempt)
            self._give_up(attempt)
            self._requeue(attempt.work)

    def _give_up(self, attempt: Attempt) -> None:
        self._given_up[attempt.id] = attempt.work

    def _blame(self, work: Work, *, alone: bool) -> None:
        """Narrow down what did it: a worker died while it ran this."""
        if self._overlaps:
            work = replace(work, ranges=self._nobody_has(work.kind, work.ranges))
        work = replace(work, deaths=work.deaths + 1)
        if len(work.ranges) != 1:
            for part in work.split():
                self._backlogs[work.kind].add(part)
            return
        item = (work.kind, work.ranges.pairs[0][0])
        if alone:
            self._strikes[item] = self._strikes.get(item, 0) + 1
        if self._strikes.get(item, 0) < DEADLY:
            self._backlogs[work.kind].add(work)
        elif not self._draining:
            self._condemn(work)

    def _condemn(self, work: Work) -> None:
        message = f"took its worker down {DEADLY} times"
        error = ErrorExample(
            fingerprint="worker died",
            status=ReplicateStatus.CRASHED,
            error_type="WorkerDied",
            message=message,
            index=work.ranges.pairs[0][0] if work.kind is _SIMULATE else -1,
        )
        attempt = self._next_attempt_id()
        command: c.CommitSynthetic | c.CommitSyntheticAggregates
        if work.kind is _SIMULATE:
            command = c.CommitSynthetic(attempt, work.ranges, ReplicateStatus.CRASHED, error)
        else:
            command = c.CommitSyntheticAggregates(attempt, work.ranges, error)
        self._commit(attempt, _Commit(work, command, [error]))

    def _requeue(self, work: Work, at: float | None = None) -> None:
        """Put work that ended without an outcome back; what somebody else has by now is left out."""
        if self._overlaps:
            work = replace(work, ranges=self._nobody_has(work.kind, work.ranges))
        if at is None:
            self._backlogs[work.kind].add(work)
        else:
            self._backlogs[work.kind].add_later(work, at)

    def _nobody_has(self, kind: Kind, items: Ranges) -> Ranges:
        """Return those that are in no outcome, commit or attempt, and take them out of the backlog."""
        items = self._ledger.lacks(kind, items)
        for commit in self._commits.values():
            if commit.work.kind is kind:
                items = items - commit.work.ranges
        for attempt in self._roster.attempts.values():
            if attempt.work.kind is kind:
                items = items - attempt.work.ranges
        self._backlogs[kind].withdraw(items)
        return items

    # Receipts.

    def _on_chunk_done(self, receipt: Receipt, now: float) -> None:
        work, late = self._take_over(receipt.attempt, _SIMULATE)
        if work is None:
            return
        for text in receipt.notes:
            if text not in self._noted:
                self._noted.add(text)
                self._write(c.Note("note", text))
        examples = [f.example for f in receipt.failures]
        stored = Ranges(receipt.segment.ranges) if receipt.segment else EMPTY
        again = [(status, Ranges(ranges)) for status, ranges in receipt.retry]
        tried = stored
        for _, ranges in again:
            tried |= ranges
        if tried:
            self._measure(len(tried), receipt)
        if receipt.segment is not None and receipt.segment.counts.get(ReplicateStatus.SUCCEEDED):
            self._judge(EMPTY, 1, [], now)  # that one succeeded is no status yet, but reason enough to go on
        if receipt.segment is not None:
            self._commit_if_new(
                receipt.attempt,
                _Commit(replace(work, ranges=stored), c.CommitSegment(receipt.segment), examples, late),
            )
        if not late:
            self._retry(work, again, now)
            unasked = not tried and not self._draining and receipt.missing_import is None
            back = replace(work, ranges=work.ranges - tried, errors=0)
            self._requeue(back, now + GIVEN_BACK_DELAY_S if unasked else None)
        if receipt.missing_import is not None:
            self._stop_early(receipt.missing_import, now)
        elif not late and again and work.number == 1:
            ended = tried - stored
            self._judge(ended, 0, examples if receipt.segment is None else [], now)

    def _measure(self, n: int, receipt: Receipt) -> None:
        seconds = receipt.model_seconds
        if n >= 16:  # in smaller chunks, starting a process outweighs all else
            seconds = max(seconds, receipt.wall_seconds)
        self._meters[_SIMULATE].record(n, seconds)

    def _retry(self, work: Work, again: Sequence[tuple[ReplicateStatus, Ranges]], now: float) -> None:
        failed = EMPTY
        for _, ranges in again:
            failed |= ranges & work.ranges
        if not failed:
            return
        if work.number > self.spec.retry.max_retries:
            self._erred(replace(work, ranges=failed), "a worker gave back outcomes that are not retried", now)
        else:
            next_try = Work(_SIMULATE, failed, work.number + 1)
            self._requeue(next_try, now + self.spec.retry.delay_s(work.number))

    def _on_aggregate_done(self, receipt: AggregateReceipt, now: float) -> None:
        work, late = self._take_over(receipt.attempt, _AGGREGATE)
        if work is None:
            return
        stored = receipt.stored
        made = Ranges(stored.params) if stored else EMPTY
        if stored is not None:
            self._meters[_AGGREGATE].record(len(made), receipt.wall_seconds)
            self._commit_if_new(
                receipt.attempt, _Commit(replace(work, ranges=made), c.CommitAggregates(stored), [], late)
            )
        if not late and (back := work.ranges - made):
            stopped = receipt.stopped or stored is not None
            self._requeue(replace(work, ranges=back), None if stopped else now + GIVEN_BACK_DELAY_S)

    def _take_over(self, name: AttemptId, kind: Kind) -> tuple[Work | None, bool]:
        """Return the work of an attempt whose receipt came, and whether it had been given up before."""
        attempt = self._roster.attempts.get(name)
        if attempt is not None and attempt.work.kind is kind:
            self._roster.remove(name)
            return attempt.work, False
        work = self._given_up.get(name)
        if work is None or work.kind is not kind:
            return None, False  # twice, or of another driver: it says nothing new
        del self._given_up[name]
        return work, True

    # Commits.

    def _commit_if_new(self, attempt: AttemptId, commit: _Commit) -> None:
        """Commit, unless other outcomes of these items are there already; then only run what nobody has."""
        if self._finalizing:
            return  # the result files are being written from what is committed; a resumed job runs it again
        work = commit.work
        taken = False
        if commit.late:
            self._overlaps = True
            taken = any(
                k.work.kind is work.kind and k.work.ranges & work.ranges for k in self._commits.values()
            )
        if self._overlaps:
            taken = taken or self._ledger.lacks(work.kind, work.ranges) != work.ranges
        if taken:
            self._requeue(work)
            return
        if commit.late:
            self._backlogs[work.kind].withdraw(work.ranges)
        self._commit(attempt, commit)

    def _commit(self, attempt: AttemptId, commit: _Commit) -> None:
        self._commits[attempt] = commit
        if not self._paused:  # otherwise it is given with all others when the store is back
            self._out.append(commit.command)

    def _on_committed(self, event: e.Committed, now: float) -> None:
        commit = self._commits.pop(event.attempt, None)
        if commit is None:
            return
        work, command = commit.work, commit.command
        if not event.accepted:
            self._on_refused(commit, now)
            return
        if commit.late:
            self._stop_doubles(work)
        match command:
            case c.CommitSegment():
                self._settle(work, command.segment.counts, command.segment, commit.examples, now)
            case c.CommitSynthetic():
                self._settle(work, {command.status: len(work.ranges)}, event.segment, commit.examples, now)
            case c.CommitAggregates():
                self._ledger.add_aggregates(work.ranges, command.stored.counts)
            case c.CommitSyntheticAggregates():
                n = len(work.ranges) * len(self.spec.aggregates)
                self._ledger.add_aggregates(work.ranges, {AggregateStatus.FAILED: n})

    def _settle(
        self,
        work: Work,
        counts: dict[ReplicateStatus, int],
        segment: SegmentRef | None,
        examples: list[ErrorExample],
        now: float,
    ) -> None:
        settled = self._ledger.add_outcomes(work.ranges, counts, segment)
        self._backlogs[_AGGREGATE].add(Work(_AGGREGATE, settled))
        if work.number == 1:
            self._judge(work.ranges, 0, examples, now)
        limit = self.spec.max_failures
        if limit is not None and (n := self._ledger.n_failed) > limit:
            self._stop_early(f"{n} replicates failed, more than max_failures = {limit}", now)

    def _on_refused(self, commit: _Commit, now: float) -> None:
        """Run what nobody has, as the store has other outcomes of these; never for ever."""
        work = commit.work
        if self._draining:
            return
        self._overlaps = True
        left = self._nobody_has(work.kind, work.ranges)
        if left:
            self._erred(replace(work, ranges=left), "the store refused outcomes as covered already", now)

    def _stop_doubles(self, work: Work) -> None:
        """Stop attempts that can no longer be committed, because a late receipt won."""
        for attempt in self._roster.attempts.values():
            if attempt.work.kind is work.kind and attempt.work.ranges & work.ranges:
                self._stop_attempt(attempt)

    # Faults of the machinery.

    def _on_chunk_erred(self, event: e.ChunkErred, now: float) -> None:
        attempt = self._roster.remove(event.attempt)
        if attempt is None or self._draining:
            return
        reason = f"{event.error_type}: {event.message}"
        if event.final:
            self._stop_early(reason, now)
        self._erred(attempt.work, reason, now)

    def _erred(self, work: Work, reason: str, now: float) -> None:
        if self._draining:
            return
        if work.errors >= MAX_ERRORS:
            self._stop_early(reason, now)
            return
        self._write(c.Note("chunk_erred", reason))
        delay = ERROR_DELAY_S * 4.0**work.errors
        self._requeue(replace(work, errors=work.errors + 1), now + delay)

    def _on_store_lost(self, what: str) -> None:
        self._paused = True
        self._held.append(c.Note("store_lost", what))

    def _on_store_back(self) -> None:
        if not self._paused:
            return
        self._paused = False
        self._out.extend(commit.command for commit in self._commits.values())
        self._out.extend(self._held)
        self._held.clear()
        if self._finalizing and c.Finalize() not in self._out:
            self._out.append(c.Finalize())
        self.over = self.state in FINAL_JOB_STATES

    # The probe, and ends before the end.

    def _judge(self, ended: Ranges, n_succeeded: int, examples: list[ErrorExample], now: float) -> None:
        if self._probe.passed:
            return
        error = self._probe.judge(ended, n_succeeded, examples)
        if error is not None:
            n = len(self._probe.indices)
            self._stop_early(f"all {n} replicates that were tried first failed alike: {describe(error)}", now)
        elif self._probe.passed:
            self._backlogs[_SIMULATE].add(Work(_SIMULATE, self._probe.release()))

    def _stop_early(self, reason: str, now: float) -> None:
        if self.state is JobState.RUNNING:
            self._change(JobEvent.STOPPED_EARLY, reason)
            self._drain(now)

    def _on_cancel(self, who: str, now: float) -> None:
        if self.state is JobState.CANCELLING:
            self._abandon()
        elif self.state not in FINAL_JOB_STATES:
            self._change(JobEvent.CANCEL_ASKED, f"cancelled by {who}")
            self._drain(now)

    def _drain(self, now: float) -> None:
        if not self._draining:
            self._draining = True
            if self._roster.attempts:
                self._set_timer("stop", now + STOP_GRACE_S)
        self._stop_attempts()

    def _stop_attempts(self) -> None:
        for attempt in self._roster.attempts.values():
            self._stop_attempt(attempt)

    def _stop_attempt(self, attempt: Attempt) -> None:
        if not attempt.stopping:
            attempt.stopping = True
            self._out.append(c.StopAttempt(attempt.id, attempt.worker))

    def _abandon(self) -> None:
        """Wait for no attempt any longer."""
        for attempt in list(self._roster.attempts):
            self._roster.remove(attempt)

    def _on_timer(self, name: str, now: float) -> None:
        self._timers.pop(name, None)  # if it rang early, what is still due sets it again
        if name == "probe" and self.state is JobState.RUNNING:
            self._backlogs[_SIMULATE].add(Work(_SIMULATE, self._probe.release()))
        elif name == "timeout":
            self._expired = True
            self._stop_early("timeout", now)
        elif name == "stop" and self._draining:
            self._abandon()
        elif name == "retry":
            for backlog in self._backlogs.values():
                backlog.release(now)

    # Filling the slots.

    def _dispatch(self) -> None:
        if self.state is not JobState.RUNNING or self._paused:
            return
        for work, worker in self._dispatcher.placements():
            self._submit(work, worker)

    def _submit(self, work: Work, worker: Worker) -> None:
        attempt = Attempt(self._next_attempt_id(), work, worker.name)
        self._roster.place(attempt)
        command: c.SubmitChunk | c.SubmitAggregates
        if work.kind is _SIMULATE:
            chunk = Chunk(
                job=self.job,
                attempt=attempt.id,
                epoch=self.epoch,
                ranges=work.ranges.pairs,
                attempt_number=work.number,
                retry_on=self._retry_on if work.number <= self.spec.retry.max_retries else (),
            )
            command = c.SubmitChunk(chunk, worker.name)
        else:
            aggregates = AggregateChunk(
                job=self.job,
                attempt=attempt.id,
                epoch=self.epoch,
                params=work.ranges.pairs,
                segments=self._ledger.segments_of(work.ranges),
            )
            command = c.SubmitAggregates(aggregates, worker.name)
        self._out.append(command)

    def _next_attempt_id(self) -> AttemptId:
        self._n_attempts += 1
        return attempt_id(self.epoch, self._n_attempts)

    # The end.

    def _conclude(self) -> None:
        """Begin to finalize when nothing is left to do."""
        if self._finalizing or self.over or self._commits:
            return
        if self._draining:
            if self._roster.attempts:
                return
        elif self.state is not JobState.RUNNING or not self._ledger.is_settled:
            return
        else:
            self._stop_attempts()  # only doubles of what is committed
            self._change(JobEvent.SETTLED)
        self._finalizing = True
        self._write(c.Finalize())

    def _on_finalized(self) -> None:
        if not self._finalizing:
            return
        if self.state is JobState.CANCELLING:
            self._change(JobEvent.STOPPED, self.reason)
        elif self._ledger.is_success:
            self._change(JobEvent.ALL_SUCCEEDED, self.reason)
        elif self._ledger.counts[ReplicateStatus.SUCCEEDED]:
            self._change(JobEvent.SOME_SUCCEEDED, self.reason)
        else:
            self._change(JobEvent.NONE_SUCCEEDED, self.reason)
        self._finish()

    def _on_results_voided(self, reason: str) -> None:
        if not self._finalizing:
            return
        self._ledger = Ledger(self.spec)
        cancelled = self.state is JobState.CANCELLING
        self._change(JobEvent.STOPPED if cancelled else JobEvent.NONE_SUCCEEDED, reason)
        self._finish()

    def _finish(self) -> None:
        self._write(c.Finish(self.state, self.reason))
        self.over = not self._paused

    # Small change.

    def _n_running(self) -> int:
        if not self._overlaps:
            return self._roster.n_live[_SIMULATE] + sum(
                len(k.work.ranges) for k in self._commits.values() if k.work.kind is _SIMULATE
            )
        pairs = [
            p for a in self._roster.attempts.values() if a.work.kind is _SIMULATE for p in a.work.ranges.pairs
        ]
        pairs += [p for k in self._commits.values() if k.work.kind is _SIMULATE for p in k.work.ranges.pairs]
        return len(self._ledger.lacks(_SIMULATE, Ranges(pairs)))

    def _change(self, event: JobEvent, reason: str = "") -> None:
        self.state = next_state(self.state, event)
        self.reason = reason or self.reason
        self._write(c.ChangeState(event, self.state, reason))

    def _write(self, command: c.Command) -> None:
        (self._held if self._paused else self._out).append(command)

    def _set_timer(self, name: str, at: float) -> None:
        self._timers[name] = at
        self._out.append(c.SetTimer(name, at))

    def _set_retry_timer(self) -> None:
        due = [at for b in self._backlogs.values() if (at := b.next_at()) is not None]
        if due and self._timers.get("retry") != min(due) and not self._draining:
            self._set_timer("retry", min(due))

    def _flush(self) -> list[c.Command]:
        out, self._out = self._out, []
        return out


def describe(error: ErrorExample) -> str:
    """Say what an error was in one line."""
    return f"{error.error_type}: {error.message}" if error.message else error.error_type
