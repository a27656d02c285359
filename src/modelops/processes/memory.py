"""The memory of one process: its limit, its peak, and whether somebody was killed for taking too much.

A cgroup enforces the limit where the machine lets us make one; elsewhere the watch looks at resident sizes and tells.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import TYPE_CHECKING

from modelops.processes.cgroup import CgroupHome, MemoryCgroup, make_cgroup
from modelops.processes.watch import kill_largest_child, peak_resident_bytes, resident_bytes

if TYPE_CHECKING:
    from pathlib import Path

READ_EVERY_S = 0.1
LOOK_EVERY_S = 0.5
LATELY_S = (
    30.0  # a process that was killed may take long to give back its memory, and only then it is seen as dead
)


class Surroundings:
    """The cgroup that the worker itself is in: a container has less memory than its processes together may ask for.

    The kernel counts whom it has killed there, and does not name them. So it is looked at again and again while runners
    work: one that ended by SIGKILL, just when the kernel has killed for memory, was killed for memory.
    """

    def __init__(self, cgroup: MemoryCgroup | None) -> None:
        self._cgroup = cgroup
        self._lock = threading.Lock()
        self._kills = cgroup.oom_kills() if cgroup is not None else 0
        self._looked_at, self._killed_at = time.monotonic(), -math.inf
        self._unexplained = 0  # kills by which nobody is known to have ended

    def look(self, now: float) -> None:
        """Look whether the kernel has killed, if it was not looked at just now."""
        if now - self._looked_at >= LOOK_EVERY_S:
            self._look(now)

    def _look(self, now: float) -> None:
        if self._cgroup is None:
            return
        with self._lock:
            try:
                kills = self._cgroup.oom_kills()
            except (
                OSError
            ):  # too many open files, say; what looks at limits goes on, and this is read the next time
                return
            if kills > self._kills:
                known = now - self._looked_at < LATELY_S  # else nobody knows when
                still = self._unexplained if now - self._killed_at < LATELY_S else 0
                self._unexplained, self._killed_at = (still + kills - self._kills, now) if known else (0, now)
            self._kills, self._looked_at = kills, now

    def has_killed(self, returncode: int | None) -> bool:
        """Say whether a process that has just ended like this, and by none of us, was killed for want of memory.

        One kill explains one end.
        """
        if returncode != -signal.SIGKILL:
            return False
        now = time.monotonic()
        self._look(now)
        with self._lock:
            explained = self._unexplained > 0 and now - self._killed_at < LATELY_S
            self._unexplained -= explained
        return explained

    def message(self, peak_bytes: int | None = None) -> str:
        """Return the sentence with limit and peak for a process that was; ``peak_bytes``: its own, if that is known."""
        group = self._cgroup
        if group is None:
            return f"limit unknown, {_peak(peak_bytes)}"
        peak = _peak(group.peak_bytes()) if peak_bytes is None else f"{_peak(peak_bytes)} of its own"
        return (
            f"limit {_mib(group.limit_bytes)} of all that runs in the worker's container or machine, {peak}"
        )


class ProcessMemory:
    """Parameters are the limit in bytes (None: none) and where cgroups can be made (None: nowhere)."""

    def __init__(self, limit_bytes: int | None, cgroups: CgroupHome | None) -> None:
        self._limit_bytes = limit_bytes
        self._cgroup: MemoryCgroup | None = None
        if limit_bytes is not None and cgroups is not None:
            self._cgroup = make_cgroup(cgroups, limit_bytes=limit_bytes)
        self._kills_seen = 0
        self._forks_killed, self._fork_peak = 0, 0  # by the watch
        self._peak: int | None = None
        self._peak_at = 0.0

    @property
    def cgroup(self) -> Path | None:
        """The folder of its cgroup, if it has one."""
        return self._cgroup.path if self._cgroup else None

    @property
    def to_watch(self) -> int | None:
        """The limit that somebody must watch, in bytes; None where there is none or the kernel does it."""
        return self._limit_bytes if self._cgroup is None else None

    def remove(self) -> None:
        """Remove the cgroup of a process that has ended."""
        if self._cgroup is not None:
            self._cgroup.remove()

    def kill_a_fork(self, pid: int, peak_bytes: int) -> bool:
        """Kill the largest fork of a process that itself is within its limit; False: it is the process itself."""
        if resident_bytes(pid) > (self._limit_bytes or 0) or not kill_largest_child(pid):
            return False
        self._forks_killed, self._fork_peak = self._forks_killed + 1, peak_bytes
        return True

    def new_kills(self) -> bool:
        """Say whether the kernel has killed in its cgroup, or the watch a fork, since this was last asked."""
        before = self._kills_seen
        self._kills_seen = self._forks_killed if self._cgroup is None else self._cgroup.oom_kills()
        return self._kills_seen > before

    def peak_bytes(self, pid: int, now: float, seconds: float) -> int | None:
        """Return the highest resident size so far, read at most ten times a second."""
        if self._peak is None or now - self._peak_at > READ_EVERY_S or seconds > READ_EVERY_S:
            self._peak, self._peak_at = peak_resident_bytes(pid) or self._peak, now
        return self._peak

    def message(self, peak_bytes: int | None = None) -> str:
        """Return the sentence with limit and peak; ``peak_bytes``: what the watch saw when it killed the process."""
        peak = peak_bytes
        if peak is None:
            peak = (self._fork_peak or None) if self._cgroup is None else self._cgroup.peak_bytes()
        return f"limit {_mib(self._limit_bytes or 0)}, {_peak(peak)}"


def _peak(n: int | None) -> str:
    return f"peak {_mib(n) if n is not None else 'unknown'}"


def _mib(n: int) -> str:
    return f"{n / (1 << 20):.1f} MiB"
