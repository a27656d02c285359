"""Exit codes, and the one place where errors and job states become exit codes."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Literal

from modelops.errors import BundleError, ModelOpsError, RequestError, ServerUnreachableError
from modelops.states import JobState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelops.checks import Check


class Exit(IntEnum):
    """What the shell is told."""

    SUCCEEDED = 0
    FAILED = 1
    WRONG_REQUEST = 2
    PARTIAL = 3
    CANCELLED = 4
    UNREACHABLE = 5


_OF_STATE = {
    JobState.SUCCEEDED: Exit.SUCCEEDED,
    JobState.PARTIAL: Exit.PARTIAL,
    JobState.FAILED: Exit.FAILED,
    JobState.CANCELLED: Exit.CANCELLED,
}


def exit_of_state(state: JobState | Literal["unknown"]) -> Exit:
    """Return the exit code of a job that ended in this state (a job that has not ended: 0)."""
    return Exit.UNREACHABLE if state == "unknown" else _OF_STATE.get(state, Exit.SUCCEEDED)


def exit_of_error(error: ModelOpsError) -> Exit:
    """Return the exit code of a command that raised this."""
    if isinstance(error, ServerUnreachableError):
        return Exit.UNREACHABLE
    return Exit.WRONG_REQUEST if isinstance(error, (RequestError, BundleError)) else Exit.FAILED


def exit_of_checks(checks: Iterable[Check]) -> Exit:
    """Return the exit code of a command that looked at something: a warning stops nothing."""
    return Exit.FAILED if any(c.status == "FAILED" for c in checks) else Exit.SUCCEEDED


def exit_of_counts(succeeded: int, others: int) -> Exit:
    """Return the exit code for so many replicates."""
    if not others:
        return Exit.SUCCEEDED
    return Exit.PARTIAL if succeeded else Exit.FAILED
