"""Compares records, stored bytes and what runs: when the server starts, every minute, and when somebody asks.

It writes to a job only while nobody drives it: a job that is driven here is set apart for that moment, and one that a
live driver elsewhere has is left to that driver. What decides is in `modelops.server.reconcile`, and is pure.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol

from modelops.errors import IntegrityError, InternalError, ModelOpsError, NotFoundError, RequestError
from modelops.server.facts import facts_of, lost_for_good, refuse_empty
from modelops.server.mend import mend_job, needs_mending, record_findings
from modelops.server.reconcile import Finding, Mismatch, never_counts, nobody_runs, runs_after_end
from modelops.server.workers import ask_workers, stop_attempt
from modelops.states import FINAL_JOB_STATES
from modelops.store.fetch import STORE_AGAIN, bundle_object, check_stored_bundle
from modelops.store.rows import LeaseLostError
from modelops.store.segments import job_folder
from modelops.study.ids import AttemptId, BundleDigest
from modelops.study.spec import is_newer, unreadable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from contextlib import AbstractContextManager

    from modelops.driver.hands import Pool
    from modelops.server.reconcile import Held
    from modelops.store import JobRow, Objects, Records
    from modelops.study.ids import JobId

log = logging.getLogger(__name__)
EVERY_S: Final = 60.0
RECENT: Final = timedelta(hours=2)  # a job that changed less than that ago is looked at every time
REST: Final = (
    3.0  # times as long as a look took, at least: those who ask for a status need the processor, too
)
SETTLE_S: Final = 2.0  # between two looks at what runs: news may be under way
GRACE_S: Final = 3600.0  # as long as an object was seen here to count for nothing, before it is removed


class Driving(Protocol):
    """The drivers of this process. `modelops.server.supervisor` has the real ones."""

    def driven(self) -> Collection[JobId]:
        """Return the jobs that are driven here."""

    def attempts(self, job: JobId) -> Mapping[AttemptId, str]:
        """Return the worker of every attempt that the job's driver here waits for."""

    def lost(self, job: JobId, attempt: AttemptId) -> None:
        """Tell the job's driver that nobody runs this attempt any more."""

    def apart(self, job: JobId) -> AbstractContextManager[int | None]:
        """Drive a job not within this block; yields the epoch to write with, None if somebody else drives it."""


