"""Jobs of which nothing can run for a while, kept aside meanwhile: driving each costs a thread.

Some wait for a worker of a pool, as there is none; some for the end of a delay before replicates are tried again. What
is kept of one is small: what it waits for, and what was last seen of it, which stays true as nothing of it can run. A
job leaves when that has come, when it is to be cancelled, or has ended.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from modelops.server.live import LivePool, LiveView

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from modelops.store import Records
    from modelops.store.driving import OpenJob
    from modelops.study.ids import JobId
    from modelops.study.pools import Aliases, Membership

WAKE_BEFORE_S: Final = 2.0  # a driver takes a moment until it is ready


class Aside:
    """The jobs that are kept aside. `look` is called by one thread, `view` by any."""

    def __init__(self, records: Records, aliases: Aliases) -> None:
        self._records, self._aliases = records, aliases
        self._asked: dict[JobId, tuple[str, ...]] = {}  # of open jobs, as far as anybody needed to know
        self._kept: dict[JobId, LiveView] = {}
        self._ends_at: dict[
            JobId, float
        ] = {}  # of those that sleep: when they will have ended, as far as known

    def __contains__(self, job: JobId) -> bool:
        """Say whether a job is kept aside."""
        return job in self._kept

    def __len__(self) -> int:
        """Return how many are."""
        return len(self._kept)

    def view(self, job: JobId) -> LiveView | None:
        """Return what is known of a job that is kept aside."""
        view, ends_at = self._kept.get(job), self._ends_at.get(job)
        if view is None or ends_at is None:
            return view
        return replace(view, eta=max(0.0, ends_at - time.monotonic()))

    def look(
        self,
        jobs: Sequence[OpenJob],
        undriven: Iterable[OpenJob],
        workers: Iterable[Membership],
        *,
        crowded: bool,
    ) -> None:
        """Let go those whose time or worker has come, and if it is ``crowded`` keep others that no worker can run.

        Parameters
        ----------
        jobs
            All that have not ended.
        undriven
            Those of them that nobody here drives.
        workers
            What the workers that take work say of themselves.

        Raises
        ------
        StorageError
            The database does not answer.
        """
        if not crowded and not self._kept:
            self._asked.clear()
            return
        names = {self._aliases.canonical(name) for worker in workers for name in worker.names}
        there = {job.job for job in jobs if job.cancel_by is None}
        for kept in tuple(self._kept):
            if kept not in there or self._is_due(kept, names):
                del self._kept[kept]
                self._ends_at.pop(kept, None)
        self._asked = {job.job: self._asked[job.job] for job in jobs if job.job in self._asked}
        if not crowded:
            return
        waiting = [job for job in undriven if job.job in there and job.job not in self._kept]
        unknown = [job.job for job in waiting if job.job not in self._asked]
        if unknown:
            self._asked |= self._records.pools_of(unknown)
        now = self._records.now().replace(microsecond=0)
        for job in waiting:
            if (asked := self._asked.get(job.job)) and not self._served(job.job, names):
                pools = tuple(LivePool(name, 0, 0, 0, now) for name in asked)
                self._kept[job.job] = LiveView(job.state, pools=pools, held_up=True, needs_worker=True)

    def put(self, job: JobId, view: LiveView) -> None:
        """Keep a job that was driven until now."""
        if view.sleeps_until is None:
            self._asked[job] = tuple(pool.name for pool in view.pools)
        elif view.eta is not None:
            self._ends_at[job] = time.monotonic() + view.eta
        self._kept[job] = replace(view, eta=None)

    def _is_due(self, job: JobId, names: set[str]) -> bool:
        until = self._kept[job].sleeps_until
        return self._served(job, names) if until is None else time.monotonic() >= until - WAKE_BEFORE_S

    def _served(self, job: JobId, names: set[str]) -> bool:
        return any(self._aliases.canonical(name) in names for name in self._asked[job])
