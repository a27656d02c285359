"""Whether a database answers: who waits for it and since when, and who may ask it while it is away."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAY_AFTER_S: Final = 3.0  # a statement may take so long before anybody is told that it is waited for
TRY_EVERY_S: Final = (
    1.0  # while the database is away, one who asks may try so often; all others hear that it is
)


class Answers:
    """What one process knows of one database. Thread-safe.

    A statement that gets no answer costs its thread seconds. So once one has failed for want of an answer, and until
    one succeeds, only one thread a second may try: the others are told at once what it said. ``away``: that.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[int, float] = {}  # threads, and since when nothing has come for them
        self.away, self._away_since, self._try_at = "", 0.0, 0.0

    def now_s(self) -> float:
        """Return the time by the clock that is meant here."""
        return self._clock()

    def waits(self, since_s: float) -> None:
        """Note that nothing has come for this thread since then, by the clock."""
        self._waiting.setdefault(threading.get_ident(), since_s)

    def came(self) -> None:
        """Note that something has come for this thread."""
        self._waiting.pop(threading.get_ident(), None)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that this thread waits within the block."""
        self.waits(self._clock())
        try:
            yield
        finally:
            self.came()

    def lost(self, said: str, since_s: float) -> None:
        """Note that the database is away, since when by the clock, and what it or the way to it said."""
        with self._lock:
            if not self.away:
                self._away_since = since_s
            self.away, self._try_at = said, self._clock() + TRY_EVERY_S

    def succeeded(self) -> None:
        """Note that the database does its work."""
        self.away = ""

    def refused(self) -> str:
        """Return why this thread is not to ask the database now; empty if it may."""
        if not self.away:
            return ""
        with self._lock:
            now = self._clock()
            if now < self._try_at:
                return self.away
            self._try_at = now + TRY_EVERY_S
            return ""

    def silent_since(self, thread: int | None = None) -> datetime | None:
        """Return since when this thread, or the one of all that waits longest, has waited for too long."""
        waiting = list(self._waiting.values()) if thread is None else [self._waiting.get(thread)]
        first = min((since for since in waiting if since is not None), default=None)
        return None if first is None or self._clock() - first < SAY_AFTER_S else self._date(first)

    @property
    def away_since(self) -> datetime | None:
        """Since when it is away, or a thread waits for it for too long; None: as far as is known it is not."""
        if self.away:
            return self._date(self._away_since)
        return self.silent_since()

    def _date(self, at: float) -> datetime:
        return (datetime.now(UTC) - timedelta(seconds=self._clock() - at)).replace(microsecond=0)


def since_text(since: datetime) -> str:
    """Say since when, for a message that is read elsewhere and later."""
    return f"(since {since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC)"
