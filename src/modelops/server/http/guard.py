"""What stands before every route: the right host, and a token. Nothing else of a request is looked at before.

A client that is refused while it sends a large body would lose the answer if the connection were closed at
once, so a little of what it sends is still taken, and thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Final

from modelops.errors import ModelOpsError
from modelops.server.http.problems import UnauthorizedError, WrongHostError, problem_response

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from modelops.server.http.access import Access, Keys

ACCESS: Final = "modelops.access"  # where the scope of a request has its `Access`
HEALTH: Final = "/health"
OPEN_PATHS: Final = frozenset({HEALTH, "/ready"})  # they say nothing but that the server lives, or answers
_HOST: Final = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\[\]:]*))(?::[0-9]{0,5})?")
LINGER_BYTES: Final = 16 << 20
LINGER_S: Final = 5.0


class Guard:
    """Refuse requests for another host, and those without a token; pass the rest on, with what the token allows.

    Parameters
    ----------
    keys
        Know whom a token lets in.
    hosts
        Host names, without port, for which the server answers; ``*`` is any. Pages of other sites, which the
        browser may have been made to believe are on this machine, are refused by it.
    """

    def __init__(self, app: ASGIApp, keys: Keys, hosts: Collection[str]) -> None:
        self._app, self._keys = app, keys
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (or the beginning and end of the server, which pass)."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                scope[ACCESS] = await self._admitted(scope)
            except ModelOpsError as refusal:
                await respond_early(problem_response(refusal), scope, receive, send)
                return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    async def _admitted(self, scope: Scope) -> Access:
        """Return what a request may do. Raises ModelOpsError for one that may do nothing."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        host = _host_name(hosts[0].decode("latin-1")) if len(hosts) == 1 else ""
        if "*" not in self._hosts and host not in self._hosts:
            raise WrongHostError(
                f"this server does not answer for the host {host!r}; call it by one of its names, or start it with "
                "that name"
            )
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        access = await self._keys.find(token.strip()) if scheme.lower() == b"bearer" else None
        if access is None:
            raise UnauthorizedError("this request has no token, or one that is wrong, revoked or expired")
        return access


def _host_name(host: str) -> str:
    """Return a Host header without its port; all of it if it is none."""
    found = _HOST.fullmatch(host.lower())
    return host if found is None else found["address"] or found["name"]


async def respond_early(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the body was read: all of the answer first, then take a little of what still comes."""
    held: list[Message] = []

    async def all_but_the_end(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            held.append(message)
            message = {**message, "more_body": True}
        await send(message)

    await response(scope, receive, all_but_the_end)
    left = LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    await send({"type": "http.response.body", "body": b"", "more_body": False})
