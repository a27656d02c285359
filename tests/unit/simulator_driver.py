"""One driver of a simulation: its machine, what it was told, what it ordered, and what must hold for that."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Any

from simulator_store import OF_OUTCOMES, committed_attempt, committed_items, integers

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.blame import DEADLY
from modelops.driver.fitness import TRY_AGAIN_S
from modelops.driver.intake import MAX_ERRORS
from modelops.states import FAILURES, JobState, ReplicateStatus
from modelops.store.records import LeaseLostError
from modelops.study.ids import epoch_of
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator import World
    from simulator_store import Commit

    from modelops.driver.machine import Machine
    from modelops.study.ids import AttemptId
    from modelops.worker.messages import Receipt

Submit = c.SubmitChunk | c.SubmitAggregates
OF_RECEIPTS = (c.CommitSegment, c.CommitAggregates)
FINALIZE_S = 8.0  # at most; meanwhile the result files are written from what was committed before
TRANSIT_S = 0.002  # to a worker; nothing overtakes what was sent before
_EPSILON = 1e-9


class Driver:
    """Performs what its machine orders, until it dies, ends or learns that it has lost its lease."""

    def __init__(self, world: World, machine: Machine, epoch: int) -> None:
        self.world, self.machine, self.epoch = world, machine, epoch
        self.store, self.spec, self.slots = world.store, world.spec, world.s.slots
        self.after_epoch = world.store.after_epoch
        self.alive, self.has_lease, self.asleep = True, True, False
        self.finished: c.Finish | None = None
        self.inbox: deque[e.Event] = deque()  # while it sleeps
        self.store_news: deque[e.Event] = deque()
        self.interrupted: deque[c.Command] = deque()  # what it was about to do when it fell asleep
        self.timers: dict[str, int] = {}
        # What it knows.
        self.told = set(self.store.outcomes)
        self.told_params = set(self.store.aggregated)
        self.n_failed = self.store.n_failed
        self.store_up = True
        self.dropped: set[int] = set()
        self.unanswered: dict[AttemptId, tuple[Commit, Sequence[int]]] = {}
        self.state = self.store.state
        self.has_failed_too_often = self._may_not_fail_so_often
        self.stopped: set[AttemptId] = set()
        self.erred: Counter[int] = Counter()  # how often an index had a fault outside the model, in a row
        self.files: tuple[dict[int, ReplicateStatus], dict[int, AttemptId]] | None = None  # of results
        # Until when it may submit. What it was about to do when it fell asleep, and what it is told first, it may do.
        self.deadline = world.began + (float("inf") if self.spec.timeout_s is None else self.spec.timeout_s)
        self.receipted: set[AttemptId] = set()
        self.handed_in: set[int] = set()  # while nothing could run twice, and not refused by the store since
        self.doubles = False  # something may run twice: an attempt was given up, and its worker lives perhaps
        self.live: dict[AttemptId, tuple[str, bool, Sequence[int]]] = {}  # worker, whether a chunk, items
        self.load: dict[str, int] = {}
        self.unfit_until: dict[str, float] = {}
        self.asked: set[str] = set()
        self.cut_off: set[str] = set()
        self.failed_attempts = self.store.failed_attempts.copy()
        self.not_before = dict(self.store.not_before)
        self.holders: dict[int, AttemptId] = {}
        self.param_holders: dict[int, AttemptId] = {}
        self.deaths: defaultdict[int, int] = defaultdict(int)  # at which it was alone
        self.param_deaths: defaultdict[int, int] = defaultdict(int)

    # What it is told.

    def tell(self, event: e.Event) -> None:
        """Deliver an event, now or when it wakes."""
        self.world.n_events += 1
        self.deliver(event)

    def deliver(self, event: e.Event) -> None:
        """Tell it what has waited in the world's queue, where it was counted."""
        world = self.world
        if self.asleep or not self.alive:
            world.n_events -= 1
            if self.alive:
                news = self.store_news if isinstance(event, (e.StoreLost, e.StoreBack)) else self.inbox
                news.append(event)
            return
        if world.trace is not None:
            world.trace.append((world.now, self.epoch, "<-", event))
        note = _NOTES.get(type(event))
        if note is not None:
            note(self, event)
        commands = self.machine.handle(event, world.now)
        if not self.has_lease:
            world.check(not commands, "ordered something without a lease")
            return
        if commands:
            self.perform(commands)
        if world.n_events & 63 == 0 and self.is_awake:
            self.check_view()

    def wake(self, _: object = None) -> None:
        """Go on where it stopped, with all that has come since."""
        self.asleep = False
        self.deadline = max(self.deadline, self.world.now)
        self.world.undisturbed_since = self.world.now
        interrupted, self.interrupted = self.interrupted, deque()
        self.perform(interrupted)
        for news in (self.store_news, self.inbox):
            while news and self.is_awake:
                self.tell(news.popleft())

    def lose_lease(self) -> None:
        """Learn from the store that another is the driver."""
        self.tell(e.LeaseLost())

    def _note_lease_lost(self, _: e.LeaseLost) -> None:
        self.has_lease = False

    def _note_chunk(self, event: e.ChunkDone) -> None:
        if event.receipt.attempt in self.live:  # so its worker can
            self.unfit_until.pop(self.live[event.receipt.attempt][0], None)
        for part in event.receipt.parts:
            self._note_receipt(part)
        self._note_receipt(event.receipt)

    def _note_receipt(self, receipt: Receipt) -> None:
        is_new = (
            receipt.attempt not in self.receipted
        )  # a part comes again with the whole, refused perhaps meanwhile
        self.receipted.add(receipt.attempt)
        is_part = receipt.part_of is not None and receipt.attempt not in self.live
        attempt = receipt.part_of if is_part and receipt.part_of else receipt.attempt
        if attempt not in self.live:
            self.doubles = True
            return
        worker, is_chunk, items = self.live[attempt]
        if self.erred:
            for k in items:
                self.erred.pop(k, None)
        if receipt.segment is not None and is_new and not self.doubles:
            self.handed_in.update(integers(receipt.segment.ranges))
        for _, ranges in receipt.retry:
            for k in Ranges(ranges):
                if k in items:
                    delay = self.spec.retry.delay_s(1 + self.failed_attempts[k])
                    self.not_before[k] = self.world.now + delay
        if not is_part:
            self._forget(attempt)
            return
        done = set(receipt.indices)
        self.live[attempt] = (worker, is_chunk, [k for k in items if k not in done])
        for k in done:
            if self.holders.get(k) == attempt:
                del self.holders[k]

    def _note_recalled(self, event: e.AttemptRecalled) -> None:
        self._forget(event.attempt)

    def _note_aggregates(self, event: e.AggregateDone) -> None:
        self.receipted.add(event.receipt.attempt)
        self._forget(event.receipt.attempt)

    def _note_lost(self, event: e.AttemptLost) -> None:
        if not event.worker_died:
            self.doubles = True
            self._forget(event.attempt)
        elif event.attempt in self.live:
            self._forget_worker(self.live[event.attempt][0], died=True)

    def _note_erred(self, event: e.ChunkErred) -> None:
        if event.unfit and event.attempt in self.live:
            self.unfit_until.setdefault(self.live[event.attempt][0], self.world.now + TRY_AGAIN_S)
        elif event.attempt in self.live and self.live[event.attempt][1]:
            self.erred.update(self.live[event.attempt][2])
        self._forget(event.attempt)

    def _note_left(self, event: e.WorkerLeft) -> None:
        self.asked.discard(event.worker)
        self.doubles = self.doubles or not event.died
        (self.cut_off.discard if event.died else self.cut_off.add)(event.worker)
        self._forget_worker(event.worker, died=event.died)

    def _note_checkpointed(self, event: e.Checkpointed) -> None:
        self.deaths.pop(event.index, None)

    def _note_joined(self, event: e.WorkerJoined) -> None:
        if not self.world.may_use(event.pool or "".join(event.labels)):
            return
        if event.worker not in self.load:
            self.unfit_until.pop(event.worker, None)
        if event.worker in self.cut_off and event.worker not in self.load:
            self.asked.add(event.worker)  # it must be, as it may hold something still
        self.load.setdefault(event.worker, 0)

    def _note_rang(self, event: e.TimerRang) -> None:
        if event.name == "roll_call":
            self.asked.clear()

    def _note_store_lost(self, _: e.StoreLost) -> None:
        self.store_up = False

    def _note_store_back(self, _: e.StoreBack) -> None:
        self.store_up = True

    def _note_found(self, event: e.AttemptsFound) -> None:
        """Expect that it adopts what nobody else has."""
        self.asked.discard(event.worker)
        self.doubles = self.doubles or bool(event.attempts)
        if event.worker not in self.load:
            return
        commits = self.unanswered.values()
        committing = {k for command, items in commits if isinstance(command, OF_OUTCOMES) for k in items}
        for found in event.attempts:
            number = found.attempt_number
            if (
                found.indices
                and epoch_of(found.attempt) > self.after_epoch
                and found.attempt not in self.live
                and all(
                    k not in self.told
                    and k not in self.holders
                    and k not in committing
                    and number == 1 + self.failed_attempts[k]
                    for k in found.indices
                )
            ):
                self.live[found.attempt] = (event.worker, True, integers(found.indices.pairs))
                self.load[event.worker] += 1
                self.holders.update((k, found.attempt) for k in found.indices)
                for k in found.indices:  # its delay was over when it was begun
                    self.not_before.pop(k, None)
                    self.erred.pop(k, None)  # what it had before, a worker does not know

    def _note_committed(self, event: e.Committed) -> None:
        commit = self.unanswered.pop(event.attempt, None)
        if commit is None:
            return
        command, items = commit
        if event.accepted:
            (self.told if isinstance(command, OF_OUTCOMES) else self.told_params).update(items)
            if isinstance(command, (c.CommitSegment, c.CommitSynthetic)):
                self.n_failed += sum(self.store.outcomes[k] in FAILURES for k in items)
                self.has_failed_too_often = self._may_not_fail_so_often
        elif isinstance(command, OF_OUTCOMES):
            self.handed_in.difference_update(items)

    def _forget(self, attempt: AttemptId) -> None:
        entry = self.live.pop(attempt, None)
        if entry is None:
            return
        worker, is_chunk, items = entry
        self.load[worker] -= 1
        holders = self.holders if is_chunk else self.param_holders
        for k in items:
            if holders.get(k) == attempt:
                del holders[k]

    def _forget_worker(self, name: str, *, died: bool) -> None:
        if name not in self.load:
            return
        alone = self.slots == 1 or self.load[name] == 1
        for attempt, (worker, is_chunk, items) in list(self.live.items()):
            if worker == name:
                self._forget(attempt)
                if died and alone and len(items) == 1:
                    (self.deaths if is_chunk else self.param_deaths)[items[0]] += 1
        del self.load[name]

    # What it orders.

    def perform(self, commands: list[c.Command] | deque[c.Command]) -> None:
        """Do it, in this order; a fault may strike before each."""
        world = self.world
        strikes, trace = world.strikes, world.trace
        todo = iter(commands)
        for command in todo:
            world.n_commands = n = world.n_commands + 1
            if n in strikes and not world.strike(self):
                if self.asleep:
                    self.interrupted.extend((command, *todo))
                return
            if trace is not None:
                trace.append((world.now, self.epoch, "->", command))
            if self.finished is not None:
                world.broken("ordered after the end")
            try:
                _PERFORM[type(command)](self, command)
            except LeaseLostError:
                self.lose_lease()
                return

    def _change_state(self, command: c.ChangeState) -> None:
        self.world.check(self.store_up, "recorded a state while the store is away")
        self.store.change_state(self.epoch, command)
        self.world.check(self.store.state is command.state, "is in another state than recorded")
        self.state = command.state

    def _record_retry(self, command: c.RecordRetry) -> None:
        self.world.check(self.store_up, "recorded a retry while the store is away")
        self.store.record_retry(self.epoch, command, self.world.now)
        for k in command.indices:
            self.failed_attempts[k] += 1

    def _note(self, _: c.Note) -> None:
        self.store.hold(self.epoch)

    def _finalize(self, _: c.Finalize) -> None:
        self.world.check(self.store_up, "finalizes while the store is away")
        self.world.check(not self.unanswered, "finalizes while commits are under way")
        self.world.settled_at = self.world.now
        self.files = self.store.outcomes.copy(), self.store.aggregated.copy()
        self.world.later_by_chance(FINALIZE_S, self.world.do_finalize, self)

    def _finish(self, command: c.Finish) -> None:
        self.store.hold(self.epoch)
        self.world.check(command.state is self.store.state, "finished in another state than recorded")
        self.finished = command
        if self.world.holder is self:
            self.world.ended = True

    def _set_timer(self, command: c.SetTimer) -> None:
        self.timers[command.name] = self.world.set_timer(self, command)

    def _prepare(self, _: c.PrepareEnvironment) -> None:
        self.world.later(0.1, self.world.do_environment, self)

    def _stop(self, command: c.StopAttempt) -> None:
        self.stopped.add(command.attempt)
        self.world.later(TRANSIT_S + self.world.random() * 0.01, self.world.do_stop, command)

    def _recall(self, command: c.RecallAttempt) -> None:
        self.world.check(command.attempt in self.live, "recalls what is on no worker")
        self.world.later(TRANSIT_S + self.world.random() * 0.01, self.world.do_recall, (self, command))

    def _ask(self, command: c.AskForAttempts) -> None:
        self.asked.add(command.worker)
        self.world.later_by_chance(0.01, self.world.do_ask, (self, command.worker))

    def _submit(self, command: Submit, items: Sequence[int]) -> None:
        world, attempt, worker = self.world, command.chunk.attempt, command.worker
        load = self.load.get(worker)
        if self.state is not JobState.RUNNING:
            world.broken("submitted in the wrong state")
        if not self.store_up:
            world.broken("submitted while the store is away")
        if self.asked:
            world.broken("submitted before all workers said what they run")
        if self.has_failed_too_often:
            world.broken("submitted after more failures than allowed")
        if attempt in world.ids:
            world.broken("attempt id used twice")
        if load is None:
            world.broken("submitted to a worker that left, or is of none of its pools")
        if self.unfit_until.get(worker, world.now) > world.now:
            world.broken("submitted to a worker that has just said that it cannot")
        if world.now > self.deadline + _EPSILON:
            world.broken("submitted after the timeout of the job")
        if load >= (3 if world.s.output_bytes else 2) * self.slots:
            world.broken("more than a window on a worker")
        world.ids.add(attempt)
        self.live[attempt] = (worker, isinstance(command, c.SubmitChunk), items)
        self.load[worker] = load + 1
        world.later(TRANSIT_S, world.do_submit, (self, command, items))

    def _submit_chunk(self, command: c.SubmitChunk) -> None:
        broken, holders = self.world.broken, self.holders
        chunk = command.chunk
        attempt, number, last = chunk.attempt, chunk.attempt_number, 1 + self.spec.retry.max_retries
        items = integers(chunk.ranges)
        if not items or items[-1] >= self.world.size:
            broken("submitted what is not on the line")
        if not 1 <= number <= last:
            broken("more attempts than allowed")
        if bool(chunk.retry_on) != (number < last):
            broken("a last attempt must store every outcome")
        if not chunk.may_resume and self.is_holder and not self.world.begun.isdisjoint(items):
            broken("a replicate that had begun is not to look for its checkpoint")
        if self.store.left and not self.store.left.isdisjoint(items):
            broken("ran what this run was to leave")
        if self.erred and max(self.erred[k] for k in items) > MAX_ERRORS:
            broken("repeats for ever what fails outside the model")
        soon = self.world.now + _EPSILON
        told, handed_in = self.told, self.handed_in
        failed_attempts, not_before = self.failed_attempts, self.not_before
        for k in items:
            if k in told or k in handed_in:
                broken("a replicate has its outcome and is run again")
            if k in holders:
                broken("a replicate runs twice at once")
            if number != 1 + failed_attempts.get(k, 0):
                broken("an attempt is miscounted")
            if not_before and not_before.get(k, 0.0) > soon:
                broken("a replicate is retried too early")
            holders[k] = attempt
        self.store.numbers[attempt] = number
        self._submit(command, items)

    def _submit_aggregates(self, command: c.SubmitAggregates) -> None:
        check = self.world.check
        held = Ranges(pair for segment in command.chunk.segments for pair in segment.ranges)
        items = integers(command.chunk.params)
        for p in items:
            indices = self.spec.line.of_param(p)
            check(self.told.issuperset(indices), "aggregates before the parameter set has settled")
            check(not indices - held, "an aggregate is not given all its segments")
            check(p not in self.told_params, "aggregates twice")
            check(p not in self.param_holders, "aggregates twice at once")
            self.param_holders[p] = command.chunk.attempt
        self._submit(command, items)

    def _commit(self, command: Commit) -> None:
        world, attempt, items = self.world, committed_attempt(command), committed_items(command)
        if not self.store_up:
            world.broken("commits while the store is away")
        if isinstance(command, OF_RECEIPTS):
            if attempt not in self.receipted:
                world.broken("commits without a receipt")
            if self.after_epoch and epoch_of(attempt) <= self.after_epoch:
                world.broken("counts what an earlier run had begun and not recorded")
            if self.dropped and isinstance(command, c.CommitSegment) and attempt not in self.unanswered:
                world.check(self.dropped.isdisjoint(items), "commits what is not needed")
        elif isinstance(command, c.CommitNotNeeded):
            world.check_needs(command.indices)
            self.dropped.update(items)
        elif attempt not in self.unanswered:  # once it is condemned, a checkpoint comes too late
            seen = self.deaths if isinstance(command, c.CommitSynthetic) else self.param_deaths
            for item in items:
                world.check(seen[item] >= DEADLY, "condemned after too few deaths at which it was alone")
        self.unanswered[attempt] = command, items
        world.later_by_chance(0.005, world.do_commit, (self, command, attempt, items))

    @property
    def _may_not_fail_so_often(self) -> bool:
        limit, store = self.spec.max_failures, self.store
        return limit is not None and store.left is None and self.n_failed - store.failed_before > limit

    @property
    def is_holder(self) -> bool:
        """Whether it has the lease in truth."""
        return self.epoch == self.store.epoch

    @property
    def is_awake(self) -> bool:
        """Whether it does what its machine orders."""
        return self.alive and not self.asleep

    # What it shows.

    def check_view(self) -> None:
        """Check the figures that users see."""
        check, machine = self.world.check, self.machine
        counts = machine.counts()
        check(sum(counts.values()) == self.spec.line.size, "the counts do not add up")
        check(min(counts.values()) >= 0, "negative counts")
        n_final = sum(counts[s] for s in (ReplicateStatus.SUCCEEDED, ReplicateStatus.NOT_NEEDED, *FAILURES))
        for attempt, (_, is_chunk, items) in self.live.items():
            if is_chunk and attempt not in self.stopped and not self.told.isdisjoint(items):
                self.world.broken("an attempt goes on although others have what it is to give")
        check(n_final == len(self.told), f"counts {n_final} outcomes, and {len(self.told)} are committed")
        check(0 <= machine.progress <= 1, "progress outside 0..1")
        eta = machine.eta(self.world.now)
        check(eta is None or eta >= 0, "a time left below 0")


