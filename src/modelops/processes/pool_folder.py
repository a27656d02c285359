"""The folder of a pool: working directories, spooled outputs, logs, and the lock that says that it is in use.

The lock is held by the pool's process and by its reaper: as long as anything of the pool may live, the folder stays.
What pools that were killed left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from typing import TYPE_CHECKING, Final

from modelops.processes.process_folder import remove_if_empty

if TYPE_CHECKING:
    from pathlib import Path

KEPT_LOGS: Final = 8
FORGOTTEN_AFTER_S: Final = 24 * 3600.0


class PoolFolder:
    """A new folder below ``root``, locked.

    Parameters
    ----------
    root
        Several pools may share it.
    logs
        Where the logs of processes go; default: into the folder.
    """

    def __init__(self, root: Path, logs: Path | None = None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        self.path = root / f"pool-{os.getpid()}-{secrets.token_hex(4)}"
        self.path.mkdir()
        self.logs = logs if logs is not None else self.path / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.lock_fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def of_process(self, number: int) -> Path:
        """Return the folder of one process, not made yet, and remove those of earlier ones that nobody needs."""
        for folder in self.path.glob("p*"):
            remove_if_empty(folder)
        return self.path / f"p{number}"

    def log_of_process(self, number: int) -> Path:
        """Return the file into which what a process writes to stderr goes."""
        return self.logs / f"runner-{os.getpid()}-{number}.log"

    def prune_logs(self, n_running: int) -> None:
        """Keep the logs of the latest processes only (those that run, and a few), however many there have been."""
        logs = sorted(self.logs.glob(f"runner-{os.getpid()}-*.log*"), key=lambda path: path.stat().st_mtime)
        for path in logs[: -2 * (KEPT_LOGS + n_running)]:
            path.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Say that nothing of this process needs it any more."""
        os.close(self.lock_fd)

    def remove(self) -> None:
        """Remove it, but for spooled files that outcomes own (their folders are not empty)."""
        shutil.rmtree(self.path / "logs", ignore_errors=True)
        for folder in self.path.glob("p*"):
            remove_if_empty(folder)
        (self.path / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _remove_leftovers(root: Path) -> None:
    """Remove the folders of pools of which nothing lives any more.

    One without a lock was closed in order but for outputs that somebody was to fetch.
    """
    for folder in root.glob("pool-*"):
        if not (folder / ".lock").exists() and time.time() - folder.stat().st_mtime > FORGOTTEN_AFTER_S:
            shutil.rmtree(folder, ignore_errors=True)
    for lock in root.glob("pool-*/.lock"):
        try:
            fd = os.open(lock, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(lock.parent, ignore_errors=True)
        finally:
            os.close(fd)
