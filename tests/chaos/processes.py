"""All processes that come from this one, whatever sessions and double forks lie between (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

PR_SET_CHILD_SUBREAPER = 36


class Process(NamedTuple):
    """What the kernel says of a process."""

    pid: int
    state: str
    parent: int
    session: int


def process(pid: int) -> Process | None:
    """Return what is known of a process; None if there is none, or only its exit status."""
    found = _stat(pid)
    return None if found is None or found.state in "ZX" else found


def ancestors(pid: int) -> Iterator[int]:
    """Yield a process, its parent, and so on."""
    while pid > 1 and (found := process(pid)) is not None:
        yield pid
        pid = found.parent


@contextlib.contextmanager
def heir_of_all() -> Iterator[None]:
    """Be the parent, within this block, of every process below this one whose own parent has died."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def bury(but: Collection[int]) -> None:
    """Take the exit status of inherited processes that have ended: they have a session of their own."""
    mine = os.getsid(0)
    for found in _all():
        inherited = found.parent == os.getpid() and found.session != mine and found.pid not in but
        if inherited and found.state == "Z":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(found.pid, os.WNOHANG)


def below(root: int) -> set[int]:
    """Return the pids of all processes below one that have not ended."""
    parents = {p.pid: p.parent for p in _all() if p.state not in "ZX"}
    found: set[int] = set()
    new = {root}
    while new := {pid for pid, parent in parents.items() if parent in new} - found:
        found |= new
    return found


def end_all(but: Collection[int], patience_s: float) -> list[str]:
    """Wait until nothing is left below this process, kill what is, and return what that was."""
    deadline = time.monotonic() + patience_s
    while (left := below(os.getpid()) - set(but)) and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    named = [f"{pid} {_command(pid)}" for pid in sorted(left)]
    while left := below(os.getpid()) - set(but):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        threading.Event().wait(0.02)
    return named


def _all() -> list[Process]:
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [found for pid in numbers if (found := _stat(pid)) is not None]


def _stat(pid: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, parent, _group, session = text[text.rindex(b")") + 2 :].split()[:4]
    return Process(pid, state.decode(), int(parent), int(session))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return ""
