"""The routes of tokens: make one, list them, revoke one. The secret of a token is in one answer, and then nowhere."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec

from modelops.server.http.access import digest_of, new_secret
from modelops.server.http.api import json_response, who
from modelops.server.http.operations import Answer, Body, Operation, Place, at
from modelops.server.http.problems import MalformedRequestError
from modelops.store.tokens import TokenRow, TokenScope, create_token, list_tokens, revoke_token

if TYPE_CHECKING:
    from starlette.responses import Response

    from modelops.server.http.api import Api
    from modelops.server.http.operations import Call

NAME: Final = "^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
LONGEST_S: Final = 10 * 365 * 86400
UserText = Annotated[
    str, at(Place.HEADER, "Who asks, for the record.", pattern="^[!-~]([ -~]{0,198}[!-~])?$")
]


class NewToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a token is to be. ``expires_in_s``: seconds until it lets nobody in any more; null: never."""

    name: Annotated[str, msgspec.Meta(pattern=NAME)]
    scopes: Annotated[list[TokenScope], msgspec.Meta(min_length=1, max_length=3)]
    expires_in_s: Annotated[float, msgspec.Meta(ge=1, le=LONGEST_S)] | None = None


class TokenView(msgspec.Struct, frozen=True, kw_only=True):
    """A token, without its secret. ``expires_at``, ``revoked_at``: null for never."""

    token: str
    name: str
    scopes: tuple[TokenScope, ...]
    state: Literal["valid", "expired", "revoked"]
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class MadeToken(msgspec.Struct, frozen=True, kw_only=True):
    """A new token. ``secret``: what clients send; it cannot be read again."""

    secret: str
    token: TokenView


class TokenList(msgspec.Struct, frozen=True):
    """All tokens, the newest first."""

    tokens: list[TokenView]


class Make(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks."""

    user: UserText = msgspec.field(name="ModelOps-User", default="")


class TokenPath(msgspec.Struct, frozen=True, kw_only=True):
    """One token, and who asks."""

    token: Annotated[str, at(Place.PATH, "Id or name of a token.", pattern="^[A-Za-z0-9._-]{1,100}$")]
    user: UserText = msgspec.field(name="ModelOps-User", default="")


async def create(api: Api, call: Call) -> Response:
    """Make a token."""
    asked: NewToken = call.body
    if not re.fullmatch(NAME[1:-1], asked.name):  # a pattern's $ lets a newline at the end pass
        raise MalformedRequestError(
            f"the name of a token is letters, digits, '.', '_' and '-', not {asked.name!r}"
        )
    secret, records = new_secret(), api.service.records
    expires_at = None
    if asked.expires_in_s is not None:
        expires_at = records.now() + timedelta(seconds=asked.expires_in_s)
    row = await api.quick(
        create_token, records, asked.name, digest_of(secret.encode()), asked.scopes, by=who(call), expires_at=expires_at
    )  # fmt: skip
    made = MadeToken(secret=secret, token=_view(row, records.now()))
    return json_response(made, 201, {"Cache-Control": "no-store"})


async def list_all(api: Api, _call: Call) -> Response:
    """List all tokens."""
    records = api.service.records
    now = records.now()
    return json_response(TokenList([_view(row, now) for row in await api.quick(list_tokens, records)]))


async def revoke(api: Api, call: Call) -> Response:
    """Let a token let nobody in any more."""
    records = api.service.records
    row = await api.quick(revoke_token, records, call.given.token)
    api.keys.forget()
    return json_response(_view(row, records.now()))


def _view(row: TokenRow, now: datetime) -> TokenView:
    expired = row.expires_at is not None and row.expires_at <= now
    state: Any = "revoked" if row.revoked_at is not None else "expired" if expired else "valid"
    return TokenView(**msgspec.structs.asdict(row), state=state)


OPERATIONS: Final[tuple[Any, ...]] = (
    Operation(
        "POST", "/v1/tokens", "create_token", "Make a token that lets a client in.", create,
        {201: Answer("The token; its secret is in this answer only.", MadeToken,
                     headers={"Cache-Control": "Nobody is to keep it."})},
        Make, Body(NewToken), problems=(409,), scope=TokenScope.ADMIN,
    ),
    Operation(
        "GET", "/v1/tokens", "list_tokens", "List all tokens there ever were, the newest first.", list_all,
        {200: Answer("All tokens.", TokenList)}, scope=TokenScope.ADMIN,
    ),
    Operation(
        "POST", "/v1/tokens/{token}/revoke", "revoke_token",
        "Let a token let nobody in any more; asking again changes nothing.", revoke,
        {200: Answer("The token.", TokenView)}, TokenPath, problems=(404,), scope=TokenScope.ADMIN,
    ),
)  # fmt: skip
