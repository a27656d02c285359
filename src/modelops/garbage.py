"""How often a process of ours looks for garbage, and how soon it gives memory back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

YOUNG: Final = (
    20_000  # new containers; Python's 700 are made and dropped again hundreds of times for each chunk
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3) in glibc
LARGE_BYTES: Final = 512 << 10
SPARE_BYTES: Final = 1 << 20


def look_seldom() -> None:
    """Look for cycles at every 20,000th new container. What is in no cycle goes at once, as always."""
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])


_trim: Callable[[int], int] | None = None


def give_back_at_once() -> None:
    """Return what large arrays took when they go, for a process that is small most of the time.

    Left alone, glibc keeps what it once gave for an array of megabytes, and Arrow's own allocator likewise: making the
    tables of a job left a server twice as large as it ever needed to be.
    """
    import pyarrow as pa

    global _trim
    pa.set_memory_pool(pa.system_memory_pool())
    with contextlib.suppress(OSError, AttributeError):  # another C library: it stays as it is
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, SPARE_BYTES)
        _trim = libc.malloc_trim


def give_back_now() -> None:
    """Return also what lies free between what is in use, in such a process; it takes some milliseconds.

    For moments when much has just gone: parts of large arrays, and millions of texts, are smaller than what is
    returned by itself.
    """
    if _trim is not None:
        _trim(0)
