"""Perform the machine's commands on Dask and the store, and turn what comes back into events.

The loop is one thread with one queue. Whatever happens elsewhere (a future that finished, a worker that left,
Ctrl-C, a thread that prepared the environment) puts an event into the queue and does nothing else. So the
machine is never entered twice at a time, and every write of this driver happens in one order.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, assert_never

from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.errors import (
    BundleEnvironmentError,
    BundleError,
    ClusterError,
    HandshakeError,
    IntegrityError,
    InternalError,
    ModelOpsError,
    RemoteError,
    RequestError,
)
from modelops.states import FINAL_JOB_STATES, JobState
from modelops.worker import tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distributed import Client, Future

    from modelops.driver.machine import Machine
    from modelops.study.ids import AttemptId, JobId
    from modelops.worker.messages import AggregateRef, SegmentRef

log = logging.getLogger(__name__)
MAX_EVENTS_AT_ONCE = 256
QUICK = (c.SubmitChunk, c.SubmitAggregates, c.StopAttempt, c.SetTimer, c.PrepareEnvironment)
NO_HOPE = (RequestError, BundleError, BundleEnvironmentError, IntegrityError, HandshakeError, RemoteError)


class Ledger(Protocol):
    """Where the loop writes what has become true. Every write checks the driver's epoch."""

    def commit_segments(self, segments: Sequence[SegmentRef]) -> list[bool]: ...  # noqa: D102  named after the command
    def commit_synthetic(self, command: c.CommitSynthetic) -> tuple[bool, SegmentRef]: ...  # noqa: D102
    def commit_synthetic_aggregates(self, command: c.CommitSyntheticAggregates) -> bool: ...  # noqa: D102
    def commit_aggregates(self, stored: AggregateRef) -> bool: ...  # noqa: D102
    def change_state(self, command: c.ChangeState) -> None: ...  # noqa: D102
    def note(self, command: c.Note) -> None: ...  # noqa: D102
    def finalize(self) -> str | None: ...  # noqa: D102  why nothing counts any more, if so


