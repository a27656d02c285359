"""Who is let in, and what they may do: the server's own token, which may do all, and those that the store knows.

A token that the store was asked about is remembered for a moment, so that a client that asks often costs few
transactions, and one that was revoked elsewhere is refused that moment later.
"""

from __future__ import annotations

import functools
import hmac
import re
import secrets
from dataclasses import dataclass
from hashlib import sha256
from time import monotonic
from typing import TYPE_CHECKING, Final

import anyio

from modelops.errors import StorageError
from modelops.server.http.in_time import in_time
from modelops.store.tokens import TokenScope, token_of_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from modelops.store import Records
    from modelops.store.tokens import TokenRow

PREFIX: Final = "mot_"
REMEMBERED_S: Final = 2.0
MOST_REMEMBERED: Final = 1000
THREADS: Final = 4
_FORM: Final = re.compile(rb"mot_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class Access:
    """Somebody who was let in. ``name``: of the token, empty for the server's own."""

    scopes: Collection[TokenScope]
    name: str = ""

    def may(self, wanted: TokenScope) -> bool:
        """Say whether this is enough for an operation that asks for a scope."""
        return any(scope.allows(wanted) for scope in self.scopes)


def new_secret() -> str:
    """Return the secret of a new token."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: bytes) -> str:
    """Return what is kept of a secret. It is as long as it is random, so one round of a hash is enough."""
    return sha256(secret).hexdigest()


class Keys:
    """Finds out whom a token lets in.

    Parameters
    ----------
    own
        The server's own token.
    records
        Where the others are; None while nobody knows.
    why_not
        Says why nobody knows.
    """

    def __init__(
        self, own: str, records: Records | None, why_not: Callable[[], str] = lambda: "the server is starting"
    ) -> None:
        if not own:
            raise ValueError("a server without a token would let everybody in")
        self._own = sha256(own.encode()).digest()
        self._records, self._why_not = records, why_not
        self._known: dict[str, tuple[float, Access]] = {}
        self._limiter: anyio.CapacityLimiter | None = None

    async def find(self, secret: bytes) -> Access | None:
        """Return whom a secret lets in, None for nobody.

        Raises
        ------
        StorageError
            It may be one that the store knows, and the store does not answer.
        """
        # Of digests, so that neither the place of the first difference nor the length can be measured.
        if hmac.compare_digest(sha256(secret).digest(), self._own):
            return Access((TokenScope.ADMIN,))
        if not _FORM.fullmatch(secret):
            return None
        if self._records is None:
            raise StorageError(self._why_not())
        digest, now = digest_of(secret), monotonic()
        until, access = self._known.get(digest, (0.0, None))
        if access is not None and now < until:
            return access
        self._limiter = self._limiter or anyio.CapacityLimiter(THREADS)
        ask = functools.partial(token_of_digest, self._records, digest)
        row = await in_time(ask, self._limiter, self._records.database)
        return self._remember(digest, row, now)

    def forget(self) -> None:
        """Ask the store again from now on."""
        self._known.clear()

    def _remember(self, digest: str, row: TokenRow | None, now: float) -> Access | None:
        self._known.pop(digest, None)
        if row is None:
            return None
        if len(self._known) >= MOST_REMEMBERED:
            self._known.clear()
        access = Access(row.scopes, row.name)
        self._known[digest] = (now + REMEMBERED_S, access)
        return access
