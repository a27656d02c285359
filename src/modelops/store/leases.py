"""Who drives a job: one lease per job, each takeover with a higher epoch.

The epoch is what keeps two drivers apart: every write checks it. A lease only says when somebody else may take over.
On one machine that is a lock on a file, which the kernel takes from a process that dies. With a database for many
machines it is a time on the database's own clock, never on that of a host; who has the same folder as a driver that
has died is told by a lock on a file there, too, and does not wait for that time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Final, Protocol

import sqlalchemy as sa

from modelops.errors import StorageError
from modelops.store import schema
from modelops.store.epoch_files import EpochFiles
from modelops.store.rows import insert_lease, read_job

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.store.records import Records
    from modelops.study.ids import JobId

log = logging.getLogger(__name__)
LEASE_S: Final = 20.0  # a driver that has not renewed for so long may be replaced
RENEW_EVERY_S: Final = 5.0


class Leases(Protocol):
    """The leases of one process. Thread-safe. All but `renew` concern one job."""

    def reserve(self, job: JobId) -> None:
        """Keep a job that is about to be recorded from other drivers of this machine; `take` comes next."""

    def take(self, job: JobId, owner: str) -> int | None:
        """Become the job's driver; whoever drove it before can write no more.

        Parameters
        ----------
        owner
            Who drives from now on, for the record.

        Returns
        -------
            The new epoch; also for who holds the lease already. None: somebody else, who is alive, holds it.
        """

    def take_new(self, sql: sa.Connection, job: JobId, owner: str) -> int:
        """Become the driver of a job by the transaction that records it, and return the epoch.

        Comes after `reserve`; then comes `took_new`, or `release` if that job was not recorded.
        """

    def took_new(self, job: JobId, epoch: int) -> None:
        """Hear that the transaction was carried out."""

    def renew(self) -> list[JobId]:
        """Say for all leases that their holder lives; return the jobs whose lease is lost."""

    def release(self, job: JobId) -> None:
        """Let somebody else take the job over at once. Nothing happens if it is not held."""


def leases_for(records: Records, folder: Path) -> Leases:
    """Return leases that suit the database: locks below ``folder`` for SQLite, its own clock for PostgreSQL."""
    return FileLeases(records, folder) if records.on_one_machine else ClockLeases(records, folder)


class FileLeases:
    """A lock on ``<folder>/<job>.lock``, held by the live process: a dead driver has none, at once."""

    def __init__(self, records: Records, folder: Path) -> None:
        self._records, self._folder = records, folder
        self._lock = threading.Lock()
        self._held: dict[JobId, int] = {}  # file descriptors
        _close_in_children(self)

    def reserve(self, job: JobId) -> None:
        """Lock the job before its row exists."""
        with self._lock:
            self._acquire(job)

    def take(self, job: JobId, owner: str) -> int | None:
        """Lock the file, then raise the epoch."""
        with self._lock:
            was_held = job in self._held
            if not self._acquire(job):
                return None
            try:
                return self._records.take_lease(job, owner)
            except BaseException:
                if not was_held:
                    self._unlock(job)
                raise

    def take_new(self, sql: sa.Connection, job: JobId, owner: str) -> int:
        """Raise the epoch: the file is locked."""
        return insert_lease(sql, job, self._records.now(), owner)

    def took_new(self, job: JobId, epoch: int) -> None:
        """Do nothing: the lock says it."""

    def renew(self) -> list[JobId]:
        """Do nothing: the lock lives as long as the process."""
        return []

    def release(self, job: JobId) -> None:
        """Unlock the file, and remove it."""
        with self._lock:
            self._unlock(job)

    def _acquire(self, job: JobId) -> bool:
        if job in self._held:
            return True
        path = self._folder / f"{job}.lock"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while True:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                    return False
                if _is_at(fd, path):
                    self._held[job] = fd
                    return True
                os.close(fd)  # who held it has removed the file: lock the one that is there now
        except OSError as error:
            raise StorageError(f"the lease {path} cannot be locked: {error.strerror or error}") from error

    def _unlock(self, job: JobId) -> None:
        fd = self._held.pop(job, None)
        if fd is not None:
            path = self._folder / f"{job}.lock"
            try:
                path.unlink(missing_ok=True)  # while it is locked: nobody else has this file
            except OSError as error:  # what stays is no lock
                log.info("%s is left: %s", path, error.strerror or error, extra={"job": job})
            finally:
                os.close(fd)

    def forget_all(self) -> None:
        """Close the files without unlocking them: in a forked child, which holds no lease."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))


