"""Whether anybody can have written to a file since the runner finished it, without reading it.

A runner that has written an output sets the file's time of modification to one that has passed, and tells it together
with the time of change that the file then has. Whoever writes later, through whatever descriptor, makes the first one
the present; who puts that back changes the second. Somebody who has the file mapped could write without either, but not
without having it open for writing: a read lease is granted only while nobody has.
"""

from __future__ import annotations

import fcntl
import os
import signal


def is_untouched(fd: int, n_bytes: int, stamp: tuple[int, int]) -> bool:
    """Say whether a file is as it was when it had this stamp; False: that is not known, and its bytes must tell.

    Parameters
    ----------
    fd
        Open for reading only.
    stamp
        Its times of modification and of change, in nanoseconds.
    """
    try:
        fcntl.fcntl(
            fd, fcntl.F_SETSIG, signal.SIGURG
        )  # who opens it just now tells us so by SIGIO, which kills
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except (AttributeError, OSError):  # not Linux; a file system without leases; or somebody writes to it
        return False
    try:
        stats = os.fstat(fd)
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return (stats.st_size, stats.st_mtime_ns, stats.st_ctime_ns) == (n_bytes, *stamp)
