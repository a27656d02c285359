"""The tokens of a server, for whoever has one with the scope ``admin``."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from modelops.client.served import who_asks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.client.http import Http


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A token, without its secret; fields as in docs/reference/http-api.md."""

    token: str
    name: str
    scopes: tuple[str, ...]
    state: str
    created_by: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class MadeToken(msgspec.Struct, frozen=True, kw_only=True):
    """A new token, and its secret, which cannot be read again."""

    secret: str
    token: Token


class _Tokens(msgspec.Struct, frozen=True):
    tokens: tuple[Token, ...]


def create(http: Http, name: str, scopes: Sequence[str], expires_in_s: float | None) -> MadeToken:
    """Make a token. Raises ConflictError if there is one of that name."""
    asked: dict[str, Any] = {"name": name, "scopes": list(scopes), "expires_in_s": expires_in_s}
    body = msgspec.json.encode(asked)
    return http.request("POST", "/tokens", body=body, headers=who_asks()).as_type(MadeToken)


def every(http: Http) -> tuple[Token, ...]:
    """Return all tokens there ever were, the newest first."""
    return http.get("/tokens").as_type(_Tokens).tokens


def revoke(http: Http, which: str) -> Token:
    """Let a token, by name or id, let nobody in any more. Raises NotFoundError."""
    answer = http.request("POST", f"/tokens/{which}/revoke", headers=who_asks(), repeatable=True)
    return answer.as_type(Token)
