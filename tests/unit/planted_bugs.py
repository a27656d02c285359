"""Bugs to plant in the machine. The simulator must find each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from simulator_store import Store

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver import intake, machine
from modelops.driver.backlog import Kind, Work, next_attempts
from modelops.driver.blame import Blame
from modelops.driver.course import Course
from modelops.driver.coverage import Coverage
from modelops.driver.dispatch import Dispatcher
from modelops.driver.intake import Intake
from modelops.driver.ledger import Ledger
from modelops.driver.machine import Machine
from modelops.driver.needs import Needs, _Set
from modelops.driver.places import Commit, Places
from modelops.driver.plan import Plan
from modelops.driver.pools import Pools
from modelops.driver.probe import Probe
from modelops.driver.recall import Recall
from modelops.driver.roll_call import RollCall
from modelops.driver.roster import Attempt, Roster
from modelops.states import STORED, JobEvent, JobState, ReplicateStatus
from modelops.study.ids import attempt_id
from modelops.study.pools import Aliases
from modelops.study.ranges import EMPTY, Ranges
from modelops.worker.messages import NO_NUMBER

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from modelops.study.index_line import IndexLine
    from modelops.study.spec import JobSpec, RetryPolicy

    Plant = Callable[[pytest.MonkeyPatch], None]

_SIMULATE = Kind.SIMULATE
BUGS: list[Plant] = []
OF_UNTIL: set[Plant] = set()  # of those, such as only jobs with ``until`` can have


def bug(plant: Plant) -> Plant:
    """Add a bug to the list."""
    BUGS.append(plant)
    return plant


def bug_of_until(plant: Plant) -> Plant:
    """Add one that only jobs with ``until`` can have."""
    OF_UNTIL.add(plant)
    return bug(plant)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing, where something should be done."""


@bug
def counts_before_committed(patch: pytest.MonkeyPatch) -> None:
    commit = Intake.commit

    def wrong(self: Intake, attempt: Any, k: Commit) -> None:
        commit(self, attempt, k)
        self.committed(e.Committed(attempt), 0.0)

    patch.setattr(Intake, "commit", wrong)


@bug
def believes_refused_commits(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Intake, commit: Commit, now: float) -> None:
        if isinstance(commit.command, c.CommitSegment):
            self._settle(commit.work, commit.command.segment.counts, None, [], now)

    patch.setattr(Intake, "_refused", wrong)


@bug
def drops_retries(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Intake, "_retry", _nothing)


@bug
def retries_at_once(patch: pytest.MonkeyPatch) -> None:
    requeue = Places.requeue
    patch.setattr(Places, "requeue", lambda self, work, at=None: requeue(self, work))


@bug
def goes_on_after_too_many_failures(patch: pytest.MonkeyPatch) -> None:
    init = Intake.__init__

    def wrong(self: Intake, spec: JobSpec, **rest: Any) -> None:
        init(self, msgspec.structs.replace(spec, max_failures=None), **rest)

    patch.setattr(Intake, "__init__", wrong)


@bug
def tries_what_an_earlier_driver_retried_as_often_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "next_attempts", lambda _retried, missing, _policy: ([], missing))


@bug
def tries_what_an_earlier_driver_retried_at_once(patch: pytest.MonkeyPatch) -> None:
    right = next_attempts

    def wrong(retried: Any, missing: Ranges, policy: RetryPolicy) -> Any:
        found, others = right(retried, missing, policy)
        return [(indices, number, 0.0) for indices, number, _ in found], others

    patch.setattr(machine, "next_attempts", wrong)


@bug
def runs_an_extended_job_from_the_start(patch: pytest.MonkeyPatch) -> None:
    adopt = Ledger.adopt

    def wrong(self: Ledger, segments: Any, aggregates: Any) -> Ranges:
        return adopt(self, segments if len(self._line.blocks) == 1 else (), aggregates)

    patch.setattr(Ledger, "adopt", wrong)


@bug
def miscounts_attempts(patch: pytest.MonkeyPatch) -> None:
    retry = Intake._retry
    patch.setattr(Intake, "_retry", lambda self, work, *rest: retry(self, work._replace(number=1), *rest))


@bug
def counts_a_loss_as_an_attempt(patch: pytest.MonkeyPatch) -> None:
    give_up = Places.give_up

    def wrong(self: Places, attempt: Attempt) -> Work:
        work = give_up(self, attempt)
        return work._replace(number=work.number + 1)

    patch.setattr(Places, "give_up", wrong)


