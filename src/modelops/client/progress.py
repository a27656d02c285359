"""Show a job while it runs: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from modelops.client.run import Watcher
from modelops.states import FINAL_JOB_STATES, ReplicateStatus

if TYPE_CHECKING:
    from modelops.client.job import Job
    from modelops.driver.machine import Machine

PLAIN_EVERY_S = 5.0
_WAITING = (ReplicateStatus.PENDING, ReplicateStatus.RUNNING)
_NEVER_RAN = (ReplicateStatus.NOT_RUN, ReplicateStatus.CANCELLED, ReplicateStatus.NOT_NEEDED)


class ProgressBar(Watcher):
    """Replicates per second, counts by status, time left. Use as a context manager."""

    def __init__(self, console: Console | None = None, *, plain: bool | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.plain = not self.console.is_terminal if plain is None else plain
        self._total = 0
        self._began: float | None = None
        self._plain_at = 0.0
        self._said = ""
        self._ended = False
        self._stage = ""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[counts]}"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        self._task = self._progress.add_task("preparing", total=None, rate="", counts="", left="")
        self._live = Live(self._progress, console=self.console, refresh_per_second=10, transient=False)

    def __enter__(self) -> Self:
        if not self.plain:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.plain:
            self._live.stop()

    def prepared(self, job: Job, n_replicates: int) -> None:
        """Show the job's id."""
        self._total = n_replicates
        self._progress.update(self._task, total=n_replicates)
        self._line(f"job {job.id}: {n_replicates:,} replicates")

    def stage(self, text: str) -> None:
        """Show what is being done before replicates run."""
        self._stage = text
        if self.plain:
            self._line(text)
        else:
            self._progress.update(self._task, description=text)

    def cancelling(self, hard: bool) -> None:
        """Show that Ctrl-C was understood."""
        self._line(
            "stopping at once"
            if hard
            else "stopping: finished replicates are kept; press Ctrl-C again to stop at once"
        )

    def changed(self, machine: Machine) -> None:
        """Redraw; on a pipe, print a line every few seconds and one at the end."""
        if self._ended:
            return
        self._ended = machine.state in FINAL_JOB_STATES
        counts = machine.counts()
        done = self._total - sum(counts.get(s, 0) for s in (*_WAITING, *_NEVER_RAN))
        now = time.monotonic()
        if done and self._began is None:
            self._began = now
        elapsed = now - self._began if self._began is not None else 0.0
        rate = f"{done / elapsed:,.0f}/s" if elapsed > 0.2 else ""
        shown = "  ".join(f"{n:,} {status}" for status, n in counts.items() if n and status not in _WAITING)
        eta = machine.eta(now)
        left = f"{_duration(eta)} left" if eta is not None and done < self._total else ""
        if not self.plain:
            state = str(machine.state)
            text = self._stage if state in ("queued", "preparing") and self._stage else state
            self._progress.update(
                self._task, description=text, completed=done, rate=rate, counts=shown, left=left
            )
        elif self._ended or (done and now - self._plain_at > PLAIN_EVERY_S):
            self._plain_at = now
            self._line(f"{machine.state}: {done:,}/{self._total:,}  {rate}  {shown}  {left}".rstrip())

    def _line(self, text: str) -> None:
        if text != self._said:
            self._said = text
            # Nobody knows how wide a pipe is: a line stays one line.
            self.console.print(text, highlight=False, markup=False, soft_wrap=self.plain)


def _duration(seconds: float) -> str:
    """Return a duration as people say it: ``42 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
