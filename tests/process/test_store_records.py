"""Records on SQLite and on a real PostgreSQL: the tables, the transactions, and many writers at once."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given, settings
from hypothesis import strategies as st

from modelops.counters import Counted, counted
from modelops.errors import (
    ClusterError,
    InternalError,
    ModelOpsError,
    NotFoundError,
    RequestError,
    StorageError,
)
from modelops.home import Home
from modelops.states import JOB_NEXT, JobEvent, JobState, ReplicateStatus
from modelops.store import AlreadyExistsError, ChangedMeanwhileError, LeaseLostError, Records, schema
from modelops.store.database import Database
from modelops.store.schema import HEAD, REVISIONS, metadata
from modelops.store.withdrawal import Kept, Withdrawal
from modelops.study.ids import AttemptId, JobId, new_job_id
from modelops.study.ranges import Ranges
from modelops.worker.messages import AggregateRef, SegmentRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services import Postgres

    from modelops.study.ranges import Range

JOB = JobId("job_1")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/modelops.db"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind: what follows is one contract."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url"))
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def records(url: str) -> Iterator[Records]:
    opened = Records.open(url)
    yield opened
    opened.close()


def ref(attempt: str, *ranges: Range, digest: str = "d") -> SegmentRef:
    return SegmentRef(
        attempt=AttemptId(attempt),
        name=f"segments/{attempt}.arrow",
        digest=digest,
        n_bytes=5,
        ranges=ranges,
        counts={ReplicateStatus.SUCCEEDED: len(Ranges(ranges)) - 1, ReplicateStatus.FAILED: 1},
        pack=None,
        execution=f"executions/{attempt}.arrow",
    )


def test_migrating_from_nothing_gives_the_tables_of_the_schema(url: str) -> None:
    database = Database.open(url)
    with database.reading() as sql:
        assert compare_metadata(MigrationContext.configure(sql), metadata) == []
    database.close()


def test_open_jobs_are_told_apart_from_others_and_what_pools_and_stories_of_them_say(
    records: Records,
) -> None:
    ended, waits, anywhere = (JobId(f"job_{name}") for name in ("a", "b", "c"))
    for job, spec in (
        (ended, b"{}"),
        (waits, b'{"pools": ["EU_West"], "name": "x"}'),
        (anywhere, b'{"name": "y"}'),
    ):
        records.create_job(job, spec)
    records.change_state(ended, JobEvent.STARTED, who="me")
    records.change_state(ended, JobEvent.ENVIRONMENT_FAILED, who="me", why="no such package")
    assert [one.job for one in records.open_jobs()] == [waits, anywhere]
    assert records.pools_of([waits, anywhere, JobId("job_none")]) == {waits: ("EU_West",), anywhere: ()}
    assert (records.last_end(ended), records.last_end(waits)) == ("no such package", "")
    before = records.now()
    for job in (waits, ended):
        records.add_event(job, "me", "mismatch", f"of {job}", {"kind": "study_damaged", "n": 1})
    records.add_event(waits, "me", "note", "no mismatch")
    assert [(job, event.text) for job, event in records.mismatches_since(before)] == [
        (waits, f"of {waits}"), (ended, f"of {ended}"),
    ]  # fmt: skip
    assert [job for job, _ in records.mismatches_since(before, ended)] == [ended]
    assert records.mismatches_since(records.now() + timedelta(minutes=1)) == []


def test_a_database_of_no_encoding_keeps_text_as_it_is(postgres: Postgres) -> None:
    url = postgres.new_database("ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    with contextlib.closing(Records.open(url)) as records:
        job = JobId("job_a")
        records.create_job(job, b"{}")
        records.add_event(job, "zoë", "note", "20 °C", {})
        assert [(event.who, event.text) for event in records.events(job)][-1] == ("zoë", "20 °C")


def test_text_that_no_column_can_hold_is_spelt_out_alike_on_every_database(url: str) -> None:
    said, spelt = "a\0b caf\udce9 \ud800 zoë", r"a\x00b caf\xe9 \ud800 zoë"
    with contextlib.closing(Records.open(url)) as records:
        records.create_job(JOB, b"{}", name=said, who=said, why=said)
        epoch = records.take_lease(JOB, said)
        records.ask_cancel(JOB, said)
        row = records.change_state(JOB, JobEvent.STARTED, who=said, why=said, epoch=epoch)
        number = records.add_event(JOB, said, "note", said, {said: [said, {"n": 1}]})
        again = records.add_event(JOB, said, "note", said, {said: [said, {"n": 1}]}, unless_there=True)
        assert again == number
        assert row.reason == records.job(JOB).reason
        assert (row.name, row.reason, row.cancel_by) == (spelt, spelt, spelt)
        events = records.events(JOB)
        assert {event.who for event in events} == {spelt}
        assert (events[-1].text, events[-1].data) == (spelt, {spelt: [spelt, {"n": 1}]})
        with pytest.raises(NotFoundError):
            records.job(JobId("job\0"))


def test_what_a_database_can_never_do_is_no_database_that_is_away(url: str) -> None:
    with contextlib.closing(Records.open(url)) as records:
        before = counted(Counted.DATABASE_ERRORS)
        on_file = records.database.on_file
        wrong = (
            [("SELECT ?", ())] if on_file else [("SELECT 1/0", ()), ("SELECT no", ()), ("SELECT %s", ("\0",))]
        )
        for text, values in wrong:
            with pytest.raises(InternalError, match="as it always would"), records.database.writing() as sql:
                sql.exec_driver_sql(text, values)
        assert counted(Counted.DATABASE_ERRORS) == before
        assert records.database.away == ""
        if not on_file:  # a standby, until it is made the first one; a table, until its backup is back
            for text in ("SET TRANSACTION READ ONLY; CREATE TABLE t ()", "SELECT 1 FROM no_such_table"):
                with pytest.raises(StorageError), records.database.writing() as sql:
                    sql.exec_driver_sql(text)
            assert counted(Counted.DATABASE_ERRORS) == before + 2
        records.create_job(JOB, b"{}")  # and goes on


def test_the_revisions_known_without_alembic_are_those_that_exist() -> None:
    config = Config()
    config.set_main_option("script_location", "modelops.store:migrations")
    script = ScriptDirectory.from_config(config)
    assert script.get_current_head() == HEAD
    assert [r.revision for r in script.walk_revisions()][::-1] == list(REVISIONS)


def test_mismatches_are_counted_without_reading_the_other_events(url: str) -> None:
    with contextlib.closing(Records.open(url)) as records:
        for job in (JobId("job_a"), JobId("job_b")):
            records.create_job(job, b"{}")
            records.add_event(job, "me", "note", "x", {"kind": "other", "n": 100})
            records.add_event(job, "me", "mismatch", "x", {"kind": "segment_lost", "n": 2})
        seen: list[str] = []
        sa.event.listen(records.database.engine, "before_cursor_execute", lambda *a: seen.append(a[2]))
        assert records.mismatches() == {"segment_lost": 4}
        (query,) = (q for q in seen if "events" in q)
        if records.database.engine.dialect.name == "sqlite":  # the other one rightly reads two pages whole
            with records.database.reading() as sql:
                plan = str(sql.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}").all())
            assert "ix_events_mismatch" in plan


def test_a_newer_database_is_refused_with_a_sentence(sqlite_url: str, tmp_path: Path) -> None:
    Records.open(sqlite_url).close()
    with sqlite3.connect(tmp_path / "modelops.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    with pytest.raises(ClusterError, match=r"newer ModelOps .*9999.*upgrade modelops"):
        Records.open(sqlite_url)


@pytest.mark.parametrize("bad", ["nonsense", "sqlite://", "sqlite:///:memory:"])
def test_a_url_that_keeps_nothing_is_refused(bad: str) -> None:
    with pytest.raises(RequestError, match=r"sqlite:////path"):
        Records.open(bad)


def test_sqlite_is_opened_durably(sqlite_url: str) -> None:
    database = Database.open(sqlite_url)
    with database.reading() as sql:
        pragmas = {
            p: sql.exec_driver_sql(f"PRAGMA {p}").scalar()
            for p in ("journal_mode", "synchronous", "foreign_keys")
        }
    database.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_what_may_wait_for_the_next_sync_changes_nothing_for_what_may_not(records: Records) -> None:
    database = records.database

    def synced() -> object:
        if database.engine.dialect.name != "sqlite":
            return 2
        with database.reading() as sql:
            return sql.scalar(sa.text("PRAGMA synchronous"))

    def events() -> int:
        return len(records.events(JOB))

    records.create_job(JOB, b"{}")
    before = events()
    with database.writing_with_next() as sql:
        sql.execute(sa.update(schema.jobs).values(reason="written"))
    assert (records.job(JOB).reason, synced()) == ("written", 2)

    def fail() -> None:
        with database.writing_with_next() as sql:
            sql.execute(sa.update(schema.jobs).values(reason="not written"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (records.job(JOB).reason, synced()) == ("written", 2)
    assert events() == before


def test_a_job_is_recorded_once(records: Records) -> None:
    created = records.create_job(JOB, b"{}", name="flu", bundle="sha256:1", why="asked")
    assert records.job(JOB) == created
    assert (created.state, created.run, created.version, created.epoch) == (JobState.QUEUED, 1, 1, 0)
    assert created.created_at.tzinfo is not None
    with pytest.raises(AlreadyExistsError):
        records.create_job(JOB, b"other")
    assert records.job(JOB).spec == b"{}"
    assert [(e.number, e.kind, e.text) for e in records.events(JOB)] == [(1, "created", "asked")]


def test_times_come_from_the_clock_and_keep_their_zone(url: str) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    records = Records.open(url, clock=lambda: now)
    records.create_job(JOB, b"{}")
    assert records.job(JOB).created_at == now
    assert records.events(JOB)[0].at == now
    records.close()


def test_jobs_are_listed_newest_first_and_by_state(records: Records) -> None:
    old, new = new_job_id(), new_job_id()
    records.create_job(old, b"{}")
    records.create_job(new, b"{}")
    records.change_state(old, JobEvent.STARTED, who="test")
    assert [row.job for row in records.jobs()] == [new, old]
    assert [row.job for row in records.jobs(states=[JobState.PREPARING])] == [old]


def test_what_does_not_exist_is_said(records: Records) -> None:
    for ask in (
        lambda: records.job(JOB),
        lambda: records.take_lease(JOB, "me"),
        lambda: records.commit_segment(JOB, 1, ref("a", (0, 1))),
        lambda: records.add_event(JOB, "me", "note", ""),
        lambda: records.change_state(JOB, JobEvent.STARTED, who="me"),
    ):
        with pytest.raises(NotFoundError, match="no job job_1"):
            ask()


def path_to(state: JobState) -> list[JobEvent]:
    paths: dict[JobState, list[JobEvent]] = {JobState.QUEUED: []}
    while state not in paths:
        for (old, event), new in JOB_NEXT.items():
            if old in paths:
                paths.setdefault(new, [*paths[old], event])
    return paths[state]


@pytest.mark.parametrize("state", JobState)
def test_every_state_is_left_only_as_the_table_says(records: Records, state: JobState) -> None:
    for event in JobEvent:
        job = new_job_id()
        records.create_job(job, b"{}")
        for step in path_to(state):
            records.change_state(job, step, who="test")
        before = records.job(job)
        if (state, event) in JOB_NEXT:
            after = records.change_state(job, event, who="me", why="because", expected_state=state)
            assert (after.state, after.version) == (JOB_NEXT[state, event], before.version + 1)
            assert after.reason == "because"
            last = records.events(job)[-1]
            assert (last.who, last.kind) == ("me", event)
            assert last.data.items() >= {"from": state, "to": after.state}.items()
            begins = event in (JobEvent.RESUMED, JobEvent.EXTENDED, JobEvent.REPAIRED)
            assert after.run == before.run + begins
        else:
            with pytest.raises(InternalError):
                records.change_state(job, event, who="me")
            assert records.job(job) == before


def test_a_change_that_another_made_first_is_refused(records: Records) -> None:
    seen = records.create_job(JOB, b"{}")
    records.change_state(JOB, JobEvent.CANCEL_ASKED, who="user", expected_version=seen.version)
    with pytest.raises(ChangedMeanwhileError, match="cancelling"):
        records.change_state(JOB, JobEvent.STARTED, who="driver", expected_version=seen.version)
    assert records.job(JOB).state == JobState.CANCELLING


def test_a_driver_that_was_replaced_can_write_nothing(records: Records) -> None:
    records.create_job(JOB, b"{}")
    first = records.take_lease(JOB, "driver 1")
    assert records.commit_segment(JOB, first, ref("a", (0, 2)))
    second = records.take_lease(JOB, "driver 2")
    assert second > first
    before = (records.job(JOB), records.events(JOB), records.segments(JOB))
    aggregate = AggregateRef(
        attempt=AttemptId("g"),
        name="n",
        digest="d",
        n_bytes=1,
        params=((0, 1),),
        counts={"succeeded": 1},
        inputs=(),
    )
    for write in (
        lambda: records.commit_segment(JOB, first, ref("b", (2, 3))),
        lambda: records.commit_segment(JOB, first, ref("a", (0, 2))),
        lambda: records.commit_aggregates(JOB, first, aggregate),
        lambda: records.change_state(JOB, JobEvent.STARTED, who="driver 1", epoch=first),
        lambda: records.add_event(JOB, "driver 1", "note", "still here", epoch=first),
    ):
        with pytest.raises(LeaseLostError, match="another driver holds job job_1"):
            write()
    assert (records.job(JOB), records.events(JOB), records.segments(JOB)) == before


def test_events_are_read_on_from_a_cursor(records: Records) -> None:
    records.create_job(JOB, b"{}")
    for i in range(5):
        records.add_event(JOB, "me", "note", f"number {i}", {"i": i, "text": "ü"})
    first = records.events(JOB, limit=3)
    rest = records.events(JOB, after=first[-1].number)
    assert [e.number for e in first + rest] == [1, 2, 3, 4, 5, 6]
    assert rest[-1].data == {"i": 4, "text": "ü"}


def test_a_segment_counts_once_and_comes_back_as_it_was(records: Records) -> None:
    records.create_job(JOB, b"{}")
    epoch = records.take_lease(JOB, "me")
    a, b = ref("a", (0, 10), (20, 30)), ref("b", (10, 20))
    assert records.commit_segments(JOB, epoch, [b, a]) == [True, True]
    assert records.commit_segment(JOB, epoch, a), "the repeat of a commit whose answer was lost"
    assert not records.commit_segment(JOB, epoch, ref("a", (0, 10), (20, 30), digest="other"))
    assert not records.commit_segment(JOB, epoch, ref("c", (29, 31)))
    assert records.segments(JOB) == [a, b]
    assert records.covered(JOB) == Ranges([(0, 30)])
    assert records.counts(JOB) == {ReplicateStatus.SUCCEEDED: 28, ReplicateStatus.FAILED: 2}


def test_what_no_longer_counts_of_a_segment_does_not_come_back_by_a_repeat_of_its_commit(
    records: Records,
) -> None:
    records.create_job(JOB, b"{}")
    epoch, whole = records.take_lease(JOB, "me"), ref("a", (0, 10))
    assert records.commit_segment(JOB, epoch, whole)
    kept = Kept(((0, 4),), {ReplicateStatus.SUCCEEDED: 4})
    records.withdraw(JOB, epoch, Withdrawal(segments={whole.attempt: kept}), who="me", why="because")
    assert not records.commit_segment(JOB, epoch, whole), "who hears yes takes all of it for covered"
    assert records.covered(JOB) == Ranges([(0, 4)])
    assert records.commit_segment(JOB, epoch, ref("a", (0, 4)))


def test_attempts_of_two_jobs_may_have_the_same_id(records: Records) -> None:
    for job in (JOB, JobId("job_2")):
        records.create_job(job, b"{}")
        assert records.commit_segment(job, records.take_lease(job, "me"), ref("a", (0, 5)))
        assert [s.attempt for s in records.segments(job)] == ["a"]
        assert records.covered(job) == Ranges([(0, 5)])


def test_a_segment_that_covers_nothing_is_a_bug(records: Records) -> None:
    records.create_job(JOB, b"{}")
    with pytest.raises(InternalError, match="covers nothing"):
        records.commit_segment(JOB, records.take_lease(JOB, "me"), ref("a"))


def test_aggregates_come_back_as_they_were(records: Records) -> None:
    records.create_job(JOB, b"{}")
    epoch = records.take_lease(JOB, "me")
    stored = AggregateRef(
        attempt=AttemptId("g"),
        name="aggregates/g.arrow",
        digest="d",
        n_bytes=7,
        params=((0, 3), (5, 6)),
        counts={"succeeded": 3, "skipped": 1},
        inputs=("x", "y"),
        pack="packs/g.pack",
        pack_bytes=9,
    )
    assert records.commit_aggregates(JOB, epoch, stored)
    assert records.commit_aggregates(JOB, epoch, stored)
    assert records.aggregates(JOB) == [stored]


ranges_strategy = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda t: (t[0], t[0] + t[1])),
    min_size=1,
    max_size=4,
).map(lambda pairs: Ranges(pairs).pairs)


@settings(max_examples=40, deadline=None)
@given(attempts=st.lists(st.tuples(st.integers(0, 12), ranges_strategy), max_size=25))
def test_commits_behave_like_a_set_of_indices(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[int, tuple[Range, ...]]]
) -> None:
    records = Records.open(f"sqlite:///{tmp_path_factory.mktemp('db')}/m.db")
    records.create_job(JOB, b"{}")
    epoch = records.take_lease(JOB, "me")
    covered: set[int] = set()
    accepted: dict[str, SegmentRef] = {}
    for number, ranges in attempts:
        wanted = ref(f"att_{number}", *ranges, digest=str(ranges))
        indices = set(Ranges(ranges))
        if wanted.attempt in accepted:
            expected = accepted[wanted.attempt] == wanted
        else:
            expected = not covered & indices
            if expected:
                covered |= indices
                accepted[wanted.attempt] = wanted
        assert records.commit_segment(JOB, epoch, wanted) == expected
    assert set(records.covered(JOB)) == covered
    assert {r.attempt: r for r in records.segments(JOB)} == accepted
    records.close()


WRITER = """
import sys
from modelops.store import Records
from modelops.states import ReplicateStatus
from modelops.worker.messages import SegmentRef
url, job, epoch, me = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
records = Records.open(url)
print("ready", flush=True)
sys.stdin.readline()
for i in range(60):
    lo = i * 5
    ranges = ((lo, lo + 5),) if i % 2 else ((lo, lo + 3), (lo + 7, lo + 8))
    ref = SegmentRef(attempt=f"{me}-{i}", name="n", digest="d", n_bytes=1, ranges=ranges,
                     counts={ReplicateStatus.SUCCEEDED: sum(hi - lo for lo, hi in ranges)})
    if records.commit_segment(job, epoch, ref):
        print(ref.attempt, flush=True)
