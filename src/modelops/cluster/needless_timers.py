"""Stop the timers of a scheduler that look four times in each second whether a time is over that nobody has set."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler


def stop_needless_timers(scheduler: Scheduler) -> None:
    """Let a scheduler that may be idle, and without workers, for ever not look for that. On its event loop."""
    is_set = {
        "idle-timeout": bool(scheduler.idle_timeout or scheduler.jupyter),
        "no-workers-timeout": scheduler.no_workers_timeout is not None,
    }
    for name, needed in is_set.items():
        if not needed and (timer := scheduler.periodic_callbacks.pop(name, None)) is not None:
            timer.stop()
