"""What the driver of a job sees of it: looked at a few times in a second by its thread, asked for by any."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from modelops.server.live import LivePool, LiveView, Progress
from modelops.states import JobState

if TYPE_CHECKING:
    from datetime import datetime

    from modelops.driver.loop import DriverLoop
    from modelops.driver.machine import Machine

EVERY_S: Final = 0.25


class Lookout:
    """``doing``: what is done before replicates can run. ``stalled``: why the job stands still, if it does."""

    def __init__(self) -> None:
        self.doing = ""
        self.stalled = ""
        self._view: LiveView | None = None
        self._looked_at = 0.0
        self._waiting_since: dict[float, datetime] = {}

    @property
    def state(self) -> JobState:
        """The job's state when it was looked at last."""
        return JobState.QUEUED if self._view is None else self._view.state

    def view(self, waiting_for: str) -> LiveView | None:
        """Return what is known now; None before the job's records were read.

        ``waiting_for``: what the driver itself waits for, outside of its loop.
        """
        view, doing, stalled = self._view, self.doing, self.stalled
        if view is None and waiting_for:
            view = LiveView(JobState.QUEUED)
        if view is None or not (doing or waiting_for or stalled):
            return view
        return replace(
            view, doing=doing or view.doing, waiting_for=waiting_for or view.waiting_for, stalled=stalled
        )

    def is_due(self, machine: Machine) -> bool:
        """Whether it is time to look again."""
        before = self._view
        if before is None or machine.state is not before.state:
            return True
        return time.monotonic() >= self._looked_at + EVERY_S

    def look(self, machine: Machine, loop: DriverLoop | None, clock: datetime) -> LiveView:
        """Look; ``clock``: what the records' clock shows now."""
        self._looked_at = now = time.monotonic()
        running = machine.running
        waiting_for = "" if loop is None else loop.waits_for
        reports = {} if loop is None else loop.hands.reports
        for index in [index for index in list(reports) if index not in running]:
            reports.pop(index, None)
        pools = self._pools(machine, now, clock)
        held_up = machine.is_held_up
        self._view = LiveView(
            state=machine.state,
            reason=machine.reason,
            counts={str(status): n for status, n in machine.counts().items() if n},
            aggregates={str(status): n for status, n in machine.aggregate_counts().items() if n},
            eta=None if waiting_for else machine.eta(now),
            running=running,
            progress=tuple(
                Progress(index, report.get("fraction"), dict(report.get("values") or {}))
                for index, report in sorted(reports.copy().items())
            ),
            waiting_for=waiting_for,
            pools=pools,
            n_aggregating=machine.n_aggregating,
            longest_s=machine.longest_s,
            n_lost_with_worker=machine.n_lost_with_worker,
            held_up=held_up,
            needs_worker=held_up
            and machine.spec.timeout_s is None  # its time runs while it is driven
            and bool(machine.spec.asked_pools)
            and all(pool.waiting_since is not None for pool in pools),
            sleeps_until=None if waiting_for else machine.sleeps_until,
        )
        return self._view

    def _pools(self, machine: Machine, now: float, clock: datetime) -> tuple[LivePool, ...]:
        def since(at: float | None) -> datetime | None:
            if at is None:
                return None
            said = (clock - timedelta(seconds=now - at)).replace(microsecond=0)
            return self._waiting_since.setdefault(at, said)  # computed once: it must not jitter

        return tuple(
            LivePool(p.name, p.workers, p.slots, p.running, since(p.waiting_since)) for p in machine.pools()
        )