@bug
def aggregates_before_settled(patch: pytest.MonkeyPatch) -> None:
    init, add = Coverage.__init__, Coverage.add

    def remember(self: Any, line: IndexLine) -> None:
        init(self, line)
        self.line = line

    def wrong(self: Any, indices: Ranges) -> Ranges:
        add(self, indices)
        return self.line.params_of(indices)  # type: ignore[no-any-return]  # set above

    patch.setattr(Coverage, "__init__", remember)
    patch.setattr(Coverage, "add", wrong)


@bug
def forgets_what_waited_on_a_worker_that_left(patch: pytest.MonkeyPatch) -> None:
    leave = Roster.leave

    def wrong(self: Roster, name: str) -> Any:
        worker = leave(self, name)
        if worker is not None:
            worker.waiting.clear()
        return worker

    patch.setattr(Roster, "leave", wrong)


@bug_of_until
def decides_by_those_that_were_fast(patch: pytest.MonkeyPatch) -> None:
    put = _Set.put

    def wrong(self: _Set, first: int, codes: bytes, numbers: Any) -> None:
        put(self, first, codes, numbers)
        self.settled = max(self.settled, self.known)

    patch.setattr(_Set, "put", wrong)


@bug_of_until
def aggregates_what_was_run_too_much(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Plan, indices: Ranges, counts: Any, segment: Any) -> Ranges:
        settle(self, indices, counts, segment)
        params = self.needs.params_of(indices)
        return Ranges(
            (p, p + 1) for p in params if not self._ledger.lacks(_SIMULATE, self.needs._line.of_param(p))
        )

    settle = Plan.settle
    patch.setattr(Plan, "settle", wrong)


@bug_of_until
def commits_what_is_not_needed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Needs, "cut_segment", lambda _self, ref: ref)


@bug_of_until
def forgets_what_an_earlier_driver_decided(patch: pytest.MonkeyPatch) -> None:
    adopt = Needs.adopt

    def wrong(self: Needs, segments: Any) -> Any:
        return adopt(self, [ref for ref in segments if ReplicateStatus.NOT_NEEDED not in ref.counts])

    patch.setattr(Needs, "adopt", wrong)


@bug_of_until
def names_the_first_replicate_without_a_number_that_it_hears_of(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Needs) -> tuple[int, int, str] | None:
        param = self._first_stuck
        return None if param is None else (param, self._stuck[param], "is named too early")

    patch.setattr(Needs, "undecidable", wrong)


@bug_of_until
def takes_the_lack_of_a_number_for_not_a_number(patch: pytest.MonkeyPatch) -> None:
    put = _Set.put

    def wrong(self: _Set, first: int, codes: bytes, numbers: Any) -> None:
        put(
            self,
            first,
            codes.replace(bytes([NO_NUMBER]), bytes([STORED.index(ReplicateStatus.SUCCEEDED)])),
            numbers,
        )

    patch.setattr(_Set, "put", wrong)


@bug
def never_condemns(patch: pytest.MonkeyPatch) -> None:
    def wrong(_self: Blame, work: Work, *, alone: bool) -> list[Work]:
        return work._replace(deaths=work.deaths + alone).split()

    patch.setattr(Blame, "parts", wrong)


@bug
def condemns_at_once(patch: pytest.MonkeyPatch) -> None:
    def wrong(_self: Blame, work: Work, *, alone: bool) -> list[Work]:
        return work._replace(deaths=work.deaths + 1).split() if len(work.ranges) > alone else []

    patch.setattr(Blame, "parts", wrong)


@bug
def strikes_who_was_not_alone(patch: pytest.MonkeyPatch) -> None:
    parts = Blame.parts
    patch.setattr(Blame, "parts", lambda self, work, *, alone: parts(self, work, alone=True))


@bug
def forgets_what_was_given_back(patch: pytest.MonkeyPatch) -> None:
    requeue = Places.requeue

    def wrong(self: Places, work: Work, at: float | None = None) -> None:
        if at is None or work.number > 1 or work.errors:
            requeue(self, work, at)

    patch.setattr(Places, "requeue", wrong)


@bug
def commits_twice(patch: pytest.MonkeyPatch) -> None:
    chunk = Intake.chunk

    def wrong(self: Intake, receipt: Any, now: float) -> None:
        attempt = self._places._roster.attempts.get(receipt.attempt)
        chunk(self, receipt, now)
        if attempt is not None:
            self._places.give_up(attempt)

    patch.setattr(Intake, "chunk", wrong)
    patch.setattr(Places, "may_commit", lambda _self, _commit: True)


@bug
def runs_again_what_a_late_receipt_brought(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Places, "nobody_has", lambda _self, _kind, items: items)


