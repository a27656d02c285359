"""Can one driver lead 100,000,000 replicates on 10,000 workers? On paper: its machine in a world with its own clock.

The world plays workers of one slot each, whose replicates take times of which 99 % lie within a factor of 100 (mean
0.1 s), and what goes wrong in a large pool: each worker dies once in six hours and is back after a minute, one
replicate in a thousand crashes and is tried again, one receipt in a thousand comes after its attempt was given up or
never, and the driver itself is replaced once, in the middle. An aggregate for each parameter set.
Committing takes no time here; what the records really take for a segment is measured beside it.

Printed: CPU of the driver's machine per million replicates, its events per second of that CPU, the events per second of
the job that it would have to keep up with, and the peak of memory (goal: below 1 GB), the world's own included. What is
committed is kept here in arrays: a database would have it on disk.

Usage: python bench/scale.py [REPLICATES] [WORKERS] [MEAN_S]
"""

from __future__ import annotations

import gc
import math
import random
import resource
import time
from array import array
from collections import Counter
from heapq import heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from measuring import arguments, describe, folder_on_disk
from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.machine import Machine
from modelops.states import FINAL_JOB_STATES, AggregateStatus, JobState, ReplicateStatus
from modelops.store import Records
from modelops.study.ids import AttemptId, JobId, attempt_id
from modelops.study.index_line import IndexLine
from modelops.study.ranges import Ranges
from modelops.study.spec import JobSpec, RetryPolicy
from modelops.worker.messages import AggregateReceipt, AggregateRef, Receipt, SegmentRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.study.ranges import Range

JOB = JobId("job_of_scale")
PER_SET = 1_000
SIGMA = math.log(100) / (2 * 2.5758)
SPREAD = math.sqrt(math.exp(SIGMA**2) - 1)  # of a lognormal time, as a fraction of its mean
HANDING_OVER_S = 0.02  # from one chunk to the next, when none waits
TO_LIVE_S = 6 * 3600.0
BACK_AFTER_S = 60.0
CRASHED_OF = 1_000
BAD_RECEIPTS_OF = 1_000
SUCCEEDED = ReplicateStatus.SUCCEEDED


class Worker:
    """One slot, and what waits for it."""

    __slots__ = ("held", "name", "running")

    def __init__(self, name: str) -> None:
        self.name = name
        self.held: dict[AttemptId, c.SubmitChunk | c.SubmitAggregates] = {}
        self.running: AttemptId | None = None


class Committed:
    """What the store has of segments and aggregates, in arrays: 24 bytes for a segment, and more where it has gaps."""

    def __init__(self) -> None:
        self.numbers, self._lows, self._highs = array("q"), array("q"), array("q")
        self._gaps: dict[int, tuple[Range, ...]] = {}
        self.aggregates: list[tuple[int, tuple[Range, ...], array[int]]] = []
        self.n_outcomes = 0

    def add(self, ref: SegmentRef) -> None:
        if len(ref.ranges) > 1:
            self._gaps[len(self.numbers)] = ref.ranges
        self.numbers.append(_number(ref.attempt))
        self._lows.append(ref.ranges[0][0])
        self._highs.append(ref.ranges[-1][1])
        self.n_outcomes += sum(ref.counts.values())

    def add_aggregates(self, ref: AggregateRef) -> None:
        self.aggregates.append((_number(ref.attempt), ref.params, array("q", map(_number, ref.inputs))))

    def segments(self) -> Iterator[SegmentRef]:
        """Yield the segments by their first index, one at a time."""
        for i in np.argsort(np.array(self._lows), kind="stable").tolist():
            ranges = self._gaps.get(i, ((self._lows[i], self._highs[i]),))
            yield segment_ref(_attempt(self.numbers[i]), ranges)

    def refs_of_aggregates(self) -> Iterator[AggregateRef]:
        for number, params, inputs in self.aggregates:
            yield aggregate_ref(_attempt(number), params, tuple(map(_attempt, inputs)))

    def is_each_once(self, size: int) -> bool:
        """Say whether each index below ``size`` is in one segment."""
        gaps = {pair for ranges in self._gaps.values() for pair in ranges}
        whole = [i for i in range(len(self.numbers)) if i not in self._gaps]
        lows = np.sort([*(self._lows[i] for i in whole), *(lo for lo, _ in gaps)])
        highs = np.sort([*(self._highs[i] for i in whole), *(hi for _, hi in gaps)])
        return bool(lows[0] == 0 and highs[-1] == size and (lows[1:] == highs[:-1]).all())