class Reconciler:
    """Looks at jobs and repairs what is not as recorded. `start` and `stop` the thread that does so by itself.

    Parameters
    ----------
    who
        Goes into the stories of jobs.
    every_s, settle_s, grace_s
        See the constants of this module.
    """

    def __init__(
        self,
        records: Records,
        objects: Objects,
        driving: Driving,
        pool: Pool,
        who: str,
        *,
        every_s: float = EVERY_S,
        settle_s: float = SETTLE_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self._records, self._objects, self._driving, self._pool, self._who = (
            records,
            objects,
            driving,
            pool,
            who,
        )
        self._every_s, self._settle_s, self._grace_s = every_s, settle_s, grace_s
        self._lock = threading.Lock()  # one look at a time
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="modelops-reconcile", daemon=True)
        self._useless: dict[tuple[JobId, str], float] = {}  # since when, by the clock of this process

    def start(self) -> None:
        """Look at all jobs now, and then at those that may have changed, every minute."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; returns when a look that has begun is over."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def run(self, job: JobId | None = None, *, deep: bool = True) -> list[Finding]:
        """Look at one job, or at all, now; repair what is wrong, and return what that was.

        Parameters
        ----------
        deep
            Read every object of the job and compare it with its digest.

        Raises
        ------
        NotFoundError
            There is no such job.
        StorageError
            The database or the storage does not answer.
        """
        with self._lock:
            rows = self._records.jobs() if job is None else [self._records.job(job)]
            return self._look(rows, deep=deep)

    def _main(self) -> None:
        all_jobs = True
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                with self._lock:
                    rows = self._records.jobs()
                    self._look([row for row in rows if all_jobs or self._is_due(row)], deep=False)
                all_jobs = False
            except ModelOpsError as error:  # tried again in a minute
                log.warning("records cannot be compared with what is there: %s", error)
            except Exception:  # whatever it is, the next look must come
                log.exception("comparing records with what is there failed")
            took_s = time.monotonic() - began
            self._stopping.wait(max(self._every_s, took_s * REST))

    def _is_due(self, row: JobRow) -> bool:
        if (
            not row.epoch
        ):  # nobody has taken it up: of it there is what was submitted, which is read when somebody does
            return False
        return (
            row.state not in FINAL_JOB_STATES
            or row.job in self._driving.driven()
            or self._records.now() - row.changed_at < RECENT
            or any(job == row.job for job, _ in self._useless)
        )

    def _look(self, rows: list[JobRow], *, deep: bool) -> list[Finding]:
        found = self._look_at_stories(rows) + self._look_at_attempts(rows)
        if deep:
            found += self._look_at_bundles(rows)
        for row in rows:
            if self._stopping.is_set():
                break
            if why := unreadable(row.spec):
                found.append(self._tell_unreadable(row, why))
                continue
            try:
                found += self._look_for_losses(row, deep=deep)
                found += self._look_at_storage(row.job, deep=deep)
                self._collect(row.job)
            except (LeaseLostError, NotFoundError) as error:  # somebody else is at it
                log.info("job %s is left to others: %s", row.job, error, extra={"job": row.job})
            except (
                IntegrityError,
                RequestError,
                InternalError,
            ) as error:  # of this job; the others come as well
                if len(rows) == 1:
                    raise
                log.warning(
                    "job %s cannot be compared with what is there: %s", row.job, error, extra={"job": row.job}
                )
        return found

    def _tell_unreadable(self, row: JobRow, why: str) -> Finding:
        """Say that a job's study cannot be read; one of a newer version is left to that, its story too."""
        finding = Finding(row.job, Mismatch.STUDY_UNREADABLE, row.study, f"the job is left as it is: {why}")
        if is_newer(row.spec):
            log.warning("job %s: %s", row.job, finding.text, extra={"job": row.job})
        else:
            self._tell_once(finding)
        return finding

    def _look_at_stories(self, rows: list[JobRow]) -> list[Finding]:
        """Put states right that are not what their stories say; before anything is decided by them."""
        kind, found = Mismatch.STATE_DIFFERS, []
        for row in rows:
            if text := self._records.restore_state(row.job, who=self._who, mismatch=kind):
                log.warning("job %s: %s: %s", row.job, kind, text, extra={"job": row.job})
                found.append(Finding(row.job, kind, "", text))
        return found

    # What is stored.

    def _look_at_storage(self, job: JobId, *, deep: bool) -> list[Finding]:
        _, plan = needs_mending(self._records, self._objects, job, deep=deep)
        if not plan:
            return []
        with self._driving.apart(job) as epoch:
            if epoch is None:
                log.info(
                    "job %s is driven elsewhere, and is left to its driver: %s",
                    job,
                    plan.findings,
                    extra={"job": job},
                )
                return []
            return mend_job(
                self._records, self._objects, job, epoch, self._who, held=lambda: self._held(job), deep=deep
            )

    def _look_for_losses(self, row: JobRow, *, deep: bool) -> list[Finding]:
        """Say what cannot be made again, once in the job's story, and each time to whoever asks."""
        lost = lost_for_good(self._objects, row, deep=deep)
        for finding in lost:
            self._tell_once(finding)
        return lost

    def _look_at_bundles(self, rows: list[JobRow]) -> list[Finding]:
        """Remove archives of bundles that are damaged: a submission then stores them again."""
        found = []
        for digest, row in {row.bundle: row for row in rows if row.bundle}.items():
            name = bundle_object(BundleDigest(digest))
            try:
                check_stored_bundle(self._objects, BundleDigest(digest))
                continue
            except NotFoundError:
                refuse_empty(self._objects)
                text = f"{name} is gone"
            except IntegrityError as error:
                text = f"{error}; it is removed"
                self._objects.delete(name)
            found.append(Finding(row.job, Mismatch.BUNDLE_DAMAGED, name, f"{text}; {STORE_AGAIN}"))
            self._tell_once(found[-1])
        return found

    def _tell_once(self, finding: Finding) -> None:
        log.warning("job %s: %s: %s", finding.job, finding.kind, finding.text, extra={"job": finding.job})
        record_findings(self._records, self._who, [finding], unless_there=True)

    def _held(self, job: JobId) -> frozenset[AttemptId] | None:
        answers = ask_workers(self._pool)
        if answers is None or None in answers.values():
            return None
        return frozenset(line.attempt for line in _lines(answers) if line.job == job)

    def _collect(self, job: JobId) -> None:
        """Remove what a job that has ended has no use for, once it was seen here for long enough."""
        facts = facts_of(self._records, self._objects, job)
        useless = never_counts(facts)
        if useless:
            useless = never_counts(facts_of(self._records, self._objects, job, orphans=True))
        now = time.monotonic()
        self._useless = {
            (j, name): since for (j, name), since in self._useless.items() if j != job or name in useless
        } | {(job, name): self._useless.get((job, name), now) for name in useless}
        for name in useless:
            if now - self._useless[job, name] >= self._grace_s:
                self._objects.delete(f"{job_folder(job)}/{name}")
                del self._useless[job, name]
                log.info("job %s: %s counts for nothing, and is removed", job, name, extra={"job": job})

    # What runs.

    def _look_at_attempts(self, rows: list[JobRow]) -> list[Finding]:
        found = self._odd_attempts(rows)
        if not found or self._stopping.wait(self._settle_s):
            return []
        again = {finding: worker for finding, worker in self._odd_attempts(rows).items() if finding in found}
        for finding, worker in again.items():
            attempt = _attempt(finding)
            log.warning("job %s: %s: %s", finding.job, finding.kind, finding.text, extra={"job": finding.job})
            if worker is None:
                self._driving.lost(finding.job, attempt)
            else:
                stop_attempt(self._pool, finding.job, attempt, worker)
        record_findings(self._records, self._who, again)
        return list(again)

    def _odd_attempts(self, rows: list[JobRow]) -> dict[Finding, str | None]:
        """Return what does not run and should (None), and what runs and should not (its worker)."""
        wanted = {row.job for row in rows}
        # In this order: what a driver waits for was submitted before its worker is asked.
        submitted = {job: self._driving.attempts(job) for job in self._driving.driven() if job in wanted}
        answers = ask_workers(self._pool)
        if answers is None:
            return {}
        known = {worker: lines for worker, lines in answers.items() if lines is not None}
        odd: dict[Finding, str | None] = {
            finding: None
            for job, attempts in submitted.items()
            for finding in nobody_runs(job, attempts, known)
        }
        lines = [line for line in _lines(known) if line.job in wanted]
        states = {job: self._records.job(job).state for job in {line.job for line in lines if line.live}}
        final = {job: state for job, state in states.items() if state in FINAL_JOB_STATES}
        workers = {(line.job, line.attempt): line.worker for line in lines}
        odd |= {finding: workers[finding.job, _attempt(finding)] for finding in runs_after_end(lines, final)}
        return odd


def _lines(answers: Mapping[str, list[Held] | None]) -> Iterator[Held]:
    for lines in answers.values():
        yield from lines or ()


def _attempt(finding: Finding) -> AttemptId:
    return AttemptId(finding.what)
