"""States of jobs, replicates and aggregates, and the one table by which a job changes state.

`JOB_NEXT` is the only way to change a job's state; what is final is derived from it, not listed again.
The drawing in ``docs/reference/states.md`` is made from these tables.
"""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import Final

from modelops.errors import InternalError


class JobState(StrEnum):
    """What a job is doing, or how it ended."""

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    FINALIZING = "finalizing"
    SUCCEEDED = "succeeded"
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class JobEvent(StrEnum):
    """What changes a job's state."""

    STARTED = "started"
    ENVIRONMENT_READY = "environment_ready"
    ENVIRONMENT_FAILED = "environment_failed"
    SETTLED = "settled"
    STOPPED_EARLY = "stopped_early"
    ALL_SUCCEEDED = "all_succeeded"
    SOME_SUCCEEDED = "some_succeeded"
    NONE_SUCCEEDED = "none_succeeded"
    CANCEL_ASKED = "cancel_asked"
    STOPPED = "stopped"
    RESUMED = "resumed"
    EXTENDED = "extended"
    REPAIRED = "repaired"


S, E = JobState, JobEvent
_BEGIN_AGAIN: Final = {
    (state, event): S.QUEUED
    for state in (S.SUCCEEDED, S.PARTIAL, S.FAILED, S.CANCELLED)
    for event in (E.RESUMED, E.EXTENDED, E.REPAIRED)
}
JOB_NEXT: Final = MappingProxyType(
    {
        (S.QUEUED, E.STARTED): S.PREPARING,
        (S.PREPARING, E.ENVIRONMENT_READY): S.RUNNING,
        (S.PREPARING, E.ENVIRONMENT_FAILED): S.FAILED,
        (S.PREPARING, E.STOPPED_EARLY): S.FINALIZING,  # the environment failed; earlier runs have outcomes
        (S.RUNNING, E.ENVIRONMENT_FAILED): S.FAILED,
        (S.RUNNING, E.SETTLED): S.FINALIZING,
        (S.RUNNING, E.STOPPED_EARLY): S.FINALIZING,  # probe, max_failures, timeout: the rest is not_run
        (S.FINALIZING, E.ALL_SUCCEEDED): S.SUCCEEDED,
        (S.FINALIZING, E.SOME_SUCCEEDED): S.PARTIAL,
        (S.FINALIZING, E.NONE_SUCCEEDED): S.FAILED,
        **{
            (state, E.CANCEL_ASKED): S.CANCELLING
            for state in (S.QUEUED, S.PREPARING, S.RUNNING, S.FINALIZING)
        },
        (S.CANCELLING, E.STOPPED): S.CANCELLED,
        **_BEGIN_AGAIN,
    }
)
# Each event leads to one state, wherever it comes from: a job's story says in which state it is.
STATE_AFTER: Final = MappingProxyType({event: state for (_, event), state in JOB_NEXT.items()})
FINAL_JOB_STATES: Final = frozenset({state for (state, event) in _BEGIN_AGAIN})
OPEN_JOB_STATES: Final = frozenset(JobState) - FINAL_JOB_STATES


class ReplicateStatus(StrEnum):
    """What is known of one replicate; derived, never stored as a row."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"
    INVALID_OUTPUT = "invalid_output"
    CANCELLED = "cancelled"
    NOT_RUN = "not_run"
    NOT_NEEDED = "not_needed"


OUTCOMES: Final = (  # how a replicate ends; the position is the code in a segment, never renumbered
    ReplicateStatus.SUCCEEDED,
    ReplicateStatus.FAILED,
    ReplicateStatus.TIMED_OUT,
    ReplicateStatus.OUT_OF_MEMORY,
    ReplicateStatus.CRASHED,
    ReplicateStatus.INVALID_OUTPUT,
)
STORED: Final = (
    *OUTCOMES,
    ReplicateStatus.NOT_NEEDED,
)  # what a segment can hold: a driver says of some that they are not needed
FAILURES: Final = frozenset(OUTCOMES) - {ReplicateStatus.SUCCEEDED}


class AggregateStatus(StrEnum):
    """How the aggregate of one parameter set ended."""

    SUCCEEDED = "succeeded"
    SKIPPED = "skipped"  # fewer than min_success replicates succeeded
    FAILED = "failed"
    NOT_RUN = "not_run"


def next_state(state: JobState, event: JobEvent) -> JobState:
    """Return the state that follows; the only way to change a job's state.

    Raises
    ------
    InternalError
        The table has no such transition.
    """
    try:
        return JOB_NEXT[state, event]
    except KeyError:
        raise InternalError(f"a job that is {state} cannot go on by {event}") from None
