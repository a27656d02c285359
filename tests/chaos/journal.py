"""What a model's journal says: which replicates were begun, ended and failed, when, in which process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

Replicate = tuple[int, int]  # ordinal of the parameter set, number


@dataclass(frozen=True)
class Line:
    """A replicate was begun, ended or failed in a process, at a time of this machine's clock."""

    what: str
    replicate: Replicate
    pid: int
    at: float

    @classmethod
    def of(cls, text: str) -> Self:
        """Read one line."""
        what, param, number, pid, at = text.split()
        return cls(what, (int(param), int(number)), int(pid), float(at))


def read_journal(path: Path) -> list[Line]:
    """Return the whole lines of a journal; none if nothing was begun."""
    if not path.exists():
        return []
    text = path.read_text()
    return [Line.of(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def in_flight(lines: list[Line]) -> dict[int, Line]:
    """Return by process the beginning of the replicate that was begun last in it and neither ended nor failed."""
    open_: dict[int, Line] = {}
    for line in lines:
        if line.what == "begin":
            open_[line.pid] = line
        elif line.pid in open_ and open_[line.pid].replicate == line.replicate:
            del open_[line.pid]
    return open_
