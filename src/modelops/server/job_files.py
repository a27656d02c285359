"""What a job needs on the machine that drives it: the snapshot of its bundle, and its environment.

The snapshot is read-only for models, and looked at again when the job ends. A driver that takes a job over finds the
snapshot as an earlier driver used it; if that was changed, outcomes of this run may come from the changed one.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

from modelops.bundles import snapshot_changed, snapshot_mark
from modelops.environments import Environments
from modelops.errors import ModelOpsError, NotFoundError
from modelops.store import AlreadyExistsError
from modelops.store.fetch import fetch_snapshot
from modelops.store.segments import job_folder
from modelops.study.ids import BundleDigest
from modelops.worker.job_lock import read_lock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.environments import Environment, Lock
    from modelops.store import Objects
    from modelops.study.ids import JobId


class JobFiles:
    """Snapshot, lock and environment of one run of a job, as far as one driver is concerned.

    ``has_outcomes``: an earlier driver of this run has committed some. ``lock``: as it is stored, if that is known.
    """

    def __init__(
        self,
        job: JobId,
        bundle: str,
        objects: Objects,
        cache: Path,
        *,
        has_outcomes: bool = False,
        lock: Lock | None = None,
    ) -> None:
        self._known_lock = lock
        self._job, self._objects, self._cache = job, objects, cache
        self._place = cache / "bundles" / bundle
        self._mark: str | None = None
        self._found_changed: list[str] = []
        if has_outcomes and self._place.is_dir():
            self._found_changed = snapshot_changed(self._place)

    def prepare(self, say: Callable[[str], None]) -> Environment:
        """Fetch the bundle, resolve its dependencies once for the job, build the environment.

        Raises
        ------
        ModelOpsError
            The bundle or its environment cannot be had; StorageError: not now.
        """
        digest = BundleDigest(self._place.name)
        snapshot = fetch_snapshot(self._objects, digest, self._cache / "bundles")
        self._mark = snapshot_mark(snapshot)
        environments = _environments(self._cache)
        lock = self._lock(environments, snapshot, say)
        return environments.ensure(lock, bundle_root=snapshot, on_progress=say)

    def _lock(self, environments: Environments, snapshot: Path, say: Callable[[str], None]) -> Lock:
        if self._known_lock is not None:
            return self._known_lock
        name = f"{job_folder(self._job)}/lock"
        with contextlib.suppress(NotFoundError):
            return read_lock(self._objects, self._job)
        lock = environments.resolve(snapshot, on_progress=say)
        try:
            self._objects.put_new(name, lock.text.encode())
        except AlreadyExistsError:  # another driver was faster; workers read that one
            return read_lock(self._objects, self._job)
        return lock

    def changes(self) -> list[str]:
        """Return how the snapshot differs from what it was when this run of the job began, as far as is known."""
        if self._found_changed:
            return self._found_changed
        if self._mark is None:
            return snapshot_changed(self._place) if self._place.is_dir() else []
        if snapshot_mark(self._place) != self._mark:
            return ["it was made anew meanwhile, as another job had found it changed"]
        return snapshot_changed(self._place)


def known_lock(cache: Path, bundle: str) -> Lock | None:
    """Return the lock that a job of this bundle will have, if jobs before had it; None if preparing must find out."""
    with contextlib.suppress(ModelOpsError):  # preparing meets it again, and says what is wrong
        return _environments(cache).known_lock(cache / "bundles" / bundle)
    return None


@functools.lru_cache(maxsize=8)
def _environments(cache: Path) -> Environments:
    """Return what knows the Pythons of this machine already, if a job before needed them."""
    return Environments(cache)
