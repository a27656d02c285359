"""Keep the protocol's pipe out of the bundle's reach, and keep its output in order.

The real stdin and stdout move to private descriptors before anything of the bundle is imported. From
then on 0 is ``/dev/null`` and 1 is 2: neither `print`, nor a C library, nor a child can break a frame.
"""

from __future__ import annotations

import fcntl
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Pipes:
    """Private, non-inheritable descriptors (3 or above): requests, messages, and stderr for marks."""

    def __init__(self, requests: int, messages: int, marks: int) -> None:
        self.requests, self.messages, self.marks = requests, messages, marks


def take_over() -> Pipes:
    """Move the protocol away from 0 and 1 and put harmless files there. To be called once, first."""
    null = os.open(os.devnull, os.O_RDWR)
    while null < 3:  # a closed 0, 1 or 2 would otherwise be taken by the next file that is opened
        null = os.dup(null)
    requests, messages, marks = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (0, 1, 2))
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    for stream in (sys.stdout, sys.stderr):
        # Line by line, so that a line which was printed before a crash is seen.
        stream.reconfigure(  # type: ignore[union-attr]  # at the start they are TextIOWrappers
            encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
    _line_buffer_c_stdout()
    return Pipes(requests, messages, marks)


def put_back(marks: int) -> None:
    """Give 0, 1 and 2 their files again after the bundle has closed one of them."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if null > 2:
        os.close(null)
    os.dup2(marks, 1)
    os.dup2(marks, 2)
    os.set_inheritable(0, True)  # where it was 0 that had been closed, `dup2` had nothing to do


def usable(stream: Any) -> bool:
    """Return whether a `TextIOWrapper` is neither closed nor detached from its file."""
    try:
        return not stream.closed
    except ValueError:  # detached
        return False


def new_stream(fd: int) -> Any:
    """Return a text stream like the one that Python began with on this descriptor."""
    return open(fd, "w" if fd else "r", 1, "utf-8", "backslashreplace", closefd=False)


def flush() -> None:
    """Write out what the bundle has printed, from Python and from C. A broken stream is no reason to stop."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # noqa: BLE001  the model may have closed it or put anything in its place
            pass
    _fflush(None)


def _load_libc() -> Any:
    try:
        import ctypes

        return ctypes, ctypes.CDLL(None)
    except (ImportError, OSError):  # a Python without ctypes: only the order of C's own output suffers
        return None, None


_ctypes, _libc = _load_libc()
_fflush = _libc.fflush if _libc else lambda _: 0


def _line_buffer_c_stdout() -> None:
    if _ctypes is None:
        return
    try:
        stdout = _ctypes.c_void_p.in_dll(_libc, "stdout")
    except ValueError:  # a C library that calls it otherwise (macOS: __stdoutp)
        return
    _libc.setvbuf(stdout, None, 1, 0)  # 1: _IOLBF in glibc and musl
