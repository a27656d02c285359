"""Watch and signal processes that may not be ours, so that a pid which was given anew is never mistaken.

Linux: a *pidfd* names a process, not a number. Elsewhere the lock that the process holds is asked each time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from modelops_runner.reaper import descendants, process_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelops.cluster.run_folder import RunFolder


class Handle:
    """A process that holds a role. Close it, or use it in a ``with`` block."""

    def __init__(self, run: RunFolder, role: str, pid: int, fd: int | None) -> None:
        self._run, self.role, self.pid, self.fd = run, role, pid, fd

    @classmethod
    def of_role(cls, run: RunFolder, role: str) -> Handle | None:
        """Return a handle of the process that holds a role now, None if nobody does."""
        while (pid := run.holder(role)) is not None:
            if (
                pid <= 0
            ):  # it runs in another pid namespace: it can be seen, but neither watched nor signalled
                return None
            fd = _pidfd(pid)
            if run.holder(role) == pid and (fd is not None or not hasattr(os, "pidfd_open")):
                return cls(
                    run, role, pid, fd
                )  # it held the role after the descriptor was made: it is that one
            if fd is not None:
                os.close(fd)
        return None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        if self.fd is None:
            return self._run.holder(self.role) == self.pid
        return not select.select([self.fd], [], [], 0)[0]

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            if self.fd is not None:
                signal.pidfd_send_signal(self.fd, number)
            elif self.alive:
                os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False if it still runs after that time."""
        if self.fd is not None:
            return bool(select.select([self.fd], [], [], timeout_s)[0])
        while self.alive and timeout_s > 0:
            select.select([], [], [], 0.05)
            timeout_s -= 0.05
        return not self.alive

    def close(self) -> None:
        """Forget it; it goes on."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Born(NamedTuple):
    """A process for good: a pid and when, in ticks since boot, it was started."""

    pid: int
    started: int


def offspring(pids: Iterable[int]) -> set[Born]:
    """Return all processes below these (nothing without ``/proc``)."""
    table = process_table()
    found = {child for pid in pids for child in descendants(pid, table)}
    return {Born(pid, started) for pid in found if (started := _stat(pid).started)}


def still_there(born: Iterable[Born]) -> set[Born]:
    """Return those that run."""
    return {b for b in born if (now := _stat(b.pid)).started == b.started and now.state not in "ZX"}


def kill_all(born: Iterable[Born]) -> None:
    """Kill those that run."""
    for b in born:
        fd = _pidfd(b.pid)
        if fd is None:
            continue
        try:
            if _stat(b.pid).started == b.started:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def is_stopped(pid: int) -> bool:
    """Whether somebody has sent it SIGSTOP (not whether a debugger looks at it)."""
    return _stat(pid).state == "T"


class _Stat(NamedTuple):
    state: str
    started: int


def _stat(pid: int) -> _Stat:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return _Stat("X", 0)
    fields = text[text.rindex(b")") + 2 :].split()  # the command name may hold anything
    return _Stat(fields[0].decode(), int(fields[19]))


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
