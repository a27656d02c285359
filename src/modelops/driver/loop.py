"""Perform the machine's commands on Dask and the store, and turn what comes back into events.

The loop is one thread with one queue. Whatever happens elsewhere (a future that finished, a worker that left,
Ctrl-C, a thread that prepared the environment) puts an event into the queue and does nothing else. So the
machine is never entered twice at a time, and every write of this driver happens in one order, see `writer`.
What is done on Dask is in `hands`.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import math
import queue
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.hands import DAMAGE, STORAGE_AWAY, Adopted, Hands, Heard, Said
from modelops.driver.idle_workers import IdleWorkers
from modelops.driver.writer import WRITES, Ledger, RecordUse, Writer
from modelops.errors import (
    ClusterError,
    IntegrityError,
    InternalError,
    ModelOpsError,
    StorageError,
)
from modelops.states import FINAL_JOB_STATES, JobState
from modelops.store.answers import since_text
from modelops.store.rows import LeaseLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from modelops.driver.hands import Pool
    from modelops.driver.machine import Machine
    from modelops.study.ids import JobId

__all__ = ["DriverLoop", "Ledger"]
log = logging.getLogger(__name__)
MAX_EVENTS_AT_ONCE: Final = 256
SHOW_EVERY_S: Final = 0.05
RECORD_USE_EVERY_S: Final = 5.0
# Of a job with a timeout more often, so that a server that dies every few seconds cannot make it last much longer: of
# each driver's life an eighth is forgotten, or these seconds.
NOTE_USE_AFTER: Final = 1 / 8
NOTE_USE_S: Final = (0.25, 1.0)
LOOK_FOR_CANCEL_EVERY_S: Final = 2.0  # one that was recorded while nobody told us


class _Stop:
    """Drive no further, and say nothing to the store."""


class _Wake:
    """Look around now."""


News = e.Event | Adopted | Heard | Said | _Stop | _Wake


@dataclass
class DriverLoop:
    """Drive one job to its end, or until another driver has it, or `stop`.

    ``prepare`` resolves and builds the environment and stores the lock; it runs in a thread of its own and may
    raise. ``is_prepared`` says that nothing of this is left to do. ``on_change`` is called on the loop's thread after
    events were handled, at most every 50 ms, for progress bars. ``on_waiting`` is told what database or storage said
    when one of them does not do its part, here or on a worker. ``used_s``: of the job's timeout, by earlier drivers.
    ``study``: the object with the job's spec, ``study_digest``: its SHA-256.
    ``when_idle``: called once, as soon as there is nothing to do but to wait.
    ``inbox``: what is told to the loop; may hold something before it runs. ``raises_damage``: stop driving, and raise,
    when a worker has met damaged bytes; otherwise the machine hears of it.
    """

    job: JobId
    machine: Machine
    ledger: Ledger
    pool: Pool
    prepare: Callable[[], None]
    is_prepared: Callable[[], bool] = lambda: False
    on_change: Callable[[Machine], None] = lambda _machine: None
    on_waiting: Callable[[str], None] = lambda _text: None
    clock: Callable[[], float] = time.monotonic
    max_s_without_worker: float | None = None
    used_s: float = 0.0
    study: str = "study.json"
    study_digest: str = ""
    when_idle: Callable[[], None] | None = None
    inbox: queue.SimpleQueue[News] = field(default_factory=queue.SimpleQueue)
    raises_damage: bool = False
    lease_lost: bool = False
    hands: Hands = field(init=False)
    _writer: Writer = field(init=False)
    _without_since: float | None = None
    _timers: list[tuple[float, str]] = field(default_factory=list)
    _stopping: bool = False
    _shown_at: float = 0.0
    _unshown: bool = False
    _look_at: float = 0.0
    _record_at: float = 0.0
    _note_use_at: float = 0.0
    _cancel_heard: bool = False
    _away_since: datetime = datetime.min
    _damage: str = ""

    def __post_init__(self) -> None:
        self._writer = Writer(self.ledger)
        self._idle_workers = IdleWorkers()
        self._refused: tuple[tuple[str, ...], ...] = ()
        self.hands = Hands(
            self.job, (self.study, self.study_digest), self.machine.epoch, self.pool, self.inbox.put
        )

    def tell(self, event: e.Event) -> None:
        """Hand an event to the loop, from any thread."""
        self.inbox.put(event)

    def stop(self) -> None:
        """Drive no further; what runs goes on, and another driver may adopt it. From any thread."""
        self.inbox.put(_Stop())

    def wake(self) -> None:
        """Look around now: something that concerns the job was recorded. From any thread."""
        self.inbox.put(_Wake())

    @property
    def waits_for(self) -> str:
        """What the database or the storage said, while one of them is away; empty otherwise."""
        if away := self._writer.away:
            return f"{away} {since_text(self._away_since)}"
        return self.hands.storage_away

    def run(self) -> JobState:
        """Drive until the job is final, the lease is lost, or `stop`; return the job's state.

        Raises
        ------
        IntegrityError
            Stored bytes are not what was recorded; what runs goes on, as after `stop`.
        ModelOpsError
            The store refused a write, or the machine broke a rule.
        """
        self._began_at = self.clock()
        self._look_at = self._began_at
        self._record_at = self._began_at + RECORD_USE_EVERY_S
        self._note_use_at = self._next_note_of_use(self._began_at)
        with self.hands:
            self._order(self.machine.start(self._began_at))
            if self.inbox.empty():  # otherwise what is to be written waits until work has gone out, as ever
                self._perform([])
            while self._writer.finished is None and not self.lease_lost and not self._stopping:
                self._turn()
            self._show()
            if self._writer.finished is not None:
                self.hands.forget_job(in_a_moment=self._writer.finished is JobState.SUCCEEDED)
        if self._stopping:
            self._record_use_at_the_end()
        if self._damage:
            raise IntegrityError(self._damage)
        state = self._writer.finished
        if state is not None and state not in FINAL_JOB_STATES:
            raise ModelOpsError(f"the driver finished job {self.job} in {state}, which is not final")
        return state if state is not None else self.machine.state

    def _turn(self) -> None:
        """Wait for news, and do what the machine makes of all that has come in by then."""
        commands: list[c.Command] = []
        for news in self._news():
            self._unshown = True
            commands += self._take(news)
        self._perform(commands)
        self._look_around()
        if self.clock() - self._shown_at >= SHOW_EVERY_S:
            self._show()

    def _news(self) -> Iterable[News]:
        first = self._next_news()
        found = [] if first is None else [first]
        with contextlib.suppress(queue.Empty):
            while len(found) < MAX_EVENTS_AT_ONCE:
                found.append(self.inbox.get_nowait())
        return found

    def _next_news(self) -> News | None:
        """Return the next news, or None when it is time to look around."""
        now = self.clock()
        if self._timers and self._timers[0][0] <= now:
            return e.TimerRang(heapq.heappop(self._timers)[1])
        until = now + 0.5
        if self._timers:
            until = min(until, self._timers[0][0])
        if self._unshown:
            until = min(until, self._shown_at + SHOW_EVERY_S)
        if self._writer.away:
            until = min(until, self._writer.retry_at)
        until = min(until, self._note_use_at)
        if self.when_idle is not None and self.inbox.empty():
            act, self.when_idle = self.when_idle, None
            act()
        try:
            return self.inbox.get(timeout=max(0.0, until - now))
        except queue.Empty:
            return None

    def _take(self, news: News) -> list[c.Command]:
        """Return what the machine orders, told of this."""
        if isinstance(news, _Stop):
            self._stopping = True
            return []
        if isinstance(news, _Wake):
            self._look_at = 0.0
            return []
        if isinstance(news, Said):
            self.hands.told_by_storage(news)
            return []
        events = self.hands.take_in(news)
        if any(isinstance(event, e.CancelAsked) for event in events):
            self._cancel_heard = True
        now = self.clock()
        return [command for event in events for command in self._handle(event, now)]

    def _handle(self, event: e.Event, now: float) -> list[c.Command]:
        if isinstance(event, e.LeaseLost):
            self.lease_lost = True
        elif isinstance(event, e.StoreLost):
            self.on_waiting(event.what)
        if (
            self.raises_damage
            and isinstance(event, e.ChunkErred)
            and event.final
            and event.error_type in DAMAGE
        ):
            self._damage, self._stopping = event.message, True
            return []
        return self.machine.handle(event, now)

    def _look_around(self) -> None:
        """Do what is to be done now and then."""
        now = self.clock()
        self._check_workers(now)
        self.hands.look_around(now)
        idle, refused = self._idle_workers, self.pool.refused()
        names = tuple(self.pool.membership(worker).names for worker in refused)
        if names != self._refused:
            self._refused = names
            self.tell(e.WorkersRefused(names))
        if notes := [*idle.skewed(refused), *idle.slow(self.hands.told)]:
            self._perform([*notes])
        if note := self.hands.story_of_storage():
            if note.kind == STORAGE_AWAY:
                self.on_waiting(note.text)
            self._perform([note])
        if now >= min(self._record_at, self._note_use_at):
            lasting = now >= self._record_at
            if lasting:
                self._record_at = now + RECORD_USE_EVERY_S
            self._note_use_at = self._next_note_of_use(now)
            if self._writer.is_idle:
                self._perform([], RecordUse(self._used_s(now), lasting))
        if now >= self._look_at and not self._writer.away and not self._cancel_heard:
            self._look_at = now + LOOK_FOR_CANCEL_EVERY_S
            try:
                who = self.ledger.cancel_asked_by()
            except StorageError:
                self._perform([], RecordUse(self._used_s(now)))  # a write finds out whether the store is away
            else:
                if who is not None and self.machine.state is not JobState.CANCELLING:
                    self._cancel_heard = True
                    self.tell(e.CancelAsked(who))

    def _next_note_of_use(self, now: float) -> float:
        if self.machine.spec.timeout_s is None:
            return math.inf
        shortest, longest = NOTE_USE_S
        return now + min(longest, max(shortest, NOTE_USE_AFTER * (now - self._began_at)))

    def _used_s(self, now: float) -> float:
        return self.used_s + now - self._began_at

    def _record_use_at_the_end(self) -> None:
        try:
            self.ledger.record_use(self._used_s(self.clock()), lasting=True)
        except (StorageError, LeaseLostError) as error:
            log.warning("the time used by job %s is not recorded: %s", self.job, error)

    def _check_workers(self, now: float) -> None:
        """Give up when there has been no worker for too long: nobody would ever go on with the job."""
        if self.hands.workers:
            self._without_since = None
            return
        self._without_since = now if self._without_since is None else self._without_since
        if self.max_s_without_worker is not None and now - self._without_since > self.max_s_without_worker:
            raise ClusterError(
                f"no worker has been connected for {self.max_s_without_worker:.0f} s, and none came back; "
                "what is finished is kept. 'modelops doctor' says what is wrong with this machine"
            )

    def _show(self) -> None:
        self._shown_at, self._unshown = self.clock(), False
        self.on_change(self.machine)

    def _perform(self, commands: list[c.Command], own: RecordUse | None = None) -> None:
        # Work goes out first, so that no worker waits for a disk. A write is answered at once, and may order more.
        self._order(commands)
        writer = self._writer
        if own is not None:
            writer.add(own)
        while not self.lease_lost and writer.finished is None and writer.can_write(self.clock()):
            if isinstance(writer.next, c.Finalize):
                self._show()
            began = datetime.now(UTC)
            for answer in writer.step(self.clock()):
                if isinstance(answer, e.StoreLost):
                    self._away_since = began
                    answer = e.StoreLost(f"{answer.what} {since_text(began)}")
                self._order(self._handle(answer, self.clock()))
        if writer.is_idle:
            self.hands.acknowledge()

    def _order(self, commands: list[c.Command]) -> None:
        for command in commands:
            if isinstance(command, WRITES):
                self._writer.add(command)
            else:
                self._do(command)

    def _do(self, command: c.Command) -> None:
        match command:
            case c.SubmitChunk():
                self.hands.simulate(command)
            case c.SubmitAggregates():
                self.hands.aggregate(command)
            case c.AskForAttempts():
                self.hands.ask(command.worker)
            case c.StopAttempt():
                self.hands.stop(command)
            case c.RecallAttempt():
                self.hands.recall(command)
            case c.SetTimer():
                self._timers = [t for t in self._timers if t[1] != command.name]
                heapq.heapify(self._timers)
                heapq.heappush(self._timers, (command.at, command.name))
            case c.PrepareEnvironment() if self.is_prepared():
                self.tell(e.EnvironmentReady())
            case c.PrepareEnvironment():
                threading.Thread(target=self._prepare, name="modelops-prepare", daemon=True).start()
            case _:
                raise InternalError(f"nobody performs {command}")

    def _prepare(self) -> None:
        try:
            self.prepare()
        except LeaseLostError:
            self.tell(e.LeaseLost())
        except ModelOpsError as error:
            self.tell(e.EnvironmentFailed(type(error).__name__, str(error)))
        except Exception as error:
            log.exception("preparing the environment of %s", self.job, extra={"job": self.job})
            self.tell(e.EnvironmentFailed(type(error).__name__, repr(error)))
        else:
            self.tell(e.EnvironmentReady())
