"""Pools of real processes for tests: a home of its own for each, and nothing left of it afterwards."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.cluster.launch import ensure_server, stop_pool
from modelops.cluster.run_folder import KEEPER, SCHEDULER, SERVER, RunFolder
from modelops.home import Home

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.cluster.run_folder import ServerAddress

DEADLINE_S = 90.0
ALL = (KEEPER, SERVER, SCHEDULER, "worker-0")


@dataclass
class PoolHome:
    """A home in which a test starts a pool of one worker."""

    home: Home
    environ: dict[str, str]

    @classmethod
    def at(cls, root: Path, **environ: str) -> PoolHome:
        root.mkdir(exist_ok=True)
        given = {k: v for k, v in os.environ.items() if not k.startswith("MODELOPS_")}
        given |= {"MODELOPS_HOME": str(root), "MODELOPS_WORKERS": "1", **environ}
        return cls(Home.from_environ(given), given)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.home)

    def ensure(self) -> ServerAddress:
        return ensure_server(self.home, environ=self.environ)

    def stop(self) -> bool:
        return stop_pool(self.home, environ=self.environ)

    def pid(self, role: str) -> int:
        pid = self.run.holder(role)
        assert pid is not None, f"no {role} runs"
        return pid

    def pids(self) -> dict[str, int | None]:
        return {role: self.run.holder(role) for role in ALL}

    def wait_until_up(self) -> dict[str, int]:
        """Wait until every process runs and does its work; return the pids."""

        def up() -> bool:
            pids = self.pids()
            return None not in pids.values() and all(
                self.run.read(f"{role}.json").get("pid") == pid for role, pid in pids.items()
            )

        wait_for(up, "all processes of the pool run")
        return {role: self.pid(role) for role in ALL}

    def processes(self) -> set[int]:
        """Return every process that was started for this home, whatever it is by now."""
        mark = f"MODELOPS_HOME={self.home.data}".encode()
        below = os.fsencode(str(self.home.data))
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0") or below in (
                    (folder / "cmdline").read_bytes()
                ):
                    found.add(int(folder.name))
        return found - {os.getpid()}

    def close(self) -> None:
        """End the pool; fail if a process of it is left."""
        self.stop()
        wait_for(lambda: not self.processes(), "no process of the pool is left")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        threading.Event().wait(0.02)