def _close_in_children(leases: FileLeases) -> None:
    """Keep a fork of this process from holding its leases: a lock lasts until all copies of its file are closed."""
    known = weakref.ref(leases)

    def in_child() -> None:
        if (there := known()) is not None:
            there.forget_all()

    os.register_at_fork(after_in_child=in_child)


class ClockLeases:
    """Leases that end ``lease_s`` after they were renewed, by the clock of the database (PostgreSQL).

    Or at once, if their holder had the same ``folder`` and has died.
    """

    def __init__(self, records: Records, folder: Path, *, lease_s: float = LEASE_S) -> None:
        self._records, self._files, self._lease_s = records, EpochFiles(folder), lease_s
        self._lock = threading.Lock()
        self._held: dict[JobId, int] = {}  # epochs

    def reserve(self, job: JobId) -> None:
        """Do nothing: there is no row to hold before the job is recorded."""

    def take(self, job: JobId, owner: str) -> int | None:
        """Raise the epoch, unless a lease that has not ended is another's, who may be alive."""
        t = schema.leases.c
        with self._lock:
            known = {self._held.get(job), self._files.of_the_dead(job)}
            with self._records.database.writing() as sql:
                row = read_job(sql, job, lock=True)
                live = sa.select(t.epoch).where(
                    t.job == job, t.epoch == row.epoch, t.released_at.is_(None), t.expires_at > _NOW
                )
                if row.epoch not in known and sql.scalar(live) is not None:
                    return None
                epoch = self.take_new(sql, job, owner)
            self._hold(job, epoch)
            return epoch

    def take_new(self, sql: sa.Connection, job: JobId, owner: str) -> int:
        """Raise the epoch, with a time at which its lease ends."""
        t = schema.leases.c
        epoch = insert_lease(sql, job, self._records.now(), owner)
        times = {"taken_at": _NOW, "expires_at": self._end()}
        sql.execute(schema.leases.update().where(t.job == job, t.epoch == epoch).values(times))
        return epoch

    def took_new(self, job: JobId, epoch: int) -> None:
        """Renew it from now on."""
        with self._lock:
            self._hold(job, epoch)

    def _hold(self, job: JobId, epoch: int) -> None:
        self._held[job] = epoch
        self._files.hold(job, epoch)

    def renew(self) -> list[JobId]:
        """Move the end of every lease that is still the newest of its job."""
        with self._lock:
            held = dict(self._held)
            if not held:
                return []
            with self._records.database.writing() as sql:
                renewed = {job for job, epoch in held.items() if self._renew(sql, job, epoch)}
            lost = [job for job in held if job not in renewed]
            for job in lost:
                self._forget(job)
            return lost

    def _renew(self, sql: sa.Connection, job: JobId, epoch: int) -> bool:
        t = schema.leases.c
        newest = sa.select(schema.jobs.c.epoch).where(schema.jobs.c.job == job).scalar_subquery()
        update = schema.leases.update().where(
            t.job == job, t.epoch == epoch, t.epoch == newest, t.released_at.is_(None)
        )
        return sql.execute(update.values(expires_at=self._end())).rowcount > 0

    def release(self, job: JobId) -> None:
        """Record that the lease has ended."""
        t = schema.leases.c
        with self._lock:
            epoch = self._held.get(job)
            if epoch is None:
                return
            with self._records.database.writing() as sql:
                sql.execute(
                    schema.leases.update().where(t.job == job, t.epoch == epoch).values(released_at=_NOW)
                )
            self._forget(job)

    def _forget(self, job: JobId) -> None:
        del self._held[job]
        self._files.drop(job)

    def _end(self) -> sa.ColumnElement[object]:
        return _NOW + sa.text(f"interval '{self._lease_s} seconds'")


_NOW: Final = (
    sa.func.clock_timestamp()
)  # not now(): that is when the transaction began, before it had the lock
