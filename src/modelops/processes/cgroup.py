"""One memory cgroup per runner, where the machine lets us make one (v2, or v1's memory controller).

The kernel then enforces the limit, knows the peak, and says whether it killed for it. Where no cgroup can be
made (an unprivileged container, macOS) `modelops.processes.watch` looks at resident sizes instead.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

_counter = itertools.count(1)
_NAME = "modelops-"


@dataclass(frozen=True, slots=True)
class CgroupHome:
    """Where cgroups can be made: ``path`` is a folder of the cgroup file system, ``version`` 1 or 2."""

    path: Path
    version: int


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """A cgroup that holds one runner and its children."""

    path: Path
    version: int
    limit_bytes: int

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed in it for want of memory."""
        return self._events().get("oom_kill", 0)

    def counts_kills(self) -> bool:
        """Say whether the kernel counts them."""
        return "oom_kill" in self._events()

    def _events(self) -> dict[str, int]:
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return flat_keyed(_read(self.path / name))

    def peak_bytes(self) -> int | None:
        """Return the highest use so far; None where the kernel does not tell (v2 before Linux 5.19)."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        text = _read(self.path / name)
        return int(text) if text else None

    def remove(self, *, timeout_s: float = 2.0) -> bool:
        """Remove it; its processes have ended or are ending. Return whether it is gone."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return True
            except OSError as error:
                # The kernel lets go of a dead process's cgroup a moment after the process was collected.
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    return False
                time.sleep(0.005)
            else:
                return True


def flat_keyed(text: str) -> dict[str, int]:
    """Read a "flat keyed" cgroup file: a name and a number per line."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def candidate_homes(self_cgroup: str, mountinfo: str) -> list[CgroupHome]:
    """Return the folders in which a cgroup for a child may be made, best first. Touches nothing.

    Parameters
    ----------
    self_cgroup
        Text of ``/proc/self/cgroup``.
    mountinfo
        Text of ``/proc/self/mountinfo``.
    """
    own: dict[str, str] = {}
    for line in self_cgroup.splitlines():
        number, controllers, cgroup = line.split(":", 2)
        if number == "0" and not controllers:
            own["2"] = cgroup
        elif "memory" in controllers.split(","):
            own["1"] = cgroup
    homes = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        root, mount = (field.replace("\\040", " ") for field in left.split()[3:5])
        kind, _source, options = right.split(None, 2)
        is_v1 = kind == "cgroup" and "memory" in options.split(",")
        if not is_v1 and kind != "cgroup2":
            continue
        path = own.get("1" if is_v1 else "2")
        if path is None:
            continue
        # In a container the mount may show only the part of the tree below ``root``.
        below = path[len(root) :] if root != "/" and path.startswith(root) else path
        folder = Path(mount) / below.lstrip("/")
        version = 1 if is_v1 else 2
        homes.append(CgroupHome(folder, version))
        # v2 lets no cgroup hold both processes and cgroups with a limit: there a sibling of our own it is.
        if version == 2 and folder != Path(mount):
            homes.append(CgroupHome(folder.parent, version))
        if folder != Path(mount):
            homes.append(CgroupHome(Path(mount), version))
    return homes


def surrounding_cgroup() -> MemoryCgroup | None:
    """Return the cgroup that we are in ourselves, as of a container, with its limit; None: nothing counts there."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        candidates = candidate_homes(_read(Path("/proc/self/cgroup")), _read(Path("/proc/self/mountinfo")))
        for home in candidates:
            limit = "memory.limit_in_bytes" if home.version == 1 else "memory.max"
            text = _read(home.path / limit).strip()
            group = MemoryCgroup(
                home.path, home.version, min(memory, int(text)) if text.isdigit() else memory
            )
            if group.counts_kills():
                return group
    except (OSError, ValueError):
        pass  # no Linux, or a kernel that speaks otherwise: then it does not say for what it kills
    return None


def find_home() -> CgroupHome | None:
    """Return a place where limited cgroups really can be made (one is, as a trial), or None."""
    try:
        candidates = candidate_homes(_read(Path("/proc/self/cgroup")), _read(Path("/proc/self/mountinfo")))
    except (OSError, ValueError):
        return None  # no Linux, or a kernel that speaks otherwise: the watch takes over
    for home in candidates:
        try:
            trial = make_cgroup(home, limit_bytes=1 << 30)
        except OSError:
            continue
        usable = bool(_read(trial.path / "cgroup.procs") is not None and trial.oom_kills() == 0)
        trial.remove()
        if usable:
            return home
    return None


def make_cgroup(home: CgroupHome, *, limit_bytes: int) -> MemoryCgroup:
    """Make a cgroup with a memory limit, swap included. Raises OSError where that cannot be done."""
    path = home.path / f"{_NAME}{os.getpid()}-{next(_counter)}-{os.urandom(3).hex()}"
    path.mkdir()
    group = MemoryCgroup(path, home.version, limit_bytes)
    try:
        if home.version == 1:
            (path / "memory.limit_in_bytes").write_text(str(limit_bytes))
            with contextlib.suppress(OSError):  # the file is there only with swap accounting
                (path / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
        else:
            (path / "memory.max").write_text(str(limit_bytes))
            with contextlib.suppress(OSError):
                (path / "memory.swap.max").write_text("0")
    except OSError:
        group.remove()
        raise
    return group


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
