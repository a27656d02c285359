"""Checkpoints in storage: the newest whole one or none, whatever was damaged, removed or cut short."""

from __future__ import annotations

import os
import tempfile
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_job import StoredJob

from modelops.errors import StorageError
from modelops.processes import StopSignal
from modelops.store import Objects
from modelops.store import checkpoint_folder as rules
from modelops.store.checkpoint_folder import CheckpointError, look_through
from modelops.store.checkpoints import (
    KEPT,
    Place,
    ReplicateCheckpoints,
    clear,
    remove_all,
    remove_settled,
)
from modelops.store.contents import JobContents
from modelops.store.objects import FolderObjects
from modelops.store.results import replicates_table
from modelops.store.segments import job_folder
from modelops.study.ids import attempt_id
from modelops.worker.desk import Desk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.store.objects import Content

FOLDER = "v1/jobs/j/checkpoints/7"


@pytest.fixture
def here() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def mine(objects: Objects, epoch: int = 1, number: int = 1) -> ReplicateCheckpoints:
    return ReplicateCheckpoints(objects, FOLDER, attempt_id(epoch, number))


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    clear(folder)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(objects: Objects) -> list[str]:
    return [name.removeprefix(f"{FOLDER}/") for name in objects.list(FOLDER)]


class Killed(BaseException):
    """Stands for SIGKILL."""


class Counting(FolderObjects):
    """Folder storage that writes down what is done to it, and is killed before the ``last``-th change."""

    def __init__(self, root: Path, last: int | None = None) -> None:
        super().__init__(root)
        self.changes: list[tuple[str, str]] = []
        self.last = last

    def _count(self, what: str, name: str) -> None:
        if self.last is not None and len(self.changes) >= self.last:
            raise Killed
        self.changes.append((what, name.removeprefix(f"{FOLDER}/")))

    def put_new(self, name: str, content: Content) -> None:
        self._count("put", name)
        super().put_new(name, content)

    def delete(self, name: str) -> None:
        self._count("delete", name)
        super().delete(name)