@dataclass
class DriverLoop:
    """Drive one job to its end.

    ``prepare`` resolves and builds the environment and stores the lock; it runs in a thread of its own and may
    raise. ``on_change`` is called on the loop's thread after events were handled, at most every 50 ms, for
    progress bars.
    """

    job: JobId
    machine: Machine
    ledger: Ledger
    client: Client
    prepare: Callable[[], None]
    on_change: Callable[[Machine], None] = lambda _machine: None
    clock: Callable[[], float] = time.monotonic
    max_s_without_worker: float | None = None
    _workers: set[str] = field(default_factory=set)
    _without_since: float | None = None
    _inbox: queue.SimpleQueue[e.Event] = field(default_factory=queue.SimpleQueue)
    _timers: list[tuple[float, str]] = field(default_factory=list)
    _futures: dict[AttemptId, tuple[str, Future[Any]]] = field(default_factory=dict)  # worker, receipt
    _final: JobState | None = None
    _lease_lost: bool = False
    _shown_at: float = 0.0

    def tell(self, event: e.Event) -> None:
        """Hand an event to the loop, from any thread."""
        self._inbox.put(event)

    def run(self) -> JobState:
        """Drive until the job is final; return its state.

        Raises
        ------
        ModelOpsError
            The store refused a write, or the machine broke a rule.
        """
        self._perform(self.machine.start(self.clock()))
        while self._final is None and not self._lease_lost:
            self._perform(self._orders())
            now = self.clock()
            if now - self._shown_at >= 0.05:
                self._shown_at = now
                self.on_change(self.machine)
        self.on_change(self.machine)
        self._futures.clear()
        return self._final if self._final is not None else self.machine.state

    def _orders(self) -> list[c.Command]:
        """Wait for news and return what the machine makes of all that has come in by then."""
        events = [self._next_event()]
        with contextlib.suppress(queue.Empty):
            while len(events) < MAX_EVENTS_AT_ONCE:
                events.append(self._inbox.get_nowait())
        for event in events:
            if isinstance(event, e.WorkerJoined):
                self._workers.add(event.worker)
            elif isinstance(event, e.WorkerLeft):
                self._workers.discard(event.worker)
                self._forget(event.worker)
        return [command for event in events for command in self.machine.handle(event, self.clock())]

    def _next_event(self) -> e.Event:
        while True:
            now = self.clock()
            if self._timers and self._timers[0][0] <= now:
                return e.TimerRang(heapq.heappop(self._timers)[1])
            wait = min(self._timers[0][0] - now, 0.5) if self._timers else 0.5
            try:
                return self._inbox.get(timeout=wait)
            except queue.Empty:
                self._check_workers(now)
                self.on_change(self.machine)

    def _check_workers(self, now: float) -> None:
        """Give up when there has been no worker for too long: nobody would ever go on with the job."""
        if self._workers:
            self._without_since = None
            return
        self._without_since = now if self._without_since is None else self._without_since
        if self.max_s_without_worker is not None and now - self._without_since > self.max_s_without_worker:
            raise ClusterError(
                f"no worker has been connected for {self.max_s_without_worker:.0f} s, and none came back; "
                "what is finished is kept. 'modelops doctor' says what is wrong with this machine"
            )

    def _perform(self, commands: list[c.Command]) -> None:
        # Work goes out first, so that no worker waits for a disk. Writes keep their order; segments that are
        # committed one after another share a transaction. A write is answered at once, and may order more.
        todo = deque(commands)
        while todo:
            for command in [x for x in todo if isinstance(x, QUICK)]:
                self._one(command)
            todo = deque(x for x in todo if not isinstance(x, QUICK))
            for answer in self._write(todo):
                todo.extend(self.machine.handle(answer, self.clock()))

    def _write(self, todo: deque[c.Command]) -> list[e.Event]:
        segments = []
        while todo and isinstance(first := todo[0], c.CommitSegment):
            segments.append(first.segment)
            todo.popleft()
        if segments:
            accepted = self.ledger.commit_segments(segments)
            return [e.Committed(s.attempt, ok) for s, ok in zip(segments, accepted, strict=True)]
        answer = self._one(todo.popleft()) if todo else None
        return [] if answer is None else [answer]

    def _one(self, command: c.Command) -> e.Event | None:
        match command:
            case c.SubmitChunk():
                self._submit(tasks.simulate, command.chunk, command.worker, priority=0)
            case c.SubmitAggregates():
                self._submit(tasks.aggregate, command.chunk, command.worker, priority=1)
            case c.AskForAttempts():
                raise InternalError(f"this loop cannot ask {command.worker} for its attempts")
            case c.RecordRetry():
                text = f"attempt {command.number} of {command.indices}"
                self.ledger.note(c.Note("retry", text))
            case c.CommitSegment():
                (accepted,) = self.ledger.commit_segments([command.segment])
                return e.Committed(command.segment.attempt, accepted)
            case c.CommitSynthetic():
                accepted, segment = self.ledger.commit_synthetic(command)
                return e.Committed(command.attempt, accepted, segment)
            case c.CommitSyntheticAggregates():
                return e.Committed(command.attempt, self.ledger.commit_synthetic_aggregates(command))
            case c.CommitAggregates():
                return e.Committed(command.stored.attempt, self.ledger.commit_aggregates(command.stored))
            case c.StopAttempt():
                self._stop(command)
            case c.SetTimer():
                self._timers = [t for t in self._timers if t[1] != command.name]
                heapq.heapify(self._timers)
                heapq.heappush(self._timers, (command.at, command.name))
            case c.PrepareEnvironment():
                threading.Thread(target=self._prepare, name="modelops-prepare", daemon=True).start()
            case c.ChangeState():
                self.ledger.change_state(command)
            case c.Note():
                self.ledger.note(command)
            case c.Finalize():
                self.on_change(self.machine)
                voided = self.ledger.finalize()
                return e.Finalized() if voided is None else e.ResultsVoided(voided)
            case c.Finish():
                if command.state not in FINAL_JOB_STATES:
                    raise ModelOpsError(
                        f"the driver finished job {self.job} in {command.state}, which is not final"
                    )
                self._final = command.state
            case _:
                assert_never(command)
        return None

    def _prepare(self) -> None:
        try:
            self.prepare()
        except ModelOpsError as error:
            self.tell(e.EnvironmentFailed(type(error).__name__, str(error)))
        except Exception as error:
            log.exception("preparing the environment of %s", self.job)
            self.tell(e.EnvironmentFailed(type(error).__name__, repr(error)))
        else:
            self.tell(e.EnvironmentReady())

    def _submit(self, task: Callable[..., object], chunk: tasks.AnyChunk, worker: str, priority: int) -> None:
        future = self.client.submit(
            task,
            chunk,
            key=f"{self.job}/{chunk.attempt}",
            workers=[worker],
            allow_other_workers=False,
            pure=False,
            retries=0,
            priority=priority,
        )
        self._futures[chunk.attempt] = worker, future
        if self.client.loop is None:
            raise ClusterError("the connection to the scheduler was closed")
        self.client.loop.add_callback(self._receive, chunk.attempt, future)

    def _forget(self, worker: str) -> None:
        """Give up the receipts that a worker took along: Dask would wait for them for ever."""
        lost = [future for name, future in list(self._futures.values()) if name == worker]
        if lost:
            self.client.cancel(lost, force=True)

    async def _receive(self, attempt: AttemptId, future: Future[Any]) -> None:
        """Turn a finished future into an event. Runs on the client's event loop, beside all others.

        Not in Dask's callback thread: there is one, and a receipt that was finished but not fetched when its
        worker died would block it, and with it the receipts of all other workers.
        """
        try:
            answer = await self.client.gather(future, asynchronous=True)
        except (KilledWorker, FutureCancelledError) as error:
            self.tell(e.AttemptLost(attempt, worker_died=isinstance(error, KilledWorker)))
        except ModelOpsError as error:
            final = isinstance(error, NO_HOPE)
            self.tell(e.ChunkErred(attempt, type(error).__name__, str(error), final=final))
        except Exception as error:  # noqa: BLE001  whatever a task raised is told to the machine, by name
            self.tell(e.ChunkErred(attempt, type(error).__name__, str(error) or repr(error), final=False))
        else:
            if isinstance(answer, tasks.Receipt):
                self.tell(e.ChunkDone(answer))
            elif isinstance(answer, tasks.AggregateReceipt):
                self.tell(e.AggregateDone(answer))
            else:
                self.tell(e.ChunkErred(attempt, "InternalError", f"a task answered {answer!r}", final=True))
        finally:
            self._futures.pop(attempt, None)

    def _stop(self, command: c.StopAttempt) -> None:
        """Ask the worker; Dask itself cannot stop a task that runs."""
        try:
            self.client.run(tasks.stop, self.job, command.attempt, workers=[command.worker], wait=False)
        except (OSError, ValueError) as error:
            # The worker is gone; its attempts are told as lost by the future.
            log.info("could not ask %s to stop %s: %s", command.worker, command.attempt, error)