@bug
def floods_workers(patch: pytest.MonkeyPatch) -> None:
    placements = Dispatcher.placements

    def wrong(self: Dispatcher) -> Any:
        for work, worker in placements(self):
            yield work, worker
            if (more := self.backlogs[Kind.SIMULATE].take(1)) is not None:
                yield more, worker

    patch.setattr(Dispatcher, "placements", wrong)


@bug
def submits_while_the_store_is_away(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Course) -> bool:
        paused, self._outbox.paused = self._outbox.paused, False
        may_run: bool = right(self)
        self._outbox.paused = paused
        return may_run

    right = Course.may_run.fget  # type: ignore[attr-defined]  # a property's function
    patch.setattr(Course, "may_run", property(wrong))


@bug
def forgets_unanswered_commits(patch: pytest.MonkeyPatch) -> None:
    store_back = Machine._on_store_back

    def wrong(self: Machine, now: float) -> None:
        self._places.commits.clear()
        store_back(self, now)

    patch.setattr(Machine, "_on_store_back", wrong)


@bug
def finalizes_too_early(patch: pytest.MonkeyPatch) -> None:
    conclude = Machine._conclude

    def wrong(self: Machine) -> None:
        commits, self._places.commits = self._places.commits, {}
        conclude(self)
        self._places.commits = commits

    patch.setattr(Machine, "_conclude", wrong)


@bug
def goes_on_without_lease(patch: pytest.MonkeyPatch) -> None:
    on = Machine._on
    patch.setattr(
        Machine, "_on", lambda self, event, now: isinstance(event, e.LeaseLost) or on(self, event, now)
    )


@bug
def calls_every_end_a_success(patch: pytest.MonkeyPatch) -> None:
    change = Course.change

    def wrong(self: Course, event: JobEvent, reason: str = "") -> None:
        change(self, JobEvent.ALL_SUCCEEDED if event is JobEvent.SOME_SUCCEEDED else event, reason)

    patch.setattr(Course, "change", wrong)


@bug
def records_no_reason_of_an_end(patch: pytest.MonkeyPatch) -> None:
    change = Course.change

    def wrong(self: Course, event: JobEvent, reason: str = "") -> None:
        change(self, event, "" if event is JobEvent.SOME_SUCCEEDED else reason)

    patch.setattr(Course, "change", wrong)


@bug
def forgets_the_last_attempt(patch: pytest.MonkeyPatch) -> None:
    init = Dispatcher.__init__

    def wrong(self: Dispatcher, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._max_retries += 1

    patch.setattr(Dispatcher, "__init__", wrong)


@bug
def runs_committed_again(patch: pytest.MonkeyPatch) -> None:
    init = Machine.__init__

    def wrong(self: Machine, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self._ledger.n_outcomes and self._probe.passed:
            done = self.spec.line.all() - self._ledger.lacks(Kind.SIMULATE, self.spec.line.all())
            self._backlogs[Kind.SIMULATE].add(Work(Kind.SIMULATE, done))

    patch.setattr(Machine, "__init__", wrong)


@bug
def waits_for_hanging_workers(patch: pytest.MonkeyPatch) -> None:
    on_timer = Machine._on_timer
    patch.setattr(Machine, "_on_timer", lambda self, name, now: name == "stop" or on_timer(self, name, now))


@bug
def loses_held_back_indices(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Probe, "release", lambda _self: EMPTY)


@bug
def loses_the_end_of_a_range(patch: pytest.MonkeyPatch) -> None:
    split = Work.split

    def wrong(self: Work) -> list[Work]:
        return split(self)[:7]

    patch.setattr(Work, "split", wrong)


@bug
def runs_what_a_repair_is_to_leave(patch: pytest.MonkeyPatch) -> None:
    init = Machine.__init__
    patch.setattr(
        Machine, "__init__", lambda self, *args, **kwargs: init(self, *args, **{**kwargs, "leave": EMPTY})
    )


@bug
def looks_for_no_checkpoint_of_what_had_begun(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Places, "begun", _nothing)


@bug
def blames_a_replicate_that_keeps_checkpoints(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Blame, "made_progress", _nothing)


@bug
def takes_a_worker_that_is_back_as_empty(patch: pytest.MonkeyPatch) -> None:
    leave = RollCall.leave
    patch.setattr(RollCall, "leave", lambda self, worker, *, died: leave(self, worker, died=True))


# Of drivers that take over.


@bug
def checks_no_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Store, "hold", _nothing)


@bug
def gives_attempts_the_names_of_an_earlier_driver(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "attempt_id", lambda _epoch, n: attempt_id(1, n))


@bug
def adopts_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RollCall, "_adopt", _nothing)


