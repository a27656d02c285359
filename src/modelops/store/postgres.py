"""Connections to PostgreSQL that end when no answer comes.

No limit that the server keeps helps against a server that stands still (a stopped process, a machine that is frozen, a
network that drops everything), and the kernel goes on acknowledging what is sent to it. So the client looks at the
clock. What counts is silence, not how long a statement takes: rows that keep coming may come for hours.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from modelops.store.answers import Answers

STATEMENT_S: Final = 12.0  # none of ours computes for so long before its first row
PING_S: Final = 4.0
LOCK_S: Final = (
    8  # as long as nobody holds a row; so the server itself says who waits for a session that stands still
)
MIGRATION_S: Final = 3600.0
T = TypeVar("T")


class Connection(psycopg.Connection[Any]):
    """A connection that is closed when nothing has come from the server for ``limit_s`` seconds."""

    limit_s: float = STATEMENT_S
    answers: Answers

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """Do what takes one or more answers of the server."""
        return super().wait(self._timed(gen), *args, **kwargs)

    def _timed(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        limit_s = (
            PING_S if self.autocommit else self.limit_s
        )  # outside of a transaction the pool asks: still there?
        began = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready:
                    began = time.monotonic()
                    self.answers.came()
                elif (silent_s := time.monotonic() - began) > limit_s:
                    self.close()
                    raise psycopg.OperationalError(f"nothing has come from it for {silent_s:.0f} s")
                else:
                    self.answers.waits(began)
                wanted = gen.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            self.answers.came()


def watch(engine: sa.Engine, answers: Answers) -> None:
    """Let an engine make connections that end when no answer comes, and note in ``answers`` who waits."""

    def connect(_dialect: object, _record: object, args: Any, options: Any) -> Connection:
        with answers.waiting():
            connection = Connection.connect(*args, **options)
        connection.answers = answers
        connection.autocommit = True
        connection.execute(f"SET lock_timeout = '{LOCK_S}s'")
        connection.autocommit = False
        return connection

    sa.event.listen(engine, "do_connect", connect)


@contextmanager
def patiently(connection: sa.Connection) -> Iterator[None]:
    """Let statements take as long as a migration may, and wait for any lock, within this transaction."""
    raw: Any = connection.connection.driver_connection
    raw.limit_s = MIGRATION_S
    try:
        connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
        yield
    finally:
        del raw.limit_s  # as for all others


def is_away(error: sa.exc.DBAPIError) -> bool:
    """Whether a statement failed since there is no server, or none that answers."""
    state = getattr(error.orig, "sqlstate", None)  # what the server says has one: it is there
    if state is None:
        return error.connection_invalidated or isinstance(error.orig, psycopg.OperationalError)
    return (
        state[:2] in ("08", "57") and state != "57014"
    )  # it goes down or comes up; not: a statement was cancelled
