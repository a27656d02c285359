"""What the job's story says of replicates that were under way and are lost: one line for each occasion.

A scheduler that ends, or a host, takes several workers away at nearly the same time, so what is lost is gathered for a
moment. A driver that takes a job over does not know what ran before it; it says what workers still hold of that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c
from modelops.driver.backlog import Kind
from modelops.study.ranges import Ranges
from modelops.study.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelops.driver.outbox import Outbox
    from modelops.driver.roster import Attempt
    from modelops.study.ranges import Range

ATTEMPTS_LOST, TAKEN_OVER = "attempts_lost", "taken_over"  # kinds of events, and names of timers
GATHER_S: Final = 1.0
TAKE_OVER_S: Final = 6.0  # for workers to say what they hold
MAX_NAMED: Final = 3


class Losses:
    """Gathers what is lost. ``took_over``: the job was running before this driver had it."""

    def __init__(self, outbox: Outbox, *, took_over: bool) -> None:
        self._outbox, self._takes_over, self._asked = outbox, took_over, False
        self._n_attempts = 0
        self._pairs: list[Range] = []  # of indices; one may be lost twice in a moment, and is one replicate
        self._held: list[Range] = []
        self._workers: list[str] = []

    def lost(self, attempts: Iterable[Attempt], now: float) -> None:
        """Note attempts that their workers took along; aggregates, and what is known to wait, are nothing to tell."""
        for attempt in attempts:
            if attempt.work.kind is Kind.SIMULATE and attempt.work.ranges and not attempt.waits:
                if not self._n_attempts:
                    self._outbox.set_timer(ATTEMPTS_LOST, now + GATHER_S)
                self._n_attempts += 1
                self._pairs += attempt.work.ranges.pairs
                if attempt.worker not in self._workers:
                    self._workers.append(attempt.worker)

    def tell(self) -> None:
        """Write what was lost to the job's story."""
        if not self._n_attempts:
            return
        named = ", ".join(self._workers[:MAX_NAMED])
        if (more := len(self._workers) - MAX_NAMED) > 0:
            named += f" and {more} more"
        text = (
            f"{counted(self._n_attempts, 'attempt')} at {counted(len(Ranges(self._pairs)), 'replicate')} lost, as "
            f"{counted(len(self._workers), 'worker')} or the scheduler went away: {named}; what does not come "
            "back with its worker is begun again, and costs no retry"
        )
        self._outbox.write(c.Note(ATTEMPTS_LOST, text))
        self._n_attempts = 0
        self._pairs.clear()
        self._workers.clear()

    # Taking a job over.

    def ask(self, now: float) -> None:
        """Note that a worker is asked what it holds."""
        if self._takes_over:
            self._takes_over, self._asked = False, True
            self._outbox.set_timer(TAKEN_OVER, now + TAKE_OVER_S)

    def held(self, indices: Ranges) -> None:
        """Note what a worker holds of what an earlier driver has submitted and nobody has recorded yet."""
        self._held += indices.pairs

    def tell_of_before(self) -> None:
        """Write to the job's story what workers held as this driver took it over."""
        if not self._asked:
            return
        self._asked = False
        if self._held:
            n = counted(len(Ranges(self._held)), "replicate")
            held, rest = f"workers hold {n} that an earlier driver had begun", "whatever else it had running"
        else:
            held, rest = (
                "no worker holds a replicate that an earlier driver had begun",
                "whatever it had running",
            )
        self._outbox.write(c.Note(TAKEN_OVER, f"{held}; {rest} is lost and begun again, and costs no retry"))
