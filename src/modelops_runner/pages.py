"""Make this process cheap to fork: for every page that it has written, the kernel copies an entry of a table.

With pandas imported that is 13,000 pages of 4 KiB. Where memory lies in pages of 2 MiB one entry stands for 512; Linux
puts it there on request (``MADV_COLLAPSE``, from 6.1 on). What a fork writes is still copied 4 KiB at a time. Python's
collector, which in its first full run in a fork would write to every object of the parent, leaves them out.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

HUGE_BYTES = 2 << 20
FIRST_AFTER = 16  # forks: moving takes some 15 to 50 ms, and saves 1 to 2 of each that follows
AGAIN_AFTER = 1024  # what the parent writes while a fork lives goes back into small pages
_MADV_COLLAPSE = 25
_MAPS = "/proc/self/smaps"


class Pages:
    """The memory of a process that is forked again and again."""

    def __init__(self) -> None:
        self._n_forks = 0
        self._due = FIRST_AFTER if os.path.exists(_MAPS) else sys.maxsize

    def before_fork(self) -> None:
        """Do what makes this fork and those that follow cheaper, if it is time for it."""
        if not self._n_forks:
            import gc

            if hasattr(gc, "freeze"):  # PyPy has nothing to freeze
                gc.freeze()
        elif self._n_forks >= self._due:
            self._due = self._n_forks + AGAIN_AFTER if collapse() else sys.maxsize
        self._n_forks += 1


def collapse() -> int:
    """Have the memory of this process moved into huge pages; return how many the kernel has made, 0 if it cannot."""
    try:
        from ctypes import CDLL, c_int, c_size_t, c_void_p

        madvise = CDLL(None).madvise
    except (ImportError, OSError, AttributeError):  # a Python without ctypes, or a C library without it
        return 0
    madvise.argtypes = [c_void_p, c_size_t, c_int]
    n_made = 0
    for lo, hi in list(_full()):
        for at in range(-(-lo // HUGE_BYTES) * HUGE_BYTES, hi - HUGE_BYTES + 1, HUGE_BYTES):
            n_made += madvise(at, HUGE_BYTES, _MADV_COLLAPSE) == 0
    return n_made


def _full() -> Iterator[tuple[int, int]]:
    """Yield the ranges of memory of no file that are in use almost wholly; others would take more than before."""
    lo = hi = 0
    ours = False
    with open(_MAPS) as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                lo, hi = (int(text, 16) for text in first.split("-"))
                mode, _, _, inode, *name = rest.split()
                ours = mode == "rw-p" and inode == "0" and name in ([], ["[heap]"])
            elif ours and first == "Rss:" and int(rest.split()[0]) * 1024 >= (hi - lo) * 7 // 8:
                yield lo, hi
