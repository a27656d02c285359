"""Taking a job over: ask every worker what it runs already, adopt that, and begin only the rest.

Nothing is submitted while answers are missing, for a few seconds at most. A worker that answers later, or joins
later, may hold what somebody else runs by then: of two attempts the first to finish wins.

Attempts of an earlier run of the job are none to adopt. What they did was not recorded before that run ended, and the
new one may be there because it is to count no more: failures that are tried again. Nor are those whose outcomes were
withdrawn, as what they stored is damaged: a worker may still keep their receipts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c
from modelops.driver.backlog import Kind, Work
from modelops.driver.roster import Attempt
from modelops.study.ids import epoch_of

if TYPE_CHECKING:
    from collections.abc import Container

    from modelops.driver.backlog import Backlog
    from modelops.driver.events import Found
    from modelops.driver.ledger import Ledger
    from modelops.driver.losses import Losses
    from modelops.driver.needs import Needs
    from modelops.driver.outbox import Outbox
    from modelops.driver.places import Places
    from modelops.driver.probe import Probe
    from modelops.driver.roster import Roster
    from modelops.study.ids import AttemptId

ROLL_CALL_S: Final = 5.0  # then what did not answer is begun anew


class RollCall:
    """Asks workers for their attempts. Not ``wanted``: takes every worker that it does not know as empty.

    ``after_epoch``: attempts of epochs up to this are of earlier runs. ``withdrawn``: these count no more.
    One that was cut off and is back is always asked: it has gone on with what it held.
    """

    def __init__(
        self,
        *,
        wanted: bool,
        after_epoch: int,
        withdrawn: Container[AttemptId],
        roster: Roster,
        ledger: Ledger,
        places: Places,
        backlog: Backlog,
        probe: Probe,
        outbox: Outbox,
        losses: Losses,
        needs: Needs | None,
    ) -> None:
        self._wanted, self._roster, self._ledger, self._places = wanted, roster, ledger, places
        self._backlog, self._probe, self._outbox, self._needs = backlog, probe, outbox, needs
        self._losses, self._after_epoch, self._withdrawn = losses, after_epoch, withdrawn
        self._missing: dict[str, int] = {}  # workers that have not answered, and their slots
        self._cut_off: set[str] = set()

    @property
    def is_open(self) -> bool:
        """Whether an answer is missing."""
        return bool(self._missing)

    def join(self, worker: str, slots: int, now: float) -> None:
        """Note a worker; it gets work once it has said what it holds."""
        if worker in self._roster.workers or not (self._wanted or worker in self._cut_off):
            self._roster.join(worker, slots)
            return
        self._missing[worker] = slots
        self._outbox.order(c.AskForAttempts(worker))
        self._losses.ask(now)
        self._outbox.set_timer("roll_call", now + ROLL_CALL_S)

    def leave(self, worker: str, *, died: bool) -> None:
        """Note that a worker will not answer."""
        self._missing.pop(worker, None)
        if died:
            self._cut_off.discard(worker)
        else:
            self._cut_off.add(worker)

    def close(self) -> None:
        """Wait for no answer any longer."""
        for worker, slots in self._missing.items():
            self._roster.join(worker, slots)
        self._missing.clear()

    def answer(self, worker: str, attempts: tuple[Found, ...], *, draining: bool) -> None:
        """Adopt what a worker holds and nobody else has; stop what is of no use."""
        if worker in self._missing:
            self._roster.join(worker, self._missing.pop(worker))
        if worker not in self._roster.workers:
            return
        for found in attempts:
            if epoch_of(found.attempt) <= self._after_epoch or found.attempt in self._withdrawn:
                self._outbox.order(c.StopAttempt(found.attempt, worker))
            elif found.attempt not in self._roster.attempts:
                # A receipt that is recorded already is kept until the job goes on.
                self._losses.held(self._ledger.lacks(Kind.SIMULATE, found.indices))
                self._adopt(worker, found, draining=draining)

    def _adopt(self, worker: str, found: Found, *, draining: bool) -> None:
        indices, number = found.indices, found.attempt_number
        needed = indices if self._needs is None else self._needs.cut(indices)
        work = Work(Kind.SIMULATE, indices, number)
        due = self._backlog.numbered(number) | (self._probe.held_back if number == 1 else indices - indices)
        if self._needs is not None and number == 1:
            due |= self._needs.holds(indices)
        if needed and not draining and not needed - due:
            if self._needs is not None:
                self._needs.withdraw(self._needs.holds(indices))
            self._backlog.withdraw(indices)
            self._probe.withdraw(indices)
            self._places.forget(found.attempt)
            self._roster.place(Attempt(found.attempt, work, worker, stopping=needed != indices))
            if needed != indices:
                self._outbox.order(c.StopAttempt(found.attempt, worker, soon=True))
        elif (
            not needed
            or draining
            or self._ledger.lacks(Kind.SIMULATE, needed) != needed
            or self._places.is_in_commit(Kind.SIMULATE, needed)
        ):
            self._outbox.order(c.StopAttempt(found.attempt, worker, soon=not needed))
        else:
            self._places.remember(found.attempt, work)
