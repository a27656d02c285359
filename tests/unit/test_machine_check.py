"""What `modelops doctor` reads of a machine, from texts."""

from __future__ import annotations

import errno
import sqlite3
from contextlib import closing
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from modelops.checks import CheckStatus
from modelops.client import machine_check
from modelops.client.machine_check import clock, database, file_system, folder_check, index, mount_of
from modelops.home import Home
from modelops.store import Records
from modelops.store.schema import HEAD, REVISIONS

if TYPE_CHECKING:
    from pathlib import Path

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/export /shared nfs4 rw 0 0
tmpfs /shared/fast tmpfs rw 0 0
/dev/sdb /with\\040space xfs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/me", ("/", "ext4")),
        ("/shared/me", ("/shared", "nfs4")),
        ("/shared", ("/shared", "nfs4")),
        ("/shared/fast/x", ("/shared/fast", "tmpfs")),
        ("/sharedother", ("/", "ext4")),
        ("/with space/x", ("/with space", "xfs")),
    ],
)
def test_the_mount_of_a_path_is_the_longest_one_above_it(path: str, expected: tuple[str, str]) -> None:
    from pathlib import Path

    assert mount_of(Path(path), MOUNTS) == expected


def test_a_database_on_a_network_file_system_is_refused_with_the_setting_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_check, "mount_of", lambda _path: ("/shared", "nfs4"))
    check = file_system(Home.at(tmp_path))
    assert check.status is CheckStatus.FAILED
    assert "/shared" in check.message
    assert "MODELOPS_HOME" in check.advice


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = folder_check("data folder", tmp_path / "file" / "home")
    assert check.status is CheckStatus.FAILED
    assert str(tmp_path / "file" / "home") in check.message
    assert "MODELOPS_HOME" in check.advice


def test_a_folder_that_works_names_its_volume_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    check = folder_check("data folder", tmp_path / "home")
    assert check.status in (CheckStatus.OK, CheckStatus.WARNING)  # a full disk is a warning
    assert check.details["volume"].startswith("/")
    assert list((tmp_path / "home").iterdir()) == []


def test_an_index_that_does_not_answer_is_only_a_warning() -> None:
    check = index({"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple"})  # the discard port: nobody listens
    assert check.status is CheckStatus.WARNING
    assert "127.0.0.1" in check.message


def test_the_words_of_an_index_do_not_show_its_password() -> None:
    check = index({"UV_DEFAULT_INDEX": "http://me:secret@127.0.0.1:9/simple"})
    assert "secret" not in check.message


def test_an_impossible_clock_is_a_failure(tmp_path: Path) -> None:
    check = clock(Home.at(tmp_path), now=86_400.0)
    assert check.status is CheckStatus.FAILED
    assert "1970" in check.message


@pytest.mark.parametrize(("free", "status"), [(60 << 10, "FAILED"), (500 << 20, "warning"), (9 << 30, "ok")])
def test_a_volume_on_which_nothing_fits_is_a_failure(
    free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=free))
    check = folder_check("cache folder", tmp_path)
    assert check.status == status
    assert status == "ok" or "larger volume" in check.advice


def test_a_full_volume_is_not_called_one_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    check = folder_check("cache folder", tmp_path)
    assert check.status is CheckStatus.FAILED
    assert "free some space" in check.advice


def test_a_newer_database_is_a_fault_with_what_to_do_and_an_older_one_is_left_as_it_is(
    tmp_path: Path,
) -> None:
    home = Home.at(tmp_path)
    assert database(home).details["revision"] is None
    assert list(tmp_path.iterdir()) == [], "looking makes no database"
    Records.open(home.database_url).close()
    assert (database(home).status, database(home).details["revision"]) == (CheckStatus.OK, HEAD)
    for revision, status in (("9999", CheckStatus.FAILED), (REVISIONS[0], CheckStatus.OK)):
        with closing(sqlite3.connect(tmp_path / "modelops.db")) as raw, raw:
            raw.execute("UPDATE alembic_version SET version_num = ?", [revision])
        check = database(home)
        assert check.status is status
        assert revision in check.message
        if status is CheckStatus.FAILED:
            assert "newer ModelOps" in check.message
            assert "upgrade modelops" in check.advice
        with closing(sqlite3.connect(tmp_path / "modelops.db")) as raw:
            assert raw.execute("SELECT version_num FROM alembic_version").fetchall() == [(revision,)]
