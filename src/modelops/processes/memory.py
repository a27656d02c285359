"""The memory of one process: its limit, its peak, and whether somebody was killed for taking too much.

A cgroup enforces the limit where the machine lets us make one; elsewhere the watch looks at resident sizes and tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.processes.cgroup import CgroupHome, MemoryCgroup, make_cgroup
from modelops.processes.watch import kill_largest_child, peak_resident_bytes, resident_bytes

if TYPE_CHECKING:
    from pathlib import Path

READ_EVERY_S = 0.1


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
        return f"limit {_mib(self._limit_bytes or 0)}, peak {_mib(peak) if peak is not None else 'unknown'}"


def _mib(n: int) -> str:
    return f"{n / (1 << 20):.1f} MiB"
