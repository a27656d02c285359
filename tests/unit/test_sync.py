"""Copying a job's files: whole and verified or not at all, and only what is new."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modelops.client.status import JobFile, JobFiles
from modelops.client.sync import LIST, Synced, refuse_own_folder, sync_files
from modelops.errors import IntegrityError, RequestError, StorageError
from modelops.home import Home
from modelops.study.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Iterator

JOB = JobId("job_" + "0" * 32)


class Files:
    """A source that has files; what is asked of it is recorded. ``broken``: sends other bytes, so many times."""

    def __init__(self, **contents: bytes) -> None:
        self.contents = {name.replace("__", "/"): content for name, content in contents.items()}
        self.final = False
        self.asked: list[str] = []
        self.broken: dict[str, int] = {}

    def files(self, job: JobId) -> JobFiles:
        assert job
        listed = [JobFile(n, len(c), sha256(c).hexdigest()) for n, c in self.contents.items()]
        return JobFiles(tuple(listed), self.final)

    def pieces(self, job: JobId, file: JobFile, offset: int = 0) -> Iterator[bytes]:
        assert job
        self.asked.append(file.name)
        content = self.contents[file.name]
        if self.broken.get(file.name, 0):
            self.broken[file.name] -= 1
            content = content[:-1] + b"?"
        yield content[:3]
        yield content[3:]


def sync(files: Files, folder: Path, job: JobId = JOB, **options: Any) -> Any:
    return sync_files(files, job, folder, **options)  # type: ignore[arg-type]  # it needs no more of a source


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found.pop(LIST, None)
    return found


def test_the_second_time_only_what_is_new_is_copied(tmp_path: Path) -> None:
    files = Files(segments__a=b"aaaaa", segments__b=b"bbbbb")
    first = sync(files, tmp_path / "to")
    assert (first.copied, first.unchanged, first.final) == (("segments/a", "segments/b"), (), False)
    files.contents["results/r.parquet"] = b"rows"
    files.final, files.asked = True, []
    second = sync(files, tmp_path / "to")
    assert (second.copied, second.final, second.n_bytes) == (("results/r.parquet",), True, 4)
    assert files.asked == ["results/r.parquet"]
    assert contents(tmp_path / "to") == files.contents


def test_copies_one_after_another_add_up(tmp_path: Path) -> None:
    """As ``jobs sync --follow --json`` tells them."""
    source: Any = Files(a=b"1", b=b"22")
    sync_files(source, JOB, tmp_path)  # by an earlier command
    source.contents |= {"c": b"333", "d": b"4444"}
    whole = sync_files(source, JOB, tmp_path)
    del source.contents["c"], source.contents["a"]
    source.contents["e"] = b"55555"
    whole = whole.then(sync_files(source, JOB, tmp_path))
    source.final = True
    whole = whole.then(sync_files(source, JOB, tmp_path))
    assert whole == Synced(tmp_path, ("d", "e"), ("b",), ("a", "c"), 12, final=True)


@pytest.mark.parametrize(
    "name", ["", "objects", "objects/v1/jobs", "cache", "cache/envs", "state", "x/../cache", "link"]
)
def test_a_folder_in_which_modelops_keeps_its_own_files_is_refused(tmp_path: Path, name: str) -> None:
    home = Home.at(tmp_path / "home")
    home.objects.mkdir(parents=True)
    (home.data / "link").symlink_to(home.objects)
    with pytest.raises(RequestError, match=r"belongs to ModelOps itself, .* name a folder of your own"):
        refuse_own_folder(home, home.data / name)


def test_a_storage_elsewhere_is_refused_and_a_folder_of_one_s_own_is_not(tmp_path: Path) -> None:
    home = replace(Home.at(tmp_path / "home"), objects_at=str(tmp_path / "storage"))
    with pytest.raises(RequestError, match="keeps the storage there"):
        refuse_own_folder(home, tmp_path / "storage" / "x")
    for free in (tmp_path, tmp_path / "out", home.data / "results"):
        refuse_own_folder(home, free)
    refuse_own_folder(replace(home, objects_at="s3://bucket/folder"), tmp_path / "s3:")


def test_a_file_that_was_damaged_here_is_copied_again(tmp_path: Path) -> None:
    files = Files(segments__a=b"aaaaa", segments__b=b"bbbbb")
    sync(files, tmp_path)
    (tmp_path / "segments" / "a").write_bytes(b"aaaaX")
    (tmp_path / "segments" / "b").write_bytes(b"bb")
    assert sync(files, tmp_path).copied == ("segments/a", "segments/b")
    assert contents(tmp_path) == files.contents


def test_bytes_with_another_digest_never_appear(tmp_path: Path) -> None:
    files = Files(segments__a=b"aaaaa", segments__b=b"bbbbb")
    files.broken["segments/b"] = 100
    with pytest.raises(IntegrityError, match="segments/b"):
        sync(files, tmp_path)
    assert contents(tmp_path) == {"segments/a": b"aaaaa"}
    files.broken["segments/b"] = 1  # once is bad luck
    assert sync(files, tmp_path).copied == ("segments/b",)
    assert contents(tmp_path) == files.contents


@pytest.mark.parametrize("nameless", [True, False], ids=["O_TMPFILE", "hidden name"])
def test_nothing_is_left_of_a_copy_that_is_cut_off(
    tmp_path: Path, nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:
        real = os.open

        def refusing(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not here")
            return real(path, flags, *more, **named)

        monkeypatch.setattr(os, "open", refusing)
    files = Files(segments__a=b"aaaaa")

    def cut(*_: object) -> Iterator[bytes]:
        yield b"aa"
        assert not any(b"aa" in content for content in contents(tmp_path).values()) or not nameless
        raise KeyboardInterrupt

    whole, files.pieces = files.pieces, cut  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        sync(files, tmp_path)
    assert contents(tmp_path) == {}
    files.pieces = whole  # type: ignore[method-assign]
    assert sync(files, tmp_path).copied == ("segments/a",)
    assert contents(tmp_path) == files.contents


def test_what_no_longer_belongs_to_the_job_goes_and_what_is_the_users_stays(tmp_path: Path) -> None:
    files = Files(segments__a=b"aaaaa", segments__b=b"bbbbb")
    sync(files, tmp_path)
    (tmp_path / "segments" / "mine").write_bytes(b"notes")
    del files.contents["segments/a"]  # repaired: it counts for nothing now
    assert sync(files, tmp_path).removed == ("segments/a",)
    assert contents(tmp_path) == {"segments/b": b"bbbbb", "segments/mine": b"notes"}


def test_the_files_of_two_jobs_are_never_mixed(tmp_path: Path) -> None:
    sync(Files(segments__a=b"aaaaa"), tmp_path)
    with pytest.raises(RequestError, match="holds the files of job job_0000"):
        sync(Files(segments__a=b"other"), tmp_path, JobId("job_" + "1" * 32))
    assert contents(tmp_path) == {"segments/a": b"aaaaa"}


def test_a_copy_that_was_cut_off_is_known_by_the_next(tmp_path: Path) -> None:
    files = Files(segments__a=b"aaaaa", segments__b=b"bbbbb")
    files.broken["segments/b"] = 100
    with pytest.raises(IntegrityError):
        sync(files, tmp_path)
    with pytest.raises(RequestError, match="holds the files of job job_0000"):
        sync(Files(segments__c=b"ccccc"), tmp_path, JobId("job_" + "1" * 32))
    del files.contents["segments/a"]  # repaired meanwhile: it counts for nothing now
    files.broken.clear()
    assert sync(files, tmp_path).removed == ("segments/a",)
    assert contents(tmp_path) == files.contents


@pytest.mark.parametrize("when", ["files", "pieces"])
def test_of_copies_of_two_jobs_that_begin_at_once_one_is_refused(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Files(segments__a=b"aaaaa"), Files(segments__b=b"bbbbb")
    asked, other = getattr(ours, when), JobId("job_" + "1" * 32)

    def meanwhile(*given: Any) -> Any:
        monkeypatch.undo()
        sync(theirs, tmp_path, other)
        return asked(*given)

    monkeypatch.setattr(ours, when, meanwhile)
    with pytest.raises(RequestError, match="holds the files of job job_"):
        sync(ours, tmp_path)
    assert contents(tmp_path) == (theirs.contents if when == "files" else {})


def test_what_another_copy_has_taken_away_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(segments__a=b"aaaaa", segments__b=b"bbbbb")
    sync(files, tmp_path)
    del files.contents["segments/a"]
    unlink = Path.unlink

    def second(path: Path, **how: Any) -> None:
        if path.name == "a":
            unlink(path)
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", second)
    assert sync(files, tmp_path).removed == ("segments/a",)


def test_a_file_where_a_folder_of_the_job_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "segments").write_text("mine")
    with pytest.raises(RequestError, match="is no folder to copy to, and cannot be made") as refused:
        sync(Files(segments__a=b"aaaaa"), tmp_path)
    assert str(tmp_path / "segments") in str(refused.value)
    assert contents(tmp_path) == {"segments": b"mine"}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..", "a\\b"])
def test_a_server_cannot_write_outside_the_folder(tmp_path: Path, name: str) -> None:
    files = Files()
    files.contents = {name: b"evil"}
    with pytest.raises(RequestError, match="does not stay in the folder"):
        sync(files, tmp_path / "to")
    assert contents(tmp_path) == {}


def test_a_folder_where_a_file_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "segments" / "a").mkdir(parents=True)
    with pytest.raises(RequestError, match="is a folder, where a file of the job belongs") as refused:
        sync(Files(segments__a=b"aaaaa"), tmp_path)
    assert str(tmp_path / "segments" / "a") in str(refused.value)


@pytest.mark.parametrize("path", ["file", "file/to", "/dev/null/to", "/proc/no/such"])
def test_what_cannot_be_a_folder_is_a_wrong_request_that_names_it(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is no folder to copy to") as refused:
        sync(Files(segments__a=b"aaaaa"), tmp_path / path)
    assert path in str(refused.value)
    assert "space" not in str(refused.value)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some of your space"), (errno.EROFS, "mounted"),
        (errno.EACCES, "chmod"), (errno.EPERM, "chmod"), (errno.EIO, "; name another folder"),
    ],
)  # fmt: skip
def test_the_advice_fits_what_the_system_said(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="cannot be written") as refused:
        sync(Files(segments__a=b"aaaaa"), tmp_path / "to")
    assert advice in str(refused.value)
    assert ("space" in str(refused.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