_NOTES: dict[type, Any] = {
    e.ChunkDone: Driver._note_chunk,
    e.AggregateDone: Driver._note_aggregates,
    e.AttemptLost: Driver._note_lost,
    e.AttemptRecalled: Driver._note_recalled,
    e.Checkpointed: Driver._note_checkpointed,
    e.ChunkErred: Driver._note_erred,
    e.WorkerLeft: Driver._note_left,
    e.WorkerJoined: Driver._note_joined,
    e.AttemptsFound: Driver._note_found,
    e.TimerRang: Driver._note_rang,
    e.StoreLost: Driver._note_store_lost,
    e.StoreBack: Driver._note_store_back,
    e.LeaseLost: Driver._note_lease_lost,
    e.Committed: Driver._note_committed,
}
_PERFORM: dict[type, Any] = {
    c.SubmitChunk: Driver._submit_chunk,
    c.SubmitAggregates: Driver._submit_aggregates,
    c.CommitSegment: Driver._commit,
    c.CommitSynthetic: Driver._commit,
    c.CommitNotNeeded: Driver._commit,
    c.CommitAggregates: Driver._commit,
    c.CommitSyntheticAggregates: Driver._commit,
    c.RecordRetry: Driver._record_retry,
    c.AskForAttempts: Driver._ask,
    c.StopAttempt: Driver._stop,
    c.RecallAttempt: Driver._recall,
    c.SetTimer: Driver._set_timer,
    c.ChangeState: Driver._change_state,
    c.PrepareEnvironment: Driver._prepare,
    c.Finalize: Driver._finalize,
    c.Finish: Driver._finish,
    c.Note: Driver._note,
}
