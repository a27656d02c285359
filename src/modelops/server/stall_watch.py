"""Looks every few seconds at the jobs that are open, and flags those that stand still without explanation.

While the database is away it goes by what it has read before, and the flag is shown; it is recorded afterwards.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from modelops.errors import ModelOpsError, StorageError
from modelops.server.stalled import Seen, Watched, look, no_worker_of
from modelops.states import OPEN_JOB_STATES, JobState, ReplicateStatus
from modelops.study.spec import read_or_why

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from modelops.server.live import LiveView
    from modelops.store import JobRow, Records
    from modelops.study.ids import JobId
    from modelops.study.spec import JobSpec

log = logging.getLogger(__name__)
EVERY_S: Final = 10.0
MOST_RECORDED: Final = (
    200  # in one look: of thousands of jobs that wait for one thing the others' turn comes, too
)
_NO_STEP: Final = {str(ReplicateStatus.PENDING), str(ReplicateStatus.RUNNING)}


class Driving(Protocol):
    """The drivers of this process. `modelops.server.supervisor` has the real ones."""

    def driven(self) -> Collection[JobId]:
        """Return the jobs that are driven here."""

    def view(self, job: JobId) -> LiveView | None:
        """Return what the driver of a job knows."""

    def workers(self) -> dict[str, int]:
        """Return the slots of each worker."""

    def refused(self) -> dict[str, str]:
        """Return the workers that get no work as their versions do not fit, and a table of these."""

    def connected(self) -> bool:
        """Say whether there is a scheduler."""

    def flag(self, job: JobId, stalled: str) -> None:
        """Show of a job that is driven here why it stands still, or (empty) that it does not."""

    @property
    def is_full(self) -> bool:
        """Whether further jobs wait until one that is driven has ended."""


class StallWatch:
    """Flags jobs that stand still, and takes the flag away when they go on. A job driven elsewhere is left alone.

    Parameters
    ----------
    who
        Goes into the stories of jobs.
    """

    def __init__(
        self,
        records: Records,
        driving: Driving,
        who: str,
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._records, self._driving, self._who = records, driving, who
        self._every_s, self._clock = every_s, clock
        self._watched: dict[JobId, Watched] = {}
        self._rows: list[JobRow] = []  # as last read
        self._flags: dict[JobId, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="modelops-stalled", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def look(self) -> None:
        """Look at every open job once.

        Raises
        ------
        StorageError
            The database does not answer. What is known without it was done.
        """
        away: StorageError | None = None
        try:
            self._rows = self._records.jobs(states=OPEN_JOB_STATES)
        except StorageError as error:
            away = error
        now, seen, n_recorded = self._clock(), self._seen(), 0
        self._watched = {job: watched for job, watched in self._watched.items() if job in seen}
        for job, (row, one) in seen.items():
            self._watched[job], stall = look(self._watched.get(job), one, now)
            reason = "" if stall is None else stall.reason
            text = "it goes on" if stall is None else str(stall)
            if reason != self._flags.get(job, row.stalled):
                log.info("job %s: %s", job, text, extra={"job": job})
            self._flags[job] = reason
            self._driving.flag(job, reason)
            if reason != row.stalled and away is None and n_recorded < MOST_RECORDED:
                n_recorded += 1
                try:
                    self._records.record_stalled(job, reason, who=self._who, text=text)
                except StorageError as error:  # so does each look, until it is recorded
                    away = error
        self._flags = {job: reason for job, reason in self._flags.items() if job in seen}
        if away is not None:
            raise away

    def _main(self) -> None:
        while not self._stopping.wait(self._every_s):
            try:
                self.look()
            except ModelOpsError as error:  # looked again in a moment
                log.info("whether jobs stand still cannot be recorded: %s", error)
            except Exception:  # whatever it is, the next look must come
                log.exception("looking for jobs that stand still failed")

    def _seen(self) -> dict[JobId, tuple[JobRow, Seen]]:
        views = {job: view for job in self._driving.driven() if (view := self._driving.view(job)) is not None}
        running = {job: len(view.running) for job, view in views.items()}
        n_workers = sum(1 for slots in self._driving.workers().values() if slots)
        n_refused = len(self._driving.refused())
        is_full = self._driving.is_full  # which looks at every job that is driven
        out = {}
        for row in self._rows:
            view = views.get(row.job) or self._asleep(row.job)
            if view is not None and (spec := read_or_why(row.spec)[0]) is not None:
                seen = _of_driven(row, spec, view, n_workers, running.get(row.job, 0), sum(running.values()))
                seen = replace(seen, n_refused=n_refused)
            elif (kept := self._driving.view(row.job)) is not None and kept.needs_worker:
                seen = _of_waiting(row, no_worker_of([pool.name for pool in kept.pools]))
            elif why := read_or_why(row.spec)[1]:
                seen = _of_waiting(row, why)
            elif not self._driving.connected():
                seen = _of_waiting(row, "the scheduler does not answer")
            elif is_full and row.state is JobState.QUEUED:
                seen = _of_waiting(
                    row, "the server drives as many other jobs as it may, which were there first"
                )
            else:
                continue  # somebody else drives it, or it is just being taken up
            out[row.job] = row, seen
        return out

    def _asleep(self, job: JobId) -> LiveView | None:
        view = self._driving.view(job)
        return None if view is None or view.sleeps_until is None else view


def _of_driven(
    row: JobRow, spec: JobSpec, view: LiveView, n_workers: int, n_running: int, n_running_of_all: int
) -> Seen:
    outcomes = tuple(sorted((status, n) for status, n in view.counts.items() if status not in _NO_STEP))
    reports = tuple((p.index, p.fraction) for p in view.progress)
    return Seen(
        state=view.state,
        mark=(row.run, view.state, outcomes, tuple(sorted(view.aggregates.items())), reports),
        waiting_for=view.waiting_for,
        n_workers=sum(p.workers for p in view.pools) if spec.asked_pools else n_workers,
        pools=spec.asked_pools,
        n_running=n_running,
        n_aggregating=view.n_aggregating,
        longest_chunk_s=view.longest_s,
        n_lost_with_worker=view.n_lost_with_worker,
        n_running_of_others=n_running_of_all - n_running,
        replicate_timeout_s=spec.limits.replicate_timeout_s,
        retry_delay_s=max((spec.retry.delay_s(n) for n in (1, spec.retry.max_retries) if n), default=0.0),
    )


def _of_waiting(row: JobRow, reason: str) -> Seen:
    return Seen(state=row.state, mark=(row.run, row.version), waiting_for=reason, is_driven=False)
