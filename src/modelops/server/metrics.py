"""Metrics in Prometheus' text format, taken from the store when they are asked for. No id is a label."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.server.reconcile import Mismatch
from modelops.states import OUTCOMES, JobState
from modelops.store import overview

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from modelops.server.service import JobService


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
    mismatches = service.records.mismatches()
    return "".join(
        (
            _family("modelops_build_info", "gauge", "The version that runs.", [({"version": version}, 1)]),
            _family(
                "modelops_jobs",
                "gauge",
                "Jobs by state.",
                [({"state": state}, jobs.get(state, 0)) for state in JobState],
            ),
            _family(
                "modelops_replicates_total",
                "counter",
                "Replicates whose outcome is committed, by status.",
                [({"status": status}, replicates.get(status, 0)) for status in OUTCOMES],
            ),
            _family(
                "modelops_status_mismatches_total",
                "counter",
                "Times that something was not as recorded, and was repaired; the goal is 0.",
                [({"kind": kind}, mismatches.get(kind, 0)) for kind in Mismatch],
            ),
            _family("modelops_workers", "gauge", "Workers that are connected.", [({}, len(workers))]),
            _family(
                "modelops_worker_slots",
                "gauge",
                "Replicates that the workers can run at a time.",
                [({}, sum(workers.values()))],
            ),
            _family(
                "modelops_http_requests_total",
                "counter",
                "Requests that this server has answered.",
                [({"method": method, "status": status}, n) for (method, status), n in requests],
            ),
        )
    )


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(str(v))}"' for key, v in labels.items())
        lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
