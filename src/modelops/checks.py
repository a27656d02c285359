"""One line of ``modelops bundle check`` or ``modelops doctor``: what was looked at, how it is, what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class CheckStatus(StrEnum):
    """How a thing is that was looked at. Only ``FAILED`` makes a command fail."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Check:
    """What was found.

    ``message``: what happened, to what. ``advice``: what to do next; empty when there is nothing to do.
    ``details``: the numbers behind the message, for ``--json``.
    """

    name: str
    status: CheckStatus
    message: str
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the check as ``--json`` shows it."""
        return asdict(self)


def ok(name: str, message: str, /, **details: Any) -> Check:
    """Return a check that found nothing wrong."""
    return Check(name, CheckStatus.OK, message, details=details)


def warning(name: str, message: str, advice: str = "", /, **details: Any) -> Check:
    """Return a check that found something to look at, which stops nothing."""
    return Check(name, CheckStatus.WARNING, message, advice, details)


def failed(name: str, message: str, advice: str = "", /, **details: Any) -> Check:
    """Return a check that found something that must be mended."""
    return Check(name, CheckStatus.FAILED, message, advice, details)
