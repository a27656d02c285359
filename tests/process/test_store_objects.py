"""Object storage: one contract over a folder and a real S3 service, and what only a folder can suffer."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from modelops.errors import IntegrityError, NotFoundError, RequestError, StorageError
from modelops.store import AlreadyExistsError, Objects
from modelops.store.objects import Content, FolderObjects

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from services import S3


@pytest.fixture(params=["folder", "memory", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "s3":
        service: S3 = request.getfixturevalue("s3")
        return Objects.open(f"{service.url}/{uuid4()}")
    return Objects.open(tmp_path / "objects" if request.param == "folder" else "memory:///")


def test_an_object_comes_back_as_it_was_stored(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a file")
    objects.put_new("v1/bytes", b"bytes")
    objects.put_new("v1/pieces", iter([b"pie", b"", b"ces"]))
    objects.put_new("v1/file", tmp_path / "file")
    objects.put_new("v1/empty", b"")
    assert [objects.get(f"v1/{n}") for n in ("bytes", "pieces", "file", "empty")] == [
        b"bytes",
        b"pieces",
        b"from a file",
        b"",
    ]
    assert b"".join(objects.stream("v1/pieces")) == b"pieces"


def test_a_name_that_exists_is_refused_and_keeps_its_bytes(objects: Objects) -> None:
    objects.put_new("a/b", b"first")
    with pytest.raises(AlreadyExistsError, match="a/b"):
        objects.put_new("a/b", b"second")
    assert objects.get("a/b") == b"first"


def test_of_sixteen_writers_of_one_name_exactly_one_wins(objects: Objects) -> None:
    won, start = [], threading.Barrier(16)

    def write(i: int) -> None:
        start.wait()
        try:
            objects.put_new("race", b"%d" % i * 1000)
        except AlreadyExistsError:
            return
        won.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1
    assert objects.get("race") == b"%d" % won[0] * 1000


def test_the_size_of_an_object_is_that_of_its_bytes(objects: Objects) -> None:
    objects.put_new("a/b", b"12345")
    objects.put_new("a/c", b"")
    assert (objects.size("a/b"), objects.size("a/c")) == (5, 0)
    for absent in ("a/d", "a"):
        with pytest.raises(NotFoundError, match=absent):
            objects.size(absent)


def test_what_is_stored_together_is_all_there_but_what_was_taken(objects: Objects) -> None:
    objects.put_new("x/taken", b"first")
    contents: dict[str, Content] = {"x/taken": b"second", "x/new": iter([b"pie", b"ces"]), "y/z/new": b"else"}
    assert objects.put_together(contents) == {"x/taken"}
    assert {name: objects.get(name) for name in contents} == {
        "x/taken": b"first", "x/new": b"pieces", "y/z/new": b"else",
    }  # fmt: skip
    objects.replace_together({"x/taken": b"third", "y/other": b"new"})
    assert (objects.get("x/taken"), objects.get("y/other")) == (b"third", b"new")


def test_put_replaces(objects: Objects) -> None:
    objects.put("results/a", b"one")
    objects.put("results/a", iter([b"t", b"wo"]))
    assert objects.get("results/a") == b"two"


def test_a_slice_is_exact_or_an_error(objects: Objects) -> None:
    objects.put_new("a", b"0123456789")
    assert objects.read("a", 3, 4) == b"3456"
    assert objects.read("a", 10, 0) == b""
    with pytest.raises(IntegrityError, match="too short"):
        objects.read("a", 8, 4)


def test_what_does_not_exist_is_named(objects: Objects) -> None:
    with pytest.raises(NotFoundError, match="no/such"):
        objects.get("no/such")
    with pytest.raises(NotFoundError, match="no/such"):
        objects.read("no/such", 0, 1)
    with pytest.raises(NotFoundError, match="no/such"):
        list(objects.stream("no/such"))
    assert not objects.exists("no/such")


def test_listing_is_sorted_and_stays_below_the_folder(objects: Objects) -> None:
    for name in ("a/b/2", "a/b/1", "a/bc", "d"):
        objects.put_new(name, b"")
    assert list(objects.list("a/b")) == ["a/b/1", "a/b/2"]
    assert list(objects.list("")) == ["a/b/1", "a/b/2", "a/bc", "d"]
    assert list(objects.list("nothing")) == []


def test_deleting_twice_is_no_error_and_frees_the_name(objects: Objects) -> None:
    objects.put_new("a", b"1")
    objects.delete("a")
    objects.delete("a")
    assert not objects.exists("a")
    objects.put_new("a", b"2")


@pytest.mark.parametrize("how", ["put_new", "put"])
@pytest.mark.parametrize("removed", ["a", "a/b/c"])
def test_a_folder_that_somebody_else_has_removed_is_made_again(
    tmp_path: Path, how: str, removed: str
) -> None:
    ours, others = Objects.open(tmp_path), Objects.open(tmp_path)
    getattr(ours, how)("a/b/c/1", b"one")
    others.remove_folder(removed)
    assert not (tmp_path / "a/b/c").exists()
    getattr(ours, how)("a/b/c/2", b"two")
    assert list(others.list("")) == ["a/b/c/2"]


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a//b", "a/../b", "a/.", "a\\b", "a\0", ".tmp/x"]
)
def test_a_name_that_could_lead_elsewhere_is_refused(objects: Objects, name: str) -> None:
    with pytest.raises(RequestError):
        objects.put_new(name, b"")


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    objects = Objects.open(tmp_path)

    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        objects.put_new("a/b", pieces())
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    objects.put_new("a/b", b"whole")


def test_files_are_on_disk_before_they_are_named_and_names_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects, synced, sync, link = Objects.open(tmp_path / "objects"), [], os.fsync, os.link

    def syncing(file: int) -> None:
        sync(file)
        synced.append(os.fstat(file).st_ino)

    def linking(source: Path, target: Path) -> None:
        assert source.stat().st_ino in synced, f"{target} is named before its bytes are on disk"
        link(source, target)
        if target.parent.stat().st_ino in synced:
            synced.remove(target.parent.stat().st_ino)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "link", linking)
    for names in (["a/b/one", "a/c/two"], ["a/b/three", "four"]):
        objects.put_together(dict.fromkeys(names, b"bytes"))
        for name in names:
            path = tmp_path / "objects" / name
            above = path.parents[: path.parents.index(tmp_path)]
            assert {path.stat().st_ino, *(folder.stat().st_ino for folder in above)} <= set(synced)
    assert not list((tmp_path / "objects" / ".tmp").iterdir())


@pytest.mark.parametrize("how", ["put_together", "replace_together"])
def test_objects_that_nobody_knows_of_are_on_disk_with_their_names_and_folders_when_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    objects, synced, sync = Objects.open(tmp_path / "objects"), [], os.fsync
    named: list[str] = []

    def syncing(file: int) -> None:
        named[:] = [name for name in objects.list("") if name.startswith("a/")]
        sync(file)
        synced.append(os.fstat(file).st_ino)

    monkeypatch.setattr(os, "fsync", syncing)
    names = ["a/b/one", "a/c/two", "a/three"]
    getattr(objects, how)(dict.fromkeys(names, b"bytes"), unknown=True)
    assert sorted(named) == sorted(names), "so that one wait for the disk is enough"
    for name in names:
        path = tmp_path / "objects" / name
        above = path.parents[: path.parents.index(tmp_path)]
        assert {path.stat().st_ino, *(folder.stat().st_ino for folder in above)} <= set(synced)
    assert not list((tmp_path / "objects" / ".tmp").iterdir())


@pytest.mark.parametrize("unknown", [False, True])
def test_a_file_that_cannot_be_synced_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: bool
) -> None:
    objects, sync = Objects.open(tmp_path), os.fsync

    def failing(file: int) -> None:
        if os.fstat(file).st_size == 3:
            raise OSError(errno.EIO, "no such luck")
        sync(file)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match="no such luck"):
        objects.put_together({"a": b"good", "b": b"bad", "c": b"good"}, unknown=unknown)
    assert list(objects.list("")) == []
    assert not list((tmp_path / ".tmp").iterdir())


def test_only_a_folder_has_local_paths(objects: Objects) -> None:
    objects.put_new("a/b", b"x")
    path = objects.local_path("a/b")
    assert path is None or path.read_bytes() == b"x"
    assert (path is None) == (not isinstance(objects, FolderObjects))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A volume of 1 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr!r}")
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_full_disk_is_named_and_the_next_write_that_fits_works(small_disk: Path) -> None:
    objects = Objects.open(small_disk)
    with pytest.raises(StorageError, match=rf"storing v1/big .*No space left.*volume {small_disk}"):
        objects.put_new("v1/big", b"x" * (2 << 20))
    assert list(objects.list("")) == []
    objects.put_new("v1/small", b"fits")
    assert objects.get("v1/small") == b"fits"


def test_a_disk_that_became_read_only_is_named(small_disk: Path) -> None:
    objects = Objects.open(small_disk)
    objects.put_new("v1/before", b"x")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match=rf"v1/after .*Read-only.*volume {small_disk}"):
        objects.put_new("v1/after", b"x")
    assert objects.get("v1/before") == b"x"


def test_without_its_bucket_a_service_says_of_no_object_that_it_is_gone(s3: S3) -> None:
    objects = Objects.open(f"s3://absent-{uuid4()}/a")
    for look in (
        lambda: objects.get("b"), lambda: objects.read("b", 0, 1), lambda: list(objects.stream("b")),
        lambda: objects.size("b"), lambda: objects.exists("b"), lambda: objects.delete("b"),
    ):  # fmt: skip
        with pytest.raises(StorageError, match=r"absent.* no such bucket"):
            look()
    for list_all in (objects.list, objects.sizes):
        with pytest.raises(StorageError, match="NoSuchBucket"):
            list_all("")


@contextlib.contextmanager
def _kept_out_of(folder: Path) -> Iterator[None]:
    """Let nobody look into a folder; root could all the same, so it is somebody else within the block."""
    user = os.geteuid()
    folder.chmod(0)
    try:
        os.seteuid(65534 if user == 0 else user)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


@pytest.mark.parametrize("folder", [".", "v1"])
def test_a_folder_that_may_not_be_looked_into_is_storage_that_is_away(tmp_path: Path, folder: str) -> None:
    objects = FolderObjects(tmp_path / "objects")
    (tmp_path / "file").write_bytes(b"x")
    objects.put_new("v1/a", b"a")
    with _kept_out_of(objects.root / folder):
        for act in (
            lambda: objects.exists("v1/a"), lambda: objects.get("v1/a"), lambda: objects.size("v1/a"),
            lambda: objects.sizes("v1"), lambda: objects.put_new("v1/b", b"b"), lambda: objects.put("v1/b", b"b"),
            lambda: objects.take_new("v1/b", tmp_path / "file", lambda: None), lambda: objects.delete("v1/a"),
        ):  # fmt: skip
            with pytest.raises(StorageError, match=r"v1.* denied .*volume .*allow writing"):
                act()
    assert objects.exists("v1/a")
    assert not objects.exists("v1/b")


def test_an_object_is_not_absent_because_the_volume_is(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path / "objects")
    objects.put_new("a", b"a")
    objects.root.rename(tmp_path / "elsewhere")
    objects.root.mkdir()  # what is left where a volume was mounted
    with pytest.raises(StorageError, match="is its volume mounted"):
        objects.exists("a")
