"""One contract for both kinds of leases: file locks beside SQLite, and the clock of a real PostgreSQL."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from modelops.errors import NotFoundError
from modelops.store import LeaseLostError, Records
from modelops.store.leases import ClockLeases, FileLeases, leases_for
from modelops.store.rows import hold, insert_job, new_row
from modelops.study.ids import JobId, new_job_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services import Postgres

    from modelops.store.leases import Leases

LEASE_S = 1.0


class Maker(Protocol):
    def __call__(self, lease_s: float = 3600.0) -> Leases: ...


@dataclass
class Machine:
    """A database, and leases of as many processes as the test makes."""

    records: Records
    process: Maker  # leases of a process on a machine of its own, if there can be several

    def job(self) -> JobId:
        job = new_job_id()
        self.records.create_job(job, b"")
        return job


@pytest.fixture(params=["file", "clock"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    if request.param == "file":
        with closing(Records.open(f"sqlite:///{tmp_path}/modelops.db")) as records:
            yield Machine(records, lambda lease_s=0.0: FileLeases(records, tmp_path / "leases"))
    else:
        postgres: Postgres = request.getfixturevalue("postgres")
        with closing(Records.open(postgres.new_database())) as records:
            folders = (tmp_path / str(n) for n in count())
            yield Machine(
                records, lambda lease_s=3600.0: ClockLeases(records, next(folders), lease_s=lease_s)
            )


def test_only_one_of_two_processes_gets_a_job_and_the_other_after_it_was_released(machine: Machine) -> None:
    job, one, two = machine.job(), machine.process(), machine.process()
    assert one.take(job, "one") == 1
    assert two.take(job, "two") is None
    assert machine.records.job(job).epoch == 1
    two.release(job)  # it holds nothing, and takes nothing away
    assert two.take(job, "two") is None
    one.release(job)
    assert two.take(job, "two") == 2
    assert one.take(job, "one") is None
    assert [e.who for e in machine.records.events(job) if e.kind == "lease_taken"] == ["one", "two"]


def test_who_holds_a_job_may_take_it_again_with_a_new_epoch(machine: Machine) -> None:
    job, one, two = machine.job(), machine.process(), machine.process()
    assert [one.take(job, "one") for _ in range(3)] == [1, 2, 3]
    assert two.take(job, "two") is None
    with pytest.raises(LeaseLostError):
        machine.records.hold(job, 2)
    machine.records.hold(job, 3)


def test_of_many_that_ask_at_once_one_gets_the_job(machine: Machine) -> None:
    job, takers = machine.job(), [machine.process() for _ in range(8)]
    got: list[int | None] = []
    barrier = threading.Barrier(len(takers))

    def take(leases: Leases) -> None:
        barrier.wait()
        got.append(leases.take(job, "somebody"))

    threads = [threading.Thread(target=take, args=(leases,)) for leases in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got, key=str) == [1, *[None] * 7]


def test_jobs_are_independent_and_an_unknown_one_leaves_nothing_behind(machine: Machine) -> None:
    a, b, one, two = machine.job(), machine.job(), machine.process(), machine.process()
    assert (one.take(a, "one"), two.take(b, "two")) == (1, 1)
    assert one.renew() == []
    assert two.renew() == []
    unknown = new_job_id()
    with pytest.raises(NotFoundError):
        one.take(unknown, "one")
    machine.records.create_job(unknown, b"")
    assert two.take(unknown, "two") == 1


def test_a_job_can_be_kept_from_others_before_it_is_recorded(tmp_path: Path) -> None:
    with closing(Records.open(f"sqlite:///{tmp_path}/modelops.db")) as records:
        one, two = (leases_for(records, tmp_path / "leases") for _ in range(2))
        job = new_job_id()
        one.reserve(job)
        records.create_job(job, b"")
        assert two.take(job, "two") is None
        assert one.take(job, "one") == 1
        one.release(job)
        assert list((tmp_path / "leases").iterdir()) == []


def test_a_job_that_is_recorded_together_with_its_lease_is_nobody_elses(machine: Machine) -> None:
    one, two, job = machine.process(), machine.process(), new_job_id()
    one.reserve(job)
    with machine.records.database.writing() as sql:
        insert_job(sql, new_row(job, b"", name="", bundle="", at=machine.records.now()), "me", "")
        epoch = one.take_new(sql, job, "one")
    one.took_new(job, epoch)
    assert epoch == machine.records.job(job).epoch == 1
    assert two.take(job, "two") is None
    assert one.renew() == []
    one.release(job)
    assert two.take(job, "two") == 2
    kinds = [(e.number, e.kind, e.who) for e in machine.records.events(job)]
    assert kinds == [(1, "created", "me"), (2, "lease_taken", "one"), (3, "lease_taken", "two")]


def test_a_lock_whose_file_cannot_be_removed_is_given_back_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Records.open(f"sqlite:///{tmp_path}/modelops.db")) as records:
        one, two = (FileLeases(records, tmp_path / "leases") for _ in range(2))
        job = new_job_id()
        records.create_job(job, b"")
        assert one.take(job, "one") == 1
        with monkeypatch.context() as patched:  # as in a folder that is read-only just now

            def refuse(path: Path, **_: object) -> None:
                raise OSError(errno.EROFS, "Read-only file system", str(path))

            patched.setattr(Path, "unlink", refuse)
            one.release(job)
        assert two.take(job, "two") == 2
        two.release(job)
        assert one.take(job, "one") == 3
        one.release(job)
        assert list((tmp_path / "leases").iterdir()) == []


def test_who_locks_a_file_that_its_holder_has_just_removed_locks_the_one_that_is_there_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Records.open(f"sqlite:///{tmp_path}/modelops.db")) as records:
        one, two, three = (FileLeases(records, tmp_path / "leases") for _ in range(3))
        job, flock = new_job_id(), fcntl.flock
        records.create_job(job, b"")
        assert one.take(job, "one") == 1

        def after_its_holder(fd: int, how: int) -> None:
            one.release(job)  # only the first time does it hold anything
            flock(fd, how)

        with monkeypatch.context() as patched:
            patched.setattr(fcntl, "flock", after_its_holder)
            assert two.take(job, "two") == 2
        assert three.take(job, "three") is None
        two.release(job)


HOLD = """
import os, sys
from pathlib import Path
from modelops.store import Records
from modelops.store.leases import leases_for
leases = leases_for(Records.open(sys.argv[1]), Path(sys.argv[2]))
epoch = leases.take(sys.argv[3], "other")
if sys.argv[4] == "fork":
    began, begin = os.pipe()
    if os.fork() == 0:
        os.write(begin, b"!")
        sys.stdin.read()  # a child of a driver, which outlives it
        os._exit(0)
    os.read(began, 1)