CONTENT = st.dictionaries(st.sampled_from(["a", "b", "deep/er/c"]), st.binary(max_size=9), max_size=3)
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda _: None,
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "zeros": lambda data: bytes(len(data)),
    "flipped": lambda data: bytes([data[0] ^ 1]) + data[1:] if data else b"x",
    "longer": lambda data: data + b"x",
}


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_whatever_is_damaged_the_newest_whole_checkpoint_comes_back_or_none(data: st.DataObject) -> None:
    objects = Objects.open("memory://")
    saved: dict[Place, tuple[dict[str, bytes], set[str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for epoch, number in data.draw(
            st.lists(st.tuples(st.integers(1, 2), st.integers(1, 12)), max_size=4, unique=True),
            label="attempts",
        ):
            checkpoints = mine(objects, epoch, number)
            for content in data.draw(st.lists(CONTENT, max_size=3), label="contents"):
                manifest = checkpoints.save(fill(Path(scratch, "source"), content))
                place = Place.of_manifest(manifest.name)
                assert place is not None
                saved[place] = content, manifest.names
        intact = set(names(objects))
        for name in data.draw(
            st.lists(st.sampled_from(sorted(intact)), unique=True) if intact else st.just([])
        ):
            whole = f"{FOLDER}/{name}"
            before = objects.get(whole)
            after = DAMAGE[data.draw(st.sampled_from(sorted(DAMAGE)))](before)
            if after == before:
                continue  # half of nothing
            intact.discard(name)
            objects.delete(whole)
            if after is not None:
                objects.put_new(whole, after)
        expected = max((p for p, (_, needed) in saved.items() if needed <= intact), default=None)
        target = fill(Path(scratch, "target"), {"left": b"over"})
        restored, damaged = mine(objects, 3, 1).restore(target)
        assert (restored.name if restored else None) == (expected.name if expected else None)
        assert files_of(target) == (saved[expected][0] if expected else {})
        newer = [
            n for n in names(objects) if (p := Place.of_manifest(n)) and (expected is None or p > expected)
        ]
        assert len(damaged) == len(newer)
        assert all(any(n in text for text in damaged) for n in newer)


def test_killed_before_any_change_of_storage_a_whole_checkpoint_is_found(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the machine stays up, and there are hundreds
    first = {"a": b"1", "b": b"same", "c/d": b""}
    contents = [first, {**first, "a": b"2"}, {**first, "a": b"3", "new": b"n"}, {**first, "a": b"4"}]
    for last in count():
        objects = Counting(here / str(last), last)
        done: list[dict[str, bytes]] = [{}]
        try:
            for number in (1, 2):
                checkpoints = mine(objects, 1, number)
                if number == 2:
                    checkpoints.restore(here / "work")
                for content in contents:
                    fill(here / "work", content)
                    checkpoints.save(here / "work")
                    done.append(content)
        except Killed:
            mine(FolderObjects(here / str(last)), 1, 9).restore(here / "work")
            # It is the last one that was whole; or the next, which was whole when it was killed cleaning up.
            following = contents[(len(done) - 1) % len(contents)]
            assert files_of(here / "work") in (done[-1], following)
            manifests = [c for c in objects.changes if c[0] == "put" and c[1].endswith("manifest")]
            assert (files_of(here / "work") == following) == (len(manifests) == len(done)) or done[
                -1
            ] == following
        else:
            assert last > 20
            break


def test_what_did_not_change_is_not_stored_again_and_two_checkpoints_are_kept(here: Path) -> None:
    objects = Counting(here / "objects")
    checkpoints = mine(objects)
    for n in range(1, 6):
        fill(here / "work", {"large": b"the same", "twin": b"the same", "state": b"%d" % n})
        checkpoints.save(here / "work")
        put = [
            name for what, name in objects.changes if what == "put" and name.startswith(f"0001-000001/{n}/")
        ]
        assert len(put) == (3 if n == 1 else 2)
        assert put[-1] == f"0001-000001/{n}/manifest"
        objects.changes.clear()
    manifests = [name for name in names(objects) if name.endswith("manifest")]
    assert manifests == ["0001-000001/4/manifest", "0001-000001/5/manifest"]
    assert len(names(objects)) == KEPT + KEPT + 1  # manifests, states, and the bytes of the first one


def test_an_attempt_that_was_given_up_and_goes_on_harms_nobody(here: Path) -> None:
    objects = FolderObjects(here / "objects")
    old, new = mine(objects, 1, 1), mine(objects, 1, 2)
    old.save(fill(here / "old", {"state": b"1"}))
    assert new.restore(here / "new")[1] == []
    assert files_of(here / "new") == {"state": b"1"}
    for n in range(2, 6):
        old.save(fill(here / "old", {"state": b"%d of the old one" % n}))
    new.save(fill(here / "new", {"state": b"2"}))
    old.save(fill(here / "old", {"state": b"6 of the old one"}))
    assert mine(objects, 2, 1).restore(here / "next")[1] == []
    assert files_of(here / "next") == {"state": b"2"}


def test_a_checkpoint_stands_on_its_own_when_an_earlier_attempt_removes_what_was_the_same(here: Path) -> None:
    objects = FolderObjects(here / "objects")
    old, new = mine(objects, 1, 1), mine(objects, 1, 2)
    old.save(fill(here / "old", {"state": b"the same"}))
    assert new.restore(here / "new")[1] == []
    new.save(here / "new")
    for n in range(2, 5):
        old.save(fill(here / "old", {"state": b"%d of the old one" % n}))
    restored, damaged = mine(objects, 2, 1).restore(here / "next")
    assert restored is not None
    assert (restored.name, damaged) == ("0001-000002/1/manifest", [])
    assert files_of(here / "next") == {"state": b"the same"}


def test_an_attempt_that_begins_late_removes_nothing_of_a_younger_one(here: Path) -> None:
    objects = FolderObjects(here / "objects")
    old, new = mine(objects, 1, 1), mine(objects, 1, 2)
    for n in (1, 2, 3):
        new.save(fill(here / "new", {"state": b"%d" % n}))
    before = set(names(objects))
    old.restore(here / "old")
    for n in (4, 5, 6):
        old.save(fill(here / "old", {"state": b"%d of the old one" % n}))
    assert before <= set(names(objects))
    mine(objects, 2, 1).restore(here / "next")
    assert files_of(here / "next") == {"state": b"3"}


def test_the_millionth_attempt_is_younger_than_those_before_it(here: Path) -> None:
    objects = FolderObjects(here / "objects")
    for number in (1_000_000, 999_999):
        mine(objects, 1, number).save(fill(here / "work", {"state": b"%d" % number}))
    restored, _ = mine(objects, 1, 1_000_001).restore(here / "next")
    assert restored is not None
    assert files_of(here / "next") == {"state": b"1000000"}


def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_the_newer_one(here: Path) -> None:
    class Racing(FolderObjects):
        def get(self, name: str) -> bytes:
            if name.endswith("/1/manifest"):
                for n in range(2, 5):
                    old.save(fill(here / "old", {"state": b"%d" % n}))
            return super().get(name)

    old = mine(FolderObjects(here / "objects"))
    old.save(fill(here / "old", {"state": b"1"}))
    _, damaged = mine(Racing(here / "objects"), 1, 2).restore(here / "new")
    assert files_of(here / "new") == {"state": b"4"}
    assert damaged == []


def test_an_attempt_that_dask_begins_twice_overwrites_nothing(here: Path) -> None:
    objects = FolderObjects(here / "objects")
    for text in (b"first", b"second"):
        mine(objects).save(fill(here / "work", {"state": text}))
    assert [n for n in names(objects) if n.endswith("manifest")] == [
        "0001-000001/1/manifest",
        "0001-000001/2/manifest",
    ]
    mine(objects, 2, 1).restore(here / "work")
    assert files_of(here / "work") == {"state": b"second"}


def test_a_lost_answer_is_no_reason_to_fail(here: Path) -> None:
    class Forgetful(FolderObjects):
        def put_new(self, name: str, content: Content) -> None:
            super().put_new(name, content)
            if name not in seen:
                seen.add(name)
                raise StorageError("the connection was cut")

    def patiently(do: Callable[[], object]) -> object:
        while True:
            try:
                return do()
            except StorageError:
                continue

    seen: set[str] = set()
    checkpoints = ReplicateCheckpoints(Forgetful(here / "objects"), FOLDER, attempt_id(1, 1), patiently)
    for text in (b"1", b"2"):
        assert checkpoints.save(fill(here / "work", {"state": text})).name.split("/")[1] == text.decode()


def test_folders_modes_times_and_links_come_back(here: Path) -> None:
    objects, work = FolderObjects(here / "objects"), here / "work"
    fill(work, {"epochs/3.npz": b"three", "run.sh": b"#!"})
    (work / "empty").mkdir()
    (work / "run.sh").chmod(0o750)
    (work / "epochs").chmod(0o500)
    os.utime(work / "epochs/3.npz", ns=(1, 1_234_567_890_123_456_789))
    (work / "latest").symlink_to("epochs/3.npz")
    (work / "empty/up").symlink_to("../run.sh")
    mine(objects).save(work)
    mine(objects, 1, 2).restore(here / "new")
    assert look_through(here / "new") == look_through(work)
    assert (here / "new/latest").read_bytes() == b"three"
    clear(work)
    assert list(work.iterdir()) == []


def test_what_cannot_be_kept_is_refused_with_its_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_ENTRIES", 3)
    monkeypatch.setattr(rules, "MAX_BYTES", 10)
    objects = Counting(here / "objects")

    def refused() -> str:
        with pytest.raises(CheckpointError) as e:
            mine(objects).save(here / "work")
        return str(e.value)

    fill(here / "work", {"a": b"12345678901"})
    assert "more than 0 GiB" in refused()
    fill(here / "work", {"a/b/c/d": b""})
    assert "more than 3 files and folders" in refused()
    fill(here / "work", {})
    os.mkfifo(here / "work/pipe")
    assert "'pipe'" in refused()
    for target in ("/etc/passwd", "..", "../7/x", "a/../../x"):
        fill(here / "work", {})
        (here / "work/link").symlink_to(target)
        assert "'link'" in refused()
    fill(here / "work", {})
    os.close(os.open(os.fsencode(here / "work") + b"/\xff", os.O_CREAT))
    assert "UTF-8" in refused()
    assert objects.changes == []


def test_a_checkpoint_of_a_later_format_is_passed_over_and_says_so(here: Path) -> None:
    objects = FolderObjects(here / "objects")
    mine(objects).save(fill(here / "work", {"state": b"1"}))
    name = f"{FOLDER}/0001-000001/1/manifest"
    body = objects.get(name).split(b"\n")[0].replace(b'"format":1', b'"format":2')
    objects.put(name, body + b"\n" + __import__("hashlib").sha256(body).hexdigest().encode() + b"\n")
    restored, damaged = mine(objects, 1, 2).restore(here / "work")
    assert restored is None
    assert "its format is 2" in damaged[0]
    assert "upgrade" in damaged[0]


def test_a_large_file_is_stored_in_pieces_and_only_those_that_changed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "PIECE_BYTES", 4)
    objects = Counting(here / "objects")
    checkpoints = mine(objects)
    checkpoints.save(fill(here / "work", {"a": b"aaaabbbbcccc"}))
    checkpoints.save(fill(here / "work", {"a": b"aaaaBBBBccccdd"}))
    assert [what for what, name in objects.changes if "/2/" in name] == ["put"] * 3
    mine(objects, 1, 2).restore(here / "new")
    assert files_of(here / "new") == {"a": b"aaaaBBBBccccdd"}


def test_removing_a_folder_leaves_no_empty_ones_and_others_can_store_again(here: Path) -> None:
    one, other = FolderObjects(here / "objects"), FolderObjects(here / "objects")
    mine(one).save(fill(here / "work", {"state": b"1"}))
    other.remove_folder("v1/jobs/j/checkpoints")
    assert not (here / "objects/v1/jobs/j/checkpoints").exists()
    mine(one, 1, 2).save(here / "work")
    assert len(names(one)) == 2


def test_only_checkpoints_of_what_succeeded_are_of_no_use_and_each_first_one_is_told(here: Path) -> None:
    objects, first = FolderObjects(here / "objects"), list[int]()
    desk = Desk(
        objects, lambda k: f"checkpoints/{k}", attempt_id(1, 1), here / "work", may_resume=False,
        stop=StopSignal(), on_first=first.append,
    )  # fmt: skip
    for index, succeeds in enumerate((True, False, True)):
        desk.restore(index)
        for _ in range(2):
            desk.keep(index)
        desk.ended(succeeded=succeeds)
    desk.restore(3)
    desk.ended(succeeded=True)  # it has kept none
    assert first == [0, 1, 2]
    assert desk.settled == ["checkpoints/0", "checkpoints/2"]


def test_at_the_end_of_a_job_checkpoints_of_what_failed_are_left_for_another_try(here: Path) -> None:
    job = StoredJob(here, [{"a": 1, "bad": True}], 12)
    job.run()
    status = replicates_table(JobContents.of(job.objects, job.records, job.job))["status"].to_pylist()
    assert {"succeeded", "failed"} <= set(status)
    folder = f"{job_folder(job.job)}/checkpoints"
    for index in range(12):
        job.objects.put_new(f"{folder}/{index}/0001-000001/1/manifest", b"x")
    remove_settled(JobContents.of(job.objects, job.records, job.job))
    left = {int(name.removeprefix(f"{folder}/").split("/")[0]) for name in job.objects.list(folder)}
    assert left == {index for index, one in enumerate(status) if one != "succeeded"}
    remove_all(job.objects, job.job)
    assert list(job.objects.list(folder)) == []
