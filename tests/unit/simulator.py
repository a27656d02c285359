"""A world for the driver's machine: its own clock, workers, a store, and faults, all from one seed.

`simulate(seed)` builds a scenario, plays it to its end and checks, at every command and at the end, what must
hold whatever goes wrong. A broken rule raises `BrokenRule` with the seed and the last events.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.machine import DEADLY, Machine
from modelops.states import FAILURES, FINAL_JOB_STATES, AggregateStatus, JobState, ReplicateStatus, next_state
from modelops.study.ids import JobId
from modelops.study.index_line import Block, IndexLine
from modelops.study.ranges import Ranges
from modelops.study.spec import JobSpec, RetryPolicy
from modelops.worker.messages import (
    AggregateReceipt,
    AggregateRef,
    ErrorExample,
    FailureCount,
    Receipt,
    SegmentRef,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelops.study.ids import AttemptId

JOB = JobId("job_simulated")
WITHOUT_OUTCOME = (
    ReplicateStatus.PENDING,
    ReplicateStatus.RUNNING,
    ReplicateStatus.NOT_RUN,
    ReplicateStatus.CANCELLED,
)
SUCCEEDED, CRASHED, FAILED = ReplicateStatus.SUCCEEDED, ReplicateStatus.CRASHED, ReplicateStatus.FAILED
MAX_STEPS = 30_000
MAX_OUTAGES = 10  # of the store, per run; each makes the machine ask again for everything unanswered


class BrokenRule(AssertionError):  # noqa: N818  it is a finding, not an error of the program
    """The machine did something that must never happen."""


@dataclass
class Scenario:
    """What is run and what goes wrong. Rates are chances per chunk, or per commit."""

    spec: JobSpec
    n_workers: int
    slots: int
    seconds: list[float]  # of each replicate
    crashes: dict[int, int] = field(default_factory=dict)  # index -> how many attempts crash first
    failing: set[int] = field(default_factory=set)  # indices whose model raises
    fingerprints: int = 1  # how many different errors they raise
    poison: set[int] = field(default_factory=set)  # indices that take the worker down
    poison_params: set[int] = field(default_factory=set)  # parameter sets whose aggregate does
    environment_fails: bool = False
    missing_import_at: int = -1
    deaths: float = 0.0  # of the worker, while it runs a chunk
    partitions: float = 0.0  # the worker is said to be gone, and its receipts come later
    late: float = 0.0  # the attempt is said to be lost, and its receipt comes later
    twice: float = 0.0
    errs: float = 0.0
    errs_finally: float = 0.0
    given_back: float = 0.0
    refusals: float = 0.0
    unanswered: float = 0.0  # the store goes away while it commits
    jitter: float = 0.0  # seconds by which news is delayed
    cancels: tuple[float, ...] = ()
    lease_lost_at: float | None = None
    resumes: int = 0
    deaf: bool = False  # a stopped attempt hangs: no receipt comes


def draw_scenario(seed: int) -> Scenario:
    """Make a random scenario. The same seed makes the same one."""
    rng = random.Random(seed)
    chance = rng.random
    line = _draw_line(rng)
    size = line.size
    retry = RetryPolicy(max_retries=0)
    if chance() < 0.6:
        retry = RetryPolicy(
            max_retries=rng.randint(1, 4),
            initial_delay=rng.choice([0.0, 0.5, 30.0]),
            backoff=rng.choice([1.0, 2.0]),
            max_delay=rng.choice([None, 40.0]),
            on=frozenset({CRASHED} if chance() < 0.7 else {CRASHED, FAILED}),
        )
    mean = rng.choice([1e-5, 1e-3, 0.05, 1.0, 60.0])
    seconds = [mean * rng.lognormvariate(0, 1) for _ in range(size)]
    failing: set[int] = set()
    if chance() < 0.1:
        failing = set(range(size))
    elif chance() < 0.4:
        failing = {k for k in range(size) if chance() < 0.1}
    is_calm = chance() < 0.1
    rate = rng.choice([0.02, 0.1, 0.3])

    def fault(likely: float) -> float:
        return rate * chance() if not is_calm and chance() < likely else 0.0

    total = sum(seconds)
    return Scenario(
        spec=JobSpec(
            name="simulated",
            bundle="b",
            bundle_name="b",
            model="m:f",
            aggregates=tuple("mn"[: rng.choice([0, 1, 1, 2])]),
            line=line,
            retry=retry,
            fail_fast=chance() < 0.7,
            max_failures=rng.randint(0, size) if chance() < 0.1 else None,
            timeout_s=total * chance() * 2 if chance() < 0.1 else None,
        ),
        n_workers=rng.randint(1, 4),
        slots=rng.choice([1, 1, 2, 3]),
        seconds=seconds,
        crashes={k: rng.randint(1, 7) for k in range(size) if chance() < 0.1} if chance() < 0.5 else {},
        failing=failing,
        fingerprints=rng.choice([1, 1, 3]),
        poison={rng.randrange(size) for _ in range(rng.randint(1, 2))} if size and chance() < 0.15 else set(),
        poison_params={rng.randrange(line.n_params)} if size and chance() < 0.07 else set(),
        environment_fails=chance() < 0.02,
        missing_import_at=rng.randrange(size) if size and chance() < 0.03 else -1,
        deaths=fault(0.5),
        partitions=fault(0.4),
        late=fault(0.5),
        twice=fault(0.5),
        errs=fault(0.3),
        errs_finally=fault(0.05) / 10,
        given_back=fault(0.3),
        refusals=fault(0.1) / 3,
        unanswered=fault(0.4),
        jitter=rng.choice([0.0, 0.01, mean * 3]),
        cancels=tuple(sorted(total * chance() for _ in range(rng.choice([1, 1, 2]))))
        if chance() < 0.15
        else (),
        lease_lost_at=total * chance() if chance() < 0.02 else None,
        resumes=rng.choice([0, 0, 1, 2]),
        deaf=chance() < 0.1,
    )


def _draw_line(rng: random.Random) -> IndexLine:
    blocks = [Block(0, 0, *_draw_rectangle(rng, 0))]
    if rng.random() < 0.3:  # more replicates, then more parameter sets
        b = blocks[0]
        more = rng.randint(0, 5)
        blocks.append(Block(b.end, 0, b.n_params, b.n_replicates, more))
        blocks.append(Block(blocks[-1].end, b.n_params, rng.randint(0, 4), 0, b.n_replicates + more))
    return IndexLine(tuple(blocks))


def _draw_rectangle(rng: random.Random, r0: int) -> tuple[int, int, int]:
    n_params = rng.choice([1, 1, 2, 5, 20, 80])
    return n_params, r0, rng.randint(1, max(1, rng.choice([1, 60, 150]) // n_params))


class _Worker:
    __slots__ = ("alive", "name", "running", "slots", "waiting")

    def __init__(self, name: str, slots: int) -> None:
        self.name, self.slots = name, slots
        self.alive = True
        self.running: dict[AttemptId, c.SubmitChunk | c.SubmitAggregates] = {}
        self.waiting: deque[c.SubmitChunk | c.SubmitAggregates] = deque()


class World:
    """Plays one scenario."""

    def __init__(self, scenario: Scenario, seed: int, machine_class: type[Machine] = Machine) -> None:
        self.s, self.seed, self.machine_class = scenario, seed, machine_class
        self.spec = scenario.spec
        self.line = self.spec.line
        self.rng = random.Random(seed ^ 0x5EED)
        self.now = 0.0
        self.queue: list[tuple[float, int, str, Any]] = []
        self.ties = itertools.count()
        self.n_events = self.n_faults = 0
        self.trace: deque[tuple[float, str, object]] = deque(maxlen=40)
        # the store
        self.outcomes: dict[int, ReplicateStatus] = {}
        self.segments: dict[AttemptId, SegmentRef] = {}
        self.aggregated: dict[int, AttemptId] = {}
        self.aggregates: dict[AttemptId, AggregateRef] = {}
        self.aggregate_rows: Counter[str] = Counter()
        self.store_up = True
        self.epoch = 0
        self.n_workers_made = 0
        self.workers: dict[str, _Worker] = {}

    # One run of the job.

    def run(self) -> None:
        """Play until the job has ended, and then each resumption."""
        for _ in range(1 + self.s.resumes):
            self._run_once()
            if self.lease_lost or self.machine.state is JobState.SUCCEEDED:
                break

    def _run_once(self) -> None:
        self.epoch += 1
        self.queue.clear()
        self.n_outages = 0
        self.told: set[int] = set(self.outcomes)  # outcomes that the machine was told of
        self.told_params: set[int] = set(self.aggregated)
        self.holders: dict[int, AttemptId] = {}
        self.param_holders: dict[int, AttemptId] = {}
        self.live: dict[AttemptId, c.SubmitChunk | c.SubmitAggregates] = {}  # as the machine must see it
        self.load: dict[str, int] = {}
        self.failed_attempts: Counter[int] = Counter()
        self.not_before: dict[int, float] = {}
        self.deaths_seen: Counter[int] = Counter()
        self.param_deaths_seen: Counter[int] = Counter()
        self.ids: set[AttemptId] = set()
        self.numbers: dict[AttemptId, int] = {}
        self.unanswered: dict[AttemptId, Any] = {}
        self.receipted: set[AttemptId] = set()
        self.timers: dict[str, int] = {}
        self.state = JobState.QUEUED
        self.finished: c.Finish | None = None
        self.finalizing = False
        self.store_told_up = True
        self.lease_lost = False
        self.cancelled = False
        self.store_up = True
        self.machine = self.machine_class(
            self.spec,
            JOB,
            epoch=self.epoch,
            segments=list(self.segments.values()),
            aggregates=list(self.aggregates.values()),
        )
        self.check(self.machine.counts()[SUCCEEDED] == self._n_succeeded(), "does not know what is committed")
        self.workers.clear()
        for _ in range(self.s.n_workers):
            self._later(self.rng.random() * 0.1, "hire", None)
        for at in self.s.cancels:
            self._later(at, "tell", e.CancelAsked())
        if self.s.lease_lost_at is not None:
            self._later(self.s.lease_lost_at, "tell", e.LeaseLost())
        self._perform(self.machine.start(self.now))
        while self.queue and not self.machine.over:
            self.n_events += 1
            self.check(self.n_events < MAX_STEPS, "the job does not end")
            self.now, _, what, arg = heappop(self.queue)
            getattr(self, f"_do_{what}")(arg)
        self._check_end()

    def _later(self, delay: float, what: str, arg: object) -> None:
        heappush(self.queue, (self.now + delay, next(self.ties), what, arg))

    def _chance(self, rate: float) -> bool:
        if rate and self.rng.random() < rate:
            self.n_faults += 1
            return True
        return False

    def check(self, holds: bool, rule: str) -> None:
        """Raise `BrokenRule` unless it holds."""
        if not holds:
            raise BrokenRule(f"seed {self.seed}, t={self.now:.3f}, run {self.epoch}: {rule}{self.story()}")

    def story(self) -> str:
        """Return the last events and commands, a line each."""
        return "".join(f"\n  {at:.3f} {arrow} {what}" for at, arrow, what in self.trace)

    # What the machine is told.

    def _do_tell(self, event: e.Event) -> None:
        self.trace.append((self.now, "<-", event))
        match event:
            case e.ChunkDone():
                self._note_receipt(event.receipt)
            case e.AggregateDone():
                self.receipted.add(event.receipt.attempt)
                self._forget(event.receipt.attempt)
            case e.AttemptLost() if event.worker_died:
                if event.attempt in self.live:
                    self._forget_worker(self.live[event.attempt].worker, died=True)
            case e.AttemptLost() | e.ChunkErred():
                self._forget(event.attempt)
            case e.WorkerLeft():
                self._forget_worker(event.worker, died=event.died)
            case e.WorkerJoined():
                self.load.setdefault(event.worker, 0)
            case e.CancelAsked():
                self.cancelled = True
            case e.StoreLost():
                self.store_told_up = False
            case e.StoreBack():
                self.store_told_up = True
            case e.LeaseLost():
                self.lease_lost = True
            case e.Committed():
                self._note_committed(event)
            case _:
                pass
        self._perform(self.machine.handle(event, self.now))
        if self.n_events % 16 == 0 or self.n_events < 50:
            self._check_view()

    def _forget(self, attempt: AttemptId) -> None:
        command = self.live.pop(attempt, None)
        if command is None:
            return
        self.load[command.worker] -= 1
        for k in Ranges(_items(command)):
            holders = self.holders if isinstance(command, c.SubmitChunk) else self.param_holders
            if holders.get(k) == attempt:
                del holders[k]

    def _forget_worker(self, name: str, *, died: bool) -> None:
        if name not in self.load:
            return
        for attempt, command in list(self.live.items()):
            if command.worker == name:
                self._forget(attempt)
                if died:
                    is_chunk = isinstance(command, c.SubmitChunk)
                    (self.deaths_seen if is_chunk else self.param_deaths_seen).update(Ranges(_items(command)))
        del self.load[name]

    def _note_receipt(self, receipt: Receipt) -> None:
        self.receipted.add(receipt.attempt)
        command = self.live.get(receipt.attempt)
        if isinstance(command, c.SubmitChunk):
            for _, ranges in receipt.retry:
                for k in Ranges(ranges):
                    if k not in self.told:
                        self.failed_attempts[k] += 1
                        delay = self.spec.retry.delay_s(command.chunk.attempt_number)
                        self.not_before[k] = self.now + delay
        self._forget(receipt.attempt)

    def _note_committed(self, event: e.Committed) -> None:
        command = self.unanswered.pop(event.attempt, None)
        if command is None or not event.accepted:
            return
        if isinstance(command, c.CommitSegment | c.CommitSynthetic):
            self.told.update(_committed_items(command))
        else:
            self.told_params.update(_committed_items(command))

    # What it orders.

    def _perform(self, commands: Iterable[c.Command]) -> None:
        for command in commands:
            self.trace.append((self.now, "->", command))
            self.check(self.finished is None, "ordered after the end")
            self.check(not self.lease_lost, "ordered without a lease")
            match command:
                case c.SubmitChunk():
                    self._submit_chunk(command)
                case c.SubmitAggregates():
                    self._submit_aggregates(command)
                case (
                    c.CommitSegment()
                    | c.CommitSynthetic()
                    | c.CommitAggregates()
                    | c.CommitSyntheticAggregates()
                ):
                    self._take_commit(command)
                case c.StopAttempt():
                    self._later(self.rng.random() * (0.01 + self.s.jitter), "stop", command)
                case c.SetTimer():
                    tie = next(self.ties)
                    self.timers[command.name] = tie
                    heappush(self.queue, (max(self.now, command.at), tie, "ring", (command.name, tie)))
                case c.ChangeState():
                    self.check(self.store_told_up, "recorded a state while the store is away")
                    self.check(next_state(self.state, command.event) is command.state, "illegal transition")
                    self.state = command.state
                case c.PrepareEnvironment():
                    self._later(0.1, "environment", None)
                case c.Finalize():
                    self.check(self.store_told_up, "finalizes while the store is away")
                    self.check(not self.unanswered, "finalizes while commits are under way")
                    self.finalizing = True
                    self._later(0.1, "finalize", None)
                case c.Finish():
                    self.check(command.state is self.state, "finished in another state than recorded")
                    self.finished = command
                case c.Note():
                    pass

    def _submit(self, command: c.SubmitChunk | c.SubmitAggregates) -> None:
        attempt = command.chunk.attempt
        self.check(self.state is JobState.RUNNING, f"submitted while {self.state}")
        self.check(self.store_told_up, "submitted while the store is away")
        self.check(attempt not in self.ids, f"attempt id used twice: {attempt}")
        self.check(attempt.startswith(f"{self.epoch:04d}-"), f"attempt id without its epoch: {attempt}")
        self.check(command.worker in self.load, "submitted to a worker that left")
        self.ids.add(attempt)
        self.live[attempt] = command
        self.load[command.worker] += 1
        self.check(self.load[command.worker] <= 2 * self.s.slots, "more than a window on a worker")
        worker = self.workers.get(command.worker)
        if worker is not None and worker.alive:
            worker.waiting.append(command)
            self._start_next(worker)

    def _submit_chunk(self, command: c.SubmitChunk) -> None:
        chunk = command.chunk
        number = chunk.attempt_number
        last = 1 + self.spec.retry.max_retries
        self.check(bool(chunk.ranges), "submitted nothing")
        self.check(1 <= number <= last, f"attempt {number} of {last}")
        self.check(bool(chunk.retry_on) == (number < last), "a last attempt must store every outcome")
        for k in Ranges(chunk.ranges):
            self.check(k < self.line.size, f"{k} is not on the line")
            self.check(k not in self.told, f"replicate {k} has its outcome and is run again")
            self.check(k not in self.holders, f"replicate {k} runs twice at once")
            self.check(
                number == 1 + self.failed_attempts[k], f"replicate {k}: attempt {number} is miscounted"
            )
            self.check(self.not_before.get(k, 0) <= self.now + 1e-9, f"replicate {k} is retried too early")
            self.holders[k] = chunk.attempt
        self.numbers[chunk.attempt] = number
        self._submit(command)

    def _submit_aggregates(self, command: c.SubmitAggregates) -> None:
        held: set[int] = set()
        for segment in command.chunk.segments:
            held.update(Ranges(segment.ranges))
        for p in Ranges(command.chunk.params):
            indices = self.line.of_param(p)
            self.check(all(k in self.told for k in indices), f"aggregates {p} before it has settled")
            self.check(all(k in held for k in indices), f"aggregate {p} is not given all its segments")
            self.check(p not in self.told_params, f"aggregates {p} twice")
            self.check(p not in self.param_holders, f"aggregates {p} twice at once")
            self.param_holders[p] = command.chunk.attempt
        self._submit(command)

    # Workers.

    def _do_hire(self, _: None) -> None:
        self.n_workers_made += 1
        worker = _Worker(f"w{self.n_workers_made}", self.s.slots)
        self.workers[worker.name] = worker
        self._later(0.0, "tell", e.WorkerJoined(worker.name, worker.slots))

    def _do_environment(self, _: None) -> None:
        failed = e.EnvironmentFailed("ResolutionError", "no such package")
        self._do_tell(failed if self.s.environment_fails else e.EnvironmentReady())

    def _do_ring(self, timer: tuple[str, int]) -> None:
        if self.timers.get(timer[0]) == timer[1]:
            self._do_tell(e.TimerRang(timer[0]))

    def _start_next(self, worker: _Worker) -> None:
        while worker.alive and worker.waiting and len(worker.running) < worker.slots:
            command = next(
                (w for w in worker.waiting if isinstance(w, c.SubmitAggregates)), worker.waiting[0]
            )
            worker.waiting.remove(command)
            attempt = command.chunk.attempt
            worker.running[attempt] = command
            if isinstance(command, c.SubmitChunk):
                items = Ranges(command.chunk.ranges)
                duration = 0.002 + sum(self.s.seconds[k] for k in items)
                deadly = any(k in self.s.poison for k in items)
            else:
                duration = 0.002 + 0.001 * len(Ranges(command.chunk.params))
                deadly = any(p in self.s.poison_params for p in Ranges(command.chunk.params))
            duration += self.rng.random() * 0.002
            if deadly or self._chance(self.s.deaths):
                self._later(duration * self.rng.random(), "die", worker)
            elif self._chance(self.s.partitions):
                self._later(duration * self.rng.random(), "partition", worker)
            self._later(duration, "end", (worker, command))

    def _do_die(self, worker: _Worker) -> None:
        if not worker.alive:
            return
        worker.alive = False
        if worker.name not in self.workers:
            return  # partitioned before: nobody sees it die
        attempts = [*worker.running, *(w.chunk.attempt for w in worker.waiting)]
        if self.rng.random() < 0.5:
            self.rng.shuffle(attempts)
            for attempt in attempts:
                self._later(self._delay(), "tell", e.AttemptLost(attempt, worker_died=True))
        self._later(self._delay() + 0.001, "tell", e.WorkerLeft(worker.name, died=True))
        del self.workers[worker.name]
        self._later(1.0, "hire", None)

    def _do_partition(self, worker: _Worker) -> None:
        if worker.alive and worker.name in self.workers:
            del self.workers[worker.name]
            self._later(0.0, "tell", e.WorkerLeft(worker.name, died=False))
            self._later(1.0, "hire", None)  # its receipts still come, under the old name

    def _delay(self) -> float:
        return self.rng.random() * self.s.jitter if self.s.jitter else 0.0

    def _do_end(self, ended: tuple[_Worker, c.SubmitChunk | c.SubmitAggregates]) -> None:
        worker, command = ended
        attempt = command.chunk.attempt
        if not worker.alive or attempt not in worker.running:
            return
        del worker.running[attempt]
        if self._chance(self.s.errs):
            self._later(
                self._delay(), "tell", e.ChunkErred(attempt, "StorageError", "disk full", final=False)
            )
        elif self._chance(self.s.errs_finally):
            self._later(self._delay(), "tell", e.ChunkErred(attempt, "HandshakeError", "no", final=True))
        else:
            n = 0 if self._chance(self.s.given_back) else len(Ranges(_items(command)))
            self._hand_in(worker, command, n)
        self._start_next(worker)

    def _do_stop(self, stop: c.StopAttempt) -> None:
        worker = self.workers.get(stop.worker)
        if worker is None or not worker.alive:
            return
        if self.s.deaf and self.state is not JobState.RUNNING:  # it hangs, and no receipt will ever come
            worker.running.pop(stop.attempt, None)
            return
        if stop.attempt in worker.running:
            command = worker.running.pop(stop.attempt)
            items = Ranges(_items(command))
            deadly = self.s.poison if isinstance(command, c.SubmitChunk) else self.s.poison_params
            n = self.rng.randint(0, next((i for i, k in enumerate(items) if k in deadly), len(items)))
            self._hand_in(worker, command, n)
        else:
            waiting = next((w for w in worker.waiting if w.chunk.attempt == stop.attempt), None)
            if waiting is None:
                return
            worker.waiting.remove(waiting)
            self._hand_in(worker, waiting, 0)
        self._start_next(worker)

    def _hand_in(self, worker: _Worker, command: c.SubmitChunk | c.SubmitAggregates, n: int) -> None:
        """Deliver the receipt for the first ``n`` items: at once, late, or twice."""
        event: e.Event
        if isinstance(command, c.SubmitChunk):
            event = e.ChunkDone(self._receipt(worker, command, n))
        else:
            event = e.AggregateDone(self._aggregate_receipt(worker, command, n))
        delay = self._delay()
        if self._chance(self.s.late):
            self._later(delay, "tell", e.AttemptLost(command.chunk.attempt, worker_died=False))
            delay += self.rng.random() * 2
        self._later(delay, "tell", event)
        if self._chance(self.s.twice):
            self._later(delay + self.rng.random(), "tell", event)

    def _receipt(self, worker: _Worker, command: c.SubmitChunk, n: int) -> Receipt:
        chunk = command.chunk
        done, unstarted = Ranges(chunk.ranges).take(n)
        final: list[int] = []
        counts: Counter[ReplicateStatus] = Counter()
        again: dict[ReplicateStatus, list[int]] = {}
        failures: dict[str, FailureCount] = {}
        missing = None
        seconds = 0.0
        for k in done:
            seconds += self.s.seconds[k]
            if k == self.s.missing_import_at:
                missing = "No module named 'x'"
                unstarted |= Ranges.of(j for j in done if j >= k)
                break
            status = self._outcome(k, chunk.attempt_number)
            if status in chunk.retry_on:
                again.setdefault(status, []).append(k)
            else:
                final.append(k)
                counts[status] += 1
            if status is not SUCCEEDED:
                name = f"{status}-{k % self.s.fingerprints}"
                example = ErrorExample(fingerprint=name, status=status, error_type="E", message=name, index=k)
                count = failures[name].count + 1 if name in failures else 1
                failures[name] = FailureCount(example=example, count=count)
        segment = None
        if final:
            segment = _segment(chunk.attempt, Ranges.of(final), counts)
        return Receipt(
            job=JOB,
            attempt=chunk.attempt,
            worker=worker.name,
            host="h",
            segment=segment,
            retry=tuple((status, Ranges.of(ks).pairs) for status, ks in again.items()),
            unstarted=unstarted.pairs,
            failures=tuple(failures.values()),
            model_seconds=seconds,
            wall_seconds=seconds + 0.002,
            missing_import=missing,
        )

    def _outcome(self, k: int, number: int) -> ReplicateStatus:
        if number <= self.s.crashes.get(k, 0):
            return CRASHED
        return FAILED if k in self.s.failing else SUCCEEDED

    def _aggregate_receipt(self, worker: _Worker, command: c.SubmitAggregates, n: int) -> AggregateReceipt:
        chunk = command.chunk
        params = Ranges(chunk.params)
        stored = None
        if n == len(params):
            rows: Counter[str] = Counter()
            for p in params:
                indices = self.line.of_param(p)
                ok = sum(self.outcomes[k] is SUCCEEDED for k in indices)
                status = (
                    AggregateStatus.SUCCEEDED
                    if ok >= self.spec.needed(len(indices))
                    else AggregateStatus.SKIPPED
                )
                rows[status] += len(self.spec.aggregates)
            stored = AggregateRef(
                attempt=chunk.attempt,
                name="a",
                digest=f"digest {chunk.attempt}",
                n_bytes=1,
                params=params.pairs,
                counts=dict(rows),
                inputs=tuple(s.digest for s in chunk.segments),
            )
        return AggregateReceipt(
            job=JOB,
            attempt=chunk.attempt,
            worker=worker.name,
            host="h",
            stored=stored,
            stopped=stored is None,
            wall_seconds=0.001 * n,
        )

    # The store.

    def _take_commit(
        self,
        command: c.CommitSegment | c.CommitSynthetic | c.CommitAggregates | c.CommitSyntheticAggregates,
    ) -> None:
        self.check(self.store_told_up, "commits while the store is away")
        attempt = _committed_attempt(command)
        if isinstance(command, c.CommitSegment | c.CommitAggregates):
            self.check(attempt in self.receipted, f"commits {attempt} without a receipt")
        else:
            seen = self.deaths_seen if isinstance(command, c.CommitSynthetic) else self.param_deaths_seen
            for item in _committed_items(command):
                self.check(seen[item] >= DEADLY, "condemned after too few deaths")
        self.unanswered[attempt] = command
        self._later(self.rng.random() * 0.005, "commit", command)

    def _do_commit(self, command: Any) -> None:
        if not self.store_up:
            return  # it gets no answer; the machine asks again
        attempt = _committed_attempt(command)
        accepted, segment = True, None
        if self.n_outages < MAX_OUTAGES and self._chance(self.s.unanswered):
            self.n_outages += 1
            if self.rng.random() < 0.5:
                self._write(command)
            self.store_up = False
            self._later(0.0, "tell", e.StoreLost("database"))
            self._later(self.rng.random() * 5, "mend", None)
            return
        if self._chance(self.s.refusals) and attempt not in self.segments and attempt not in self.aggregates:
            accepted = False
        else:
            accepted, segment = self._write(command)
        self._do_tell(e.Committed(attempt, accepted, segment))

    def _do_mend(self, _: None) -> None:
        self.store_up = True
        self._do_tell(e.StoreBack())

    def _write(self, command: Any) -> tuple[bool, SegmentRef | None]:
        """Commit as the real store does: idempotent by attempt, refused if any index is covered."""
        attempt = _committed_attempt(command)
        if attempt in self.segments or attempt in self.aggregates:
            return True, self.segments.get(attempt)
        items = _committed_items(command)
        if isinstance(command, c.CommitSegment | c.CommitSynthetic):
            if any(k in self.outcomes for k in items):
                return False, None
            if isinstance(command, c.CommitSegment):
                segment, number = command.segment, self.numbers[attempt]
                self.outcomes.update((k, self._outcome(k, number)) for k in items)
            else:
                segment = _segment(attempt, items, Counter({command.status: len(items)}))
                self.outcomes.update((k, command.status) for k in items)
            self.segments[attempt] = segment
            return True, segment
        if any(p in self.aggregated for p in items):
            return False, None
        if isinstance(command, c.CommitAggregates):
            stored = command.stored
        else:
            n = len(items) * len(self.spec.aggregates)
            inputs = tuple(s.digest for s in self.segments.values())
            stored = AggregateRef(
                attempt=attempt,
                name="a",
                digest="d",
                n_bytes=1,
                params=items.pairs,
                counts={"failed": n},
                inputs=inputs,
            )
        self.aggregated.update((p, attempt) for p in items)
        self.aggregates[attempt] = stored
        self.aggregate_rows.update(stored.counts)
        return True, None

    def _do_finalize(self, _: None) -> None:
        if self.store_up:
            self._do_tell(e.Finalized())

    # What must hold.

    def _n_succeeded(self) -> int:
        return sum(status is SUCCEEDED for status in self.outcomes.values())

    def _check_view(self) -> None:
        counts = self.machine.counts()
        self.check(sum(counts.values()) == self.line.size, "the counts do not add up")
        self.check(min(counts.values()) >= 0, "negative counts")
        n_final = counts[SUCCEEDED] + sum(counts[s] for s in FAILURES)
        self.check(n_final == len(self.told), f"counts {n_final} outcomes, {len(self.told)} are committed")
        self.check(0 <= self.machine.progress <= 1, "progress outside 0..1")
        eta = self.machine.eta(self.now)
        self.check(eta is None or eta >= 0, f"eta {eta}")

    def _check_end(self) -> None:
        if self.lease_lost:
            return
        self.check(self.finished is not None, f"the job never ended; it is {self.state}")
        assert self.finished is not None
        state, counts = self.finished.state, self.machine.counts()
        self.check(state in FINAL_JOB_STATES and state is self.machine.state, f"ended as {state}")
        truth = Counter(self.outcomes.values())
        for status, n in counts.items():
            if status not in WITHOUT_OUTCOME:
                self.check(n == truth[status], f"{n} {status} were reported, {truth[status]} are stored")
        n_open = self.line.size - len(self.outcomes)
        rest, other = ReplicateStatus.NOT_RUN, ReplicateStatus.CANCELLED
        if state is JobState.CANCELLED:
            rest, other = other, rest
        self.check((counts[rest], counts[other]) == (n_open, 0), "not_run or cancelled is wrong")
        self.check(
            counts[ReplicateStatus.PENDING] == counts[ReplicateStatus.RUNNING] == 0, "still open at the end"
        )
        rows = self.machine.aggregate_counts()
        for row in (AggregateStatus.SUCCEEDED, AggregateStatus.SKIPPED, AggregateStatus.FAILED):
            self.check(
                rows[row] == self.aggregate_rows[row], f"aggregates: {rows}, stored: {self.aggregate_rows}"
            )
        self.check(sum(rows.values()) == self.machine.n_aggregates, "aggregates do not add up")
        self._check_verdict(state, n_open, rows)

    def _check_verdict(self, state: JobState, n_open: int, rows: dict[AggregateStatus, int]) -> None:
        n_ok = self._n_succeeded()
        if n_open or rows[AggregateStatus.NOT_RUN]:
            self.check(self.machine.reason != "", "ended early without a reason")
        if state is JobState.CANCELLED:
            self.check(self.cancelled, "cancelled without being asked")
        elif n_ok == self.line.size and rows[AggregateStatus.SUCCEEDED] == self.machine.n_aggregates:
            self.check(state is JobState.SUCCEEDED, f"everything succeeded and the job is {state}")
        elif n_ok:
            self.check(
                state is JobState.PARTIAL or self.s.environment_fails,
                f"some succeeded and the job is {state}",
            )
        else:
            self.check(state is JobState.FAILED, f"nothing succeeded and the job is {state}")
        for k in self.s.poison & set(self.outcomes):
            self.check(self.outcomes[k] is CRASHED, f"poison {k} ended as {self.outcomes[k]}")


def _segment(attempt: AttemptId, indices: Ranges, counts: Counter[ReplicateStatus]) -> SegmentRef:
    return SegmentRef(
        attempt=attempt,
        name="s",
        digest=f"digest {attempt}",
        n_bytes=1,
        ranges=indices.pairs,
        counts=dict(counts),
    )


def _items(command: c.SubmitChunk | c.SubmitAggregates) -> tuple[tuple[int, int], ...]:
    return command.chunk.ranges if isinstance(command, c.SubmitChunk) else command.chunk.params


def _committed_attempt(command: Any) -> AttemptId:
    match command:
        case c.CommitSegment():
            return command.segment.attempt
        case c.CommitAggregates():
            return command.stored.attempt
        case c.CommitSynthetic() | c.CommitSyntheticAggregates():
            return command.attempt
        case _:
            raise TypeError(command)


def _committed_items(command: Any) -> Ranges:
    match command:
        case c.CommitSegment():
            return Ranges(command.segment.ranges)
        case c.CommitAggregates():
            return Ranges(command.stored.params)
        case c.CommitSynthetic():
            return command.indices
        case c.CommitSyntheticAggregates():
            return command.params
        case _:
            raise TypeError(command)


def simulate(seed: int, machine_class: type[Machine] = Machine) -> World:
    """Play the scenario of this seed to its end and return the world, for its figures."""
    world = World(draw_scenario(seed), seed, machine_class)
    try:
        world.run()
    except BrokenRule:
        raise
    except Exception as error:
        raise BrokenRule(f"seed {seed}: the machine raised {error!r}{world.story()}") from error
    return world