def _number(attempt: str) -> int:
    epoch, _, number = attempt.partition("-")
    return int(epoch) << 40 | int(number)


def _attempt(number: int) -> AttemptId:
    return attempt_id(*divmod(number, 1 << 40))


def segment_ref(attempt: AttemptId, ranges: tuple[Range, ...]) -> SegmentRef:
    counts = {SUCCEEDED: sum(hi - lo for lo, hi in ranges)}
    return SegmentRef(attempt=attempt, name="s", digest=attempt, n_bytes=1, ranges=ranges, counts=counts)


def aggregate_ref(attempt: AttemptId, params: tuple[Range, ...], inputs: tuple[str, ...]) -> AggregateRef:
    counts = {AggregateStatus.SUCCEEDED: sum(hi - lo for lo, hi in params)}
    return AggregateRef(
        attempt=attempt, name="a", digest=attempt, n_bytes=1, params=params, counts=counts, inputs=inputs
    )


class World:
    """Plays the job to its end. ``cpu_s`` and ``n_events`` are the machine's."""

    def __init__(self, n_params: int, n_workers: int, mean_s: float) -> None:
        self.spec = JobSpec(
            name="scale", bundle="b", bundle_name="b", model="m:f", aggregates=("m:g",),
            line=IndexLine.of(n_params, PER_SET), retry=RetryPolicy(max_retries=3, initial_delay=0.0),
        )  # fmt: skip
        self.mean_s, self.random = mean_s, random.Random(1)
        self.now, self.n_ties = 0.0, 0
        self.queue: list[tuple[float, int, Any, Any]] = []
        self.workers: dict[str, Worker] = {}
        self.n_workers = n_workers
        self.store = Committed()
        self.state, self.reason = JobState.QUEUED, ""
        self.cpu_s, self.n_events, self.n_drivers = 0.0, 0, 0
        self.met: Counter[str] = Counter()

    def play(self) -> None:
        for n in range(self.n_workers):
            self.later(self.random.random() * 30, self.join, f"w{n}")
        self.drive()
        halfway = self.spec.line.size // 2
        while self.state not in FINAL_JOB_STATES:
            self.now, _, happen, arg = heappop(self.queue)
            happen(arg)
            if self.n_drivers == 1 and self.store.n_outcomes > halfway:
                self.drive()

    def drive(self) -> None:
        """Let a driver begin with what is committed; it asks all workers what they run."""
        self.n_drivers += 1
        self.timers: dict[str, int] = {}
        began = time.process_time()
        self.machine = Machine(
            self.spec, JOB, epoch=self.n_drivers, segments=self.store.segments(),
            aggregates=self.store.refs_of_aggregates(), state=self.state, adopt=self.n_drivers > 1,
        )  # fmt: skip
        commands = self.machine.start(self.now)
        self.cpu_s += time.process_time() - began
        self.perform(commands)
        for name in self.workers:
            self.tell(e.WorkerJoined(name, 1))

    def later(self, delay: float, happen: Any, arg: Any) -> None:
        self.n_ties += 1
        heappush(self.queue, (self.now + delay, self.n_ties, happen, arg))

    def tell(self, event: e.Event) -> None:
        began = time.process_time()
        commands = self.machine.handle(event, self.now)
        self.cpu_s += time.process_time() - began
        self.n_events += 1
        self.perform(commands)

    def perform(self, commands: list[c.Command]) -> None:
        for command in commands:
            self.do(command)

    def do(self, command: c.Command) -> None:
        match command:
            case c.SubmitChunk() | c.SubmitAggregates():
                worker = self.workers.get(command.worker)
                if worker is not None:  # otherwise its loss is under way
                    worker.held[command.chunk.attempt] = command
                    self.start(worker)
            case c.CommitSegment():
                self.store.add(command.segment)
                self.tell(e.Committed(command.segment.attempt))
            case c.CommitAggregates():
                self.store.add_aggregates(command.stored)
                self.tell(e.Committed(command.stored.attempt))
            case c.ChangeState():
                self.state = command.state
            case c.SetTimer():
                self.timers[command.name] = self.n_ties + 1
                self.later(max(0.0, command.at - self.now), self.ring, (command.name, self.n_ties + 1))
            case c.PrepareEnvironment():
                self.later(1.0, self.tell, e.EnvironmentReady())
            case c.Finalize():
                self.later(1.0, self.tell, e.Finalized())
            case c.AskForAttempts():
                self.later(0.1, self.answer, command.worker)
            case c.RecallAttempt():
                self.recall(command)
            case c.StopAttempt():
                self.stop(command)
            case c.CommitSynthetic() | c.CommitSyntheticAggregates() | c.CommitNotNeeded():
                raise AssertionError(f"nothing here is deadly: {command}")
            case c.RecordRetry() | c.Note() | c.Finish():
                self.met[type(command).__name__] += 1

    def ring(self, timer: tuple[str, int]) -> None:
        if self.timers.get(timer[0]) == timer[1]:
            self.tell(e.TimerRang(timer[0]))

    # Workers.

    def join(self, name: str) -> None:
        self.workers[name] = Worker(name)
        self.later(self.random.expovariate(1 / TO_LIVE_S), self.die, self.workers[name])
        self.tell(e.WorkerJoined(name, 1))

    def die(self, worker: Worker) -> None:
        self.met["workers lost"] += 1
        del self.workers[worker.name]
        self.later(BACK_AFTER_S, self.join, worker.name)
        self.tell(e.WorkerLeft(worker.name, died=False))

    def answer(self, name: str) -> None:
        worker = self.workers.get(name)
        if worker is not None:
            found = tuple(_found(attempt, submitted) for attempt, submitted in worker.held.items())
            self.met["adopted"] += len(found)
            self.tell(e.AttemptsFound(name, found))

    def recall(self, command: c.RecallAttempt) -> None:
        worker = self.workers.get(command.worker)
        if worker is None or command.attempt not in worker.held:
            return
        if worker.running == command.attempt:  # what it has not begun could be handed in; here it is not
            self.tell(e.AttemptBegun(command.attempt))
        else:
            self.met["recalled"] += 1
            del worker.held[command.attempt]
            self.tell(e.AttemptRecalled(command.attempt))

    def stop(self, command: c.StopAttempt) -> None:
        worker = self.workers.get(command.worker)
        submitted = worker.held.pop(command.attempt, None) if worker is not None else None
        if worker is None or submitted is None:
            return
        self.met["stopped"] += 1
        if worker.running == command.attempt:
            worker.running = None
            self.start(worker)
        self.tell(e.AttemptLost(command.attempt, worker_died=False))

    def start(self, worker: Worker) -> None:
        if worker.running is None and worker.held:
            attempt, submitted = next(iter(worker.held.items()))
            worker.running = attempt
            if isinstance(submitted, c.SubmitChunk):
                n = sum(hi - lo for lo, hi in submitted.chunk.ranges)
                model_s = self.model_s(n)
            else:
                n = sum(hi - lo for lo, hi in submitted.chunk.params)
                model_s = 0.002 * n
            if model_s > 1.0:
                self.later(1.0, self.begun, (worker, attempt))
            self.later(model_s + HANDING_OVER_S, self.end, (worker, attempt, n, model_s))

    def model_s(self, n: int) -> float:
        """Draw how long ``n`` replicates take: their sum is nearly normal when they are many."""
        if n > 30:
            return self.mean_s * max(0.1 * n, self.random.gauss(n, SPREAD * math.sqrt(n)))
        return sum(self.random.lognormvariate(math.log(self.mean_s) - SIGMA**2 / 2, SIGMA) for _ in range(n))

    def begun(self, of: tuple[Worker, AttemptId]) -> None:
        worker, attempt = of
        if worker.running == attempt and self.workers.get(worker.name) is worker:
            self.tell(e.AttemptBegun(attempt))

    def end(self, of: tuple[Worker, AttemptId, int, float]) -> None:
        worker, attempt, n, model_s = of
        if worker.running != attempt or self.workers.get(worker.name) is not worker:
            return
        submitted, worker.running = worker.held.pop(attempt), None
        event = self.receipt(worker, submitted, n, model_s)
        self.start(worker)
        if self.random.random() * BAD_RECEIPTS_OF < 1:
            self.met["receipts late or lost"] += 1
            self.tell(e.AttemptLost(attempt, worker_died=False))
            if self.random.random() < 0.5:
                return
        self.tell(event)

    def receipt(self, worker: Worker, submitted: Any, n: int, model_s: float) -> e.Event:
        chunk = submitted.chunk
        if isinstance(submitted, c.SubmitAggregates):
            inputs = tuple(segment.digest for segment in chunk.segments)
            stored = aggregate_ref(chunk.attempt, chunk.params, inputs)
            return e.AggregateDone(
                AggregateReceipt(
                    job=JOB,
                    attempt=chunk.attempt,
                    worker=worker.name,
                    host="h",
                    stored=stored,
                    wall_seconds=model_s,
                )
            )
        ranges: tuple[Range, ...] = chunk.ranges
        retry: tuple[tuple[ReplicateStatus, tuple[Range, ...]], ...] = ()
        if chunk.retry_on and self.random.random() * CRASHED_OF < n:
            self.met["replicates crashed"] += 1
            lo, hi = ranges[0]
            k = lo + int(self.random.random() * (hi - lo))
            crashed = Ranges(((k, k + 1),))
            ranges, retry = (Ranges(ranges) - crashed).pairs, ((ReplicateStatus.CRASHED, crashed.pairs),)
        segment = segment_ref(chunk.attempt, ranges) if ranges else None
        return e.ChunkDone(
            Receipt(
                job=JOB,
                attempt=chunk.attempt,
                worker=worker.name,
                host="h",
                segment=segment,
                retry=retry,
                model_seconds=model_s,
                wall_seconds=model_s,
            )
        )


