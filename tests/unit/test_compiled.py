"""What a process has compiled goes to the next one whole, or not at all."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.processes import compiled
from modelops.processes.compiled import FILE, Compiled


def process(tmp_path: Path, name: str) -> tuple[Compiled, Path]:
    folder = tmp_path / name
    folder.mkdir()
    one = Compiled(folder, str(tmp_path / "modules"))
    one.take()
    return one, folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


FIRST = {"numba/m_1/f.nbi": b"index", "numba/m_1/f.1.nbc": b"code", "matplotlib/fontlist-v3.json": b"{}"}


def test_the_next_process_begins_with_what_one_has_left(tmp_path: Path) -> None:
    one, folder = process(tmp_path, "one")
    write(folder, {**FIRST, "numba/m_1/notes.txt": b"of the model's", "fonts/fontlist": b"no"})
    (folder / "numba" / "link.nbc").symlink_to("/etc/passwd")
    one.leave()
    _, after = process(tmp_path, "two")
    assert contents(after) == FIRST
    assert [path.name for path in (tmp_path / "modules").iterdir()] == [FILE]


def test_who_has_more_is_kept_and_who_has_nothing_new_writes_nothing(tmp_path: Path) -> None:
    one, folder = process(tmp_path, "one")
    write(folder, FIRST)
    one.leave()
    (two, of_two), (three, of_three) = process(tmp_path, "two"), process(tmp_path, "three")
    write(of_two, {"numba/m_1/g.nbi": b"more"})
    two.leave()
    kept = (tmp_path / "modules" / FILE).stat()
    write(of_three, {"numba/m_1/f.nbi": b"changed, but nothing more"})
    three.leave()
    assert (tmp_path / "modules" / FILE).stat() == kept
    assert contents(process(tmp_path, "four")[1]) == {**FIRST, "numba/m_1/g.nbi": b"more"}


@given(data=st.data())
def test_a_damaged_file_counts_as_none_and_is_replaced(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("compiled")
    one, folder = process(tmp_path, "one")
    write(folder, FIRST)
    one.leave()
    file = tmp_path / "modules" / FILE
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut, changed = (
        whole[:at],
        whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :],
    )
    file.write_bytes(data.draw(st.sampled_from([cut, changed])))
    two, of_two = process(tmp_path, "two")
    assert contents(of_two) == {}
    write(of_two, FIRST)
    two.leave()
    assert file.read_bytes() == whole


def test_a_file_that_holds_something_else_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / FILE).write_bytes(compiled._encoded({"a.nbi": 1}))  # type: ignore[dict-item]
    assert contents(process(tmp_path, "one")[1]) == {}


@pytest.mark.parametrize("path", ["/etc/x.nbi", "../x.nbi", "a/../../x.nbi"])
def test_a_file_that_leads_out_of_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / FILE).write_bytes(compiled._encoded({"a.nbi": b"1", path: b"2"}))
    assert contents(process(tmp_path, "one")[1]) == {}
    assert not (tmp_path / "x.nbi").exists()


def test_too_much_is_not_kept(tmp_path: Path) -> None:
    one, folder = process(tmp_path, "one")
    write(folder, FIRST)
    with patch.object(compiled, "MAX_BYTES", 5):
        one.leave()
    assert contents(process(tmp_path, "two")[1]) == {}


def test_without_room_nothing_is_left_and_half_of_it_is_not_begun_with(tmp_path: Path) -> None:
    one, folder = process(tmp_path, "one")
    write(folder, FIRST)
    write_bytes = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if len(data) > 4:
            write_bytes(self, data[:2])
            raise OSError(28, "No space left on device")
        return write_bytes(self, data)

    with patch("os.replace", side_effect=OSError(28, "No space left on device")):
        one.leave()
    assert list((tmp_path / "modules").iterdir()) == []
    one.leave()
    with patch.object(Path, "write_bytes", full):
        assert contents(process(tmp_path, "two")[1]) == {}


def test_without_a_place_nothing_is_taken_or_left(tmp_path: Path) -> None:
    one = Compiled(tmp_path, None)
    one.take()
    write(tmp_path, FIRST)
    one.leave()
    assert contents(tmp_path) == FIRST
