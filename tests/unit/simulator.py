"""A world for the driver's machine: its own clock, workers, a store, drivers that come and go, and faults.

`simulate(seed)` builds a scenario, plays it to its end and checks, at every command and at the end, what must
hold whatever goes wrong. A broken rule raises `BrokenRule` with the seed and the last events. `simulate.py`
plays many of them.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
from simulator_driver import Driver, Submit
from simulator_scenario import EVENTS_OF_ADDED, EVENTS_OF_RUN_MORE, FAULTS, Scenario, draw_scenario
from simulator_store import (
    RealStore,
    Store,
    has_number,
    integers,
    number_of,
    ranges_of,
    segment_of,
    watched_of,
)

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.machine import STOP_GRACE_S, Machine
from modelops.states import FINAL_JOB_STATES, AggregateStatus, JobState, ReplicateStatus
from modelops.store.records import LeaseLostError
from modelops.study.extension import extended_spec
from modelops.study.ids import JobId, attempt_id, part_id
from modelops.study.ranges import EMPTY, Ranges
from modelops.worker.messages import (
    AggregateReceipt,
    AggregateRef,
    Chunk,
    ErrorExample,
    FailureCount,
    Receipt,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from simulator_store import Commit

    from modelops.study.ids import AttemptId
    from modelops.study.ranges import Range
    from modelops.study.spec import JobSpec
    from modelops.worker.messages import NoNumbers

JOB = JobId("job_simulated")
WITHOUT_OUTCOME = (
    ReplicateStatus.PENDING,
    ReplicateStatus.RUNNING,
    ReplicateStatus.NOT_RUN,
    ReplicateStatus.CANCELLED,
)
SUCCEEDED, CRASHED, NOT_NEEDED = (
    ReplicateStatus.SUCCEEDED,
    ReplicateStatus.CRASHED,
    ReplicateStatus.NOT_NEEDED,
)
MAX_STEPS = 30_000
FEWEST_MORE = 4  # events; a job is extended for no fewer
MOST_MORE_RUNS = 3  # of a job that has made too few events
HIRED_WITHIN_S = 0.1  # as a run begins
NEVER_SO_MANY = 900_000  # attempts
SAY_BEGUN_AFTER_S = 1.0  # as workers do
END_S = STOP_GRACE_S + 20.0  # after a timeout, with all there
LEASE_S = 2.0  # without a sign of life, then another driver takes over


class BrokenRule(AssertionError):  # noqa: N818  it is a finding, not an error of the program
    """The machine did something that must never happen."""


class Task:
    """An attempt as its worker sees it, and the drivers that wait for its receipt."""

    __slots__ = ("attempt", "command", "drivers", "items", "parts")

    def __init__(self, command: Submit, items: Sequence[int], driver: Driver) -> None:
        self.command, self.items, self.drivers = command, items, [driver]
        self.attempt = command.chunk.attempt
        self.parts: tuple[Receipt, ...] = ()


class Worker:
    """A worker, its tasks, and the receipts that nobody took."""

    __slots__ = ("alive", "busy", "home", "name", "running", "slots", "table", "waiting")

    def __init__(self, name: str, slots: int, home: str) -> None:
        self.name, self.slots, self.home, self.alive = name, slots, home, True
        self.busy = 0  # slots that another job has
        self.running: dict[AttemptId, Task] = {}
        self.waiting: list[Task] = []
        self.table: dict[AttemptId, tuple[Task, e.ChunkDone | e.AggregateDone]] = {}


class World:
    """Plays one scenario. ``traced``: keeps the last events and commands, for `story`; what happens is the same."""

    def __init__(self, scenario: Scenario, seed: int, *, traced: bool = False) -> None:
        self.s, self.seed = scenario, seed
        self.be(scenario.spec)
        self.seconds = scenario.seconds
        self.asked_pools = scenario.spec.asked_pools
        self.all_succeed = not scenario.crashes and not scenario.failing and scenario.missing_import_at < 0
        self.random = random.Random(seed ^ 0x5EED).random
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.n_ties = self.n_events = self.n_commands = self.n_faults = self.n_workers_made = 0
        self.occasions = dict.fromkeys(FAULTS, 0)
        self.faults = scenario.occasions()
        self.strikes = self.faults["command"]
        self.trace: deque[tuple[float, int, str, object]] | None = deque(maxlen=40) if traced else None
        self.store: Store = (RealStore if scenario.real_store else Store)(scenario.spec, scenario.outcome)
        self.ids: set[AttemptId] = set()
        self.begun: set[int] = set()  # indices that were on a worker
        self.workers: dict[str, Worker] = {}
        self.drivers: list[Driver] = []
        self.cancelled = self.ended = False
        self.began = self.undisturbed_since = 0.0  # this run; since when driver and store are there
        self.settled_at = 0.0  # when result files began to be written

    # One run of the job.

    def run(self) -> None:
        """Play until the job has ended, and again each time that it is resumed, repaired or extended."""
        self._run_once()
        for n in range(1, 1 + self.s.resumes + MOST_MORE_RUNS):
            missing = self.s.enough - self.n_events
            if self.s.enough and missing < FEWEST_MORE:
                break
            if n > self.s.resumes or (n not in self.s.repairs and self.store.state is JobState.SUCCEEDED):
                if not self.s.enough:
                    break
                self._go_on(missing)
            elif n in self.s.repairs:
                self.store.repair()
            else:
                self.store.begin_again()
            self._run_once()

    def be(self, spec: JobSpec) -> None:
        """Let the job be this from now on."""
        self.spec, self.line, self.size = spec, spec.line, spec.line.size

    def _go_on(self, missing: int) -> None:
        """Let a job that has ended be run again, so that it makes about so many events: extended, or what is left."""
        n_open = self.size - len(self.store.outcomes)
        wanted = int((missing - EVENTS_OF_RUN_MORE) / EVENTS_OF_ADDED) - n_open
        if wanted <= 0 and n_open and self.store.state is not JobState.SUCCEEDED:
            self.store.begin_again()
            return
        if missing < EVENTS_OF_RUN_MORE and self.store.segments:
            self.store.repair()
            return
        line = self.line
        most = max(n for _, _, n in line.replicates())
        more, n_new = max(1, wanted // line.n_params), max(1, wanted // most)
        if abs(more * line.n_params - wanted) <= abs(n_new * most - wanted):
            self.be(extended_spec(self.spec, replicates=most + more))
        else:
            self.be(extended_spec(self.spec, n_more_params=n_new))
        while len(self.seconds) < self.size:
            self.seconds = self.seconds * 2
        self.store.extend(self.spec)

    def forget(self) -> None:
        """Let go of all who know each other. Of what is in no circle, nothing needs to be collected."""
        self.queue.clear()
        self.workers.clear()
        for driver in self.drivers:
            vars(driver.machine).clear()
            vars(driver).clear()
        self.drivers.clear()

    def _run_once(self) -> None:
        self.forget()
        self.began = self.undisturbed_since = self.now
        self.store.up = True
        self.cancelled = self.ended = False
        for n in range(self.s.n_workers):
            self.later_by_chance(HIRED_WITHIN_S, self._hire, self.s.homes[n % len(self.s.homes)])
        for at in self.s.cancels:
            self.later(at, self._cancel, None)
        self._take_over()
        queue = self.queue
        while queue and not self.ended:
            self.now, _, happen, arg = heappop(queue)
            self.n_events = n = self.n_events + 1
            if n > MAX_STEPS:
                self.broken("the job does not end")
            happen(arg)
        if not self.ended or self.holder.finished is not None:
            self._check_end(self.holder)  # otherwise the driver died when all was recorded

    def _take_over(self, _: object = None) -> None:
        """Let a new driver take the lease and begin with what the store knows."""
        if not self.store.up:
            self.later(1.0, self._take_over, None)
            return
        if self.store.state in FINAL_JOB_STATES:
            return
        self.undisturbed_since = self.now
        store = self.store
        epoch = store.take_lease()
        segments, aggregates, retried = store.known(self.now)
        self.machine = Machine(
            self.spec,
            JOB,
            epoch=epoch,
            segments=segments,
            aggregates=aggregates,
            retried=retried,
            state=store.state,
            reason=store.reason,
            used_s=self.now - self.began,
            leave=None if store.left is None else Ranges.of(store.left),
            adopt=epoch > 1,
            after_epoch=store.after_epoch,
        )
        self.holder = driver = Driver(self, self.machine, epoch)
        self.drivers.append(driver)
        self.check(self.machine.counts()[SUCCEEDED] == store.n_succeeded, "does not know what is committed")
        for worker in self.workers.values():
            self.later(0.0, driver.deliver, self._joined(worker))
        driver.perform(self.machine.start(self.now))

    @property
    def finished(self) -> c.Finish | None:
        """How the last driver ended the job."""
        return self.holder.finished

    @property
    def outcomes(self) -> dict[int, ReplicateStatus]:
        """What the store holds of each replicate."""
        return self.store.outcomes

    # The clock, and chance.

    def later(self, delay: float, happen: Callable[[Any], None], arg: object) -> None:
        """Let something happen."""
        self.n_ties = tie = self.n_ties + 1
        heappush(self.queue, (self.now + delay, tie, happen, arg))

    def later_by_chance(self, most: float, happen: Callable[[Any], None], arg: object) -> None:
        """Let something happen soon."""
        self.n_ties = tie = self.n_ties + 1
        heappush(self.queue, (self.now + self.random() * most, tie, happen, arg))

    def set_timer(self, driver: Driver, command: c.SetTimer) -> int:
        """Set a timer, and return what tells it from earlier ones of its name."""
        self.n_ties = tie = self.n_ties + 1
        timer = (driver, command.name, tie)
        heappush(self.queue, (max(self.now, command.at), tie, self._ring, timer))
        return tie

    def _ring(self, timer: tuple[Driver, str, int]) -> None:
        driver, name, tie = timer
        if driver.timers.get(name) == tie:
            driver.deliver(e.TimerRang(name))

    def wrong(self, occasion: str) -> tuple[str, ...]:
        """Return what goes wrong at this occasion: mostly nothing."""
        self.occasions[occasion] = n = self.occasions[occasion] + 1
        faults = self.faults[occasion]
        if n not in faults:
            return ()
        found = faults[n]
        self.n_faults += len(found)
        return found

    def check(self, holds: bool, rule: str) -> None:
        """Raise `BrokenRule` unless it holds."""
        if not holds:
            self.broken(rule)

    def broken(self, rule: str) -> NoReturn:
        """Raise `BrokenRule`."""
        raise BrokenRule(f"seed {self.seed}, t={self.now:.3f}: {rule}")

    def story(self) -> str:
        """Return the last events and commands, a line each."""
        return "".join(f"\n  {at:.3f} driver {n} {arrow} {what}" for at, n, arrow, what in self.trace or ())

    def _tell_all(self, event: e.Event) -> None:
        for driver in self.drivers:
            driver.tell(event)

    # Drivers.

    def strike(self, driver: Driver) -> bool:
        """Let the fault of this moment hit a driver; return whether it goes on."""
        kind = self.strikes[self.n_commands][0]
        if driver is not self.holder:
            return True
        self.n_faults += 1
        if self.trace is not None:
            self.trace.append((self.now, driver.epoch, "!!", kind))
        if kind == "rival":
            self.later_by_chance(0.1, self._take_over, None)
            return True
        if kind == "crash":
            driver.alive = False
            for worker in self.workers.values():  # Dask drops what a client that is gone had waiting
                worker.waiting = [t for t in worker.waiting if any(d.alive for d in t.drivers)]
            self.later_by_chance(2 * LEASE_S, self._take_over, None)
            self.ended = self.store.state in FINAL_JOB_STATES
            return False
        driver.asleep = True
        sleep = self.random() * 3 * LEASE_S
        self.later(sleep, driver.wake, None)
        if sleep > LEASE_S:
            self.later(LEASE_S, self._take_over, None)
        return False

    def _cancel(self, _: object) -> None:
        holder = self.holder
        if not holder.alive or holder.asleep or not holder.is_holder:
            self.later(0.5, self._cancel, None)
            return
        self.cancelled = True
        self.n_faults += 1
        holder.tell(e.CancelAsked())

    def do_environment(self, driver: Driver) -> None:
        """Answer PrepareEnvironment."""
        failed = e.EnvironmentFailed("ResolutionError", "no such package")
        driver.tell(failed if self.s.environment_fails else e.EnvironmentReady())

    def do_finalize(self, driver: Driver) -> None:
        """Answer Finalize."""
        if self.store.up:
            driver.tell(e.Finalized())

    # Workers.

    def _hire(self, home: str) -> None:
        self.n_workers_made += 1
        worker = Worker(f"w{self.n_workers_made}", self.s.slots, home)
        self.workers[worker.name] = worker
        if self.store.after_epoch and self.now <= self.began + HIRED_WITHIN_S and self.wrong("again"):
            self._leave_behind(worker)
        self._tell_all(self._joined(worker))

    def _leave_behind(self, worker: Worker) -> None:
        """Let a worker still run what an earlier run of the job has begun, and nobody is told of but who asks."""
        items = [k for k in range(self.size) if k not in self.store.outcomes][:2]
        if not items:
            return
        epoch = self.store.after_epoch
        attempt = attempt_id(epoch, NEVER_SO_MANY + self.n_workers_made)
        chunk = Chunk(job=JOB, attempt=attempt, epoch=epoch, ranges=ranges_of(items).pairs)
        task = Task(c.SubmitChunk(chunk, worker.name), items, self.holder)
        task.drivers = []
        worker.running[attempt] = task
        self.store.numbers[attempt] = 1
        self.begun.update(items)
        self.later_by_chance(10.0, self._end, (worker, task))

    def _joined(self, worker: Worker) -> e.WorkerJoined:
        if self.n_workers_made & 1:
            return e.WorkerJoined(worker.name, worker.slots, worker.home)
        return e.WorkerJoined(worker.name, worker.slots, labels=(worker.home,))

    def may_use(self, home: str) -> bool:
        """Say whether the job may run on the workers of a pool."""
        asked = self.asked_pools
        return not asked or home.lower().replace("_", "-").replace(".", "-") in asked

    def do_submit(self, asked: tuple[Driver, Submit, Sequence[int]]) -> None:
        """Give a worker a task, if it is still there, and if who sent it is."""
        driver, command, items = asked
        worker = self.workers.get(command.worker)
        if worker is not None and driver.alive:
            if not self.may_use(worker.home):
                self.broken("ran on a worker that is of none of its pools")
            task = Task(command, items, driver)
            worker.waiting.append(task)
            if self.wrong("submit") and not worker.busy:
                worker.busy = 1
                self.later_by_chance(10.0, self._free, worker)
            self._start_next(worker)
            if worker.waiting and worker.waiting[-1] is task and self.wrong("wait"):
                self.later(
                    2.0, driver.deliver, e.AttemptWaits(task.attempt)
                )  # perhaps it does no more by then

    def _free(self, worker: Worker) -> None:
        worker.busy = 0
        self._start_next(worker)

    def _start_next(self, worker: Worker) -> None:
        while worker.waiting and worker.alive and len(worker.running) < worker.slots - worker.busy:
            waiting = worker.waiting
            i = 0
            if len(waiting) > 1:
                for n, t in enumerate(waiting):
                    if isinstance(t.command, c.SubmitAggregates):
                        i = n
                        break
            task = waiting.pop(i)
            worker.running[task.attempt] = task
            if task.command.chunk.alone:
                for driver in task.drivers:
                    self.later(0.0, driver.deliver, e.AttemptBegun(task.attempt))
            duration = 0.002 + self.random() * 0.002
            items, is_chunk = task.items, isinstance(task.command, c.SubmitChunk)
            if is_chunk:
                seconds, deadly = self.seconds, self.s.poison
                for k in items:
                    duration += seconds[k]
                self.begun.update(items)
                if duration > SAY_BEGUN_AFTER_S:
                    self.later(SAY_BEGUN_AFTER_S, self._say, (worker, task, e.AttemptBegun(task.attempt)))
                if len(items) > 1 and self.wrong("many"):
                    self.later_by_chance(duration, self._part, (worker, task))
            else:
                deadly = self.s.poison_params
                duration += 0.001 * len(items)
            if wrong := self.wrong("begin"):
                if "checkpoint" in wrong and is_chunk:
                    self.later(duration / 2, self._say, (worker, task, e.Checkpointed(items[-1])))
                if "death" in wrong:
                    self.later_by_chance(duration, self._die, worker)
                elif "partition" in wrong:
                    self.later_by_chance(duration, self._partition, worker)
            if deadly and not deadly.isdisjoint(items):
                self.n_faults += 1
                self.later_by_chance(duration, self._die, worker)
            self.later(duration, self._end, (worker, task))

    def _say(self, said: tuple[Worker, Task, e.Event]) -> None:
        """Let a worker say something of an attempt that runs."""
        worker, task, event = said
        if worker.alive and task.attempt in worker.running:
            for driver in task.drivers:
                driver.deliver(event)

    def _die(self, worker: Worker) -> None:
        if not worker.alive:
            return
        worker.alive = False
        if self.workers.pop(worker.name, None) is None:
            return  # partitioned before: nobody sees it die
        attempts = [*worker.running, *(t.attempt for t in worker.waiting)]
        delay = self._delay() + 0.001
        for driver in self.drivers:
            if self.random() < 0.5:
                for attempt in sorted(attempts, key=lambda _: self.random()):
                    self.later(self._delay(), driver.deliver, e.AttemptLost(attempt, worker_died=True))
            self.later(delay, driver.deliver, e.WorkerLeft(worker.name, died=True))
        self.later(1.0, self._hire, worker.home)

    def _partition(self, worker: Worker) -> None:
        if worker.alive and self.workers.pop(worker.name, None) is not None:
            self._tell_all(e.WorkerLeft(worker.name, died=False))
            if self.wrong("gone"):
                self.later_by_chance(3.0, self._rejoin, worker)
            else:
                self.later(1.0, self._hire, worker.home)  # its receipts still come, under the old name

    def _rejoin(self, worker: Worker) -> None:
        if worker.alive:
            self.workers[worker.name] = worker
            self._tell_all(self._joined(worker))
        else:
            self._hire(worker.home)

    def _delay(self) -> float:
        return self.random() * self.s.jitter if self.s.jitter else 0.0

    def _end(self, ended: tuple[Worker, Task]) -> None:
        worker, task = ended
        if not worker.alive or task.attempt not in worker.running:
            return
        del worker.running[task.attempt]
        wrong = self.wrong("end")
        if self.s.cursed in task.items and isinstance(task.command, c.SubmitChunk):
            self.n_faults += 1
            wrong = ("err",)
        if not wrong:
            self._hand_in(worker, task, len(task.items))
        elif "err" in wrong:
            self._answer(task, e.ChunkErred(task.attempt, "StorageError", "disk full", final=False))
        elif "unfit" in wrong:
            self._answer(
                task, e.ChunkErred(task.attempt, "IndexUnreachableError", "no", final=False, unfit=True)
            )
        elif "fatal" in wrong:
            self._answer(task, e.ChunkErred(task.attempt, "HandshakeError", "no", final=True))
        else:
            self._hand_in(worker, task, 0)  # given back
        if worker.waiting:
            self._start_next(worker)

    def _part(self, of: tuple[Worker, Task]) -> None:
        """Let a worker hand in what it has finished of a chunk, and give back all but the replicate that runs."""
        worker, task = of
        command, items = task.command, task.items
        if not worker.alive or task.attempt not in worker.running or not isinstance(command, c.SubmitChunk):
            return
        if task.parts:
            return
        n = int(self.random() * len(items))
        rest = [*items[:n], *items[n + 1 :]]
        if not self.s.poison.isdisjoint(items[:n]) or self.s.missing_import_at in items[:n]:
            return
        part = part_id(task.attempt)
        self.store.numbers[part] = command.chunk.attempt_number
        whole = self._chunk_receipt(worker, task, command, n)
        segment, unstarted = whole.segment, ranges_of(items[n + 1 :]).pairs
        if segment is not None:
            watched = (segment.watched, segment.no_numbers)
            segment = segment_of(part, segment.ranges, segment.counts, watched)
        receipt = msgspec.structs.replace(
            whole, attempt=part, part_of=task.attempt, segment=segment, unstarted=unstarted
        )
        other = Task(command, rest, task.drivers[0])
        other.attempt, other.drivers = part, task.drivers
        task.items, task.parts = [items[n]], (receipt,)
        event = e.ChunkDone(receipt)
        worker.table[part] = (other, event)
        wrong = self.wrong("receipt")
        if (
            "never" not in wrong and self.random() < 0.7
        ):  # an announcement gets lost more easily than a result
            self._answer(task, event, self.random() * 2 if "late" in wrong else 0.0)
        if "twice" in wrong:
            self._answer(task, event, 0.01 + self.random() * 2)

    def do_recall(self, asked: tuple[Driver, c.RecallAttempt]) -> None:
        """Give an attempt back that has not begun, or what of it has not."""
        driver, recall = asked
        worker = self.workers.get(recall.worker)
        if worker is None:
            return
        task = next((t for t in worker.waiting if t.attempt == recall.attempt), None)
        if task is None:
            driver.tell(e.AttemptBegun(recall.attempt))
            task = worker.running.get(recall.attempt)
            if task is not None and len(task.items) > 1:
                self.later_by_chance(0.3, self._part, (worker, task))
            return
        worker.waiting.remove(task)
        driver.tell(e.AttemptRecalled(recall.attempt))
        self._answer(task, self._receipt(worker, task, 0), self.random() * 2)

    def do_stop(self, stop: c.StopAttempt) -> None:
        """Stop an attempt: it hands in a part of its items, as far as it has come."""
        worker = self.workers.get(stop.worker)
        if worker is None:
            return
        task = worker.running.pop(stop.attempt, None)
        if task is not None:
            if self.machine.state is not JobState.RUNNING and self.wrong("stop"):
                return  # it hangs, and no receipt will ever come
            deadly = self.s.poison if isinstance(task.command, c.SubmitChunk) else self.s.poison_params
            items = task.items
            most = next((i for i, k in enumerate(items) if k in deadly), len(items)) if deadly else len(items)
            self._hand_in(worker, task, int(self.random() * (most + 1)))
        else:
            task = next((t for t in worker.waiting if t.attempt == stop.attempt), None)
            if task is None:
                return
            worker.waiting.remove(task)
            self._tell_all(e.AttemptRecalled(stop.attempt))
            self._answer(task, self._receipt(worker, task, 0), self.random() * 2)
        self._start_next(worker)

    def do_ask(self, asked: tuple[Driver, str]) -> None:
        """Let a worker say what it runs, and send the receipts of that here too from now on."""
        driver, name = asked
        if self.wrong("ask"):
            if self.random() < 0.5:
                self.later(6.0, self.do_ask, asked)
            return
        worker = self.workers.get(name)
        if worker is None or not driver.alive:
            return
        tasks = [*worker.running.values(), *(task for task, _ in worker.table.values())]
        found = []
        for task in tasks:
            if driver not in task.drivers:
                task.drivers.append(driver)
            is_chunk = isinstance(task.command, c.SubmitChunk)
            number = task.command.chunk.attempt_number if isinstance(task.command, c.SubmitChunk) else 1
            found.append(e.Found(task.attempt, ranges_of(task.items) if is_chunk else EMPTY, number))
        driver.tell(e.AttemptsFound(name, tuple(found)))
        for _, event in worker.table.values():
            self.later(0.0, driver.deliver, event)
        worker.table.clear()

    def _answer(self, task: Task, event: e.Event, delay: float = 0.0) -> None:
        is_late = delay or self.s.jitter
        for driver in task.drivers:
            if is_late:
                self.later(self._delay() + delay, driver.deliver, event)
            else:
                driver.tell(event)

    def _hand_in(self, worker: Worker, task: Task, n: int) -> None:
        """Deliver the receipt for the first ``n`` items: at once, late, twice or never."""
        event = self._receipt(worker, task, n)
        drivers = task.drivers
        if not drivers or not (drivers[-1].alive or any(driver.alive for driver in drivers)):
            worker.table[task.attempt] = (task, event)
            return
        wrong = self.wrong("receipt")
        if not wrong:
            self._answer(task, event)
            return
        if "never" in wrong or "late" in wrong:
            self._answer(task, e.AttemptLost(task.attempt, worker_died=False))
        else:
            self._answer(task, event)
        for kind in wrong:
            if kind != "never":
                self._answer(task, event, 0.01 + self.random() * 2)

    def _receipt(self, worker: Worker, task: Task, n: int) -> e.ChunkDone | e.AggregateDone:
        if isinstance(task.command, c.SubmitChunk):
            return e.ChunkDone(self._chunk_receipt(worker, task, task.command, n))
        return e.AggregateDone(self._aggregate_receipt(worker, task, task.command, n))

    def _chunk_receipt(self, worker: Worker, task: Task, command: c.SubmitChunk, n: int) -> Receipt:
        chunk, items = command.chunk, task.items
        done: Sequence[int] = items
        ranges, unstarted = ranges_of(items).pairs if task.parts else chunk.ranges, EMPTY
        if n < len(items):
            done, unstarted = items[:n], ranges_of(items[n:])
            ranges = ranges_of(done).pairs
        final = done
        counts = {SUCCEEDED: len(done)}
        again: dict[ReplicateStatus, list[int]] = {}
        failures: dict[str, FailureCount] = {}
        missing = None
        if not self._all_succeed(done, chunk.attempt_number):
            if self.s.missing_import_at in done:
                missing = "No module named 'x'"
                done = [k for k in done if k < self.s.missing_import_at]
                unstarted = ranges_of(items) - ranges_of(done)
            statuses = {k: self.s.outcome(k, chunk.attempt_number) for k in done}
            final = [k for k, status in statuses.items() if status not in chunk.retry_on]
            if len(final) < len(items):
                ranges = ranges_of(final).pairs
            counts = {}
            for k, status in statuses.items():
                if status in chunk.retry_on:
                    again.setdefault(status, []).append(k)
                else:
                    counts[status] = counts.get(status, 0) + 1
                if status is not SUCCEEDED:
                    name = f"{status}-{k % self.s.fingerprints}"
                    example = ErrorExample(
                        fingerprint=name, status=status, error_type="E", message=name, index=k
                    )
                    count = failures[name].count + 1 if name in failures else 1
                    failures[name] = FailureCount(example=example, count=count)
        seconds = 0.0
        for k in done:
            seconds += self.seconds[k]
        return Receipt(
            job=JOB,
            attempt=chunk.attempt,
            worker=worker.name,
            host="h",
            segment=segment_of(
                chunk.attempt,
                ranges,
                counts,
                self._watched(chunk.attempt_number, ranges),
                self.s.output_bytes * counts.get(SUCCEEDED, 0),
            )
            if final
            else None,
            retry=tuple((status, ranges_of(ks).pairs) for status, ks in again.items()) if again else (),
            unstarted=unstarted.pairs,
            failures=tuple(failures.values()),
            model_seconds=seconds,
            wall_seconds=seconds + 0.002,
            missing_import=missing,
            parts=task.parts,
        )

    def _all_succeed(self, indices: Sequence[int], number: int) -> bool:
        if self.all_succeed:
            return True
        outcome = self.s.outcome
        for k in indices:
            if outcome(k, number) is not SUCCEEDED:
                return False
        return self.s.missing_import_at < 0

    def _watched(self, number: int, ranges: tuple[Range, ...]) -> tuple[bytes | None, NoNumbers]:
        if self.spec.until is None:
            return None, ()
        return watched_of([(k, self.s.outcome(k, number)) for k in integers(ranges)], self.spec.until)

    def check_needs(self, not_needed: Ranges) -> None:
        """Check that this is what the rule says of the outcomes that the store has."""
        for param in self.line.params_of(not_needed):
            mine = not_needed & self.line.of_param(param)
            first = min(self.line.locate(lo).replicate for lo, _ in mine.pairs)
            outcomes = [self.outcomes.get(self.line.index(param, r)) for r in range(first)]
            self.check(None not in outcomes, "not needed, though the replicates before have no outcomes")
            first = outcomes.index(NOT_NEEDED) if NOT_NEEDED in outcomes else first  # before it was extended
            self._check_rule(param, outcomes[:first], first)

    def _check_rule(self, param: int, outcomes: Sequence[ReplicateStatus | None], expected: int) -> None:
        until = self.spec.until
        assert until is not None
        indices = [self.line.index(param, r) for r in range(len(outcomes))]
        numbers = [has_number(k, until) or s is not SUCCEEDED for k, s in zip(indices, outcomes, strict=True)]
        self.check(all(numbers), "a set was decided by a replicate that has no number")
        seen = [number_of(k) if s is SUCCEEDED else None for k, s in zip(indices, outcomes, strict=True)]
        needed = until.needed(seen)
        self.check(needed == expected, f"parameter set {param} needs {needed}, and got {expected}")

    def _check_all_needs(self) -> None:
        self._check_undecidable()
        for param in range(self.line.n_params):
            if self._looked_at(param) is not None:
                continue
            indices = [
                k for _, _, first, n in self.line.ordered(param, param + 1) for k in range(first, first + n)
            ]
            got = [self.outcomes.get(k) for k in indices]
            if None in got:
                continue
            n = got.index(NOT_NEEDED) if NOT_NEEDED in got else len(got)
            self.check(set(got[n:]) <= {NOT_NEEDED}, "a replicate counts beyond what is needed")
            self._check_rule(param, got[:n], n)

    def _looked_at(self, param: int) -> tuple[bool, int | None] | None:
        """Say how far the rule comes with the outcomes that count of a set.

        Returns
        -------
            None: it decides. Else whether it comes to a replicate that has no number, and to which one.
        """
        until, line = self.spec.until, self.line
        assert until is not None
        seen: list[float | None] = []
        for r in range(until.max):
            k = line.index(param, r)
            status = self.outcomes.get(k)
            if status is NOT_NEEDED or (seen and until.needed(seen) is not None):
                return None
            if status is None:
                return False, None
            if status is SUCCEEDED and not has_number(k, until):
                return True, r
            seen.append(number_of(k) if status is SUCCEEDED else None)
        return None

    def _check_undecidable(self) -> None:
        """Check that the job names the first replicate without a number, and did not end before it was certain."""
        reason, state = self.machine.reason, self.machine.state
        for param in range(self.line.n_params):
            found = self._looked_at(param)
            if found is None:
                continue
            stuck, replicate = found
            if not stuck:
                self.check(
                    "until goes by" not in reason or bool(self.store.left), "it ended before it was certain"
                )
                return
            says = f"says {self.line.index(param, replicate or 0) % 3}"
            named = f"and replicate {replicate} of parameter set {param} {says}"
            self.check(state is not JobState.SUCCEEDED, "a job that cannot be decided has succeeded")
            self.check(
                named in reason or "until goes by" not in reason or bool(self.store.left),
                f"{reason!r} does not say: {named}",
            )
            if self.spec.aggregates and "until goes by" in reason and not self.store.left:
                lacking = set(range(param)) - set(self.store.aggregated)
                self.check(not lacking, f"decided sets have no aggregates: {sorted(lacking)}")
            return

    def _aggregate_receipt(
        self, worker: Worker, task: Task, command: c.SubmitAggregates, n: int
    ) -> AggregateReceipt:
        chunk, spec, params, outcomes = command.chunk, self.spec, task.items, self.outcomes
        stored = None
        if n == len(params):
            rows: dict[str, int] = {}
            for p in params:
                ended = [outcomes[k] for lo, hi in self.line.of_param(p).pairs for k in range(lo, hi)]
                n_needed = len(ended) - ended.count(NOT_NEEDED)
                enough = ended.count(SUCCEEDED) >= spec.needed(n_needed)
                status = AggregateStatus.SUCCEEDED if enough else AggregateStatus.SKIPPED
                rows[status] = rows.get(status, 0) + len(spec.aggregates)
            stored = AggregateRef(
                attempt=chunk.attempt,
                name="a",
                digest=f"digest {chunk.attempt}",
                n_bytes=1,
                params=chunk.params,
                counts=rows,
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

    def do_commit(self, asked: tuple[Driver, Commit, AttemptId, Sequence[int]]) -> None:
        """Write and answer, if the store is there and the driver holds the lease."""
        driver, command, attempt, items = asked
        store = self.store
        if not store.up:
            return  # it gets no answer; the machine asks again
        try:
            store.hold(driver.epoch)
            wrong = self.wrong("commit")
            if "outage" in wrong and driver.alive:
                if self.random() < 0.5:
                    store.commit(driver.epoch, command, attempt, items)
                store.up = False
                self._tell_all(e.StoreLost("database"))
                self.later_by_chance(5, self._mend, None)
                return
            if "refusal" in wrong and attempt not in store.segments and attempt not in store.aggregates:
                driver.tell(e.Committed(attempt, accepted=False))
                return
            accepted, segment = store.commit(driver.epoch, command, attempt, items)
        except LeaseLostError:
            driver.lose_lease()
            return
        driver.tell(e.Committed(attempt, accepted, segment))

    def _mend(self, _: None) -> None:
        self.store.up = True
        self.undisturbed_since = self.now
        self._tell_all(e.StoreBack())

    # What must hold at the end.

    def _check_end(self, driver: Driver) -> None:
        check, machine = self.check, driver.machine
        finished, store = driver.finished, self.store
        check(finished is not None, f"the job never ended; it is {store.state}")
        assert finished is not None
        state, counts = finished.state, machine.counts()
        check(state in FINAL_JOB_STATES and state is machine.state is store.state, f"ended as {state}")
        check(store.reason == machine.reason, "another reason is recorded than it gives")
        truth = Counter(store.outcomes.values())
        for status, n in counts.items():
            if status not in WITHOUT_OUTCOME:
                check(n == truth[status], "other outcomes were reported than are stored")
        n_open = self.size - len(store.outcomes)
        rest, other = ReplicateStatus.NOT_RUN, ReplicateStatus.CANCELLED
        if state is JobState.CANCELLED:
            rest, other = other, rest
        check((counts[rest], counts[other]) == (n_open, 0), "not_run or cancelled is wrong")
        check(
            counts[ReplicateStatus.PENDING] == counts[ReplicateStatus.RUNNING] == 0, "still open at the end"
        )
        n_stored = sum(hi - lo for s in store.segments.values() for lo, hi in s.ranges)
        check(n_stored == len(store.outcomes), "an outcome is stored twice")
        written = driver.files == (store.outcomes, store.aggregated)
        unwritten = driver.files is None and self.s.environment_fails
        check(written or unwritten, "the result files hold something else than the record")
        if self.spec.timeout_s is not None:
            due = max(self.began + self.spec.timeout_s, self.undisturbed_since)
            check(self.now < due + END_S, "the job went on after its timeout")
        rows = machine.aggregate_counts()
        for row in (AggregateStatus.SUCCEEDED, AggregateStatus.SKIPPED, AggregateStatus.FAILED):
            check(rows[row] == store.aggregate_rows[row], "other aggregates were reported than are stored")
        check(sum(rows.values()) == machine.n_aggregates, "aggregates do not add up")
        self._check_verdict(state, n_open, rows)
        if self.spec.until is not None and state is not JobState.CANCELLED:
            self._check_all_needs()

    def _check_verdict(self, state: JobState, n_open: int, rows: dict[AggregateStatus, int]) -> None:
        check, machine, n_ok = self.check, self.machine, self.store.n_succeeded
        if (n_open or rows[AggregateStatus.NOT_RUN]) and not self.store.left:
            check(machine.reason != "", "ended early without a reason")
        if state is JobState.CANCELLED:
            check(self.cancelled, "cancelled without being asked")
        elif (
            n_ok + [*self.outcomes.values()].count(NOT_NEEDED) == self.size
            and rows[AggregateStatus.SUCCEEDED] == machine.n_aggregates
            and "until goes by" not in machine.reason
        ):
            check(state is JobState.SUCCEEDED, "everything succeeded and the job has not")
        elif n_ok:
            check(
                state is JobState.PARTIAL or self.s.environment_fails,
                "some succeeded and the job is not partial",
            )
        else:
            check(state is JobState.FAILED, "nothing succeeded and the job has not failed")
        for k in self.s.poison & self.outcomes.keys():
            check(self.outcomes[k] in (CRASHED, NOT_NEEDED), "poison has not ended as crashed")


def play(scenario: Scenario, seed: int, world: World | None = None) -> World:
    """Play a scenario to its end and return the world, for its figures. Raises BrokenRule, without a story."""
    world = world or World(scenario, seed)
    try:
        world.run()
    except BrokenRule:
        raise
    except Exception as error:
        raise BrokenRule(f"seed {seed}: raised {error!r}") from error
    return world


def story(scenario: Scenario, seed: int) -> str:
    """Play a scenario that breaks a rule again; return it, and the last events and commands before that."""
    world = World(scenario, seed, traced=True)
    try:
        play(scenario, seed, world)
    except BrokenRule as broken:
        return f"{broken}\n{scenario}{world.story()}"
    return f"seed {seed}: broke a rule, but not when it was played again\n{scenario}{world.story()}"


def simulate(seed: int) -> World:
    """Play the scenario of this seed. Raises BrokenRule."""
    return play(draw_scenario(seed), seed)