def _found(attempt: AttemptId, submitted: c.SubmitChunk | c.SubmitAggregates) -> e.Found:
    if isinstance(submitted, c.SubmitChunk):
        return e.Found(attempt, Ranges(submitted.chunk.ranges), submitted.chunk.attempt_number)
    return e.Found(attempt, Ranges())


def commit_s(segments: list[SegmentRef]) -> float:
    """Return the CPU seconds that the records (SQLite, on disk) take for a segment, 20 in one transaction."""
    with folder_on_disk() as folder:
        records = Records.open(f"sqlite:///{folder}/modelops.db")
        records.create_job(JOB, b"{}")
        epoch = records.take_lease(JOB, "bench")
        began = time.process_time()
        for at in range(0, len(segments), 20):
            assert all(records.commit_segments(JOB, epoch, segments[at : at + 20]))
        seconds = time.process_time() - began
        records.close()
    return seconds / len(segments)


def main() -> None:
    said = arguments(__doc__)
    n = int(float(said[0])) if said else 100_000_000
    n_workers = int(said[1]) if len(said) > 1 else 10_000
    mean_s = float(said[2]) if len(said) > 2 else 0.1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.disable()  # the world leaves no circles; the machine's own cost is what is asked for
    world = World(n // PER_SET, n_workers, mean_s)
    began = time.perf_counter()
    world.play()
    wall_s = time.perf_counter() - began
    counts, size = world.machine.counts(), world.spec.line.size
    assert world.state is JobState.SUCCEEDED, (world.state, world.reason)
    peak, n_segments = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(world.store.numbers)
    assert counts[SUCCEEDED] == size == world.store.n_outcomes
    assert world.store.is_each_once(size)
    assert world.machine.aggregate_counts()[AggregateStatus.SUCCEEDED] == n // PER_SET
    ideal_s, n_events, cpu_s = size * mean_s / n_workers, world.n_events, world.cpu_s
    needed, can = n_events / world.now, n_events / cpu_s
    each_s, rate = commit_s(list(islice(world.store.segments(), 4_000))), n_segments / world.now
    print(f"{size:,} replicates of {mean_s:g} s on {n_workers:,} workers")
    print(f"  {world.now:,.0f} s, {world.now / ideal_s:.2f} of the ideal; {n_events:,} events,", end=" ")
    print(f"{n_segments:,} segments, {len(world.store.aggregates):,} of aggregates; {dict(world.met)}")
    print(f"  driver: {1e6 * cpu_s / size:.2f} s of CPU per million replicates, {1e6 / can:.1f} us per event")
    print(f"  it can do {can:,.0f} events per second, and needs {needed:,.0f}: {needed / can:.1%} of a core")
    print(f"  records: {1e6 * each_s:.0f} us of CPU per segment, {rate:,.0f} per second:", end=" ")
    print(f"{each_s * rate:.1%} of a core")
    print(
        f"  peak of memory {peak / 1024:,.0f} MiB, {before / 1024:,.0f} before it began (goal: below 1 GB);",
        end=" ",
    )
    print(f"the bench took {wall_s:.0f} s")
    describe("msgspec", "sqlalchemy")


if __name__ == "__main__":
    main()