print(epoch, flush=True)
sys.stdin.read()
"""


@contextmanager
def other_process(url: str, folder: Path, job: JobId, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """Lend a process that has the lease of a job, with epoch 1; it is killed at the end."""
    program = [sys.executable, "-c", HOLD, url, str(folder), job, how]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        yield other
        os.kill(other.pid, signal.SIGKILL)
        other.wait()


@pytest.fixture(params=["file", "clock"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"sqlite:///{tmp_path}/modelops.db"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.new_database()


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path: Path, url: str, how: str) -> None:
    folder = tmp_path / "leases"
    with closing(Records.open(url)) as records:
        job = new_job_id()
        records.create_job(job, b"")
        leases = leases_for(records, folder)
        with other_process(url, folder, job, how):
            assert leases.take(job, "me") is None
        assert leases.take(job, "me") == 2
        assert leases_for(records, folder).take(job, "third") is None
        leases.release(job)
        assert list(folder.iterdir()) == []


def test_on_another_machine_the_lease_of_a_killed_process_ends_by_the_clock(
    postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.new_database()
    with closing(Records.open(url)) as records:
        job = new_job_id()
        records.create_job(job, b"")
        with other_process(url, tmp_path / "here", job):
            pass
        assert ClockLeases(records, tmp_path / "there").take(job, "there") is None
        assert records.job(job).epoch == 1


def test_what_a_dead_process_held_before_another_machine_took_the_job_says_nothing(
    postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.new_database()
    with closing(Records.open(url)) as records:
        job = new_job_id()
        records.create_job(job, b"")
        with other_process(url, tmp_path / "here", job):
            pass
        there = ClockLeases(records, tmp_path / "there")
        with records.database.writing() as sql:  # as if its time had passed
            sql.exec_driver_sql("UPDATE leases SET expires_at = now()")
        assert there.take(job, "there") == 2
        here = ClockLeases(records, tmp_path / "here")
        assert here.take(job, "here") is None
        (tmp_path / "here" / f"{job}.epoch").write_bytes(b"half of")
        assert here.take(job, "here") is None
        assert there.renew() == []


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_wait(
    postgres: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with closing(Records.open(postgres.new_database())) as records:
        job = new_job_id()
        records.create_job(job, b"")
        leases = ClockLeases(records, tmp_path / "file" / "leases")
        caplog.set_level("INFO")
        assert leases.take(job, "me") == 1
        assert "if this process dies" in caplog.text
        assert leases.renew() == []
        leases.release(job)


def test_a_lease_that_is_not_renewed_ends_by_the_clock_of_the_database(
    postgres: Postgres, tmp_path: Path
) -> None:
    with closing(Records.open(postgres.new_database())) as records:
        job = new_job_id()
        records.create_job(job, b"")
        one, two = (ClockLeases(records, tmp_path / name, lease_s=LEASE_S) for name in ("one", "two"))
        assert one.take(job, "one") == 1
        epoch = None
        while epoch is None:  # it is not renewed
            epoch = two.take(job, "two")
        assert epoch == 2
        assert one.renew() == [job]
        assert one.renew() == []  # told once
        with pytest.raises(LeaseLostError):
            records.hold(job, 1)
        one.release(job)  # of another's lease nothing is released
        assert one.take(job, "one") is None or records.job(job).epoch == 3


def test_whether_a_lease_has_ended_is_judged_when_its_row_can_be_read_and_not_when_that_was_asked(
    postgres: Postgres, tmp_path: Path
) -> None:
    with closing(Records.open(postgres.new_database())) as records:
        job = new_job_id()
        records.create_job(job, b"")
        one, two = (ClockLeases(records, tmp_path / name) for name in ("one", "two"))
        assert one.take(job, "one") == 1
        got: list[int | None] = []
        taking = threading.Thread(target=lambda: got.append(two.take(job, "two")))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        here = f"{waiting} AND datname = current_database()"

        def waits() -> bool:
            with records.database.reading() as other:
                return bool(other.exec_driver_sql(here).scalar())

        with records.database.writing() as sql:
            hold(sql, job, 1)
            taking.start()
            while not waits():
                assert taking.is_alive()
            sql.exec_driver_sql("UPDATE leases SET expires_at = clock_timestamp()")
        taking.join()
        assert got == [2]


def test_a_lease_that_has_ended_and_that_nobody_took_can_be_renewed(
    postgres: Postgres, tmp_path: Path
) -> None:
    with closing(Records.open(postgres.new_database())) as records:
        job = new_job_id()
        records.create_job(job, b"")
        one = ClockLeases(records, tmp_path / "one", lease_s=0.0)
        two = ClockLeases(records, tmp_path / "two")
        assert one.take(job, "one") == 1
        assert one.renew() == []
        assert two.take(job, "two") == 2
        assert one.renew() == [job]
