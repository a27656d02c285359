"""Threads for what blocks, and an answer in time when the database gives none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import anyio.to_thread

from modelops.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.store.database import Database

ANSWER_WITHIN_S: Final = 3.5  # a client that asks for a status waits 5 s
TRY_FOR_S: Final = 0.5  # if the database was away a moment ago
T = TypeVar("T")


async def in_time(call: Callable[[], T], limiter: anyio.CapacityLimiter, database: Database) -> T:
    """Run in a thread what only reads and writes rows.

    If the database does not answer, nobody waits until that is certain: the call goes on in its thread, alone. What it
    changes may be asked for again, as by any client that got no answer.

    Raises
    ------
    StorageError
        The database does not answer.
    """
    if database.on_file:
        return await anyio.to_thread.run_sync(call, limiter=limiter)
    asked = asyncio.ensure_future(anyio.to_thread.run_sync(call, limiter=limiter, abandon_on_cancel=True))
    try:
        within_s = TRY_FOR_S if database.away else ANSWER_WITHIN_S
        while not (await asyncio.wait({asked}, timeout=within_s))[0]:
            if said := database.away or database.waits():
                raise StorageError(said)
        return asked.result()
    finally:
        asked.cancel()
