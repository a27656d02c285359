"""Look at runners from outside: resident size where there is no cgroup, and whether one was stopped.

One thread per pool. It sleeps while nothing is watched.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY_TICK_S = 0.02
STALL_TICK_S = 0.5
TREE_TICK_S = 0.2
STALLED_AFTER_S = 5.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(eq=False)
class Watched:
    """One runner that is at work.

    ``limit_bytes``: resident size of the whole tree above which ``on_memory(peak)`` is called; None: any. It returns
    whether that was the end of the runner. ``on_stall`` is called when it has been stopped (by a signal) for
    `STALLED_AFTER_S`.
    """

    pid: int
    limit_bytes: int | None
    on_memory: Callable[[int], bool]
    on_stall: Callable[[], None]
    peak_bytes: int = 0
    tree: list[int] = field(default_factory=list)
    tree_at: float = -1.0
    stopped_since: float | None = None
    fired: bool = False


class Watch:
    """The watching thread. ``at_each_look`` is called with the time of each look, on ``time.monotonic``."""

    def __init__(
        self,
        *,
        stalled_after_s: float = STALLED_AFTER_S,
        at_each_look: Callable[[float], None] = lambda _now: None,
    ) -> None:
        self._stalled_after_s, self._at_each_look = stalled_after_s, at_each_look
        self._changed = threading.Condition()
        self._watched: list[Watched] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="modelops-watch", daemon=True)
        self._thread.start()

    def add(self, watched: Watched) -> None:
        """Begin to watch a process."""
        with self._changed:
            self._watched.append(watched)
            self._changed.notify_all()

    def remove(self, watched: Watched) -> None:
        """Stop watching; no callback is called after this has returned."""
        with self._changed:
            self._watched.remove(watched)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                self._at_each_look(now)
                for watched in self._watched:
                    self._look(watched, now)
                memory = any(w.limit_bytes is not None for w in self._watched)
                tick = (MEMORY_TICK_S if memory else STALL_TICK_S) if self._watched else None
                self._changed.wait(tick)

    def _look(self, watched: Watched, now: float) -> None:
        if watched.fired:
            return
        if watched.limit_bytes is not None:
            if now - watched.tree_at > TREE_TICK_S:
                watched.tree, watched.tree_at = [watched.pid, *tree_below(watched.pid)], now
            size = sum(map(resident_bytes, watched.tree))
            if size > watched.limit_bytes and len(watched.tree) > 1:
                # Forks share pages, which plain resident sizes count once per process.
                size = sum(map(proportional_bytes, watched.tree))
            watched.peak_bytes = max(watched.peak_bytes, size)
            if size > watched.limit_bytes:
                watched.fired = watched.on_memory(watched.peak_bytes)
                watched.peak_bytes, watched.tree_at = 0, -1.0
                return
        if process_state(watched.pid) not in ("T", "t"):
            watched.stopped_since = None
        elif watched.stopped_since is None:
            watched.stopped_since = now
        elif now - watched.stopped_since >= self._stalled_after_s:
            watched.fired = True
            watched.on_stall()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - read 50 times a second; pathlib costs as much again
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def process_state(pid: int) -> str:
    """Return the kernel's letter for what a process does (``R``, ``S``, ``T``, ``Z``...), "" if unknown."""
    stat = _read(f"/proc/{pid}/stat")
    return stat[stat.rindex(b")") + 2 :][:1].decode() if stat else ""


def resident_bytes(pid: int) -> int:
    """Return the resident size of a process without shared file pages, 0 when it is gone."""
    fields = _read(f"/proc/{pid}/statm").split()
    return (int(fields[1]) - int(fields[2])) * _PAGE if len(fields) > 2 else 0


def proportional_bytes(pid: int) -> int:
    """Return a process's share of the pages it has in memory (anonymous ones), 0 when it is gone."""
    return _field(_read(f"/proc/{pid}/smaps_rollup"), b"Pss_Anon:")


def peak_resident_bytes(pid: int) -> int | None:
    """Return the highest resident size a process ever had, None when unknown."""
    return _field(_read(f"/proc/{pid}/status"), b"VmHWM:") or None


def kill_largest_child(pid: int) -> bool:
    """Kill the child of a process that takes the most memory, its own descendants counted; False if there is none.

    What the child leaves behind falls to the process, which is a subreaper.
    """
    sizes = {child: sum(map(resident_bytes, [child, *tree_below(child)])) for child in children(pid)}
    if not sizes:
        return False
    largest = max(sizes, key=sizes.__getitem__)
    try:
        handle = os.pidfd_open(largest)
    except ProcessLookupError:
        return True  # it has just ended
    try:
        if largest in children(pid):  # else the number is another's by now
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
    return True


def _field(text: bytes, name: bytes) -> int:
    at = text.find(name)
    return int(text[at + len(name) : text.index(b"\n", at)].split()[0]) * 1024 if at >= 0 else 0


def tree_below(pid: int) -> list[int]:
    """Return the descendants of a process, as far as the kernel lists them."""
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children(queue.pop())
        found += below
        queue += below
    return found


def children(pid: int) -> list[int]:
    """Return the children of a process, as far as the kernel lists them."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - names only
    except OSError:
        return []
    return [int(child) for task in tasks for child in _read(f"/proc/{pid}/task/{task}/children").split()]