"""


def test_many_threads_and_processes_commit_at_once_and_no_index_is_covered_twice(
    records: Records, url: str
) -> None:
    records.create_job(JOB, b"{}")
    epoch = records.take_lease(JOB, "me")
    accepted: list[str] = []
    errors: list[ModelOpsError] = []
    start = threading.Barrier(8)

    def commit(me: int) -> None:
        try:
            start.wait()
            for i in range(40):
                lo = (i * 7 + me) % 300
                wanted = ref(f"thread-{me}-{i}", (lo, lo + 3), (lo + 9, lo + 10))
                if records.commit_segment(JOB, epoch, wanted):
                    accepted.append(wanted.attempt)
                records.add_event(JOB, f"thread {me}", "note", str(i))
        except ModelOpsError as e:
            errors.append(e)

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, JOB, str(epoch), f"process-{n}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    threads = [threading.Thread(target=commit, args=(me,)) for me in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        accepted += out.split()
    assert errors == []
    stored = records.segments(JOB)
    assert sorted(accepted) == sorted(r.attempt for r in stored)
    indices = [k for r in stored for lo, hi in r.ranges for k in range(lo, hi)]
    assert len(indices) == len(set(indices)) == len(records.covered(JOB))
    assert [e.number for e in records.events(JOB)] == list(range(1, len(records.events(JOB)) + 1))


OPENER = """
import sys
from modelops.store import Records
sys.stdin.readline()
print(len(Records.open(sys.argv[1]).jobs()))
"""


def test_processes_that_open_a_new_database_at_once_all_find_it_whole(url: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [p.communicate(timeout=120)[0] for p in processes] == ["0\n"] * 3


def test_what_was_committed_survives_kill_9_of_its_writer(url: str) -> None:
    records = Records.open(url)
    records.create_job(JOB, b"{}")
    epoch = records.take_lease(JOB, "me")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, url, JOB, str(epoch), "p"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.write("go\n")
    process.stdin.flush()
    told = [process.stdout.readline().strip() for _ in range(10)]
    process.kill()
    process.wait()
    told += process.stdout.read().split()
    process.stdin.close()
    process.stdout.close()
    assert set(told) <= {r.attempt for r in records.segments(JOB)}
    assert records.commit_segment(JOB, epoch, ref("next", (5000, 5001)))
    records.close()


@pytest.mark.parametrize("moment", ["its row", "its ranges", "the commit", "the answer"])
def test_a_server_that_dies_in_the_middle_of_a_commit_has_all_of_it_or_nothing(
    postgres: Postgres, moment: str
) -> None:
    died: list[str] = []

    def die() -> None:
        if not died:
            died.append(moment)
            postgres.stop()

    def before_statement(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        table = {"its row": "segments", "its ranges": "segment_ranges"}.get(moment, "none")
        if statement.startswith(f"INSERT INTO {table} "):
            die()

    def before_commit(connection: sa.Connection) -> None:
        raw = connection.connection.driver_connection
        if raw is not None and moment == "the answer" and not died:
            raw.commit()
            raw.cursor().execute("SELECT 1")  # so that there is something to commit of which nothing is heard
        if moment in ("the commit", "the answer"):
            die()

    with contextlib.closing(Records.open(postgres.new_database())) as records:
        records.create_job(JOB, b"{}")
        epoch, both = records.take_lease(JOB, "me"), [ref("a", (0, 4), (6, 8)), ref("b", (4, 6))]
        sa.event.listen(records.database.engine, "before_cursor_execute", before_statement)
        sa.event.listen(records.database.engine, "commit", before_commit)
        with pytest.raises(StorageError, match=rf":{postgres.port}/.* see whether it is up"):
            records.commit_segments(JOB, epoch, both)
        assert died == [moment]
        postgres.start()
        while True:
            try:
                found = records.segments(JOB)
                break
            except StorageError:  # of many that ask, one a second tries
                continue
        assert found == (both if moment == "the answer" else [])
        assert records.commit_segments(JOB, epoch, both) == [True, True]
        assert records.segments(JOB) == both


def test_a_full_disk_under_the_database_is_named_and_nothing_is_half_written(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr!r}")
    records = Records.open(f"sqlite:///{where}/m.db")
    try:
        records.create_job(JOB, b"{}")

        def fill() -> None:
            for _ in range(100):
                records.add_event(JOB, "me", "note", "x" * 50_000)

        with pytest.raises(StorageError, match=rf"{where}/m.db.*full"):
            fill()
        events = records.events(JOB)
        assert [e.number for e in events] == list(range(1, len(events) + 1))
        assert records.job(JOB).n_events == len(events)
    finally:
        records.close()
        subprocess.run(["umount", where], check=True)


def test_voided_results_count_no_more_and_can_be_covered_again(records: Records) -> None:
    records.create_job(JOB, b"{}")
    other = new_job_id()
    records.create_job(other, b"{}")
    epoch = records.take_lease(JOB, "me")
    aggregate = AggregateRef(
        attempt=AttemptId("g"), name="a", digest="d", n_bytes=1, params=((0, 2),), counts={}, inputs=()
    )
    records.commit_segments(JOB, epoch, [ref("a", (0, 10)), ref("b", (10, 12), (14, 15))])
    records.commit_aggregates(JOB, epoch, aggregate)
    records.commit_segment(other, records.take_lease(other, "me"), ref("a", (0, 10)))

    assert records.void_results(JOB, epoch, "me", "changed: model.py") == 13

    assert (records.segments(JOB), records.aggregates(JOB)) == ([], [])
    assert (records.counts(JOB), records.covered(JOB)) == ({}, Ranges())
    assert records.covered(other) == Ranges([(0, 10)])
    event = records.events(JOB)[-1]
    assert (event.who, event.kind, event.text) == ("me", "results_voided", "changed: model.py")
    assert event.data == {"replicates": 13, "epoch": epoch}
    assert records.withdrawn(JOB).epoch == epoch, "what an attempt of that time stored will never count"
    later = records.take_lease(JOB, "me")
    with pytest.raises(LeaseLostError):
        records.void_results(JOB, epoch, "me", "late")
    assert records.commit_segment(JOB, later, ref("c", (5, 12)))
    assert records.commit_aggregates(JOB, later, aggregate)
    assert records.void_results(JOB, later, "me", "again") == 7


@pytest.mark.parametrize("name", ["a?b=c", "100%", "a%3Fb", "a#b", "a b", "häuser", "a:b@c&d"])
def test_the_database_lies_in_its_home_whatever_that_is_called(name: str, tmp_path: Path) -> None:
    home = Home.at(tmp_path / name)
    assert home.database_file == home.data / "modelops.db"
    Records.open(home.database_url).close()
    assert home.database_file.is_file()
    assert [folder.name for folder in tmp_path.iterdir()] == [name]


def test_only_a_database_in_a_file_has_one(tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    assert replace(home, database="sqlite:////a%20b/c.db?x=1").database_file == Path("/a b/c.db")
    assert replace(home, database="postgresql+psycopg://me@here/jobs").database_file is None
