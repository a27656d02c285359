"""What a worker does for models that checkpoint and report: mirror, restore, and show."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec

from modelops.errors import NotFoundError, StorageError
from modelops.processes import GivenUpError
from modelops.store.checkpoints import ReplicateCheckpoints, clear, remove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from modelops.processes import StopSignal
    from modelops.store import Objects
    from modelops.study.ids import AttemptId, JobId

log = logging.getLogger(__name__)


class Report(TypedDict):
    """Of a replicate that runs. ``values``: tagged tree."""

    index: int
    fraction: float
    values: dict[str, Any]


class Desk:
    """A `modelops.processes.ContextDesk`: the checkpoints and reports of the replicates of one chunk.

    Parameters
    ----------
    folder_of
        Where the checkpoints of a replicate lie in storage, by its index.
    root
        A folder of this chunk alone; removed by `close`.
    may_resume
        Whether replicates may have begun before. If not, storage is not asked for checkpoints.
    patiently
        Calls what needs storage until storage does its part. A model that went on without its checkpoint would
        repeat more than it should after a kill, so it waits, however long.
    on_report
        Called with each report.
    on_first
        Called with the index of a replicate when it has kept its first checkpoint here.
    """

    def __init__(
        self,
        objects: Objects,
        folder_of: Callable[[int], str],
        attempt: AttemptId,
        root: Path,
        *,
        may_resume: bool,
        stop: StopSignal,
        patiently: Callable[[Callable[[], object]], object] = lambda act: act(),
        on_report: Callable[[Report], None] = lambda _report: None,
        on_first: Callable[[int], None] = lambda _index: None,
    ) -> None:
        self._objects, self._folder_of, self._attempt = objects, folder_of, attempt
        self._root, self._may_resume, self._stop = root, may_resume, stop
        self._patient, self._on_report, self._on_first = patiently, on_report, on_first
        self._one: tuple[int, ReplicateCheckpoints] | None = None  # the replicate that runs
        self.current: int | None = None  # the replicate that runs, if it has asked for its folder
        self._holds = False  # whether storage holds a checkpoint of it
        self._kept = False  # whether it was this attempt that kept one
        self.settled: list[str] = []  # folders in storage that are of no use once the outcomes are committed
        self.notes: list[str] = []

    @property
    def root(self) -> str:
        """Folder of the replicates' folders."""
        return str(self._root)

    def restore(self, index: int) -> None:
        """Make the folder of a replicate, with its last checkpoint in it."""
        if self._one is not None and self._one[0] != index:
            remove(self._root / str(self._one[0]))
        target = self._root / str(index)
        mine = ReplicateCheckpoints(self._objects, self._folder_of(index), self._attempt, self._patiently)
        self._one, self.current, self._holds, self._kept = (index, mine), index, False, False
        if not self._may_resume:
            clear(target)
            return

        def restore() -> None:
            checkpoint, damaged = mine.restore(target)
            went_on = f"it went on from {checkpoint.name}" if checkpoint else "it began anew"
            self.notes += [f"replicate {index}: {one}; {went_on}" for one in damaged]
            self._holds = checkpoint is not None

        self._patiently(restore)

    def keep(self, index: int) -> None:
        """Store what is in the folder; return when it is durable."""
        if self._one is None or self._one[0] != index:
            raise NotFoundError(f"replicate {index} has no checkpoint_dir yet")
        self._one[1].save(self._root / str(index))
        self._holds = True
        if not self._kept:
            self._kept = True
            self._on_first(index)

    def ended(self, *, succeeded: bool) -> None:
        """Note how the current replicate ended. If it did not succeed, a later attempt may go on from there."""
        if succeeded and self._holds and self.current is not None:
            self.settled.append(self._folder_of(self.current))
        self.current = None

    def report(self, index: int, fraction: float, values: bytes) -> None:
        """Hand a report on."""
        self._on_report({"index": index, "fraction": fraction, "values": msgspec.json.decode(values)})

    def close(self) -> None:
        """Remove the folders of this chunk from this machine."""
        remove(self._root)

    def _patiently(self, act: Callable[[], object]) -> object:
        try:
            return self._patient(act)
        except StorageError:
            if self._stop.stopped:
                raise GivenUpError from None
            raise


class SettledCheckpoints:
    """Which checkpoints are of no use once the outcomes of an attempt are committed. Thread-safe."""

    MAX_ATTEMPTS = 10_000

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._folders: dict[tuple[JobId, AttemptId], list[str]] = {}
        self._lock = threading.Lock()

    def remember(self, job: JobId, attempt: AttemptId, folders: list[str]) -> None:
        """Note the folders of replicates that succeeded in this attempt."""
        if folders:
            with self._lock:
                self._folders[job, attempt] = folders
                while len(self._folders) > self.MAX_ATTEMPTS:  # the end of their job removes them
                    del self._folders[next(iter(self._folders))]

    def remove(self, job: JobId, attempts: Iterable[AttemptId]) -> None:
        """Remove them from storage, as the outcomes of these attempts are recorded. May take a while."""
        with self._lock:
            folders = [folder for one in attempts for folder in self._folders.pop((job, one), [])]
        for folder in folders:
            try:
                self._objects.remove_folder(folder)
            except StorageError as error:  # the end of the job removes them
                log.warning("the checkpoints in %s are left for now: %s", folder, error)
