"""The tables, as the newest migration leaves them. A test compares the two.

Ranges of indices (of parameter sets, for aggregates) are rows of their own: disjoint within a job, so
the row with the largest ``lo`` below a point is the only one that can cover it, and the primary key
finds it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from modelops.states import AggregateStatus, ReplicateStatus
from modelops.study.wording import spelt_out

REVISIONS: Final = (
    "0001",
    "0002",
    "0003",
    "0004",
    "0005",
)  # every migration there is, oldest first; needed without importing alembic
HEAD: Final = REVISIONS[-1]
_STATUSES: Final = {*map(str, ReplicateStatus), *map(str, AggregateStatus)}


def data_spelt_out(value: Any) -> Any:
    """Return what JSON can hold with every text in it `spelt_out`."""
    match value:
        case str():
            return spelt_out(value)
        case dict():
            return {data_spelt_out(key): data_spelt_out(item) for key, item in value.items()}
        case list() | tuple():
            return [data_spelt_out(item) for item in value]
        case _:
            return value


class Counts(sa.TypeDecorator[Any]):
    """How many ended how, as JSON. Text that is damaged reads as no counts, which contradicts its row's ranges."""

    impl = sa.JSON
    cache_ok = True

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Any:
        """Return what turns a stored text into counts."""
        read = super().result_processor(dialect, coltype)

        def counts_of(value: Any) -> dict[str, int]:
            try:
                found = value if read is None else read(value)
            except (ValueError, TypeError):
                return {}
            return whole_counts(found)

        return counts_of


def whole_counts(found: Any) -> dict[str, int]:
    """Return what was read as counts if it can be such, else none."""
    is_whole = isinstance(found, dict) and all(type(n) is int and n >= 0 for n in found.values())
    return found if is_whole and found.keys() <= _STATUSES else {}


class Words(sa.TypeDecorator[str]):
    """Text of any length, see `spelt_out`."""

    impl: Any = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        """Spell out what no column can hold."""
        return None if value is None else spelt_out(value)


class Word(Words):
    """Text of so many characters at most."""

    impl = sa.String
    cache_ok = True


