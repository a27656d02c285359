"""What the machine has ordered and the loop has not fetched yet. While the store is away, writes wait here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.driver import commands as c

if TYPE_CHECKING:
    from collections.abc import Iterable


class Outbox:
    """Commands in the order in which they are to be performed.

    Timers are remembered, so that one is set again only when its time has changed.
    """

    def __init__(self) -> None:
        self.paused = False  # the store is away
        self._out: list[c.Command] = []
        self._held: list[c.Command] = []
        self._timers: dict[str, float] = {}

    def order(self, command: c.Command) -> None:
        """Give a command that needs no store."""
        self._out.append(command)

    def write(self, command: c.Command) -> None:
        """Give a command that the store must answer for: at once, or when it is back."""
        (self._held if self.paused else self._out).append(command)

    def pause(self, what: str) -> None:
        """Hold all writes back: the store is away."""
        self.paused = True
        self._held.append(c.Note("store_lost", what))

    def resume(self, unanswered: Iterable[c.Command]) -> None:
        """Give first what the store never answered, then what was held back."""
        self.paused = False
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
