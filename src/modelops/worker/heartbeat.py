"""Make a worker's heartbeats rarer than Dask's scheduler asks for.

A pool of less than ten workers is asked for two in each second from each. Each costs some milliseconds at either end,
and tells the scheduler nothing that it needs: it sees by its connection that a worker is gone, and waits five minutes
for one that is silent (`distributed.scheduler.worker-ttl`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tornado.ioloop import PeriodicCallback

if TYPE_CHECKING:
    from distributed import Worker

AT_LEAST_S: Final = 5.0


class _Seldom(PeriodicCallback):
    """Dask sets the time between two calls after each; nothing less than `AT_LEAST_S` is taken."""

    @property
    def callback_time(self) -> float:
        return self._ms

    @callback_time.setter
    def callback_time(self, ms: float) -> None:
        self._ms = max(ms, AT_LEAST_S * 1000)


def beat_seldom(worker: Worker) -> None:
    """Replace the timer of a worker's heartbeats; call it on the worker's event loop."""
    old = worker.periodic_callbacks["heartbeat"]
    new = worker.periodic_callbacks["heartbeat"] = _Seldom(old.callback, old.callback_time)
    if old.is_running():
        old.stop()
        new.start()
