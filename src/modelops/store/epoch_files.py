"""Which leases processes of this machine held: a file per job that its holder keeps locked, and that names the epoch.

A lease on the database's clock outlives its holder by some seconds. Whoever starts in the same folder need not wait
for them: a file that nobody locks says that its holder has died, and with which epoch. It is a hint and no lease: the
database decides, and only about that very epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelops.study.ids import JobId

log = logging.getLogger(__name__)


class EpochFiles:
    """The files ``<folder>/<job>.epoch``. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[JobId, int] = {}  # file descriptors
        _close_in_children(self)

    def of_the_dead(self, job: JobId) -> int | None:
        """Return the epoch with which a process drove the job that has died since; None if there is none."""
        try:
            fd = os.open(self._path(job), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return int(os.read(fd, 32))
        except (OSError, ValueError):  # its holder lives; or it is not ours
            return None
        finally:
            os.close(fd)

    def hold(self, job: JobId, epoch: int) -> None:
        """Say that this process has the lease of this epoch, for as long as it lives or until `drop`."""
        before = self._held.pop(job, None)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            fd, temporary = tempfile.mkstemp(prefix=".", suffix=".new", dir=self._folder)
            self._held[job] = fd
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(fd, b"%d\n" % epoch)
                Path(temporary).replace(self._path(job))  # so what is there was locked from its first moment
            except OSError:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            why = error.strerror or error
            log.info(
                "if this process dies, job %s waits for the end of its lease: %s",
                job,
                why,
                extra={"job": job},
            )
        finally:
            if before is not None:
                os.close(before)

    def drop(self, job: JobId) -> None:
        """Forget a lease that was released or lost, and remove its file if it is still the one of this process."""
        fd = self._held.pop(job, None)
        if fd is None:
            return
        path = self._path(job)
        with contextlib.suppress(OSError):  # what stays names an epoch that is over
            if os.path.samestat(path.stat(), os.fstat(fd)):
                path.unlink()
        os.close(fd)

    def forget_all(self) -> None:
        """Close the files without unlocking them: in a forked child, which holds no lease."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    def _path(self, job: JobId) -> Path:
        return self._folder / f"{job}.epoch"


def _close_in_children(files: EpochFiles) -> None:
    """Keep a fork of this process from holding its locks: a lock lasts until all copies of its file are closed."""
    known = weakref.ref(files)

    def in_child() -> None:
        if (there := known()) is not None:
            there.forget_all()

    os.register_at_fork(after_in_child=in_child)
