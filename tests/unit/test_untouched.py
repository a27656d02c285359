"""A large output is stored without reading it again only while nobody can have changed it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from modelops.errors import IntegrityError
from modelops.rpc import spool_file
from modelops.states import ReplicateStatus
from modelops.store import Objects, SegmentWriter, SpooledFile, segment_body
from modelops.store.untouched import is_untouched
from modelops.study.ids import AttemptId, JobId
from modelops_runner.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = bytes(range(256)) * 4_000


@pytest.fixture
def file(tmp_path: Path) -> SpooledFile:
    """Return what a runner's spool tells of a large output."""
    (tmp_path / "spool").mkdir()
    kind, text = Spool(str(tmp_path / "spool"), 65_536).output(DATA)
    told = spool_file(msgspec.Raw(text.encode()))
    assert told is not None
    assert kind == "bytes"
    assert told.stamp
    return SpooledFile(Path(told.path), told.bytes, told.sha256, told.stamp)


def store(folder: Path, file: SpooledFile) -> bytes:
    objects = Objects.open(folder / "objects")
    writer = SegmentWriter(objects, JobId("job_1"), AttemptId("att_1"))
    writer.add(0, ReplicateStatus.SUCCEEDED, True, [("a", "bytes", file)])
    try:
        ref = writer.finish()
    except IntegrityError:
        assert list(objects.list("")) == []
        raise
    assert ref is not None
    return objects.get(f"v1/jobs/job_1/{ref.pack}")


def test_the_bytes_of_a_file_that_nobody_touched_are_not_read_again(
    file: SpooledFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with file.path.open("rb") as there:
        if not is_untouched(there.fileno(), file.n_bytes, file.stamp or (0, 0)):
            pytest.skip("this file system gives no leases")
    monkeypatch.setattr(segment_body, "file_digest", None)
    assert store(tmp_path, file) == DATA


def overwrite(path: Path) -> None:
    with path.open("r+b") as there:
        there.write(b"!")


def overwrite_and_put_the_time_back(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def overwrite_in_memory(path: Path) -> None:
    with path.open("r+b") as there, mmap.mmap(there.fileno(), 0) as mapped:
        mapped[0:1] = b"!"


def put_another_in_its_place(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"!" + DATA[1:])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    "change",
    [overwrite, overwrite_and_put_the_time_back, overwrite_in_memory, put_another_in_its_place],
    ids=lambda change: change.__name__,
)
def test_a_file_that_was_changed_since_the_runner_finished_it_is_refused(
    file: SpooledFile, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    change(file.path)
    with pytest.raises(IntegrityError, match="not what the runner said"):
        store(tmp_path, file)


def test_a_file_that_somebody_has_open_for_writing_or_mapped_is_read(
    file: SpooledFile, tmp_path: Path
) -> None:
    stamp = file.stamp or (0, 0)
    with file.path.open("rb") as there:
        with file.path.open("r+b") as writer:
            assert not is_untouched(there.fileno(), file.n_bytes, stamp)
            mapped = mmap.mmap(writer.fileno(), 0)
        assert not is_untouched(there.fileno(), file.n_bytes, stamp)
        mapped.close()
    assert store(tmp_path, file) == DATA


def test_the_spool_gives_no_stamp_to_a_file_that_somebody_wrote_to_through_its_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    astray = [b"?"]

    def writing(fd: int, data: bytes) -> int:
        if astray:  # by C code that uses the number of a file it has closed
            write(fd, astray.pop())
        return write(fd, data)

    monkeypatch.setattr(os, "write", writing)
    _, text = Spool(str(tmp_path), 65_536).output(DATA)
    monkeypatch.undo()
    told = spool_file(msgspec.Raw(text.encode()))
    assert told is not None
    assert told.stamp is msgspec.UNSET
    with pytest.raises(IntegrityError, match="not what the runner said"):
        store(tmp_path, SpooledFile(Path(told.path), told.bytes, told.sha256))
