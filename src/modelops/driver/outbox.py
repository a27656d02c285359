"""What the machine has ordered and the loop has not fetched yet. While the store is away, writes wait here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c

if TYPE_CHECKING:
    from collections.abc import Iterable

STORE_LOST: Final = "store_lost"
STORE_BACK: Final = "store_back"


class Outbox:
    """Commands in the order in which they are to be performed.

    Timers are remembered, so that one is set again only when its time has changed.
    """

    def __init__(self) -> None:
        self.paused = False  # the store is away
        self._paused_at = 0.0
        self._out: list[c.Command] = []
        self._held: list[c.Command] = []
        self._timers: dict[str, float] = {}

    def order(self, command: c.Command) -> None:
        """Give a command that needs no store."""
        self._out.append(command)

    def write(self, command: c.Command) -> None:
        """Give a command that the store must answer for: at once, or when it is back."""
        (self._held if self.paused else self._out).append(command)

    def pause(self, what: str, now: float) -> None:
        """Hold all writes back: the store is away."""
        self.paused, self._paused_at = True, now
        self._held.append(c.Note(STORE_LOST, what))

    def resume(self, unanswered: Iterable[c.Command], now: float) -> None:
        """Give first what the store never answered, then what was held back."""
        self.paused = False
        self._held.append(c.Note(STORE_BACK, f"it answers again, after {now - self._paused_at:.0f} s"))
        self._out.extend(unanswered)
        self._out.extend(self._held)
        self._held.clear()

    def set_timer(self, name: str, at: float) -> None:
        """Have a timer ring, unless it is set to that time already."""
        if self._timers.get(name) != at:
            self._timers[name] = at
            self._out.append(c.SetTimer(name, at))

    def rang(self, name: str) -> None:
        """Forget a timer: if it rang early, whoever still waits for it sets it again."""
        self._timers.pop(name, None)

    def fetch(self) -> list[c.Command]:
        """Hand out what has been ordered."""
        out, self._out = self._out, []
        return out

    def __contains__(self, command: object) -> bool:
        return command in self._out
