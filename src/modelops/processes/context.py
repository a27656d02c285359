"""What a model asks for and tells through its context, while it runs.

A wish (restore a checkpoint, keep one) is performed in the thread that runs the chunk; the model waits for the
answer, and the time it takes is not the replicate's. Of reports the newest goes on, about once a second.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

from modelops.errors import RequestError
from modelops.rpc import KeepCheckpoint

if TYPE_CHECKING:
    from modelops.rpc import Asked, ProgressNote

REPORT_S: Final = 1.0


class GivenUpError(Exception):
    """The run is to stop, so a wish is not performed any more."""


class ContextDesk(Protocol):
    """Performs what models ask through their contexts. One chunk has one; no two calls at once.

    ``root``: folder that holds ``<index>/`` for each replicate that has asked for its checkpoint.
    """

    @property
    def root(self) -> str: ...  # noqa: D102  said above

    def restore(self, index: int) -> None:
        """Make the folder of a replicate, with its last checkpoint in it.

        Raises
        ------
        GivenUpError
            The run is to stop, and it was not done by then.
        """

    def keep(self, index: int) -> None:
        """Store what is in the folder; return when it is durable.

        Raises
        ------
        RequestError
            It cannot be kept; the model is told why.
        GivenUpError
            The run is to stop, and it was not done by then.
        """

    def report(self, index: int, fraction: float, values: bytes) -> None:
        """Take a report. ``values``: tagged JSON of an object."""


class Conversation:
    """Answers the wishes of one chunk's replicates and passes their reports on.

    Parameters
    ----------
    desk
        None: nobody keeps checkpoints or looks at reports.
    """

    def __init__(self, desk: ContextDesk | None) -> None:
        self._desk = desk
        self._report: ProgressNote | None = None
        self._due = self._last_due = 0.0

    @property
    def root(self) -> str | None:
        """Folder of the checkpoints, as the runner is told."""
        return None if self._desk is None else self._desk.root

    def perform(self, asked: Asked) -> str | None:
        """Do what was asked; return why it cannot be done, or None. Raises `GivenUpError`."""
        if self._desk is None:
            return "nobody keeps checkpoints here"
        index = asked.request.index
        try:
            if isinstance(asked.request, KeepCheckpoint):
                self._desk.keep(index)
            else:
                self._desk.restore(index)
        except RequestError as error:
            return str(error)
        return None

    def take(self, report: ProgressNote) -> None:
        """Take a report in; the one before it, if it was not passed on, is forgotten."""
        self._report = report

    @property
    def due(self) -> float | None:
        """When something is to be passed on (``time.monotonic``); None if there is nothing."""
        return None if self._report is None else self._due

    def pass_on(self) -> None:
        """Pass the newest report on if it is time."""
        if self._report is not None and time.monotonic() >= self._due:
            self._pass()

    def ended(self, index: int) -> None:
        """Pass on the last report of a replicate that has ended, unless another one was passed on just so."""
        report = self._report
        if report is None:
            return
        if report.index == index and time.monotonic() >= self._last_due:
            self._pass()
            self._last_due = self._due
        self._report = None

    def _pass(self) -> None:
        report, self._report = self._report, None
        if report is not None and self._desk is not None:
            self._desk.report(report.index, report.fraction, bytes(report.values))
        self._due = time.monotonic() + REPORT_S
