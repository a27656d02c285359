"""What a driver does on Dask: submit, ask, stop, and receive what becomes of its attempts.

A worker announces how an attempt has ended, which is heard some milliseconds before Dask has told and fetched the
result of the task. An announcement can get lost, and then the result is fetched. Dask drops results whose client is
gone, so a worker keeps receipts too. Attempts that this driver did not submit, or whose future Dask has dropped, are
*adopted*: nothing comes of them but the announcement, so their worker is asked for its table now and then.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import msgspec
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.begins import Begins
from modelops.driver.farewells import say_farewell
from modelops.errors import ClusterError, IntegrityError, NotFoundError
from modelops.study.ids import AttemptId
from modelops.study.ranges import Ranges
from modelops.worker import tasks
from modelops.worker.attempts import task_error
from modelops.worker.messages import HeldAttempt
from modelops.worker.topics import (
    BEGUN_TOPIC,
    CHECKPOINT_TOPIC,
    PROGRESS_TOPIC,
    RECEIPTS_TOPIC,
    SLOW_TOPIC,
    STORAGE_TOPIC,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client, Future

    from modelops.study.ids import JobId
    from modelops.study.pools import Membership

log = logging.getLogger(__name__)
DAMAGE: Final = (IntegrityError.__name__, NotFoundError.__name__)
POLL_EVERY_S: Final = 5.0
SAY_EVERY_S: Final = 60.0  # that storage is away from workers
STORAGE_AWAY, STORAGE_BACK = "storage_away", "storage_back"  # kinds of events


class Pool(Protocol):
    """A connection to workers. ``client``: read it at every use, it may be another one after a while.

    Raises `ClusterError` while there is none.
    """

    @property
    def client(self) -> Client: ...  # noqa: D102

    def workers(self) -> dict[str, int]: ...  # noqa: D102  address -> slots

    def membership(self, worker: str) -> Membership: ...  # noqa: D102  of one that is connected

    def refused(self) -> dict[str, str]: ...  # noqa: D102  workers of versions that do not fit -> table of these

    def on_workers(  # noqa: D102  within the block, on a thread of the client
        self, joined: Callable[[str, int], None], left: Callable[[str, bool], None]
    ) -> contextlib.AbstractContextManager[None]: ...

    def on_topic(  # noqa: D102  likewise: what is announced under a topic, of all jobs
        self, topic: str, heard: Callable[[dict[str, Any]], None]
    ) -> contextlib.AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class Heard:
    """A worker said how attempts stand. ``asked``: by the machine; these are all it holds of the job."""

    worker: str
    held: tuple[HeldAttempt, ...]
    asked: bool = False
    is_table: bool = True


@dataclass(frozen=True, slots=True)
class Adopted:
    """Dask has dropped the future of an attempt that its worker may still run."""

    attempt: AttemptId
    worker: str


@dataclass(frozen=True, slots=True)
class Said:
    """What storage said to an attempt that waits for it; empty: it has stopped waiting."""

    attempt: AttemptId
    text: str


class Hands:
    """The Dask side of one driver. Use it in a ``with`` block; all but callbacks run on the loop's thread.

    ``study``: the object with the job's spec, and its SHA-256. ``put`` takes news from any thread into the loop's
    queue.
    """

    def __init__(
        self, job: JobId, study: tuple[str, str], epoch: int, pool: Pool, put: Callable[[Any], None]
    ) -> None:
        self.job, (self._study, self._study_digest) = job, study
        self._epoch, self._pool, self._put = epoch, pool, put
        self.workers: set[str] = set()
        self.told: deque[str] = deque()  # by workers that take long to prepare the environment
        self.reports: dict[int, dict[str, Any]] = {}  # the last progress of replicates, by index
        self._futures: dict[AttemptId, Future[Any]] = {}
        self._holders: dict[AttemptId, str] = {}  # the worker of every attempt whose receipt has not come
        self._adopted: dict[AttemptId, str] = {}  # those of them that Dask will not tell us of
        self._poll_at = 0.0
        self._begins = Begins()
        self._announced: set[AttemptId] = set()  # only the client's event loop looks at it
        self._received: list[tuple[str, AttemptId]] = []  # not recorded yet
        self._acknowledged: dict[str, set[AttemptId]] = {}  # by worker, for its next chunk
        self._waiting: dict[AttemptId, str] = {}  # attempts that cannot store, and what storage said to them
        self._said = False  # that storage is away, to the job's story
        self._say_at = 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(
            self._pool.on_workers(
                joined=self._joined,
                left=lambda worker, died: self._put(e.WorkerLeft(worker, died)),
            )
        )
        hears = {
            RECEIPTS_TOPIC: self._hear_receipt,
            STORAGE_TOPIC: self._hear_storage,
            PROGRESS_TOPIC: self._hear_progress,
            SLOW_TOPIC: lambda message: self.told.append(str(message["text"])),
            CHECKPOINT_TOPIC: lambda message: self._put(e.Checkpointed(int(message["index"]))),
            BEGUN_TOPIC: lambda message: self._put(e.AttemptBegun(AttemptId(message["attempt"]))),
        }
        for topic, hear in hears.items():
            self._stack.enter_context(self._pool.on_topic(topic, self._if_ours(hear)))
        # There may be none just now: those that died are being started again, and the loop waits for them.
        for worker, slots in self._pool.workers().items():
            self._joined(worker, slots)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._futures.clear()

    def _subject(self, attempt: AttemptId | None = None) -> dict[str, Any]:
        """Return what a line of the log is about: some are written on the client's thread."""
        return {"job": self.job, "attempt": attempt}

    # News.

    def _joined(self, worker: str, slots: int) -> None:
        of = self._pool.membership(worker)
        self._put(e.WorkerJoined(worker, slots, of.pool, tuple(of.labels.values())))

    def take_in(self, news: e.Event | Adopted | Heard) -> list[e.Event]:
        """Return what the machine is to be told of this."""
        match news:
            case Heard():
                return self._heard(news)
            case Adopted():
                return self._adopt(news)
            case e.WorkerJoined():
                self.workers.add(news.worker)
                self._begins.joined(news.worker, news.slots)
            case e.WorkerLeft():
                self._forget(news.worker)
            case e.ChunkDone() | e.AggregateDone():
                self._receive_from(news.receipt.attempt)
            case e.AttemptBegun():
                self._begins.begun(news.attempt)
            case e.ChunkErred() | e.AttemptLost():
                self._receive_from(news.attempt)
            case _:
                pass
        return [news]

    def _heard(self, news: Heard) -> list[e.Event]:
        events: list[e.Event] = []
        if news.asked:
            unknown = [h for h in news.held if h.attempt not in self._holders]
            found = [h for h in unknown if not _met_damage(h)]
            # It may be mended since. What is run again in their place meets it again if it is not.
            self._received += [(news.worker, h.attempt) for h in unknown if _met_damage(h)]
            events.append(
                e.AttemptsFound(
                    news.worker, tuple(e.Found(h.attempt, Ranges(h.ranges), h.attempt_number) for h in found)
                )
            )
            for held in found:
                if held.ranges:
                    self._adopted[held.attempt] = self._holders[held.attempt] = news.worker
        here = {held.attempt for held in news.held}
        for attempt, worker in self._adopted.items():
            if worker == news.worker and news.is_table and attempt not in here:
                events.append(e.AttemptLost(attempt, worker_died=False))
        for held in news.held:
            if _whole(held) not in self._holders:
                continue
            if held.receipt is not None:
                events.append(e.ChunkDone(held.receipt))
                if held.receipt.part_of is not None:
                    self._received.append((news.worker, held.attempt))
            elif held.error is not None:
                x = held.error
                events.append(
                    e.ChunkErred(held.attempt, x.error_type, x.message, final=x.final, unfit=x.unfit)
                )
        for event in events:
            if isinstance(event, e.ChunkDone):
                self._receive_from(event.receipt.attempt)
            elif isinstance(event, e.ChunkErred | e.AttemptLost):
                self._receive_from(event.attempt)
        return events

    def _adopt(self, news: Adopted) -> list[e.Event]:
        if news.attempt not in self._holders:
            return []
        if news.worker not in self.workers:
            self._receive_from(news.attempt)
            return [e.AttemptLost(news.attempt, worker_died=False)]
        self._futures.pop(news.attempt, None)
        self._adopted[news.attempt] = news.worker
        self._ask(news.worker, asked=False)
        return []

    def _receive_from(self, attempt: AttemptId) -> None:
        """Expect nothing more of an attempt."""
        self._futures.pop(attempt, None)
        self._adopted.pop(attempt, None)
        self._waiting.pop(attempt, None)
        self._begins.ended(attempt, time.monotonic())
        worker = self._holders.pop(attempt, None)
        if worker is not None:
            self._received.append((worker, attempt))

    def acknowledge(self) -> None:
        """Note that all that was received is recorded: workers need not keep it."""
        for worker, attempt in self._received:
            if worker in self.workers:
                self._acknowledged.setdefault(worker, set()).add(attempt)
        self._received.clear()

    def look_around(self, now: float) -> None:
        """Ask the workers of adopted attempts how these stand, and of others whether they have begun."""
        for attempt, worker in self._begins.due(now):
            self._call(worker, tasks.has_begun, attempt, self._told_of_begin)
        if now >= self._poll_at:
            self._poll_at = now + POLL_EVERY_S
            for worker in set(self._adopted.values()) & self.workers:
                self._ask(worker, asked=False)

    def attempts(self) -> dict[AttemptId, str]:
        """Return the worker of every attempt whose end has not been heard of. From any thread."""
        return dict(self._holders)

    # Announcements.

    def _if_ours(self, hear: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        def heard(message: dict[str, Any]) -> None:
            if message.get("job") == self.job:
                hear(message)

        return heard

    def _hear_receipt(self, message: dict[str, Any]) -> None:
        held = msgspec.msgpack.decode(message["held"], type=HeldAttempt)
        worker = self._holders.get(_whole(held))
        if worker is not None:
            self._announced.add(held.attempt)
            self._put(Heard(worker, (held,), is_table=False))

    def _hear_storage(self, message: dict[str, Any]) -> None:
        self._put(Said(message["attempt"], str(message["text"])))

    @property
    def storage_away(self) -> str:
        """What storage said to an attempt that waits for it now; empty: none does. From any thread."""
        return next(iter(self._waiting.copy().values()), "")

    def told_by_storage(self, said: Said) -> None:
        """Remember what storage said to an attempt."""
        if said.text and said.attempt in self._holders:
            self._waiting[said.attempt] = said.text
        else:
            self._waiting.pop(said.attempt, None)

    def story_of_storage(self) -> c.Note | None:
        """Return what the job's story should say of it now, each thing once."""
        now, text = time.monotonic(), self.storage_away
        if text and not self._said and now >= self._say_at:
            self._said, self._say_at = True, now + SAY_EVERY_S
            return c.Note(STORAGE_AWAY, text)
        if self._said and not text:
            self._said = False
            return c.Note(STORAGE_BACK, "no worker waits for storage any more")
        return None

    def _hear_progress(self, message: dict[str, Any]) -> None:
        self.reports[int(message["index"])] = message

    # Orders.

    def simulate(self, command: c.SubmitChunk) -> None:
        """Submit a chunk of replicates."""
        self._submit(tasks.simulate, command.chunk, command.worker, priority=0)

    def aggregate(self, command: c.SubmitAggregates) -> None:
        """Submit a chunk of aggregates."""
        self._submit(tasks.aggregate, command.chunk, command.worker, priority=1)

    def _submit(self, task: Callable[..., object], chunk: tasks.AnyChunk, worker: str, priority: int) -> None:
        acknowledged = tuple(sorted(self._acknowledged.pop(worker, ())))
        chunk = msgspec.structs.replace(
            chunk, study=self._study, study_digest=self._study_digest, acknowledged=acknowledged
        )
        self._holders[chunk.attempt] = worker
        self._begins.submitted(chunk.attempt, worker, time.monotonic())
        try:
            client = self._pool.client
            future = client.submit(
                task,
                chunk,
                key=f"{self.job}/{chunk.attempt}",
                workers=[worker],
                allow_other_workers=False,
                pure=False,
                retries=0,
                priority=priority,
            )
        except ClusterError as error:
            # The scheduler has just gone, and that its workers left will be told in a moment.
            log.info(
                "could not submit %s to %s: %s",
                chunk.attempt,
                worker,
                error,
                extra=self._subject(chunk.attempt),
            )
            self._put(e.AttemptLost(chunk.attempt, worker_died=False))
            return
        self._futures[chunk.attempt] = future
        if client.loop is None:
            raise ClusterError("the connection to the scheduler was closed")
        client.loop.add_callback(self._receive, client, chunk.attempt, worker, future)

    async def _receive(self, client: Client, attempt: AttemptId, worker: str, future: Future[Any]) -> None:
        """Turn a finished future into news. Runs on the client's event loop, beside all others.

        Not in Dask's callback thread: there is one, and a receipt that was finished but not fetched when its
        worker died would block it, and with it the receipts of all other workers.
        """
        if future._state is not None:
            await future._state.wait()  # not `distributed.wait`, which asks the default client
        if attempt in self._announced:
            self._announced.discard(attempt)
            return
        try:
            answer = await client.gather(future, asynchronous=True)
        except KilledWorker:
            self._put(e.AttemptLost(attempt, worker_died=True))
        except (FutureCancelledError, CommClosedError):
            self._put(Adopted(attempt, worker))
        except Exception as error:  # noqa: BLE001  whatever a task raised is told to the machine, by name
            x = task_error(error)
            self._put(e.ChunkErred(attempt, x.error_type, x.message, final=x.final, unfit=x.unfit))
        else:
            if isinstance(answer, tasks.Receipt):
                self._put(e.ChunkDone(answer))
            elif isinstance(answer, tasks.AggregateReceipt):
                self._put(e.AggregateDone(answer))
            else:
                self._put(e.ChunkErred(attempt, "InternalError", f"a task answered {answer!r}", final=True))

    def ask(self, worker: str) -> None:
        """Ask a worker for its table, for the machine."""
        self._ask(worker, asked=True)

    def _ask(self, worker: str, *, asked: bool) -> None:
        try:
            client = self._pool.client
        except ClusterError as error:  # that the worker left will be told in a moment
            log.info("could not ask %s for its attempts: %s", worker, error, extra=self._subject())
            return
        if client.loop is not None:
            client.loop.add_callback(self._fetch_table, client, worker, asked)

    async def _fetch_table(self, client: Client, worker: str, asked: bool) -> None:
        try:
            answers = await client.run(tasks.attempts, self.job, self._epoch, workers=[worker])
        except (OSError, ValueError, TimeoutError) as error:
            # It is leaving, or will be asked again: `look_around`, or the machine when the worker joins again.
            log.info("could not ask %s for its attempts: %s", worker, error, extra=self._subject())
            return
        self._put(Heard(worker, tuple(answers[worker]), asked=asked))

    def stop(self, command: c.StopAttempt) -> None:
        """Ask the worker; Dask itself cannot stop a task that runs."""

        def told(attempt: AttemptId, withheld: bool) -> None:
            if withheld:
                self._put(e.AttemptRecalled(attempt))

        self._call(command.worker, tasks.stop, command.attempt, told, self._epoch, command.soon)

    def recall(self, command: c.RecallAttempt) -> None:
        """Take an attempt back that has not begun."""

        def told(attempt: AttemptId, recalled: bool) -> None:
            self._put(e.AttemptRecalled(attempt) if recalled else e.AttemptBegun(attempt))

        self._call(command.worker, tasks.recall, command.attempt, told, self._epoch)

    def _told_of_begin(self, attempt: AttemptId, begun: bool) -> None:
        self._put(e.AttemptBegun(attempt) if begun else e.AttemptWaits(attempt))

    def _call(
        self,
        worker: str,
        function: Callable[..., object],
        attempt: AttemptId,
        told: Callable[[AttemptId, bool], None],
        *more: object,
    ) -> None:
        """Ask a worker about an attempt; ``told`` is called with its answer, on the client's event loop."""

        async def call(client: Client) -> None:
            try:
                answers = await client.run(function, self.job, attempt, *more, workers=[worker])
            except (OSError, ValueError, TimeoutError) as error:
                # It will be asked again, or it is leaving. What is to be stopped is not waited for long.
                log.info(
                    "could not ask %s about %s: %s", worker, attempt, error, extra=self._subject(attempt)
                )
            else:
                told(attempt, answers[worker])

        try:
            client = self._pool.client
        except ClusterError as error:  # that the worker left will be told in a moment
            log.info("could not ask %s about %s: %s", worker, attempt, error, extra=self._subject(attempt))
            return
        if client.loop is not None:
            client.loop.add_callback(call, client)

    def forget_job(self, *, in_a_moment: bool = False) -> None:
        """Tell all workers that the job has ended; attempts of earlier drivers may still be running.

        ``in_a_moment``: those who wait for the job's end come first, see `say_farewell`.
        """
        try:
            client = self._pool.client
        except ClusterError as error:
            log.info("could not reach the workers: %s", error, extra=self._subject())
            return
        say_farewell(client, self.workers, self.job, self._epoch, in_a_moment=in_a_moment)

    def _forget(self, worker: str) -> None:
        """Give up the receipts that a worker took along: Dask would wait for them for ever."""
        self.workers.discard(worker)
        self._acknowledged.pop(worker, None)
        self._begins.left(worker)
        gone = [attempt for attempt, name in self._holders.items() if name == worker]
        futures = [future for attempt in gone if (future := self._futures.pop(attempt, None)) is not None]
        for attempt in gone:
            self._adopted.pop(attempt, None)
            self._waiting.pop(attempt, None)
            del self._holders[attempt]
        if futures:
            with contextlib.suppress(ClusterError):  # with the scheduler all its futures are gone
                self._pool.client.cancel(futures, force=True)


def _whole(held: HeldAttempt) -> AttemptId:
    """Return the attempt that was submitted: what is announced may be a part of it."""
    return (held.receipt.part_of if held.receipt is not None else None) or held.attempt


def _met_damage(held: HeldAttempt) -> bool:
    """Say whether an attempt has ended because stored bytes were not what was recorded."""
    return held.error is not None and held.error.final and held.error.error_type in DAMAGE
