"""A server with its scheduler and workers in a home of its own, as a user has it, and what its processes cost."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import modelops as mo
from measuring import folder_on_disk
from modelops.cluster.launch import start_pool, stop_pool
from modelops.cluster.status import pool_status
from modelops.home import Home

if TYPE_CHECKING:
    from collections.abc import Iterator

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
LOOK_S = 0.1
PYPROJECT = """
[project]
name = "noop"
version = "1.0"
requires-python = ">=3.11"
[tool.modelops]
model = "noop:simulate"
aggregate = "noop:summarize"
"""
MODEL = """
def simulate(params, seed):
    return {"a": seed / 3, "b": -seed / 7, "c": params["x"] * seed, "d": 0.1, "e": seed * 1e-300}

def summarize(replicates):
    return {"total": sum(r["a"] for r in replicates), "n": len(replicates)}
"""


def noop_bundle(folder: Path) -> Path:
    """Write the bundle that all shapes are measured with: a model that does nothing, five floats out."""
    bundle = folder / "noop"
    bundle.mkdir()
    (bundle / "pyproject.toml").write_text(PYPROJECT)
    (bundle / "noop.py").write_text(MODEL)
    return bundle


@contextlib.contextmanager
def served(n_workers: int = 2) -> Iterator[tuple[Home, Path]]:
    """Start `modelops up` for a home of its own and run one small job; yield the home and the bundle."""
    with folder_on_disk() as folder:
        home = Home.at(Path(folder, "home"))
        os.environ["MODELOPS_HOME"] = str(home.data)
        os.environ.pop("MODELOPS_SERVER", None)
        bundle = noop_bundle(Path(folder))
        start_pool(home, n_workers=n_workers)
        try:
            study = mo.Study(bundle=bundle, parameters=[{"x": 0.5}], replicates=2_000)
            assert mo.submit(study).wait().state == "succeeded"  # builds the environment, warms the workers
            yield home, bundle
        finally:
            stop_pool(home)


class Processes:
    """What the processes of a home use: CPU seconds by role, and the highest memory of server and scheduler.

    Use as a ``with`` block around what is measured.
    """

    def __init__(self, home: Home) -> None:
        self._roles = {role.role: role.pid for role in pool_status(home).roles if role.pid is not None}
        self._ended = threading.Event()
        self.cpu_s: dict[str, float] = {}
        self.grown_bytes: dict[str, int] = {}

    def __enter__(self) -> Processes:
        self._before = self._cpu()
        self._own = os.times()
        self._idle = {role: _resident(self._roles[role]) for role in ("server", "scheduler")}
        self._peak = dict(self._idle)
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        after, own = self._cpu(), os.times()
        self.cpu_s = {name: after[name] - self._before.get(name, 0.0) for name in sorted(after)}
        self.cpu_s["client"] = own.user + own.system - self._own.user - self._own.system
        self.grown_bytes = {role: self._peak[role] - idle for role, idle in self._idle.items()}

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            for role in self._peak:
                self._peak[role] = max(self._peak[role], _resident(self._roles[role]))

    def _cpu(self) -> dict[str, float]:
        """Return CPU seconds by role; what a worker has started counts as `runners`."""
        parents, used = {}, {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                    parents[int(folder.name)] = int(fields[1])
                    used[int(folder.name)] = (int(fields[11]) + int(fields[12])) * TICK_S
        by_pid = {pid: role.split("-")[0] for role, pid in self._roles.items()}
        total: defaultdict[str, float] = defaultdict(float)
        for pid, seconds in used.items():
            at, below = pid, False
            while at not in by_pid and at in parents:
                at, below = parents[at], True
            if at in by_pid:
                name = by_pid[at]
                total[f"{name}'s children" if below else name] += seconds
        return dict(total)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
