"""Jobs that only a worker of a pool can run, kept aside while there is none: driving each costs a thread.

What is kept of one is small: which pools it asks for, and what was last seen of it, which stays true as nothing of it
can run. A job leaves when a worker comes that is of one of its pools, when it is to be cancelled, or has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.server.live import LivePool, LiveView

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from modelops.store import Records
    from modelops.store.driving import OpenJob
    from modelops.study.ids import JobId
    from modelops.study.pools import Aliases, Membership


class Aside:
    """The jobs that are kept aside. `look` is called by one thread, `view` by any."""

    def __init__(self, records: Records, aliases: Aliases) -> None:
        self._records, self._aliases = records, aliases
        self._asked: dict[JobId, tuple[str, ...]] = {}  # of open jobs, as far as anybody needed to know
        self._kept: dict[JobId, LiveView] = {}

    def __contains__(self, job: JobId) -> bool:
        """Say whether a job is kept aside."""
        return job in self._kept

    def __len__(self) -> int:
        """Return how many are."""
        return len(self._kept)

    def view(self, job: JobId) -> LiveView | None:
        """Return what is known of a job that is kept aside."""
        return self._kept.get(job)

    def look(
        self,
        jobs: Sequence[OpenJob],
        undriven: Iterable[OpenJob],
        workers: Iterable[Membership],
        *,
        crowded: bool,
    ) -> None:
        """Let go those that a worker has come for, and if it is ``crowded`` keep others that none can run.

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
            if kept not in there or self._served(kept, names):
                del self._kept[kept]
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

    def put(self, job: JobId, asked: tuple[str, ...], view: LiveView) -> None:
        """Keep a job that was driven until now."""
        self._asked[job] = asked
        self._kept[job] = view

    def _served(self, job: JobId, names: set[str]) -> bool:
        return any(self._aliases.canonical(name) in names for name in self._asked[job])
