"""Hand in what a chunk has finished when its next replicate runs long, and give back what has not begun.

A chunk is meant to take 2.5 seconds, and is committed as a whole. If one of its replicates takes an hour, those
before it would be neither stored nor seen, and those behind it would wait. So after a while the runner is asked to
begin nothing more of it; if that replicate still runs a little later, all else of the chunk is handed in under an id of
its own, and the attempt goes on with this one alone. Likewise when a driver asks for it, as another worker is idle. One
thread per worker looks after that.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Final

import msgspec

from modelops.errors import StorageError
from modelops.study.ids import part_id
from modelops.study.ranges import EMPTY, Ranges
from modelops.worker.topics import BEGUN_TOPIC, RECEIPTS_TOPIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.worker.attempts import Attempt
    from modelops.worker.job_context import JobContext
    from modelops.worker.job_log import JobLog
    from modelops.worker.messages import Chunk
    from modelops.worker.runtime import WorkerRuntime
    from modelops.worker.sorter import Sorter

log = logging.getLogger(__name__)
SAY_BEGUN_AFTER_S: Final = 1.0  # by then a driver wants to know whether it waits
GIVE_BACK_AFTER_S: Final = 3.0
HAND_IN_AFTER_S: Final = 3.4  # a status is to be seen within 5 s, also on a busy machine
LOOK_EVERY_S: Final = 0.25  # while something was asked back; so much later what has ended is handed in


class Parts:
    """What one chunk hands in while it goes on."""

    def __init__(
        self,
        runtime: WorkerRuntime,
        chunk: Chunk,
        attempt: Attempt,
        sorter: Sorter,
        log: JobLog,
        context: JobContext,
    ) -> None:
        self._context = context
        self._runtime, self._chunk, self._attempt = runtime, chunk, attempt
        self._sorter, self._log = sorter, log
        self._began = time.monotonic()
        self._said_begun = self._cut = self._recalled = False
        self._handing_in = threading.Lock()
        self._error: Exception | None = None
        self.lost = EMPTY  # ended, and not stored because the attempt was stopped meanwhile

    def look(self, now: float) -> None:
        """Do what is due."""
        age = now - self._began
        if not self._said_begun and age >= SAY_BEGUN_AFTER_S:
            self._said_begun = True
            message = {"job": self._chunk.job, "attempt": self._chunk.attempt}
            self._runtime.announce(BEGUN_TOPIC, message)
        if age >= GIVE_BACK_AFTER_S and not self._attempt.stop.gives_back:
            self._attempt.stop.give_back()
        recalled, self._recalled = self._recalled, self._attempt.recalled
        if (age >= HAND_IN_AFTER_S or recalled) and not self._cut:
            with self._handing_in:
                self._hand_in()

    def due_in(self, now: float) -> float | None:
        """Return the seconds until `look` may have something to do, None if it never will.

        Before that, too, when the attempt is asked to give back.
        """
        if self._cut or self._attempt.stop.stopped:
            return None
        if self._attempt.stop.gives_back:
            return LOOK_EVERY_S
        next_s = GIVE_BACK_AFTER_S if self._said_begun else SAY_BEGUN_AFTER_S
        return max(0.0, self._began + next_s - now)

    def waking(self, wake: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Call ``wake`` within the block whenever the attempt is asked to give back, or to stop."""
        return self._attempt.stop.waking(wake)

    def close(self) -> None:
        """Let nothing more be handed in, and wait until what is being handed in is stored.

        Raises
        ------
        ModelOpsError
            Storing it failed.
        """
        with self._handing_in:
            self._cut = True
        if self._error is not None:
            raise self._error

    def _hand_in(self) -> None:
        if self._cut or self._attempt.stop.stopped:
            return
        cut = self._sorter.cut(part_id(self._chunk.attempt))
        if cut is None:
            return
        self._cut = True
        tally, rest = cut
        runtime, job = self._runtime, self._chunk.job
        log = self._log.split(tally.attempt, Ranges(tally.ended))
        try:
            runtime.look_at_bundle(self._context, tally.attempt, self._attempt)
            runtime.when_storage_allows(log.store, self._attempt)
            segment = runtime.when_storage_allows(tally.writer.finish, self._attempt)
        except StorageError as error:
            self.lost = Ranges(tally.ended) | rest
            if not self._attempt.stop.stopped:
                self._error = error
            return
        except Exception as error:  # noqa: BLE001  the thread of the chunk raises it
            self._error = error
            return
        runtime.settled.remember(job, tally.attempt, tally.settled)
        receipt = tally.receipt(
            runtime,
            self._chunk,
            part_of=self._chunk.attempt,
            segment=segment,
            unstarted=rest.pairs,
            wall_seconds=max(0.0, tally.last_ended - tally.began),
        )
        held = runtime.attempts.hand_in(self._attempt, receipt)
        runtime.announce(RECEIPTS_TOPIC, {"job": job, "held": msgspec.msgpack.encode(held)})


class PartWatch:
    """The thread that looks at the chunks which run on this worker."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: list[Parts] = []
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watching(self, parts: Parts) -> Iterator[None]:
        """Look at these within the block. Leaving it waits for what is being handed in; see `Parts.close`."""
        with self._changed:
            self._watched.append(parts)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="modelops-parts", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()
        try:
            with parts.waking(self._wake):
                yield
        finally:
            with self._changed:
                self._watched.remove(parts)
            parts.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                dues = [due_s for parts in self._watched if (due_s := parts.due_in(now)) is not None]
                self._changed.wait(min(dues, default=None))
                watched = list(self._watched)
            now = time.monotonic()
            for parts in watched:
                try:
                    parts.look(now)
                except Exception:  # the chunk itself goes on, and hands in at its end
                    log.exception("looking after a chunk that runs long")
