"""The tokens of clients: who may do what, and until when. The secrets themselves are kept nowhere."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError as SqlIntegrityError

from modelops.errors import ConflictError, NotFoundError
from modelops.store import schema
from modelops.study.ids import new_token_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from modelops.store.records import Records


class TokenScope(StrEnum):
    """What a token allows. Who may submit may read, who may administer may do all."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"

    def allows(self, wanted: TokenScope) -> bool:
        """Say whether it is enough for what asks for another."""
        return _RANK[self] >= _RANK[wanted]


_RANK: Final[Mapping[TokenScope, int]] = {scope: n for n, scope in enumerate(TokenScope)}


class TokenRow(msgspec.Struct, frozen=True, kw_only=True):
    """A token. ``expires_at``, ``revoked_at``: None for never."""

    token: str
    name: str
    scopes: tuple[TokenScope, ...]
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


def create_token(
    records: Records,
    name: str,
    digest: str,
    scopes: Iterable[TokenScope],
    *,
    by: str,
    expires_at: datetime | None,
) -> TokenRow:
    """Record a token.

    Parameters
    ----------
    digest
        SHA-256 of its secret, hexadecimal.

    Raises
    ------
    ConflictError
        A token of that name was not revoked.
    """
    row = TokenRow(
        token=new_token_id(), name=name, scopes=tuple(dict.fromkeys(scopes)), created_by=by,
        created_at=records.now(), expires_at=expires_at, revoked_at=None,
    )  # fmt: skip
    values = {f: getattr(row, f) for f in TokenRow.__struct_fields__} | {
        "scopes": [*row.scopes],
        "digest": digest,
    }
    try:
        with records.database.writing() as sql:
            sql.execute(schema.tokens.insert(), values)
    except SqlIntegrityError as e:
        raise ConflictError(
            f"there is a token {name!r} already: revoke it first ('modelops tokens revoke {name}'), or choose another "
            "name"
        ) from e
    return row


def token_of_digest(records: Records, digest: str) -> TokenRow | None:
    """Return the token with this digest if it is valid now."""
    t = schema.tokens.c
    with records.database.reading() as sql:
        found = sql.execute(sa.select(schema.tokens).where(t.digest == digest)).mappings().first()
    if found is None:
        return None
    row = _row(found)
    over = row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= records.now())
    return None if over else row


def list_tokens(records: Records) -> list[TokenRow]:
    """Return all tokens there ever were, the newest first."""
    t = schema.tokens.c
    with records.database.reading() as sql:
        rows = sql.execute(sa.select(schema.tokens).order_by(t.created_at.desc(), t.token.desc())).mappings()
        return [_row(row) for row in rows]


def revoke_token(records: Records, which: str) -> TokenRow:
    """Let a token, by its name or its id, let nobody in any more. Done again it changes nothing.

    Raises
    ------
    NotFoundError
        There is none.
    """
    t = schema.tokens.c
    mine = sa.or_(t.token == which, t.name == which)
    # Of several of a name only the newest can be valid.
    newest = sa.select(schema.tokens).where(mine).order_by(t.created_at.desc(), t.token.desc()).limit(1)
    with records.database.writing() as sql:
        found = sql.execute(newest).mappings().first()
        if found is None:
            raise NotFoundError(f"there is no token {which!r}; 'modelops tokens list' shows all")
        row = _row(found)
        if row.revoked_at is not None:
            return row
        now = records.now()
        sql.execute(schema.tokens.update().where(t.token == row.token).values(revoked_at=now))
    return msgspec.structs.replace(row, revoked_at=now)


def _row(found: Mapping[Any, Any]) -> TokenRow:
    values = {f: found[f] for f in TokenRow.__struct_fields__}
    return TokenRow(**{**values, "scopes": tuple(TokenScope(s) for s in values["scopes"])})
