"""Metrics in Prometheus' text format, taken from the store when they are asked for. No id is a label."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from modelops.counters import Counted, counted, totals
from modelops.metrics_text import family, of_processes
from modelops.server.pool_backlog import backlog_by_pool, unserved_by_pool
from modelops.server.reconcile import Mismatch
from modelops.states import OUTCOMES, JobState
from modelops.store import overview
from modelops.store.waiting_work import waiting_work
from modelops.study.pools import normal_form

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelops.server.service import JobService
    from modelops.store.waiting_work import WaitingWork


def metrics_text(service: JobService, version: str, requests: Iterable[tuple[tuple[str, str], int]]) -> str:
    """Return all metrics as text.

    Parameters
    ----------
    requests
        (method, class of status) and how many.
    """
    jobs = service.jobs_by_state()
    replicates = overview.replicates_by_status(service.records)
    workers = service.supervisor.workers()
    members = [service.supervisor.membership(worker) for worker in workers]
    pools = Counter(normal_form(of.pool) for of in members if of.pool)
    mismatches = service.records.mismatches()
    waiting = waiting_work(service.records)
    aliases = service.supervisor.aliases
    backlog = backlog_by_pool(waiting.by_pools, members, aliases)
    unserved = unserved_by_pool(waiting.by_pools, members, aliases)
    return "".join(
        (
            family("modelops_build_info", "gauge", "The version that runs.", [({"version": version}, 1)]),
            family(
                "modelops_jobs",
                "gauge",
                "Jobs by state.",
                [({"state": state}, jobs.get(state, 0)) for state in JobState],
            ),
            family(
                "modelops_replicates_total",
                "counter",
                "Replicates whose outcome is committed, by status.",
                [({"status": status}, replicates.get(status, 0)) for status in OUTCOMES],
            ),
            family(
                "modelops_status_mismatches_total",
                "counter",
                "Times that something was not as recorded, and was repaired; the goal is 0.",
                [({"kind": kind}, mismatches.get(kind, 0)) for kind in Mismatch],
            ),
            family(
                "modelops_replicates_pending",
                "gauge",
                "Replicates without an outcome, of jobs that have not ended.",
                [({}, waiting.replicates)],
            ),
            family(
                "modelops_pool_replicates_pending",
                "gauge",
                "Those that ask for a pool, by its name; no_pool: those of jobs that ask for none.",
                [({"pool": pool}, n) for pool, n in sorted(backlog.items())],
            ),
            family(
                "modelops_pool_replicates_unserved",
                "gauge",
                "Those that ask for a pool in which no worker is connected, by its name.",
                [({"pool": pool}, n) for pool, n in sorted(unserved.items())],
            ),
            family(
                "modelops_jobs_stalled",
                "gauge",
                "Jobs that do not get on though they should.",
                [({}, waiting.stalled)],
            ),
            family(
                "modelops_queue_wait_seconds",
                "gauge",
                "How long the job has waited that waits longest to run replicates.",
                [({}, round(_longest_wait_s(waiting, service), 3))],
            ),
            family(
                "modelops_scheduler_connected",
                "gauge",
                "Whether this server is connected to the Dask scheduler.",
                [({}, int(service.supervisor.connected()))],
            ),
            family(
                "modelops_environment_build_failures_total",
                "counter",
                "Jobs that ended because their environment could not be built, since this server began.",
                [({}, counted(Counted.ENVIRONMENT_FAILURES))],
            ),
            family(
                "modelops_store_errors_total",
                "counter",
                "Times that the database or the storage failed, since this server began.",
                [
                    ({"store": "database"}, counted(Counted.DATABASE_ERRORS)),
                    ({"store": "storage"}, counted(Counted.STORAGE_ERRORS)),
                ],
            ),
            family(
                "modelops_workers_joined_total",
                "counter",
                "Workers that came, since this server began.",
                [({}, counted(Counted.WORKERS_JOINED))],
            ),
            family(
                "modelops_workers_lost_total",
                "counter",
                "Workers that went, by whether they died or left, since this server began.",
                [
                    ({"how": "died"}, counted(Counted.WORKERS_DIED)),
                    ({"how": "left"}, counted(Counted.WORKERS_LEFT)),
                ],
            ),
            family(
                "modelops_workers_unfit_total",
                "counter",
                "Times that a worker could not prepare a job's environment, since this server began.",
                [({}, counted(Counted.WORKERS_UNFIT))],
            ),
            family("modelops_workers", "gauge", "Workers that are connected.", [({}, len(workers))]),
            family(
                "modelops_workers_refused",
                "gauge",
                "Workers that get no work as their versions do not fit.",
                [({}, len(service.supervisor.refused()))],
            ),
            family(
                "modelops_pool_workers",
                "gauge",
                "Workers that are connected, by the named pool they are in.",
                [({"pool": pool}, n) for pool, n in sorted(pools.items())],
            ),
            family(
                "modelops_worker_slots",
                "gauge",
                "Replicates that the workers can run at a time.",
                [({}, sum(workers.values()))],
            ),
            family(
                "modelops_http_requests_total",
                "counter",
                "Requests that this server has answered.",
                [({"method": method, "status": status}, n) for (method, status), n in requests],
            ),
            of_processes(totals(), "this server has committed"),
        )
    )


def _longest_wait_s(waiting: WaitingWork, service: JobService) -> float:
    """Return how long the job has waited that waits longest to run replicates.

    A job is running as soon as replicates of it may run: its first may still wait for a worker, or a slot. That is
    known where it is driven; of other servers each says it of its own.
    """
    waits = [0.0, *waiting.waits.values()]
    for job, seconds in waiting.without_outcome.items():
        view = service.supervisor.view(job)
        if view is not None and not view.running and view.sleeps_until is None:
            waits.append(seconds)
    return max(waits)
