"""Where every item is that has no outcome yet: in the backlog, in an attempt, or in a commit under way.

An item is an index or, to aggregate, a parameter set. (What the probe holds back is with the probe.) Each is in
exactly one place, until a receipt comes after its attempt was given up, or a new driver finds an attempt whose work
somebody else has: such items are remembered, and of them `nobody_has` is asked before they are run again. To ask of all
would cost every attempt, each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c
from modelops.driver.backlog import Kind, Work
from modelops.study.ranges import EMPTY, Ranges

if TYPE_CHECKING:
    from modelops.driver.backlog import Backlog
    from modelops.driver.ledger import Ledger
    from modelops.driver.roster import Attempt, Roster
    from modelops.study.ids import AttemptId
    from modelops.worker.messages import ErrorExample

MANY_ATTEMPTS: Final = 2_000


@dataclass(slots=True, eq=False)
class Commit:
    """A write that the store has not answered yet. ``late``: its attempt had been given up."""

    work: Work
    command: (
        c.CommitSegment
        | c.CommitSynthetic
        | c.CommitNotNeeded
        | c.CommitAggregates
        | c.CommitSyntheticAggregates
    )
    examples: list[ErrorExample]
    late: bool = False


class Places:
    """Moves work between the backlogs, the attempts and the commits."""

    def __init__(self, ledger: Ledger, roster: Roster, backlogs: dict[Kind, Backlog]) -> None:
        self.commits: dict[AttemptId, Commit] = {}
        self._twice = {Kind.SIMULATE: EMPTY, Kind.AGGREGATE: EMPTY}  # items that may be in two places
        self._given_up: dict[AttemptId, Work] = {}
        self._begun = EMPTY  # indices that were in an attempt before, and have checkpoints perhaps
        self._ledger, self._roster, self._backlogs = ledger, roster, backlogs

    # From an attempt.

    def give_up(self, attempt: Attempt) -> Work:
        """Wait for this attempt no longer (it has left the roster); its receipt may still come."""
        self._given_up[attempt.id] = attempt.work
        return attempt.work

    def remember(self, attempt: AttemptId, work: Work) -> None:
        """Expect a receipt of an attempt whose work somebody else has too: the first to finish wins."""
        self._given_up[attempt] = work
        self.doubt(work)

    def doubt(self, work: Work) -> None:
        """Note that each item of this may be in two places from now on."""
        self._twice[work.kind] |= work.ranges

    def forget(self, attempt: AttemptId) -> None:
        """Expect nothing of an attempt that was given up: it is on its worker again."""
        self._given_up.pop(attempt, None)

    def take_over(self, attempt_id: AttemptId, kind: Kind) -> tuple[Work | None, bool]:
        """Return the work of an attempt whose receipt came, and whether it had been given up before."""
        attempt = self._roster.attempts.get(attempt_id)
        if attempt is not None and attempt.work.kind is kind:
            self._roster.remove(attempt_id)
            return attempt.work, False
        work = self._given_up.get(attempt_id)
        if work is None or work.kind is not kind:
            return None, False  # twice, or of another driver: it says nothing new
        del self._given_up[attempt_id]
        return work, True

    def take_part(self, attempt_id: AttemptId, items: Ranges) -> tuple[Work | None, bool]:
        """Return the work behind a part of an attempt that goes on, and whether the attempt had been given up."""
        attempt = self._roster.attempts.get(attempt_id)
        if attempt is not None and attempt.work.kind is Kind.SIMULATE:
            work = attempt.work.of(attempt.work.ranges & items)
            if work.ranges:
                self._roster.shrink(attempt, work.ranges)
            return (work if work.ranges else None), False
        whole = self._given_up.get(attempt_id)
        if whole is None or whole.kind is not Kind.SIMULATE:
            return None, False
        work = whole.of(whole.ranges & items)
        self._given_up[attempt_id] = whole.of(whole.ranges - items)
        return (work if work.ranges else None), True

    # Into the backlog.

    def begun(self, work: Work) -> None:
        """Note that this comes back from an attempt that may have begun with it. A retry says so by its number."""
        if work.kind is Kind.SIMULATE and work.number == 1:
            self._begun |= work.ranges

    def may_have_begun(self, work: Work) -> bool:
        """Say whether an attempt that came to nothing may have begun with some of this."""
        return (
            work.kind is Kind.SIMULATE and bool(self._begun.pairs) and not self._begun.isdisjoint(work.ranges)
        )

    def requeue(self, work: Work, at: float | None = None) -> None:
        """Put work that ended without an outcome back; what somebody else has by now is left out."""
        self.begun(work)
        work = self.undoubted(work)
        if at is None:
            self._backlogs[work.kind].add(work)
        else:
            self._backlogs[work.kind].add_later(work, at)

    def undoubted(self, work: Work) -> Work:
        """Return this without what somebody else has by now; such is in no backlog after that."""
        doubtful = work.ranges & self._twice[work.kind]
        if not doubtful:
            return work
        return work._replace(ranges=(work.ranges - doubtful) | self.nobody_has(work.kind, doubtful))

    def nobody_has(self, kind: Kind, items: Ranges) -> Ranges:
        """Return those that are in no outcome, commit or attempt, and take them out of the backlog."""
        items = self._ledger.lacks(kind, items)
        held = [commit.work for commit in self.commits.values()]
        held += [attempt.work for attempt in self._touching(items)]
        for work in held:
            if work.kind is kind:
                items = items - work.ranges
        self._backlogs[kind].withdraw(items)
        return items

    # Into a commit.

    def may_commit(self, commit: Commit) -> bool:
        """Say whether nobody else has outcomes of these items; if so they are in this commit alone."""
        work = commit.work
        if commit.late:
            self.doubt(work)
            if self.is_in_commit(work.kind, work.ranges):
                return False
        if self._twice[work.kind] and self._ledger.lacks(work.kind, work.ranges) != work.ranges:
            return False
        if commit.late:
            self._backlogs[work.kind].withdraw(work.ranges)
        return True

    def is_in_commit(self, kind: Kind, items: Ranges) -> bool:
        """Say whether any of these is in a commit that is under way."""
        return any(k.work.kind is kind and k.work.ranges & items for k in self.commits.values())

    def doubles(self, work: Work) -> list[Attempt]:
        """Return the attempts that repeat some of this work."""
        return [
            a for a in self._touching(work.ranges) if a.work.kind is work.kind and a.work.ranges & work.ranges
        ]

    def _touching(self, items: Ranges) -> list[Attempt]:
        """Return the attempts that may hold some of these, by their first and last item."""
        if not items:
            return []
        lo, hi = items.pairs[0][0], items.pairs[-1][1]
        found = []
        for attempt in self._roster.attempts.values():
            pairs = attempt.work.ranges.pairs
            if pairs and pairs[0][0] < hi and lo < pairs[-1][1]:
                found.append(attempt)
        return found

    @property
    def n_running(self) -> int:
        """How many indices are in commits and in attempts, but for those that stand behind something else.

        With very many attempts, the few indices that are in two places count twice: to find them takes too long.
        """
        attempts, twice = self._roster.attempts, self._twice[Kind.SIMULATE]
        commits = [
            k.work.ranges
            for k in self.commits.values()
            if k.work.kind is Kind.SIMULATE and not isinstance(k.command, c.CommitNotNeeded)
        ]
        n = self._roster.n_live[Kind.SIMULATE] - self._roster.n_standing + sum(map(len, commits))
        if not twice or len(attempts) > MANY_ATTEMPTS:
            return n
        held = [a.work.ranges for a in attempts.values() if a.work.kind is Kind.SIMULATE and not a.stands]
        doubtful = [ranges & twice for ranges in (*held, *commits)]
        found = Ranges(pair for ranges in doubtful for pair in ranges.pairs)
        return n - sum(map(len, doubtful)) + len(self._ledger.lacks(Kind.SIMULATE, found))
