"""Where a job is on its way from queued to an end, and what may still be done there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c
from modelops.states import FINAL_JOB_STATES, JobEvent, JobState, ReplicateStatus, next_state

if TYPE_CHECKING:
    from modelops.driver.ledger import Ledger
    from modelops.driver.outbox import Outbox

_RUNNING: Final = JobState.RUNNING


class Course:
    """The job's state, changed by `modelops.states` only, each change written with its reason.

    ``draining``: nothing new is started, and what runs is stopped. ``finalizing``: the result files are being
    written from what is committed, so nothing more is committed.
    """

    def __init__(self, outbox: Outbox, state: JobState, reason: str) -> None:
        self.state, self.reason = state, reason
        self.draining = state in (JobState.FINALIZING, JobState.CANCELLING)
        self.finalizing = False
        self.has_environment = False
        self._outbox = outbox

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self.state in FINAL_JOB_STATES

    @property
    def is_ending(self) -> bool:
        """Whether nothing new is started any more."""
        return self.draining or self.finalizing or self.is_final

    @property
    def may_run(self) -> bool:
        """Whether chunks may be submitted."""
        return self.state is _RUNNING and self.has_environment and not self._outbox.paused

    def change(self, event: JobEvent, reason: str = "") -> None:
        """Go on, and write it down."""
        self.state = next_state(self.state, event)
        self.reason = reason or self.reason
        self._outbox.write(c.ChangeState(event, self.state, reason))

    def finalize(self) -> None:
        """Order the result files."""
        self.finalizing = True
        self._outbox.write(c.Finalize())

    def end(self, ledger: Ledger, failed: str, *, undecidable: bool = False) -> None:
        """Choose the final state, as the result files are written.

        ``failed``: what did so most often. ``undecidable``: it is not known which replicates are needed, so that
        outcomes of all of them are no success.
        """
        if self.state is JobState.CANCELLING:
            self.change(JobEvent.STOPPED, self.reason)
        elif ledger.is_success and not undecidable:
            self.reason = ""  # what was to end it early came when all was done
            self.change(JobEvent.ALL_SUCCEEDED)
        elif ledger.counts[ReplicateStatus.SUCCEEDED]:
            self.change(JobEvent.SOME_SUCCEEDED, self.reason or failed)
        else:
            self.change(JobEvent.NONE_SUCCEEDED, self.reason or failed)
        self.finish()

    def finish(self) -> None:
        """Say that nothing follows."""
        self._outbox.write(c.Finish(self.state, self.reason))
