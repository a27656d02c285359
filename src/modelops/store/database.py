"""Open the database: SQLite in a file (WAL, ``synchronous=FULL``) or PostgreSQL by URL, migrated to now.

SQLite: writers begin with ``BEGIN IMMEDIATE``, so a transaction never discovers half-way that another
writer was faster (that error cannot be waited out); waiting at the beginning can. Switching a new file
to WAL and migrating happen under a file lock, because neither waits for another process by itself.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from filelock import FileLock
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import IntegrityError as SqlIntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from modelops.counters import Counted, count
from modelops.errors import ClusterError, InternalError, RequestError, StorageError
from modelops.home import make_private
from modelops.store.answers import Answers
from modelops.store.schema import HEAD, REVISIONS
from modelops.volumes import volume_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from sqlalchemy.engine.interfaces import DBAPIConnection

BUSY_TIMEOUT_S: Final = 60


_ON_FILE: Final[dict[str, Any]] = {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
_ON_SERVER: Final[dict[str, Any]] = {
    "pool_size": 10,
    "max_overflow": 90,  # one for each driver and each request that is being answered
    "pool_timeout": 10,
    "pool_pre_ping": True,  # a connection that died with its server is no error of the next transaction
}
# A host that is cut off says nothing: without limits the kernel goes on sending for a quarter of an hour, and whoever
# waits for the answer knows nothing of it. (One that stands still is for `modelops.store.postgres`.) What the URL says
# of these goes first.
_CONNECTING: Final[dict[str, Any]] = {
    "connect_timeout": 8,
    "application_name": "modelops",
    "client_encoding": "utf8",  # text, whatever the database was made for: one of SQL_ASCII would answer in bytes
    "tcp_user_timeout": 10_000,  # milliseconds until what was sent must have arrived
    "keepalives_idle": 5,  # seconds without a word, then it is asked whether it is there
    "keepalives_interval": 2,
    "keepalives_count": 3,
}


def _on_server(url: sa.URL) -> dict[str, Any]:
    return {**_ON_SERVER, "connect_args": {k: v for k, v in _CONNECTING.items() if k not in url.query}}


_ON_FILE_ADVICE: Final = {
    sqlite3.SQLITE_FULL: "free some space there",
    sqlite3.SQLITE_IOERR: "see what the system says of that disk, and whether it is full",
    sqlite3.SQLITE_READONLY: "allow writing to the file and its folder",
    sqlite3.SQLITE_PERM: "allow writing to the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "see whether its folder is there, and allow writing there",
    sqlite3.SQLITE_BUSY: "another process keeps it locked: end that, e.g. an open sqlite3 shell or a backup",
}
_MADE: Final = "the database beside this lock was made\n"  # so one without a byte was cut
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _damaged(file: Path, said: str) -> str:
    return (
        f"the database {file} is damaged: {said}; 'modelops down', put a backup of it in its place (without one, move "
        "it and its -wal away: a new one knows no jobs), then 'modelops up'"
    )


class Database:
    """Connections to one database, each use of them one transaction.

    ``answers``: whether it does. ``on_file``: it is SQLite's, in a file.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine, self.answers = engine, Answers()
        self.name = engine.url.render_as_string(hide_password=True)
        self.on_file = engine.dialect.name == "sqlite"
        self._readers = engine
        if engine.dialect.name == "postgresql":
            from modelops.store import postgres  # with its driver, which not everybody has

            postgres.watch(engine, self.answers)
            # What a block reads, it reads of one moment; SQLite's transactions are so by themselves.
            self._readers = engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )

    @classmethod
    def open(cls, url: str) -> Database:
        """Connect, create what is missing and migrate what is older.

        Raises
        ------
        ClusterError
            The database was written by a newer ModelOps.
        StorageError
            The database does not answer, or its file cannot be written.
        """
        parsed = _parse(url)
        on_file = parsed.get_backend_name() == "sqlite"
        engine = sa.create_engine(parsed, **(_ON_FILE if on_file else _on_server(parsed)))
        lock: Any = nullcontext()
        if on_file:
            lock = _lock_beside(parsed)
            sa.event.listen(engine, "connect", _prepare_sqlite)
        self = cls(engine)
        if self._revision() != HEAD:
            with lock:
                if on_file:
                    self._switch_to_wal()
                self._migrate()
                if on_file:
                    _lock_file(parsed).write_text(_MADE)
        return self

    @classmethod
    def revision_at(cls, url: str) -> str | None:
        """Return the revision of a database as it is, None if there are no tables in it; makes and migrates nothing.

        Raises
        ------
        ClusterError
            It was written by a newer ModelOps.
        StorageError
            It does not answer, or its file cannot be read.
        """
        parsed = _parse(url)
        on_file = parsed.get_backend_name() == "sqlite"
        if on_file and not Path(parsed.database or "").exists():
            return None
        self = cls(sa.create_engine(parsed, **(_ON_FILE if on_file else _on_server(parsed))))
        try:
            return self._known(self._revision())
        finally:
            self.close()

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def look_through(self) -> None:
        """See whether the whole file hangs together, in 2 ms for each MB; a database on a server sees to that itself.

        What was overwritten inside of it may else be missed only where it is read: rows that cannot be found are none.

        Raises
        ------
        StorageError
            It is damaged, or cannot be read.
        """
        if not self.on_file:
            return
        with self.reading() as connection:
            said = " ".join(str(connection.scalar(sa.text("PRAGMA integrity_check(1)"))).split())
        if said != "ok":
            raise self._found_damaged(said)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One consistent view; waits for no writer on SQLite."""
        with self._as_ours(), self._readers.begin() as connection:
            self._begin(connection, "BEGIN")
            try:
                yield connection
            except (ValueError, TypeError) as e:  # a time, a state or JSON that nobody of us has written
                if not self.on_file:
                    raise
                raise self._found_damaged(str(e)) from e

    def _found_damaged(self, said: str) -> StorageError:
        count(Counted.DATABASE_ERRORS)
        return StorageError(_damaged(Path(self.engine.url.database or ""), said))

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction: all of it is durable when the block ends, or none of it ever was."""
        with self._as_ours(), self.engine.begin() as connection:
            self._begin(connection, "BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def writing_with_next(self) -> Iterator[sa.Connection]:
        """One transaction that a file need not hold before the next one of `writing`, which makes both durable.

        Only for what is made again if it is lost, which it is if the machine loses its power before: then all that was
        written since is lost as well, and it is as if whoever wrote it had been killed a moment earlier. A database on
        another machine can lose it while its writer goes on, so there this is `writing`.
        """
        if not self.on_file:
            with self.writing() as connection:
                yield connection
            return
        with self._as_ours(), self.engine.connect() as connection:
            self._begin(connection, "PRAGMA synchronous=NORMAL")
            try:
                with connection.begin():
                    self._begin(connection, "BEGIN IMMEDIATE")
                    yield connection
            finally:
                try:
                    self._begin(connection, "PRAGMA synchronous=FULL")
                except BaseException:
                    connection.invalidate()  # nobody may get it as it is
                    raise

    def _begin(self, connection: sa.Connection, how: str) -> None:
        if self.on_file:  # past SQLAlchemy, which takes ten times as long for it as SQLite
            raw: Any = connection.connection.driver_connection
            raw.execute(how)

    @property
    def away(self) -> str:
        """What it, or the way to it, said last, if it does not answer; empty as long as that is not known."""
        return self.answers.away

    def check(self) -> None:
        """See whether it does its work. Raises StorageError."""
        with self.reading() as connection:
            connection.execute(sa.select(1))

    def waits(self, thread: int | None = None) -> str:
        """Say that this thread (default: any) waits for an answer for too long; empty if none does."""
        since = self.answers.silent_since(thread)
        return "" if since is None else self._said("it does not answer")

    @contextmanager
    def _as_ours(self) -> Iterator[None]:
        if refused := self.answers.refused():
            raise StorageError(refused)
        began_s = self.answers.now_s()
        try:
            yield
        except SqlIntegrityError:  # a key exists: for the caller to understand
            raise
        except (DBAPIError, sqlite3.Error) as e:
            if isinstance(
                e, sqlite3.IntegrityError
            ):  # of a statement that went past SQLAlchemy, see `Statement`
                raise SqlIntegrityError(None, None, e) from e
            cause = e.orig if isinstance(e, DBAPIError) else e
            if _can_never_succeed(cause):
                raise InternalError(self._refuses(cause)) from e
            count(Counted.DATABASE_ERRORS)
            said = self._explained(cause)
            if isinstance(e, DBAPIError) and not self.on_file and _is_away(e):
                self.answers.lost(said, began_s)
            raise StorageError(said) from e
        except PoolTimeoutError as e:
            raise StorageError(self._said("all connections to it are in use")) from e
        else:
            self.answers.succeeded()

    def _explained(self, error: BaseException | None) -> str:
        said = " ".join(str(error).split())
        if self.engine.dialect.name == "sqlite":
            file = Path(self.engine.url.database or "")
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _DAMAGED:
                return _damaged(file, said)
            advice = _ON_FILE_ADVICE.get(code, "see whether its folder is there and can be written")
            return f"the database {self.name} failed: {said} ({volume_of(file)}); {advice}"
        return self._said(said)

    def _refuses(self, error: BaseException | None) -> str:
        said = " ".join(str(error).split())
        return (
            f"the database {self.name} refuses what ModelOps asks of it, as it always would: "
            f"{type(error).__name__}: {said}; please report this"
        )

    def _said(self, what: str) -> str:
        return f"the database {self.name} failed: {what}; see whether it is up and lets this machine in"

    def _revision(self) -> str | None:
        with self.reading() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            found = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
            return None if found is None else str(found)

    def _known(self, revision: str | None) -> str | None:
        """Return a revision that this program knows. Raises ClusterError."""
        if revision is not None and revision not in REVISIONS:
            raise ClusterError(
                f"the database {self.name} was written by a newer ModelOps (revision {revision}, this "
                f"one knows up to {HEAD}); upgrade modelops, or use another MODELOPS_HOME"
            )
        return revision

    def _switch_to_wal(self) -> None:
        with self._as_ours(), self.engine.connect() as connection:
            raw = connection.connection.cursor()  # outside any transaction, as the pragma demands
            raw.execute("PRAGMA journal_mode=WAL")
            mode = raw.fetchone()
            raw.close()
        if mode != ("wal",):
            raise StorageError(
                f"the database {self.name} cannot use a write-ahead log (its file system allows {mode}); "
                "put it on a local disk: set MODELOPS_HOME"
            )

    def _migrate(self) -> None:
        # Here and not above: alembic takes 0.1 s to import, and an up-to-date database has no use for it.
        from alembic import command
        from alembic.config import Config

        self._known(self._revision())
        config = Config()
        config.set_main_option("script_location", "modelops.store:migrations")
        with _MIGRATING, self.writing() as connection, _long(connection):
            if (
                connection.dialect.name == "postgresql"
            ):  # as the file lock does for SQLite; ends with the transaction
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


# What alembic runs (``context``, ``op``) it hands over in globals of the process, so only one thread may migrate,
# whatever its database. The file lock around it keeps other processes away.
_MIGRATING: Final = threading.Lock()
_MIGRATION_LOCK: Final = (
    0x6D6F64656C6F7073  # "modelops": what all that migrate one PostgreSQL database agree on
)


def _can_never_succeed(error: BaseException | None) -> bool:
    """Whether it is the statement or its values that are wrong, so that no later try can do better.

    By the state that a server gives: wrong data (22), statements that are wrong or ask for what it does not have (21,
    42, 0A) or is too large for it (54). Without a state it was the driver that refused. What somebody can mend while
    we wait is none: a right that was taken away (42501), a table that is not there while a backup is put back (42P01).
    """
    state = getattr(error, "sqlstate", None)
    if state is not None:
        return state[:2] in ("21", "22", "42", "0A", "54") and state not in ("42501", "42P01")
    kinds = {kind.__name__ for kind in type(error).__mro__}  # of PEP 249, whichever driver it is
    return bool(kinds & {"DataError", "ProgrammingError", "NotSupportedError", "IntegrityError"})


def _is_away(error: DBAPIError) -> bool:
    from modelops.store.postgres import is_away

    return is_away(error)


def _long(connection: sa.Connection) -> AbstractContextManager[None]:
    if connection.dialect.name != "postgresql":
        return nullcontext()
    from modelops.store.postgres import patiently

    return patiently(connection)


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as e:
        raise RequestError(f"{url!r} is no database URL: use sqlite:////path/to/modelops.db") from e
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise RequestError("a job's records need a file: use sqlite:////path/to/modelops.db")
    return parsed


def _lock_beside(url: sa.URL) -> FileLock:
    path = Path(url.database or "")
    try:
        make_private(path.parent)
    except OSError as e:
        raise StorageError(f"the folder of the database {path} cannot be made: {e.strerror}") from e
    lock = _lock_file(url)
    # SQLite takes one byte for none: https://sqlite.org/src/file?name=src/os_unix.c, unixFileSize
    if path.is_file() and path.stat().st_size <= 1 and lock.exists() and lock.read_text() == _MADE:
        raise StorageError(_damaged(path, "it is empty, and once was not"))
    return FileLock(lock, timeout=BUSY_TIMEOUT_S)


def _lock_file(url: sa.URL) -> Path:
    return Path(f"{url.database}.lock")


def _prepare_sqlite(connection: DBAPIConnection, _record: object) -> None:
    # We send BEGIN ourselves, in `Database`. A listener to SQLAlchemy's "begin" could too, but with one on the
    # engine every statement costs 5 us more, a third.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
