"""What every measurement tells of itself: all repeats, the commit, the versions, the machine and how busy it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from modelops.home import Home


def arguments(doc: str | None) -> list[str]:
    """Return what was said behind the name of a measurement; asked for help, print its ``doc`` and end."""
    said = sys.argv[1:]
    if {"-h", "--help"} & set(said):
        print((doc or "").strip())
        sys.exit(0)
    return said


def folder_on_disk() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that goes away again, where ModelOps keeps its data: elsewhere syncing may cost nothing.

    The folder for temporary files is in memory on many machines.
    """
    place = Home.from_environ(os.environ).data
    while not place.is_dir():
        place = place.parent
    return tempfile.TemporaryDirectory(prefix=".modelops-bench-", dir=place)


def show(what: str, measured: list[float], unit: str = " s") -> float:
    """Print the repeats of a measurement; return the median."""
    median = statistics.median(measured)
    every = " ".join(f"{x:.3f}" for x in measured)
    print(f"{what}: median {median:.3f}{unit}, min {min(measured):.3f}, max {max(measured):.3f}  ({every})")
    return median


def describe(*packages: str) -> None:
    """Print where and with what this was measured."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = (
        subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "no repository"
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("modelops", *packages))
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    print(f"commit {commit}; Python {platform.python_version()}, {versions}")
    print(f"{_cpu()}, {cores} cores, {platform.platform()}; load of the last 1, 5, 15 minutes: {load}")


class CpuOfTree:
    """CPU seconds that this process and all its descendants use, from the making of this on.

    A process that has ended counts through its parent, which has waited for it.
    """

    def __init__(self) -> None:
        self._before = _cpu_seconds()

    def used(self) -> dict[str, float]:
        """Return the seconds so far, by what a process is: `driver and scheduler`, `workers`, `runners`, `others`."""
        now = _cpu_seconds()
        used: dict[str, float] = {}
        for pid, (role, seconds) in now.items():
            before = self._before.get(pid, (role, 0.0))[1]
            used[role] = used.get(role, 0.0) + seconds - before
        return used


def _cpu_seconds() -> dict[int, tuple[str, float]]:
    """Return the role and the CPU seconds of this process and of each that descends from it."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    parents, found = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text()
            line = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = stat[stat.rindex(")") + 2 :].split()
        parents[int(folder.name)] = int(fields[1])
        found[int(folder.name)] = (_role(line), sum(map(int, fields[11:15])) * tick_s)
    tree: dict[int, tuple[str, float]] = {}
    for pid in found:
        at = pid
        while at in parents and at != os.getpid():
            at = parents[at]
        if at == os.getpid():
            tree[pid] = ("driver and scheduler", found[pid][1]) if pid == os.getpid() else found[pid]
    return tree


def peak_bytes() -> dict[str, int]:
    """Return the highest resident size that any process of each role has had; see `CpuOfTree` for the roles."""
    peaks: dict[str, int] = {}
    for pid, (role, _) in _cpu_seconds().items():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
        peaks[role] = max(peaks.get(role, 0), *found, 0)
    return peaks


def _role(command_line: str) -> str:
    if "modelops_runner" in command_line:
        return "reapers" if "reaper" in command_line else "runners"
    return "workers" if "spawn_main" in command_line or "forkserver" in command_line else "others"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
