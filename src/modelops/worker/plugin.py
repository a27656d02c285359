"""The Dask plugin that gives each worker its runtime, and takes it down again."""

from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import WorkerPlugin
from distributed.utils import sync

if TYPE_CHECKING:
    from distributed import Worker

    from modelops.worker.runtime import WorkerRuntime
    from modelops.worker.settings import WorkerSettings

log = logging.getLogger(__name__)


class ModelOpsWorker(WorkerPlugin):
    """Own the worker's runtime: process pool, environments, attempts."""

    name = "modelops"

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.runtime: WorkerRuntime

    def setup(self, worker: Worker) -> None:
        """Start the runtime; Dask calls this before the worker takes tasks."""
        from modelops.worker.heartbeat import beat_seldom
        from modelops.worker.runtime import WorkerRuntime
        from modelops.worker.sending import send_whatever_the_clock_says

        beat_seldom(worker)
        send_whatever_the_clock_says()
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C in a terminal reaches the whole process group. The driver decides what stops, not the signal.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        def announce_surely(topic: str, message: dict[str, Any]) -> None:
            """Return when the scheduler has it, and so every client before news of this worker's death."""
            try:
                sync(worker.loop, worker.scheduler.log_event, topic=topic, msg=message)
            except OSError as error:  # there is no scheduler; who connects to the next one asks for what runs
                log.warning("could not announce %s: %s", message, error)

        self.runtime = WorkerRuntime(
            self.settings,
            address=worker.address,
            slots=worker.state.nthreads,
            announce=worker.log_event,
            announce_surely=announce_surely,
        )

    def teardown(self, worker: Worker) -> None:
        """Stop the runners; nothing outlives the worker."""
        self.runtime.close()
