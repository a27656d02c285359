"""All that a worker keeps between chunks: process pool, environments, and what it knows of each job."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from modelops.environments import Environments
from modelops.processes import ProcessPool
from modelops.store import Objects
from modelops.worker.attempts import AttemptTable
from modelops.worker.job_context import JobContext, load_job_context
from modelops.worker.segment_cache import SegmentCache

if TYPE_CHECKING:
    from modelops.study.ids import JobId
    from modelops.worker.settings import WorkerSettings


class WorkerRuntime:
    """One per worker process; its methods are called from all worker threads at once."""

    MAX_JOBS = 32

    def __init__(self, settings: WorkerSettings, *, address: str, slots: int) -> None:
        self.settings, self.address, self.host = settings, address, socket.gethostname()
        self.root = settings.scratch / f"{os.getpid()}"
        shutil.rmtree(self.root, ignore_errors=True)  # left by a killed process that had our pid
        self.spool = self.root / "spool"
        self.spool.mkdir(parents=True)
        self.objects = Objects.open(settings.objects)
        self.environments = Environments(settings.cache)
        self.pool = ProcessPool(self.root, slots=slots)
        self.segments = SegmentCache(self.objects)
        self.attempts = AttemptTable()
        self._jobs: OrderedDict[JobId, JobContext] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[JobId, threading.Lock] = {}

    def job(self, job: JobId) -> JobContext:
        """Return what is known of a job, loading and validating its environment the first time.

        Raises
        ------
        ModelOpsError
            The bundle or its environment cannot be had.
        """
        with self._lock:
            if job in self._jobs:
                self._jobs.move_to_end(job)
                return self._jobs[job]
            loading = self._loading.setdefault(job, threading.Lock())
        with loading:  # one thread loads, the others of this job wait; other jobs do not
            with self._lock:
                if job in self._jobs:
                    return self._jobs[job]
            context = load_job_context(self, job)
            with self._lock:
                self._jobs[job] = context
                self._loading.pop(job, None)
                while len(self._jobs) > self.MAX_JOBS:
                    self._jobs.popitem(last=False)
            return context

    def close(self) -> None:
        """Stop every runner and remove this worker's folders."""
        self.attempts.stop_all()
        self.pool.close()
        shutil.rmtree(self.root, ignore_errors=True)
