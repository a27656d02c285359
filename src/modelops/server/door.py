"""What answers at the server's port while its database or storage does not: alive, and to all else why it must wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from modelops.errors import StorageError
from modelops.server.http.access import Keys
from modelops.server.http.guard import HEALTH, OPEN_PATHS, Guard
from modelops.server.http.problems import problem_response

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Receive, Scope, Send


class Door:
    """An ASGI application in front of one that comes as soon as it can."""

    def __init__(self, token: str, allowed_hosts: Collection[str]) -> None:
        self._why = "the server is starting"
        self._app: ASGIApp = Guard(
            self._wait_outside, Keys(token, None, why_not=lambda: self._why), allowed_hosts
        )

    def open(self, app: ASGIApp) -> None:
        """Let requests in from now on."""
        self._app = app

    def explain(self, why: str) -> None:
        """Say why not yet."""
        self._why = why

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or say why it cannot be answered yet."""
        await self._app(scope, receive, send)

    async def _wait_outside(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == HEALTH:
            await JSONResponse({"status": "ok"})(scope, receive, send)
            return
        # Who has no token learns that it is not ready, and not why.
        why = "the server is not ready" if scope["path"] in OPEN_PATHS else self._why
        await problem_response(StorageError(why))(scope, receive, send)