class UtcTime(sa.TypeDecorator[datetime]):
    """An aware time in UTC; SQLite would lose the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Refuse a time without zone, store the rest as UTC."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a time without zone: {value}")
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: Any | None, dialect: sa.Dialect) -> datetime | None:
        """Give SQLite's naive times their zone back."""
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("job", Word(64), primary_key=True),
    sa.Column("name", Words(), nullable=False),
    sa.Column("bundle", Words(), nullable=False),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    sa.Column("state", Word(16), nullable=False, index=True),
    sa.Column("reason", Words(), nullable=False),
    sa.Column("run", sa.Integer, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("n_events", sa.Integer, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("changed_at", UtcTime, nullable=False),
    # The object that holds the spec as workers read it: another one after each extension.
    sa.Column("study", Words(), nullable=False, server_default="study.json"),
    # Seconds of the job's timeout that this run has used, as its drivers measured them.
    sa.Column("used_s", sa.Float, nullable=False, server_default="0"),
    # Who asked for the end of this run; kept here so that it is heard whoever drives the job.
    sa.Column("cancel_by", Words()),
    # Why the job makes no progress, if it should; empty while all is well.
    sa.Column("stalled", Words(), nullable=False, server_default=""),
)

submissions = sa.Table(  # so that a submission which is repeated makes no second job
    "submissions",
    metadata,
    sa.Column("key", Word(200), primary_key=True),
    sa.Column("digest", Word(64), nullable=False),  # SHA-256 of the request
    sa.Column("job", sa.ForeignKey("jobs.job"), nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)

tokens = sa.Table(  # what lets clients in; of the secrets only digests
    "tokens",
    metadata,
    sa.Column("token", Word(64), primary_key=True),
    sa.Column("name", Word(100), nullable=False),
    sa.Column("digest", Word(64), nullable=False, unique=True),  # SHA-256 of the secret
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_by", Words(), nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("expires_at", UtcTime),
    sa.Column("revoked_at", UtcTime),
)
_VALID = tokens.c.revoked_at.is_(None)
# A name is that of one token at a time; those that were revoked stay, for the record.
sa.Index("ix_tokens_name", tokens.c.name, unique=True, sqlite_where=_VALID, postgresql_where=_VALID)

leases = sa.Table(  # one row per takeover: who drove the job, and since when
    "leases",
    metadata,
    sa.Column("job", sa.ForeignKey("jobs.job"), primary_key=True),
    sa.Column("epoch", sa.Integer, primary_key=True),
    sa.Column("owner", Words(), nullable=False),
    sa.Column("taken_at", UtcTime, nullable=False),
    # By the clock of the database. Null where a file lock of the live process says who holds the job.
    sa.Column("expires_at", UtcTime),
    sa.Column("released_at", UtcTime),
)

events = sa.Table(  # numbered per job under the lock of its row, so a reader's cursor never skips one
    "events",
    metadata,
    sa.Column("job", sa.ForeignKey("jobs.job"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("who", Words(), nullable=False),
    sa.Column("kind", Words(), nullable=False),
    sa.Column("text", Words(), nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)

# Word for word in the query, too: only so do the databases see that the index fits.
IS_MISMATCH: Final = sa.text("kind = 'mismatch'")
sa.Index("ix_events_mismatch", events.c.kind, sqlite_where=IS_MISMATCH, postgresql_where=IS_MISMATCH)

segments = sa.Table(
    "segments",
    metadata,
    sa.Column("job", sa.ForeignKey("jobs.job"), primary_key=True),
    sa.Column("attempt", Word(64), primary_key=True),  # unique within its job only
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("name", Words(), nullable=False),
    sa.Column("digest", Word(64), nullable=False),
    sa.Column("n_bytes", sa.BigInteger, nullable=False),
    sa.Column("counts", Counts(), nullable=False),
    sa.Column("pack", Words()),
    sa.Column("pack_bytes", sa.BigInteger, nullable=False),
    sa.Column("execution", Words()),
    sa.Column("committed_at", UtcTime, nullable=False),
    # Of the worker that made it, as the job's driver called it; null if it was in none.
    sa.Column("pool", Words()),
)

segment_ranges = sa.Table(
    "segment_ranges",
    metadata,
    sa.Column("job", sa.ForeignKey("jobs.job"), primary_key=True),
    sa.Column("lo", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("hi", sa.BigInteger, nullable=False),
    sa.Column("attempt", Word(64), nullable=False),
    sa.ForeignKeyConstraint(["job", "attempt"], ["segments.job", "segments.attempt"]),
)

aggregates = sa.Table(
    "aggregates",
    metadata,
    sa.Column("job", sa.ForeignKey("jobs.job"), primary_key=True),
    sa.Column("attempt", Word(64), primary_key=True),  # unique within its job only
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("name", Words(), nullable=False),
    sa.Column("digest", Word(64), nullable=False),
    sa.Column("n_bytes", sa.BigInteger, nullable=False),
    sa.Column("counts", Counts(), nullable=False),
    sa.Column("inputs", sa.JSON, nullable=False),
    sa.Column("pack", Words()),
    sa.Column("pack_bytes", sa.BigInteger, nullable=False),
    sa.Column("committed_at", UtcTime, nullable=False),
)

aggregate_ranges = sa.Table(
    "aggregate_ranges",
    metadata,
    sa.Column("job", sa.ForeignKey("jobs.job"), primary_key=True),
    sa.Column("lo", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("hi", sa.BigInteger, nullable=False),
    sa.Column("attempt", Word(64), nullable=False),
    sa.ForeignKeyConstraint(["job", "attempt"], ["aggregates.job", "aggregates.attempt"]),
)
