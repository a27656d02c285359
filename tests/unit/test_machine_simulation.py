"""The machine under random faults, and proof that the simulator would see it if it were wrong."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from simulator import BrokenRule, simulate

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.backlog import Kind, Work
from modelops.driver.coverage import Coverage
from modelops.driver.machine import Machine, _Commit
from modelops.states import FINAL_JOB_STATES, JobEvent
from modelops.study.ranges import EMPTY, Ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.driver.roster import Worker
    from modelops.states import ReplicateStatus
    from modelops.study.ids import AttemptId
    from modelops.study.index_line import IndexLine
    from modelops.worker.messages import Receipt

N_SCHEDULES = 2_000


def test_no_rule_is_broken_in_thousands_of_random_schedules() -> None:
    worlds = [simulate(seed) for seed in range(N_SCHEDULES)]
    ends = {world.finished.state for world in worlds if world.finished is not None}
    assert ends == FINAL_JOB_STATES  # every way to end was met
    assert statistics.median(world.n_events for world in worlds) >= 50
    assert sum(world.n_faults for world in worlds) >= 5 * N_SCHEDULES


def test_the_same_seed_plays_the_same_schedule() -> None:
    first, second = simulate(17), simulate(17)
    assert (first.n_events, first.now, first.outcomes) == (second.n_events, second.now, second.outcomes)
    assert list(first.trace) == list(second.trace)


class _CountsBeforeCommitted(Machine):
    def _commit(self, attempt: AttemptId, commit: _Commit) -> None:
        super()._commit(attempt, commit)
        self.handle(e.Committed(attempt), 0.0)


class _BelievesRefusedCommits(Machine):
    def _on_refused(self, commit: _Commit, now: float) -> None:
        if isinstance(commit.command, c.CommitSegment):
            self._settle(commit.work, commit.command.segment.counts, None, [], now)


class _DropsRetries(Machine):
    def _retry(self, work: Work, again: Sequence[tuple[ReplicateStatus, Ranges]], now: float) -> None:
        pass


class _RetriesAtOnce(Machine):
    def _requeue(self, work: Work, at: float | None = None) -> None:
        super()._requeue(work)


class _MiscountsAttempts(Machine):
    def _retry(self, work: Work, again: Sequence[tuple[ReplicateStatus, Ranges]], now: float) -> None:
        super()._retry(replace(work, number=1), again, now)


class _CountsALossAsAnAttempt(Machine):
    def _give_up(self, attempt: Any) -> None:
        super()._give_up(attempt)
        attempt.work = replace(attempt.work, number=attempt.work.number + 1)


class _EagerCoverage(Coverage):
    def __init__(self, line: IndexLine) -> None:
        super().__init__(line)
        self._line = line

    def add(self, indices: Ranges) -> Ranges:
        super().add(indices)
        return self._line.params_of(indices)


class _AggregatesBeforeSettled(Machine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger._coverage = _EagerCoverage(self.spec.line)


class _ForgetsWaitingAttempts(Machine):
    def _on_worker_left(self, name: str, died: bool) -> None:
        worker = self._roster.workers.get(name)
        if worker is not None:
            worker.waiting, lost = {}, worker.waiting
            for attempt in lost.values():
                del self._roster.attempts[attempt.id]
        super()._on_worker_left(name, died)


class _NeverCondemns(Machine):
    def _condemn(self, work: Work) -> None:
        self._backlogs[work.kind].add(work)


class _CondemnsAtOnce(Machine):
    def _blame(self, work: Work, *, alone: bool) -> None:
        if len(work.ranges) == 1:
            self._condemn(work)
        else:
            super()._blame(work, alone=alone)


class _ForgetsWhatWasGivenBack(Machine):
    def _requeue(self, work: Work, at: float | None = None) -> None:
        if at is None or work.number > 1 or work.errors:
            super()._requeue(work, at)


class _TakesReceiptsTwice(Machine):
    def _on_chunk_done(self, receipt: Receipt, now: float) -> None:
        attempt = self._roster.attempts.get(receipt.attempt)
        super()._on_chunk_done(receipt, now)
        if attempt is not None:
            self._give_up(attempt)

    def _commit_if_new(self, attempt: AttemptId, commit: _Commit) -> None:
        self._commit(attempt, commit)


class _RunsAgainWhatALateReceiptBrought(Machine):
    def _nobody_has(self, kind: Kind, items: Ranges) -> Ranges:
        return items


class _FloodsWorkers(Machine):
    def _submit(self, work: Work, worker: Worker) -> None:
        super()._submit(work, worker)
        if (more := self._backlogs[Kind.SIMULATE].take(1)) is not None:
            super()._submit(more, worker)


class _SubmitsWhileTheStoreIsAway(Machine):
    def _dispatch(self) -> None:
        paused, self._paused = self._paused, False
        super()._dispatch()
        self._paused = paused


class _ForgetsUnansweredCommits(Machine):
    def _on_store_back(self) -> None:
        self._commits.clear()
        super()._on_store_back()


class _FinalizesTooEarly(Machine):
    def _conclude(self) -> None:
        commits, self._commits = self._commits, {}
        super()._conclude()
        self._commits = commits


class _GoesOnWithoutLease(Machine):
    def _on(self, event: e.Event, now: float) -> None:
        if not isinstance(event, e.LeaseLost):
            super()._on(event, now)


class _CallsEveryEndASuccess(Machine):
    def _change(self, event: JobEvent, reason: str = "") -> None:
        super()._change(JobEvent.ALL_SUCCEEDED if event is JobEvent.SOME_SUCCEEDED else event, reason)


class _ForgetsTheLastAttempt(Machine):
    def _submit(self, work: Work, worker: Worker) -> None:
        super()._submit(work, worker)
        if isinstance(command := self._out[-1], c.SubmitChunk):
            chunk = type(command.chunk)(
                job=command.chunk.job,
                attempt=command.chunk.attempt,
                epoch=command.chunk.epoch,
                ranges=command.chunk.ranges,
                attempt_number=command.chunk.attempt_number,
                retry_on=self._retry_on,
            )
            self._out[-1] = c.SubmitChunk(chunk, command.worker)


class _RunsCommittedAgain(Machine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._ledger.n_outcomes and self._probe.passed:
            done = self.spec.line.all() - self._ledger.lacks(Kind.SIMULATE, self.spec.line.all())
            self._backlogs[Kind.SIMULATE].add(Work(Kind.SIMULATE, done))


class _WaitsForHangingWorkers(Machine):
    def _on_timer(self, name: str, now: float) -> None:
        if name != "stop":
            super()._on_timer(name, now)


class _LosesHeldBackIndices(Machine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._probe.held_back = EMPTY


BUGS = Machine.__subclasses__()


@pytest.mark.parametrize("buggy", BUGS, ids=lambda bug: bug.__name__.strip("_"))
def test_the_simulator_finds_a_planted_bug(buggy: type[Machine]) -> None:
    for seed in range(N_SCHEDULES):
        try:
            simulate(seed, buggy)
        except BrokenRule:
            return
    pytest.fail(f"{buggy.__name__} was not found in {N_SCHEDULES} schedules")
