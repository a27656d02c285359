"""End a job that nobody will drive to its end. What is finished is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.states import FINAL_JOB_STATES, JobEvent, JobState, ReplicateStatus

if TYPE_CHECKING:
    from modelops.store import Records
    from modelops.study.ids import JobId


def abandon(records: Records, job: JobId, epoch: int, who: str, why: str) -> None:
    """Record that nobody drives the job any more: its driver was interrupted, or something else than it failed."""
    state = records.job(job).state
    if state not in FINAL_JOB_STATES:
        steps = (
            [JobEvent.STOPPED] if state is JobState.CANCELLING else [JobEvent.CANCEL_ASKED, JobEvent.STOPPED]
        )
        for event in steps:
            records.change_state(job, event, who=who, why=why, epoch=epoch)


def give_up(records: Records, job: JobId, epoch: int, who: str) -> JobState:
    """Bring a job whose drivers fail again and again one step nearer to its end: it must not stay open for ever.

    What was running is finalized next; what was finalizing ends. Returns the state it has now.

    Raises
    ------
    LeaseLostError
        Another driver has the job.
    """
    failures = [event.text for event in records.events(job) if event.kind == "driver_failed"]
    why = f"its driver failed: {failures[-1]}" if failures else "its driver failed"
    for event in _steps(records, job):
        records.change_state(job, event, who=who, why=why, epoch=epoch)
    return records.job(job).state


def _steps(records: Records, job: JobId) -> list[JobEvent]:
    some = records.counts(job).get(
        ReplicateStatus.SUCCEEDED
    )  # of earlier runs, perhaps: it has not failed then
    stopped = JobEvent.STOPPED_EARLY if some else JobEvent.ENVIRONMENT_FAILED
    match records.job(job).state:
        case JobState.QUEUED:
            return [JobEvent.STARTED, stopped]
        case JobState.PREPARING:
            return [stopped]
        case JobState.RUNNING:
            return [JobEvent.STOPPED_EARLY]
        case JobState.FINALIZING:
            return [JobEvent.SOME_SUCCEEDED if some else JobEvent.NONE_SUCCEEDED]
        case JobState.CANCELLING:
            return [JobEvent.STOPPED]
        case _:
            return []
