"""Advisory locks between threads and processes of one machine: flock, released by the kernel at any death.

A lock belongs to an open file, so two threads that open the same path exclude each other as two processes
do, and a killed holder never leaves a stale lock behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IN_USE = ".in-use"  # in an environment's folder; held shared by whoever runs from it


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold ``path`` alone; yields the descriptor of the lock file.

    Without ``wait`` a held lock raises BlockingIOError.

    The file is made when missing and never removed: removing a lock file lets two holders lock two files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Claim an environment's folder against its users; yields False when a process uses it.

    The claim never waits. A folder without the mark has no users: the mark is made before anything can run.
    """
    try:
        fd = os.open(folder / IN_USE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def share(folder: Path) -> int:
    """Mark an environment as used; returns the descriptor to close when done.

    Raises
    ------
    FileNotFoundError
        The environment is gone, or was replaced while the lock was taken.
    """
    mark = folder / IN_USE
    fd = os.open(mark, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        held, there = os.fstat(fd), mark.stat()
        if (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino):
            raise FileNotFoundError(f"the environment {folder} was replaced just now")
    except BaseException:
        os.close(fd)
        raise
    return fd
