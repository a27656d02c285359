"""Statements that go past SQLAlchemy: SQLite stores and gives what it would have stored and given with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from modelops.store import schema
from modelops.store.statements import Statement

if TYPE_CHECKING:
    from collections.abc import Iterator

AT = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=timezone(timedelta(hours=2)))
EVENTS = [
    {"job": "j", "number": 1, "at": AT, "who": "", "kind": "a", "text": "é\n", "data": {"a": [1, None, 0.1]}},
    {"job": "j", "number": 2, "at": AT, "who": "w", "kind": "b", "text": "", "data": None},
]
JOB = {
    "job": "j", "name": "n", "bundle": "b", "spec": b"\x00\xff", "state": "queued", "reason": "", "run": 1,
    "version": 1, "epoch": 0, "n_events": 0, "created_at": AT, "changed_at": AT, "used_s": 0.1, "cancel_by": None,
}  # fmt: skip
JOBS, OF_EVENTS = schema.jobs, schema.events.c


@pytest.fixture
def sql() -> Iterator[sa.Connection]:
    engine = sa.create_engine("sqlite://")
    schema.metadata.create_all(engine)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def test_what_is_written_is_read_by_sqlalchemy_and_what_it_writes_is_read(sql: sa.Connection) -> None:
    assert Statement(JOBS.insert()).run(sql, JOB) == 1
    sql.execute(JOBS.insert(), {**JOB, "job": "k"})
    query = sa.select(JOBS).order_by(JOBS.c.job)
    mine, its = Statement(query).rows(sql, {}), sql.execute(query).all()
    assert [row._asdict() for row in mine] == [row._asdict() for row in its]
    ours, theirs = (row._asdict() for row in mine)
    assert {**ours, "job": "k"} == theirs
    assert ours["created_at"] == AT
    assert ours["created_at"].tzinfo is UTC
    assert ours["study"] == "study.json"  # a column of which nothing was said has its default


def test_several_rows_at_once_keep_their_values_and_none_is_none_in_json(sql: sa.Connection) -> None:
    Statement(schema.events.insert()).run_each(sql, EVENTS)
    Statement(schema.events.insert()).run_each(sql, [])
    query = sa.select(schema.events).order_by(OF_EVENTS.number)
    found = [row._asdict() for row in Statement(query).rows(sql, {})]
    assert found == EVENTS
    assert found == [row._asdict() for row in sql.execute(query)]


def test_what_an_update_returns_has_its_new_values_and_columns_are_set_by_name(sql: sa.Connection) -> None:
    sql.execute(JOBS.insert(), JOB)
    mine = JOBS.c.job == sa.bindparam("of_job")
    counting = Statement(
        JOBS.update().where(mine).values(n_events=JOBS.c.n_events + 1).returning(JOBS.c.n_events)
    )
    assert [counting.scalar(sql, {"of_job": "j"}) for _ in range(2)] == [1, 2]
    assert counting.scalar(sql, {"of_job": "other"}) is None
    change = Statement(JOBS.update().where(mine))
    assert change.run(sql, {"of_job": "j", "reason": "r", "changed_at": AT}) == 1
    assert change.run(sql, {"of_job": "j", "state": "running"}) == 1
    assert change.run(sql, {"of_job": "other", "state": "failed"}) == 0
    row = sql.execute(sa.select(JOBS)).one()
    assert (row.reason, row.state, row.changed_at) == ("r", "running", AT)


def test_values_in_the_statement_itself_stay_and_one_that_is_missing_is_an_error(sql: sa.Connection) -> None:
    sql.execute(schema.events.insert(), EVENTS)
    query = sa.select(OF_EVENTS.number).where(OF_EVENTS.kind == "b", OF_EVENTS.at == AT)
    query = query.where(OF_EVENTS.job == sa.bindparam("of_job")).limit(1)
    assert Statement(query).rows(sql, {"of_job": "j"}) == [(2,)]
    assert Statement(query).row(sql, {"of_job": "other"}) is None
    with pytest.raises(sa.exc.InvalidRequestError, match="of_job"):
        Statement(query).rows(sql, {})
