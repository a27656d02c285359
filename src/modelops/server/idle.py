"""Whether anybody needs the server: requests are counted on their way in, unfinished jobs are asked for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

HEALTH: Final = "/health"


class Attendance:
    """An ASGI application that passes all on, and knows when somebody last asked for something (not for health)."""

    def __init__(self, app: ASGIApp, *, now: Callable[[], float] = time.monotonic) -> None:
        self._app, self._now = app, now
        self._present = 0
        self._last = now()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http" or scope["path"] == HEALTH:
            await self._app(scope, receive, send)
            return
        self._present += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._present -= 1
            self._last = self._now()

    def somebody_was_here(self) -> None:
        """Count something else as a request."""
        self._last = self._now()

    @property
    def idle_s(self) -> float:
        """For how long nobody has asked for anything."""
        return 0.0 if self._present else self._now() - self._last
