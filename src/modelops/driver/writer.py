"""Perform the machine's writes, one after another; while the store is away they wait, in order.

The store is away when a write raises StorageError. Then that write is tried again, with growing pauses, until it is
done: no other sign says as surely that the store is back. Whether it had been done before, and only the answer was
lost, does not matter: every write is idempotent. What the machine itself gives again after StoreBack (commits that
were not answered, Finalize) is dropped here meanwhile; all else is kept.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.errors import InternalError, StorageError
from modelops.store.rows import LeaseLostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.states import JobState
    from modelops.worker.messages import AggregateRef, SegmentRef

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0


class Ledger(Protocol):
    """Where the loop writes what has become true. Every write checks the driver's epoch.

    ``again``: it may have been written before, and only the answer was lost.
    """

    def commit_segments(self, segments: Sequence[SegmentRef]) -> list[bool]: ...  # noqa: D102  named after the command
    def commit_synthetic(self, command: c.CommitSynthetic) -> tuple[bool, SegmentRef]: ...  # noqa: D102
    def commit_not_needed(self, command: c.CommitNotNeeded) -> tuple[bool, SegmentRef]: ...  # noqa: D102
    def commit_synthetic_aggregates(self, command: c.CommitSyntheticAggregates) -> bool: ...  # noqa: D102
    def commit_aggregates(self, stored: AggregateRef) -> bool: ...  # noqa: D102
    def change_state(self, command: c.ChangeState) -> None: ...  # noqa: D102  the same twice is one change
    def record_retry(self, command: c.RecordRetry, *, again: bool) -> None: ...  # noqa: D102
    def note(self, command: c.Note, *, again: bool) -> None: ...  # noqa: D102
    def record_use(self, used_s: float, *, lasting: bool) -> None: ...  # noqa: D102
    def cancel_asked_by(self) -> str | None: ...  # noqa: D102
    def finalize(self) -> e.Finalized | e.ResultsVoided: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class RecordUse:
    """Record the seconds of the job's timeout that were used; the loop's own write.

    ``lasting``: also if the machine loses its power; otherwise it may be made so by the next write.
    """

    used_s: float
    lasting: bool = True


Commit = (
    c.CommitSegment | c.CommitSynthetic | c.CommitNotNeeded | c.CommitAggregates | c.CommitSyntheticAggregates
)
Write = Commit | c.ChangeState | c.RecordRetry | c.Note | c.Finalize | c.Finish | RecordUse
WRITES: Final = (*Commit.__args__, c.ChangeState, c.RecordRetry, c.Note, c.Finalize, c.Finish, RecordUse)
_GIVEN_AGAIN: Final = (*Commit.__args__, c.Finalize)  # by the machine, after StoreBack


class Writer:
    """The writes of one driver that are not done yet."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._todo: deque[Write] = deque()
        self._pause_s = FIRST_PAUSE_S
        self._finalized: e.Event | None = None  # the answer to a Finalize that the machine will give again
        self.away = ""  # what the store said, while it is away
        self.retry_at = 0.0
        self.finished: JobState | None = None

    def add(self, write: Write) -> None:
        """Take in what is to be written after all else."""
        self._todo.append(write)

    @property
    def is_idle(self) -> bool:
        """Whether everything is written."""
        return not self._todo

    @property
    def next(self) -> Write | None:
        """What is written next."""
        return self._todo[0] if self._todo else None

    def can_write(self, now: float) -> bool:
        """Say whether there is something to write or, while the store is away, to try again."""
        return bool(self._todo) and (not self.away or now >= self.retry_at)

    def step(self, now: float) -> list[e.Event]:
        """Do the next write (or several commits at once) and return what the machine is to be told."""
        try:
            answers = self._write()
        except LeaseLostError:
            self._todo.clear()
            return [e.LeaseLost()]
        except StorageError as error:
            return self._lost(str(error), now)
        if not self.away:
            return answers
        self.away = ""
        return [e.StoreBack()]

    def _lost(self, text: str, now: float) -> list[e.Event]:
        was_away, self.away = bool(self.away), text
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if was_away else FIRST_PAUSE_S
        self.retry_at = now + self._pause_s
        if was_away:
            return []
        first = self._todo.popleft()
        kept = [write for write in self._todo if not isinstance(write, _GIVEN_AGAIN)]
        self._todo = deque((first, *kept))
        return [e.StoreLost(text)]

    def _write(self) -> list[e.Event]:
        segments: list[SegmentRef] = []
        for write in self._todo:
            if not isinstance(write, c.CommitSegment) or (self.away and segments):
                break
            segments.append(write.segment)
        if segments:
            accepted = self._ledger.commit_segments(segments)
            for _ in segments:
                self._todo.popleft()
            return [e.Committed(s.attempt, ok) for s, ok in zip(segments, accepted, strict=True)]
        answer = self._one(self._todo[0])
        self._todo.popleft()
        return [] if answer is None else [answer]

    def _one(self, write: Write) -> e.Event | None:
        ledger, again = self._ledger, bool(self.away)
        match write:
            case c.CommitSynthetic():
                accepted, segment = ledger.commit_synthetic(write)
                return e.Committed(write.attempt, accepted, segment)
            case c.CommitNotNeeded():
                accepted, segment = ledger.commit_not_needed(write)
                return e.Committed(write.attempt, accepted, segment)
            case c.CommitSyntheticAggregates():
                return e.Committed(write.attempt, ledger.commit_synthetic_aggregates(write))
            case c.CommitAggregates():
                return e.Committed(write.stored.attempt, ledger.commit_aggregates(write.stored))
            case c.ChangeState():
                ledger.change_state(write)
            case c.RecordRetry():
                ledger.record_retry(write, again=again)
            case c.Note():
                ledger.note(write, again=again)
            case RecordUse():
                ledger.record_use(write.used_s, lasting=write.lasting)
            case c.Finalize():
                if self._finalized is None:
                    self._finalized = ledger.finalize()
                return self._finalized
            case c.Finish():
                self.finished = write.state
            case c.CommitSegment():
                raise InternalError("segments are committed together")
        return None