@bug
def adopts_what_an_earlier_run_had_begun(patch: pytest.MonkeyPatch) -> None:
    init = RollCall.__init__
    patch.setattr(RollCall, "__init__", lambda self, **rest: init(self, **{**rest, "after_epoch": 0}))


@bug
def adopts_what_others_have(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: RollCall, worker: str, found: e.Found, *, draining: bool) -> None:
        if found.indices and not draining:
            self._backlog.withdraw(found.indices)
            self._probe.withdraw(found.indices)
            work = Work(Kind.SIMULATE, found.indices, found.attempt_number)
            self._roster.place(Attempt(found.attempt, work, worker))

    patch.setattr(RollCall, "_adopt", wrong)


@bug
def adopts_and_runs_again(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: RollCall, worker: str, found: e.Found, *, draining: bool) -> None:
        if found.indices and not draining:
            work = Work(Kind.SIMULATE, found.indices, found.attempt_number)
            self._roster.place(Attempt(found.attempt, work, worker))

    patch.setattr(RollCall, "_adopt", wrong)


@bug
def submits_before_the_roll_call_is_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RollCall, "is_open", False)


@bug
def waits_for_ever_for_a_worker_that_does_not_answer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RollCall, "close", _nothing)


@bug
def forgets_the_failed_attempts_of_an_earlier_driver(patch: pytest.MonkeyPatch) -> None:
    init = Machine.__init__
    patch.setattr(
        Machine, "__init__", lambda self, *args, **kwargs: init(self, *args, **{**kwargs, "retried": ()})
    )


@bug
def begins_a_job_that_runs_already(patch: pytest.MonkeyPatch) -> None:
    init = Machine.__init__

    def wrong(self: Machine, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "state": JobState.QUEUED})

    patch.setattr(Machine, "__init__", wrong)


@bug
def thinks_that_an_attempt_still_has_what_it_handed_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Roster, "shrink", _nothing)


@bug
def forgets_what_a_part_gives_back(patch: pytest.MonkeyPatch) -> None:
    take_part = Places.take_part

    def wrong(self: Places, attempt: Any, items: Ranges) -> Any:
        work, late = take_part(self, attempt, items)
        return (work and work._replace(ranges=work.ranges.take(1)[0]), late)

    patch.setattr(Places, "take_part", wrong)


@bug
def looks_for_no_parts_in_receipts(patch: pytest.MonkeyPatch) -> None:
    chunk = Intake.chunk

    def wrong(self: Intake, receipt: Any, now: float) -> None:
        chunk(self, msgspec.structs.replace(receipt, parts=()), now)

    patch.setattr(Intake, "chunk", wrong)


@bug
def forgets_what_was_recalled(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Recall, attempt_id: Any, _now: float) -> None:
        self._roster.remove(attempt_id)

    patch.setattr(Recall, "recalled", wrong)


@bug
def takes_back_what_it_has_only_asked_for(patch: pytest.MonkeyPatch) -> None:
    order = Recall.order

    def wrong(self: Recall) -> None:
        asked = self._roster.recallable()
        order(self)
        for attempt in asked:
            self.recalled(attempt.id, 0.0)

    patch.setattr(Recall, "order", wrong)


@bug
def uses_workers_of_all_pools(patch: pytest.MonkeyPatch) -> None:
    join = Pools.join
    patch.setattr(Pools, "join", lambda self, event, now: join(self, event, now) or True)


@bug
def knows_only_one_spelling(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Aliases, "canonical", lambda self, name: name)


@bug
def commits_while_result_files_are_written(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Intake, attempt: Any, commit: Commit) -> None:
        if self._places.may_commit(commit):
            self.commit(attempt, commit)
        else:
            self._places.requeue(commit.work)

    patch.setattr(Intake, "_commit_if_new", wrong)


@bug
def lets_the_timeout_begin_anew_with_each_driver(patch: pytest.MonkeyPatch) -> None:
    init = Machine.__init__

    def wrong(self: Machine, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "used_s": 0.0})

    patch.setattr(Machine, "__init__", wrong)


@bug
def knows_no_timeout(patch: pytest.MonkeyPatch) -> None:
    on_timer = Machine._on_timer

    def wrong(self: Machine, name: str, now: float) -> None:
        if name != "timeout":
            on_timer(self, name, now)

    patch.setattr(Machine, "_on_timer", wrong)


@bug
def never_gives_up_what_fails_outside_the_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(intake, "MAX_ERRORS", 10**9)


@bug
def does_not_stop_doubles_of_what_was_handed_in_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Places, "doubles", lambda *_: [])
