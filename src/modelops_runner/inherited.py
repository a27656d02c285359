"""Files that are open when a process is forked: child and parent share where they stand.

The kernel keeps position and flags of an open file once for all who inherited it. So what a child has read of a file
that the bundle opened at import would be missing for the next child, unless the position is put back.
"""

from __future__ import annotations

import fcntl
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    Positions = dict[int, tuple[int, int]]

_FOLDER = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"


def positions() -> Positions:
    """Return position and flags of every open file that has a position, by descriptor."""
    found = {}
    for name in os.listdir(_FOLDER):
        fd = int(name)
        try:
            found[fd] = os.lseek(fd, 0, os.SEEK_CUR), fcntl.fcntl(fd, fcntl.F_GETFL)
        except OSError:  # a pipe or a socket; or the descriptor that listed the folder, closed by now
            continue
    return found


def restore(found: Positions) -> None:
    """Put everything back as it was when `positions` was called in this process."""
    for fd, (position, flags) in found.items():
        if os.lseek(fd, 0, os.SEEK_CUR) != position:
            os.lseek(fd, position, os.SEEK_SET)
        if fcntl.fcntl(fd, fcntl.F_GETFL) != flags:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
