"""The Dask plugin that gives each worker its runtime, and takes it down again."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

from distributed.diagnostics.plugin import WorkerPlugin

if TYPE_CHECKING:
    from distributed import Worker

    from modelops.worker.runtime import WorkerRuntime
    from modelops.worker.settings import WorkerSettings


class ModelOpsWorker(WorkerPlugin):
    """Own the worker's runtime: process pool, environments, attempts."""

    name = "modelops"

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.runtime: WorkerRuntime

    def setup(self, worker: Worker) -> None:
        """Start the runtime; Dask calls this before the worker takes tasks."""
        from modelops.worker.runtime import WorkerRuntime

        if threading.current_thread() is threading.main_thread():
            # Ctrl-C in a terminal reaches the whole process group. The driver decides what stops, not the signal.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.runtime = WorkerRuntime(
            self.settings, address=worker.address, slots=worker.state.nthreads, announce=worker.log_event
        )

    def teardown(self, worker: Worker) -> None:
        """Stop the runners; nothing outlives the worker."""
        self.runtime.close()
