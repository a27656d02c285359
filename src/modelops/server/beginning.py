"""A job that is driven from the moment it is recorded: the transaction that records it takes its lease, too.

Taken afterwards, the lease would be one more transaction that waits for the disk, and somebody would have to look for
the job before. The driver's thread begins already while the job is recorded, and sees to its environment.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlalchemy as sa

    from modelops.environments import Lock
    from modelops.store import JobRow
    from modelops.store.leases import Leases
    from modelops.study.ids import JobId


class Beginning:
    """What a job's driver, which has begun, and whoever records the job tell one another.

    Parameters
    ----------
    leases
        Among which the job is reserved.
    who
        Drives it.
    lock
        Of the job's environment, if it is known.
    """

    def __init__(self, job: JobId, bundle: str, lock: Lock | None, leases: Leases, who: str) -> None:
        self.job, self.bundle, self.lock = job, bundle, lock
        self._leases, self._who = leases, who
        self._row: Future[JobRow | None] = Future()

    def take(self, sql: sa.Connection) -> int:
        """Take the lease within the transaction that records the job; return the epoch."""
        return self._leases.take_new(sql, self.job, self._who)

    def recorded(self, row: JobRow) -> None:
        """Hear that this transaction was carried out; ``row``: what it has written."""
        self._leases.took_new(row.job, row.epoch)
        self._row.set_result(row)

    def give_up(self) -> None:
        """Hear that the job was not recorded, as far as is known, unless it was said that it was."""
        if not self._row.done():
            self._row.set_result(None)

    def wait(self) -> JobRow | None:
        """Return the row once the job is recorded; None if there is nothing to drive."""
        return self._row.result()
