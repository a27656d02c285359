"""Jobs as lines on a terminal and as JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from modelops.client.reported import reported_values
from modelops.errors import RequestError, StudyDamagedError
from modelops.states import OUTCOMES, ReplicateStatus
from modelops.study.wording import shown_name, shown_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from modelops.client.job import Job
    from modelops.client.served import Summary
    from modelops.client.status import JobEventRecord, JobStatus, PoolStatus
    from modelops.study.spec import JobSpec

STUDY_LOST: Final = "study:      cannot be read, see above"


def status_json(job: str, status: JobStatus) -> dict[str, Any]:
    """Return what is known of a job as one object."""
    found: dict[str, Any] = {
        "job": job,
        "state": str(status.state),
        "reason": status.reason,
        "counts": status.counts,
        "aggregates": status.aggregates,
        "eta": status.eta,
        "stalled": status.stalled,
        "waiting_for": status.waiting_for,
        "doing": status.doing,
        "progress": [
            {"param": r.param, "replicate": r.replicate, "fraction": r.fraction, "values": r.values}
            for r in status.progress
        ],
    }
    found["pools"] = [pool_json(pool) for pool in status.pools]
    if status.unknown_since is not None:
        known = None if status.last_known is None else str(status.last_known)
        found |= {"unknown_since": status.unknown_since, "last_known": known}
    return found


def pool_json(pool: PoolStatus) -> dict[str, Any]:
    """Return a pool of a job as one object."""
    return {
        "name": pool.name,
        "asked": pool.asked,
        "workers": pool.workers,
        "slots": pool.slots,
        "counts": pool.counts,
        "waiting_since": pool.waiting_since,
    }


def summary_json(summary: Summary) -> dict[str, Any]:
    """Return a line of the list as one object."""
    found: dict[str, Any] = msgspec.to_builtins(summary)
    found.pop("tag")
    for reported in found["progress"]:
        reported["values"] = reported_values(reported["values"])
    return found


def show_status(job: str, status: JobStatus) -> list[str]:
    """Return the lines that say how a job goes."""
    first = f"{job}: {status.state}"
    if status.unknown_since is not None:
        return [first, status.reason]
    if status.reason:
        first += f": {shown_text(status.reason)}"
    lines = [first, f"replicates: {counts_text(status.counts)}"]
    if status.aggregates:
        lines.append(f"aggregates: {counts_text(status.aggregates)}")
    if status.eta is not None and not status.final:
        lines.append(f"left:       about {duration(status.eta)}")
    for what, text in (("doing", status.doing), ("waiting", status.waiting_for), ("stalled", status.stalled)):
        if text:
            lines.append(f"{what + ':':<11} {text}")
    lines += [f"pool:       {pool}" for pool in status.pools]
    lines += [f"running:    {r}" for r in status.progress]
    return lines


def show_record(job: Job, events: Sequence[JobEventRecord], n_events: int) -> list[str]:
    """Return the lines that say what a job is, and its last ``n_events`` events; how many there are before these."""
    try:
        lines = _show_spec(job.spec)
    except (StudyDamagedError, RequestError):  # its status says so, and what to do
        lines = [STUDY_LOST]
    n_before = max(0, len(events) - n_events)
    if events:
        lines.append("events:")
    if n_before:
        lines.append(
            f"  {n_before:,} before these; 'modelops jobs show {job.id} --events {len(events)}' shows all"
        )
    for event in events[n_before:]:
        text = f": {shown_text(event.text)}" if event.text else ""
        lines.append(f"  {event.at.astimezone():%Y-%m-%d %H:%M:%S}  {event.who}  {event.kind}{text}")
    return lines


def _show_spec(spec: JobSpec) -> list[str]:
    lines = [
        f"name:       {shown_name(spec.name)}",
        f"bundle:     {shown_name(spec.bundle_name)}, digest {spec.bundle}",
        f"model:      {spec.model}"
        + (f"; aggregates {', '.join(spec.aggregates)}" if spec.aggregates else ""),
        f"study:      {spec.line.n_params:,} parameter sets, {spec.line.size:,} replicates in all",
    ]
    if spec.asked_pools:
        lines.append(f"pools:      {', '.join(spec.asked_pools)}")
    return lines


def show_list(summaries: Iterable[Summary], now: datetime | None = None) -> list[str]:
    """Return one line per job, under a heading."""
    now = now or datetime.now(UTC)
    rows = [("JOB", "STATE", "DONE", "AGE", "NAME")]
    for s in summaries:
        done = sum(s.counts.get(status, 0) for status in OUTCOMES)  # what did not run is not done
        age = duration((now - s.created_at).total_seconds()) if s.created_at else ""
        waits = any(pool.waiting_since is not None for pool in s.pools)
        state = (
            f"{s.state}, stalled" if s.stalled else f"{s.state}, waits for a pool" if waits else str(s.state)
        )
        needed = s.size - s.counts.get(ReplicateStatus.NOT_NEEDED, 0)
        of_all = f"{done:,}/{needed:,}" if s.size and not s.unreadable else ""
        name = shown_name(f"{s.name}: {s.unreadable}" if s.unreadable else s.name)
        rows.append((s.job, state, of_all, age, name))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]).rstrip() for row in rows]


def counts_text(counts: dict[str, int]) -> str:
    """Return ``3 succeeded, 1 failed``."""
    return ", ".join(f"{n:,} {status}" for status, n in counts.items() if n) or "none"


def duration(seconds: float) -> str:
    """Return a duration as people say it: ``42 s``, ``3 min``, ``2.5 h``, ``4 d``."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} d"
