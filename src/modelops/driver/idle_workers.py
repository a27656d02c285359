"""What the story of a job says of workers that do not work for it: of other versions, or long in getting ready."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.driver import commands as c

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Mapping

VERSION_SKEW, SLOW = "version_skew", "environment_slow"  # kinds of events


class IdleWorkers:
    """Says each table of versions, and each text of a worker, once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def slow(self, told: deque[str]) -> list[c.Note]:
        """Take what workers told that take long to prepare the environment, and return what is new in it."""
        notes = []
        while told:
            text = told.popleft()
            if text not in self._said:
                self._said.add(text)
                notes.append(c.Note(SLOW, text))
        return notes

    def skewed(self, refused: Mapping[str, str]) -> list[c.Note]:
        """Return what is new in this: of workers, the tables of their versions."""
        found: dict[str, str] = {}
        for worker, table in refused.items():
            if table not in self._said:
                found.setdefault(table, worker)
        self._said |= found.keys()
        return [
            c.Note(
                VERSION_SKEW, f"{worker}, and others like it, get no work: their versions do not fit\n{table}"
            )
            for table, worker in found.items()
        ]
