"""Clients that watch jobs until their end, what they say meanwhile, and what of that is not true."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from modelops.cli.exits import Exit, exit_of_state
from modelops.states import FINAL_JOB_STATES, JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

_PROGRESS: Final = re.compile(r"^(\w+): [\d,]+/[\d,]+(?:  |$)(.*)$", re.MULTILINE)
_SUCCEEDED: Final = re.compile(r"([\d,]+) succeeded")
_AWAY: Final = ("cannot be reached", "cannot do its work now", "has not ended")


@dataclass(frozen=True)
class Watch:
    """What a client that watched a job said. ``killed``: by us. ``exit_code``: None if it had not ended at the end."""

    pid: int
    killed: bool
    exit_code: int | None
    shown: str
    told: str

    def what_is_wrong(self, state: str, counts: Mapping[str, int]) -> Iterator[str]:
        """Yield what is not true of a job that ended so."""
        who = f"the client {self.pid}"
        if self.exit_code is None:
            yield f"{who} watched on after the end; it said {self._last()}"
        if "Traceback" in self.shown + self.told:
            yield f"{who} ended with a traceback: {(self.shown + self.told)[-2000:]}"
        states = [word for word, _ in _PROGRESS.findall(self.told)]
        for word in states:
            if word != state and word in FINAL_JOB_STATES:
                yield f"{who} said {word} of a job that ended {state}"
        succeeded = [int(n.replace(",", "")) for n in _SUCCEEDED.findall(self.told)]
        for before, after in pairwise(succeeded):
            if after < before:
                yield f"{who} said first that {before} had succeeded, then {after}"
        if self.exit_code is None or self.killed:
            return
        if self.exit_code == Exit.UNREACHABLE and not states and any(words in self.told for words in _AWAY):
            return  # the server was away when it began, and it said so
        if self.exit_code != exit_of_state(JobState(state)):
            yield f"{who} ended with {self.exit_code} for a job that ended {state}; it said {self._last()}"
            return
        said = json.loads(self.shown)
        if (said["state"], said["counts"]) != (state, counts):
            yield f"{who} ended with {said['state']} {said['counts']} for a job that ended {state} {counts}"

    def _last(self) -> str:
        return repr((self.told + self.shown)[-1000:])


@dataclass
class _Client:
    job: str
    process: subprocess.Popen[bytes]
    shown: Path
    told: Path


@dataclass
class Watchers:
    """One client for each live job. ``command``: all of it but the job; what they say is kept in ``folder``."""

    folder: Path
    command: Callable[[], tuple[list[str], dict[str, str]]]
    _now: dict[str, _Client] = field(default_factory=dict)
    _all: list[_Client] = field(default_factory=list)

    def look_after(self, jobs: Collection[str]) -> None:
        """Have a client watch each of these jobs; one that has ended before its job is started again."""
        for job in [job for job in self._now if job not in jobs]:
            del self._now[job]  # it ends by itself
        for job in jobs:
            if job not in self._now or self._now[job].process.poll() is not None:
                self._now[job] = self._start(job)
                self._all.append(self._now[job])

    def watching(self) -> Iterator[tuple[int, str]]:
        """Yield the clients that watch live jobs, and which."""
        for job, client in list(self._now.items()):
            if client.process.poll() is None:
                yield client.process.pid, job

    def wait(self, patience_s: float) -> None:
        """Wait until all have ended by themselves; whoever has not by then is found out later."""
        deadline = time.monotonic() + patience_s
        self._now.clear()
        for client in self._all:
            try:
                client.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue

    def of(self, job: str, killed: Collection[int]) -> list[Watch]:
        """Return all that watched a job. ``killed``: pids of those that were killed."""
        return [_said(client, killed) for client in self._all if client.job == job]

    def kill(self) -> None:
        """End all."""
        for client in self._all:
            if client.process.poll() is None:
                client.process.kill()
                client.process.wait()

    def _start(self, job: str) -> _Client:
        words, environ = self.command()
        self.folder.mkdir(exist_ok=True)
        shown, told = (self.folder / f"{job}-{len(self._all)}.{name}" for name in ("stdout", "stderr"))
        with shown.open("wb") as out, told.open("wb") as err:
            process = subprocess.Popen(
                [*words, "jobs", "watch", job, "--json"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        return _Client(job, process, shown, told)


def _said(client: _Client, killed: Iterable[int]) -> Watch:
    code = client.process.poll()
    return Watch(
        client.process.pid,
        killed=code == -9 and client.process.pid in killed,
        exit_code=code,
        shown=client.shown.read_text(errors="replace"),
        told=client.told.read_text(errors="replace"),
    )
