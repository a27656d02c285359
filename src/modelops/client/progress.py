"""Show a job while it runs: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from modelops.client.following import Outages
from modelops.client.run import Watcher
from modelops.states import FINAL_JOB_STATES, ReplicateStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modelops.client.job import Job
    from modelops.client.status import JobStatus, Reported
    from modelops.driver.machine import Machine

PLAIN_EVERY_S = 5.0
MAX_REPORTED = 8
_WAITING = (ReplicateStatus.PENDING, ReplicateStatus.RUNNING)
_NEVER_RAN = (ReplicateStatus.NOT_RUN, ReplicateStatus.CANCELLED, ReplicateStatus.NOT_NEEDED)


class ProgressBar(Watcher):
    """Replicates per second, counts by status, time left. Use as a context manager."""

    def __init__(self, console: Console | None = None, *, plain: bool | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.plain = not self.console.is_terminal if plain is None else plain
        self._total = 0
        self._began = 0.0
        self._plain_at = 0.0
        self._said = ""
        self._ended = False
        self._outages = Outages()
        self._first_done: int | None = None
        self._stage = ""
        self._standing: list[str] = []  # what keeps the job waiting, said already
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
            if text:
                self._line(text)
        else:
            self._progress.update(self._task, description=text)

    def waiting(self, text: str) -> None:
        """Show what the job waits for."""
        self._line(f"waiting: {text}")

    def cancelling(self, hard: bool) -> None:
        """Show that Ctrl-C was understood."""
        self._line(
            "stopping at once"
            if hard
            else "stopping: finished replicates are kept; press Ctrl-C again to stop at once"
        )

    def changed(self, machine: Machine) -> None:
        """Redraw from what the driver in this process knows."""
        self._show(machine.state, machine.counts(), machine.eta(time.monotonic()), ())

    def seen(self, status: JobStatus) -> None:
        """Redraw from what the server says; while it is away, say since when nothing is known."""
        if line := self._outages.line(status):
            self._line(line)
        if status.unknown_since is not None:
            return
        said = [("stalled", status.stalled), ("waiting", status.waiting_for)]
        said += [("pool", str(pool)) for pool in status.waiting_pools]
        for line in [f"{what}: {text}" for what, text in said if text]:
            if line not in self._standing:
                self._line(line)
        self._standing = [f"{what}: {text}" for what, text in said if text]
        if status.doing != self._stage and (status.doing or self._stage):
            self.stage(status.doing)
        if not self._total:
            self._total = sum(status.counts.values())
            self._progress.update(self._task, total=self._total)
        self._show(status.state, status.counts, status.eta, status.progress)

    def _show(
        self, state: str, counts: Mapping[Any, int], eta: float | None, reported: Sequence[Reported]
    ) -> None:
        """Redraw; on a pipe, print a line every few seconds and one at the end."""
        if self._ended:
            return
        self._ended = state in FINAL_JOB_STATES
        total = self._total - counts.get(ReplicateStatus.NOT_NEEDED, 0)
        done = self._total - sum(counts.get(s, 0) for s in (*_WAITING, *_NEVER_RAN))
        now = time.monotonic()
        if self._first_done is None or done <= self._first_done:
            # The rate counts from the last moment before anything ended.
            self._first_done, self._began = done, now
        elapsed = now - self._began
        rate = f"{(done - self._first_done) / elapsed:,.0f}/s" if elapsed > 0.2 else ""
        shown = "  ".join(f"{n:,} {status}" for status, n in counts.items() if n and status not in _WAITING)
        left = f"{_duration(eta)} left" if eta is not None and done < total and not self._ended else ""
        if not self.plain:
            text = self._stage if state in ("queued", "preparing") and self._stage else str(state)
            self._progress.update(
                self._task, description=text, completed=done, total=total, rate=rate, counts=shown, left=left
            )
            lines = [Text(f"  {r}", no_wrap=True, overflow="ellipsis") for r in reported[:MAX_REPORTED]]
            self._live.update(Group(self._progress, *lines))
        elif self._ended or ((done or reported) and now - self._plain_at > PLAIN_EVERY_S):
            self._plain_at = now
            self._line("  ".join(filter(None, [f"{state}: {done:,}/{total:,}", rate, shown, left])))
            for r in [] if self._ended else reported[:MAX_REPORTED]:
                self._line(f"  {r}")

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
