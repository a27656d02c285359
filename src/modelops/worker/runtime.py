"""All that a worker keeps between chunks: process pool, environments, and what it knows of each job."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, Final, TypeVar

from modelops.environments import Environments
from modelops.errors import EnvironmentDamagedError, ProcessError, SetAsideError, StorageError
from modelops.processes import ProcessPool
from modelops.store import Objects
from modelops.store.bundle_changes import say_changed
from modelops.store.segments import job_folder
from modelops.worker.attempts import AttemptTable
from modelops.worker.desk import Desk, SettledCheckpoints
from modelops.worker.job_context import JobContext, load_job_context
from modelops.worker.parts import PartWatch
from modelops.worker.segment_cache import SegmentCache
from modelops.worker.storage_wait import Waiting, find_room, when_storage_allows
from modelops.worker.topics import BEGUN_TOPIC, CHECKPOINT_TOPIC, PROGRESS_TOPIC, STORAGE_TOPIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.study.ids import AttemptId, JobId
    from modelops.worker.attempts import Attempt
    from modelops.worker.messages import AggregateChunk, Chunk
    from modelops.worker.settings import WorkerSettings

    _Key = tuple[JobId, str, str]  # a job, the object with its spec, and that object's digest

T = TypeVar("T")
TRIES: Final = 5  # somebody may remove or rebuild an environment between its validation and its use


class WorkerRuntime:
    """One per worker process; its methods are called from all worker threads at once.

    ``announce``: sends a message under a topic to whoever listens now; may be called in any thread.
    """

    MAX_JOBS = 32

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        address: str,
        slots: int,
        announce: Callable[[str, dict[str, Any]], None] = lambda _topic, _message: None,
        announce_surely: Callable[[str, dict[str, Any]], None] = lambda _topic, _message: None,
    ) -> None:
        self.settings, self.address, self.host = settings, address, socket.gethostname()
        self.announce, self._announce_surely = announce, announce_surely
        self.root = settings.scratch / f"{os.getpid()}"
        shutil.rmtree(self.root, ignore_errors=True)  # left by a killed process that had our pid
        self.spool = self.root / "spool"
        self.spool.mkdir(parents=True)
        self.objects = Objects.open(settings.objects)
        self.environments = Environments(settings.cache)
        self.pool = ProcessPool(self.root, slots=slots)
        self.segments = SegmentCache(self.objects)
        self.attempts = AttemptTable(slots=slots)
        self.parts = PartWatch()
        self.settled = SettledCheckpoints(self.objects)
        self._jobs: OrderedDict[_Key, JobContext] = OrderedDict()
        self._waiting = Waiting()
        self._notes: defaultdict[JobId, list[str]] = defaultdict(list)
        self._lock = threading.Lock()
        self._loading: dict[_Key, threading.Lock] = {}

    @contextlib.contextmanager
    def using(self, chunk: Chunk | AggregateChunk, attempt: Attempt) -> Iterator[JobContext]:
        """Lend what is known of a chunk's job; its environment is not removed within this block.

        The first time it is loaded, and its environment validated, built or mended. So it is when environment or
        snapshot were made anew since. While storage is away, the attempt waits for it.

        Raises
        ------
        ModelOpsError
            The bundle or its environment cannot be had.
        SetAsideError
            For what went wrong in the block because environment or bundle were set aside or made anew meanwhile.
        """
        with contextlib.ExitStack() as held:
            key = (chunk.job, chunk.study, chunk.study_digest)
            attempt.preparing = True
            try:
                context = self.when_storage_allows(lambda: self._held(key, held), attempt)
            finally:
                attempt.preparing = False
            try:
                yield context
            except SetAsideError:
                raise
            except ProcessError as error:
                # Nothing of the chunk counts, so nothing is to be said of what was changed.
                changed = context.snapshot_changes()
                if self.still_has_files(context) and not changed:
                    raise
                raise SetAsideError(str(error)) from error

    def still_has_files(self, context: JobContext) -> bool:
        """Say whether environment and bundle of a job are those that were made ready for it. Four microseconds.

        Whoever finds one damaged, for another job or in another worker of this cache, sets it aside and makes it anew.
        """
        return self.environments.is_in_place(context.environment) and context.has_its_snapshot

    def look_at_bundle(self, context: JobContext, said_as: AttemptId, attempt: Attempt) -> None:
        """Let the job know if its bundle was changed while an attempt ran, before anything of that is stored.

        On each machine models have a copy of the bundle, which who drives the job does not see.

        Raises
        ------
        SetAsideError
            Somebody else has found that, and it was made anew, or will be: only what this attempt did does not count.
        """
        if not context.has_its_snapshot:
            raise SetAsideError("its files may have been changed")
        changes = [f"{line} on {self.host}" for line in context.snapshot_changes()]
        if changes:
            self.when_storage_allows(
                lambda: say_changed(self.objects, context.job, said_as, changes), attempt
            )

    def say_begun(self, attempt: Attempt) -> None:
        """Make sure that the driver knows that a suspect runs now, alone; should it take the worker down, it was it."""
        if attempt.alone:
            self._announce_surely(BEGUN_TOPIC, {"job": attempt.job, "attempt": attempt.attempt})

    def when_storage_allows(self, act: Callable[[], T], attempt: Attempt) -> T:
        """Do what needs storage, as often as it takes, and let the job's driver know why it takes so long."""
        return when_storage_allows(act, attempt, self._saying(attempt))

    def when_there_is_room(self, attempt: Attempt, error: StorageError, first_wait_s: float) -> None:
        """Wait for room for outputs on this machine, for lack of which something failed with ``error`` just now."""
        failed = [error]

        def look() -> None:
            if failed:
                raise failed.pop()
            find_room(self.spool)

        when_storage_allows(look, attempt, self._saying(attempt), first_wait_s=first_wait_s)

    def _saying(self, attempt: Attempt) -> Callable[[str], None]:
        def say(text: str) -> None:
            self._waiting.note(attempt, text)
            message = {"job": attempt.job, "attempt": attempt.attempt, "worker": self.address, "text": text}
            self.announce(STORAGE_TOPIC, message)

        return say

    def _held(self, key: _Key, held: contextlib.ExitStack) -> JobContext:
        for _ in range(TRIES):
            context = self._context(key)
            if context.has_its_snapshot:
                try:
                    held.enter_context(self.environments.hold(context.environment))
                except FileNotFoundError:
                    pass  # removed or rebuilt since: load it again
                else:
                    return context
            with self._lock:
                if self._jobs.get(key) is context:
                    del self._jobs[key]
        raise EnvironmentDamagedError(
            f"environment {context.environment.key} was removed or replaced {TRIES} times while it was about to be "
            "used; look for what cleans the cache of this machine"
        )

    def desk(self, chunk: Chunk, attempt: Attempt) -> Desk:
        """Return what serves the contexts of a chunk's replicates."""
        folder = f"{job_folder(chunk.job)}/checkpoints"
        return Desk(
            self.objects,
            lambda index: f"{folder}/{index}",
            chunk.attempt,
            self.root / "checkpoints" / f"{chunk.job}-{chunk.attempt}",
            may_resume=chunk.may_resume,
            stop=attempt.stop,
            patiently=lambda act: self.when_storage_allows(act, attempt),
            on_report=lambda report: self.announce(PROGRESS_TOPIC, {"job": chunk.job, **report}),
            on_first=lambda index: self.announce(CHECKPOINT_TOPIC, {"job": chunk.job, "index": index}),
        )

    def take_notes(self, job: JobId) -> tuple[str, ...]:
        """Return what the job's story should say of this worker, each note once."""
        with self._lock:
            return tuple(self._notes.pop(job, ()))

    def _context(self, key: _Key) -> JobContext:
        job, study, digest = key
        with self._lock:
            if key in self._jobs:
                self._jobs.move_to_end(key)
                return self._jobs[key]
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:  # one thread loads, the others of this job wait; other jobs do not
            with self._lock:
                if key in self._jobs:
                    return self._jobs[key]
            context = load_job_context(self, job, study, digest)
            with self._lock:
                self._jobs[key] = context
                if damage := context.environment.damage:
                    seconds = context.environment.seconds
                    self._notes[job].append(f"{damage}; rebuilt on {self.host} in {seconds:.1f} s")
                self._loading.pop(key, None)
                while len(self._jobs) > self.MAX_JOBS:
                    self._jobs.popitem(last=False)
            return context

    def close(self) -> None:
        """Stop every runner and remove this worker's folders."""
        self.attempts.stop_all()
        self.pool.close()
        shutil.rmtree(self.root, ignore_errors=True)
