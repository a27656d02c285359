"""A SQLite file that is cut, overwritten, empty, locked or read-only: a sentence that names it and says what to do."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from volumes import Volume, can_mount

from modelops.errors import StorageError
from modelops.store import Records, database
from modelops.study.ids import JobId

COMMAND = Path(sys.executable).parent / "modelops"
N_JOBS = 40
SPEC = b'{"name": "a study", "bundle": "1"}' * 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of some jobs, whose log was written back into its file."""
    path = tmp_path_factory.mktemp("whole") / "modelops.db"
    write(path)
    return path


def write(path: Path) -> None:
    with contextlib.closing(Records.open(f"sqlite:///{path}")) as records:
        for n in range(N_JOBS):
            records.create_job(JobId(f"job_{n:032x}"), SPEC)
    with contextlib.closing(sqlite3.connect(path)) as sql:
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def read(path: Path) -> list[JobId]:
    with contextlib.closing(Records.open(f"sqlite:///{path}")) as records:
        for row in records.jobs():
            assert row.spec == SPEC
            assert [event.kind for event in records.events(row.job)] == ["created"]
        return sorted(row.job for row in records.jobs())


@settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(at=st.floats(0, 1), how=st.sampled_from(["cut", "zero", "garbage"]))
@example(at=0.0, how="cut")
@example(at=0.0, how="zero")
@example(at=1e-5, how="cut")  # one byte is left
def test_a_file_that_was_cut_or_overwritten_is_named_and_read_only_if_nothing_is_missing(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, at: float, how: str
) -> None:
    path, data = tmp_path_factory.mktemp("damaged") / "modelops.db", whole.read_bytes()
    write(path)
    byte = int(at * len(data))
    if how == "garbage":  # of a whole page, or it may be a value like any other
        byte = byte // 4096 * 4096
    rest = {"cut": b"", "zero": bytes(len(data) - byte), "garbage": os.urandom(len(data) - byte)}[how]
    path.write_bytes(path.read_bytes()[:byte] + rest)
    try:
        found = read(path)
    except StorageError as error:
        said = str(error)
    else:
        assert found == [f"job_{n:032x}" for n in range(N_JOBS)]
        return
    assert str(path) in said
    assert "a backup" in said


def test_a_page_anywhere_that_was_overwritten_is_found_before_anything_is_read_from_it(
    tmp_path: Path, whole: Path
) -> None:
    path, data = tmp_path / "modelops.db", whole.read_bytes()
    path.write_bytes(data)
    with contextlib.closing(Records.open(f"sqlite:///{path}")) as records:
        records.database.look_through()
    n_pages = len(data) // 4096
    assert n_pages > 20
    for page in range(n_pages):
        path.write_bytes(data[: 4096 * page] + bytes(4096) + data[4096 * (page + 1) :])
        with (
            pytest.raises(StorageError, match=re.escape(str(path)) + " is damaged: .* a backup"),
            contextlib.closing(Records.open(f"sqlite:///{path}")) as records,
        ):
            records.database.look_through()


@pytest.mark.parametrize(
    "damage", ["created_at = char(0, 0, 0) || substr(created_at, 4)", "state = 'runninh'"]
)
def test_a_value_that_nobody_has_written_is_damage_of_the_file_and_no_fault_of_the_program(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "modelops.db"
    write(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute(f"UPDATE jobs SET {damage} WHERE job = 'job_{7:032x}'")
    said = re.escape(str(path)) + r" is damaged: .*put a backup of it in its place"
    with contextlib.closing(Records.open(f"sqlite:///{path}")) as records:
        with pytest.raises(StorageError, match=said):
            records.jobs()
        assert records.job(JobId(f"job_{8:032x}")).spec == SPEC


def test_the_commands_say_it_with_the_exit_code_of_a_failure(tmp_path: Path, whole: Path) -> None:
    data = whole.read_bytes()
    (tmp_path / "modelops.db").write_bytes(data[: len(data) // 2])
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MODELOPS_")}
    done = subprocess.run(
        [COMMAND, "jobs", "list"], env={**environ, "MODELOPS_HOME": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert str(tmp_path / "modelops.db") in done.stderr
    assert "backup" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_another_process_keeps_locked_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "modelops.db"
    write(path)
    monkeypatch.setitem(database._ON_FILE["connect_args"], "timeout", 0.2)
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other,
        contextlib.closing(Records.open(f"sqlite:///{path}")) as records,
    ):
        other.execute("BEGIN IMMEDIATE")
        assert len(records.jobs()) == N_JOBS, "who reads waits for no writer"
        with pytest.raises(StorageError, match=r"modelops\.db .*locked.*another process keeps it locked"):
            records.create_job(JobId("job_new"), SPEC)
        other.execute("ROLLBACK")
        records.create_job(JobId("job_new"), SPEC)
        assert len(records.jobs()) == N_JOBS + 1


def test_a_database_on_a_read_only_volume_is_named_and_goes_on_when_it_can_be_written(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting file systems in memory needs root")
    with Volume(tmp_path / "volume", "16m") as volume:
        path = volume.path / "modelops.db"
        write(path)
        volume.forbid_writing()
        with pytest.raises(StorageError, match=rf"{path} .*allow writing"):
            read(path)
        volume.allow_writing()
        assert len(read(path)) == N_JOBS


def test_without_its_write_ahead_log_a_database_is_as_it_was_before(tmp_path: Path) -> None:
    path = tmp_path / "modelops.db"
    write(path)
    with contextlib.closing(Records.open(f"sqlite:///{path}")) as records:
        records.create_job(JobId("job_new"), SPEC)
        before = path.read_bytes()  # the job is in the log
    for name in ("-wal", "-shm"):
        Path(f"{path}{name}").unlink(missing_ok=True)
    path.write_bytes(before)
    assert len(read(path)) == N_JOBS
