"""What every measurement tells of itself: all repeats, the commit, the versions, the machine and how busy it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from pathlib import Path


def show(what: str, seconds: list[float]) -> float:
    """Print the repeats of a measurement; return the median."""
    median = statistics.median(seconds)
    every = " ".join(f"{s:.3f}" for s in seconds)
    print(f"{what}: median {median:.3f} s, min {min(seconds):.3f}, max {max(seconds):.3f}  ({every})")
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


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
