"""A real PostgreSQL that stands still: nothing waits for it for ever, it is named, and all goes on when it does."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy as sa
from http_service import TOKEN, Drivers, serving

from modelops.client.http import Address, Http
from modelops.client.served import HttpSource
from modelops.client.status import UNKNOWN
from modelops.errors import ServerUnreachableError, StorageError
from modelops.home import Home
from modelops.server.drive import JobDriver
from modelops.server.http import in_time
from modelops.server.service import JobService
from modelops.states import JobState
from modelops.store import Objects, Records, answers
from modelops.store import postgres as connections
from modelops.store.answers import Answers
from modelops.store.leases import leases_for
from modelops.study.ids import JobId, new_job_id

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from services import Postgres

SILENCE = "nothing has come from it"


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.new_database()


@pytest.fixture
def records(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    monkeypatch.setattr(connections, "LOCK_S", 0.3)
    with contextlib.closing(Records.open(url)) as opened:
        yield opened


@contextlib.contextmanager
def frozen(server: Postgres, pids: list[int]) -> Iterator[None]:
    """Let processes stand still, and lose patience with them soon, within the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections.Connection, "limit_s", 0.5)
        for module, name, value in (
            (connections, "PING_S", 0.5), (answers, "SAY_AFTER_S", 0.2),
            (in_time, "ANSWER_WITHIN_S", 0.3), (in_time, "TRY_FOR_S", 0.3),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        with server.stopped(pids):
            yield


def in_the_end(act: Callable[[], object]) -> None:
    """Do what may fail for a moment."""
    deadline = time.monotonic() + 60
    while True:
        try:
            act()
        except StorageError:
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
        else:
            return


def test_sessions_that_stand_still_are_given_up_and_others_are_begun(
    records: Records, url: str, postgres: Postgres
) -> None:
    assert records.jobs() == []

    def stopped_within_a_transaction() -> None:
        with records.database.reading() as sql:
            sql.execute(sa.text("SELECT 1"))
            with frozen(postgres, postgres.sessions(url)):
                sql.execute(sa.text("SELECT 1"))

    with pytest.raises(StorageError, match=rf"{postgres.port}.*{SILENCE}.*see whether it is up"):
        stopped_within_a_transaction()
    assert SILENCE in records.database.away
    assert records.database.answers.away_since is not None
    in_the_end(lambda: records.create_job(new_job_id(), b""))
    assert records.database.away == ""
    assert records.database.answers.away_since is None
    with frozen(postgres, postgres.sessions(url)):
        assert len(records.jobs()) == 1, "no statement was under way: nobody need hear of it"


def test_rows_that_keep_coming_may_take_longer_than_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now, closed = [0.0], list[bool]()
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    connection: Any = SimpleNamespace(
        autocommit=False, limit_s=12.0, answers=Answers(lambda: now[0]), close=lambda: closed.append(True)
    )

    def rows() -> Generator[str, bool, None]:
        while True:
            yield "more"

    waiting = connections.Connection._timed(connection, rows())
    next(waiting)
    for _ in range(10):  # as `psycopg` does: whether something has come, now and then
        for has_come in (False, True):
            now[0] += 5.0
            assert waiting.send(has_come) == "more"
            assert (connection.answers.silent_since() is None) is has_come
    now[0] += 12.5
    with pytest.raises(psycopg.OperationalError, match="for 12 s"):
        waiting.send(False)
    assert closed == [True]
    assert connection.answers.silent_since() is None


def test_what_a_session_that_stands_still_has_locked_is_said_to_be_locked(
    records: Records, url: str, postgres: Postgres
) -> None:
    job = new_job_id()
    records.create_job(job, b"")
    with contextlib.suppress(StorageError), records.database.writing() as sql:
        sql.execute(sa.text("SELECT * FROM jobs FOR UPDATE"))
        with postgres.stopped(postgres.sessions(url)):
            with pytest.raises(StorageError, match="lock timeout"):
                records.ask_cancel(job, "me")
            assert records.job(job).state is JobState.QUEUED, "who only reads waits for no lock"
            assert records.database.away == "", "it answers"
    in_the_end(lambda: records.ask_cancel(job, "me"))


def test_while_it_is_away_one_a_second_tries_and_the_others_hear_at_once_what_it_said() -> None:
    now = [100.0]
    seen = Answers(lambda: now[0])
    assert seen.refused() == ""
    seen.lost("no answer", 90.0)
    assert [seen.refused(), seen.refused()] == ["no answer", "no answer"]
    now[0] += answers.TRY_EVERY_S
    assert [seen.refused(), seen.refused()] == ["", "no answer"]
    assert seen.away_since is not None
    assert abs((datetime.now(UTC) - seen.away_since).total_seconds() - 11) < 5
    seen.succeeded()
    assert [seen.refused(), seen.away_since] == ["", None]


def test_requests_are_answered_in_time_and_name_the_database_that_stands_still(
    records: Records, postgres: Postgres, tmp_path: Path
) -> None:
    home = Home.at(tmp_path)
    service = JobService(records, Objects.open(home.storage), home, Drivers())
    job = new_job_id()
    with serving(service) as client, contextlib.closing(
        Http(lambda: Address(client.url, TOKEN, "the server", "look"), patience_s=0)
    ) as http:  # fmt: skip
        source = HttpSource(http, home)
        records.create_job(job, _spec(), name="a study")
        assert source.status(job).state is JobState.QUEUED
        with frozen(postgres, postgres.processes()):
            status = source.status(job)
            assert (status.state, status.last_known) == (UNKNOWN, JobState.QUEUED)
            for said in (status.reason, *_refusals(source, job)):
                assert f"{postgres.port}" in said
                assert "see whether it is up" in said
                assert " UTC)" in said, "since when"
            told = client.get("/v1/server")["database"]
            assert f"{postgres.port}" in told
            assert " UTC)" in told
        in_the_end(lambda: records.jobs())
        assert source.status(job).state is JobState.QUEUED


def _refusals(source: HttpSource, job: JobId) -> Iterator[str]:
    for act in (
        lambda: source.cancel(job), lambda: source.events(job), lambda: source.http.get("/jobs"),
    ):  # fmt: skip
        with pytest.raises(ServerUnreachableError) as refused:
            act()
        yield str(refused.value)


def _spec() -> bytes:
    import msgspec
    from http_service import request_for

    return msgspec.json.encode(request_for("b" * 64).spec)


def test_a_driver_that_waits_for_an_answer_is_not_shown_as_running_without_a_word(
    records: Records, tmp_path: Path
) -> None:
    leases = leases_for(records, tmp_path / "leases")
    objects = Objects.open(str(tmp_path / "objects"))
    driver = JobDriver(
        new_job_id(), 1, leases=leases, records=records, objects=objects, cache=tmp_path, who="test"
    )
    driver._thread = threading.get_ident()
    assert driver.view() is None
    records.database.answers.waits(time.monotonic() - 2 * answers.SAY_AFTER_S)
    view = driver.view()
    assert view is not None
    assert f"{records.database.name} failed: it does not answer" in view.waiting_for
    assert " UTC)" in view.waiting_for
    records.database.answers.came()
    assert driver.view() is None
