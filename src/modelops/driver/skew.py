"""What a job's story says of workers that are connected, and get no work as their versions do not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION_SKEW: Final = "version_skew"  # a kind of event


class Skews:
    """Says each table of versions once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def notes(self, refused: Mapping[str, str]) -> list[c.Note]:
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
