"""Failures remembered for a short while, so that a second job does not pay for the same answer again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from modelops.errors import IndexUnreachableError, ResolutionError
from modelops.whole_file import write_whole

if TYPE_CHECKING:
    from pathlib import Path

FORMAT: Final = 1
REMEMBER_S: Final = 600.0


class _Failure(msgspec.Struct):
    format: int
    at: float
    final: bool
    what: str
    uv_output: str


class Failures:
    """One small file for each failure, named after what failed.

    What is final is repeated for `REMEMBER_S`. An index that did not answer is repeated only to those who
    had asked before it failed and waited for the same try.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recall(self, name: str, asked_at: float) -> ResolutionError | IndexUnreachableError | None:
        """Return the remembered failure that answers a call made at ``asked_at``, if there is one."""
        try:
            failure = msgspec.json.decode((self._folder / f"{name}.json").read_bytes(), type=_Failure)
        except (OSError, msgspec.DecodeError):
            return None
        if failure.format != FORMAT:
            return None
        age_s = time.time() - failure.at
        if failure.final and 0 <= age_s < REMEMBER_S:
            return ResolutionError(failure.what, failure.uv_output)
        if (
            not failure.final and age_s >= 0 and failure.at >= asked_at
        ):  # not from before the clock was put back
            return IndexUnreachableError(failure.what, failure.uv_output)
        return None

    def remember(self, name: str, error: ResolutionError | IndexUnreachableError) -> None:
        """Keep a failure."""
        self._folder.mkdir(parents=True, exist_ok=True)
        final = isinstance(error, ResolutionError)
        failure = _Failure(FORMAT, time.time(), final, error.what, error.uv_output)
        write_whole(self._folder / f"{name}.json", msgspec.json.encode(failure))

    def forget(self, name: str) -> None:
        """Drop a failure; the next call tries again."""
        (self._folder / f"{name}.json").unlink(missing_ok=True)

    def forget_old(self) -> None:
        """Drop the files of failures that answer nobody any more."""
        for file in self._folder.glob("*.json"):
            if time.time() - file.stat().st_mtime > REMEMBER_S:
                file.unlink(missing_ok=True)
