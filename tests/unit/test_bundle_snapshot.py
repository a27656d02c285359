"""A snapshot is whole, read-only, made once, and changes to it are seen."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelops.bundles import bundle_digest, snapshot_changed, take_snapshot
from modelops.bundles import snapshot as snapshot_module
from modelops.bundles.snapshot import check_snapshot, drop_snapshot
from modelops.errors import BundleError, IntegrityError

if TYPE_CHECKING:
    from modelops.bundles.digest import Entry
    from modelops.bundles.files import Found


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "src").mkdir(parents=True)
    (folder / "model.py").write_text("x = 1\n")
    (folder / "src" / "tool.sh").write_text("#!/bin/sh\n")
    (folder / "src" / "tool.sh").chmod(0o755)
    (folder / "link.py").symlink_to("model.py")
    return folder


def names(cache: Path) -> set[str]:
    return {p.name for p in cache.iterdir() if p.is_dir()}


def test_a_snapshot_is_the_bundle_read_only_under_its_digest(bundle: Path, tmp_path: Path) -> None:
    digest, place = take_snapshot(bundle, tmp_path / "cache")
    assert place == tmp_path / "cache" / digest
    assert digest == bundle_digest(bundle) == bundle_digest(place)
    assert stat.S_IMODE((place / "model.py").stat().st_mode) == 0o444
    assert stat.S_IMODE((place / "src" / "tool.sh").stat().st_mode) == 0o555
    assert stat.S_IMODE((place / "src").stat().st_mode) == 0o555
    assert (place / "link.py").readlink() == Path("model.py")
    assert snapshot_changed(place) == []
    check_snapshot(place)


def test_a_single_file_becomes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "coin.py").write_text("pass\n")
    _, place = take_snapshot(tmp_path / "coin.py", tmp_path / "cache")
    assert [p.name for p in place.iterdir()] == ["coin.py"]


def test_the_job_keeps_its_version_when_the_author_edits_on(bundle: Path, tmp_path: Path) -> None:
    _, first = take_snapshot(bundle, tmp_path / "cache")
    (bundle / "model.py").write_text("x = 2\n")
    _, second = take_snapshot(bundle, tmp_path / "cache")
    assert first != second
    assert (first / "model.py").read_text() == "x = 1\n"


def test_many_who_ask_at_once_get_one_snapshot(bundle: Path, tmp_path: Path) -> None:
    cache, start = tmp_path / "cache", threading.Barrier(16)

    def ask() -> Path:
        start.wait()
        return take_snapshot(bundle, cache)[1]

    with ThreadPoolExecutor(16) as pool:
        places = {f.result() for f in [pool.submit(ask) for _ in range(16)]}
    assert len(places) == 1
    assert names(cache) == {places.pop().name}


def test_asking_again_copies_nothing(bundle: Path, tmp_path: Path) -> None:
    _, place = take_snapshot(bundle, tmp_path / "cache")
    before = (place / "model.py").stat().st_ino
    take_snapshot(bundle, tmp_path / "cache")
    assert (place / "model.py").stat().st_ino == before


def test_every_kind_of_change_is_named(bundle: Path, tmp_path: Path) -> None:
    _, place = take_snapshot(bundle, tmp_path / "cache")
    for folder in (place, place / "src"):
        folder.chmod(0o755)
    (place / "model.py").chmod(0o644)
    (place / "model.py").write_text("x = 2\n")  # the same size
    (place / "src" / "tool.sh").unlink()
    (place / "new.txt").touch()
    (place / "link.py").unlink()
    (place / "link.py").symlink_to("src")
    (place / "__pycache__").mkdir()
    (place / "__pycache__" / "model.cpython-311.pyc").touch()
    assert snapshot_changed(place) == [
        "added: new.txt",
        "changed: link.py",
        "changed: model.py",
        "missing: src/tool.sh",
    ]
    with pytest.raises(IntegrityError, match=r"changed: model\.py"):
        check_snapshot(place)


def test_a_damaged_snapshot_is_replaced_by_the_next_who_asks(bundle: Path, tmp_path: Path) -> None:
    _, place = take_snapshot(bundle, tmp_path / "cache")
    (place / "model.py").chmod(0o644)
    (place / "model.py").write_text("x = 2\n")
    _, again = take_snapshot(bundle, tmp_path / "cache")
    assert again == place
    assert (again / "model.py").read_text() == "x = 1\n"
    assert snapshot_changed(again) == []


def test_a_snapshot_whose_maker_died_before_the_stats_is_taken_over_if_whole(
    bundle: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    digest, place = take_snapshot(bundle, cache)
    (cache / f"{digest}.stats.json").unlink()
    inode = (place / "model.py").stat().st_ino
    take_snapshot(bundle, cache)
    assert (place / "model.py").stat().st_ino == inode
    assert snapshot_changed(place) == []


def test_a_bundle_that_changes_while_it_is_copied_is_copied_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = iter(["x = 22\n"])
    original = snapshot_module._copy

    def edited_meanwhile(found: Found, folder: Path) -> Entry:
        entry = original(found, folder)
        if found.path == "model.py" and (text := next(edits, None)):
            (bundle / "model.py").write_text(text)
        return entry

    monkeypatch.setattr(snapshot_module, "_copy", edited_meanwhile)
    digest, place = take_snapshot(bundle, tmp_path / "cache")
    assert (place / "model.py").read_text() == "x = 22\n"
    assert digest == bundle_digest(place)
    assert names(tmp_path / "cache") == {digest}


def test_a_bundle_that_never_stops_changing_is_refused_and_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = snapshot_module._copy, iter(range(1_000))

    def edited_meanwhile(found: Found, folder: Path) -> Entry:
        (bundle / "model.py").write_text(f"x = {next(count)}\n")
        return original(found, folder)

    monkeypatch.setattr(snapshot_module, "_copy", edited_meanwhile)
    with pytest.raises(BundleError, match="kept changing while it was copied"):
        take_snapshot(bundle, tmp_path / "cache")
    assert names(tmp_path / "cache") == set()


def test_a_snapshot_can_be_dropped_and_made_again(bundle: Path, tmp_path: Path) -> None:
    _, place = take_snapshot(bundle, tmp_path / "cache")
    drop_snapshot(place)
    assert not place.exists()
    assert snapshot_changed(place) == ["missing: its list of stats"]
    assert take_snapshot(bundle, tmp_path / "cache")[1] == place


def test_the_snapshot_holds_the_bytes_the_digest_speaks_of(bundle: Path, tmp_path: Path) -> None:
    big = os.urandom(3_000_000)
    (bundle / "big.bin").write_bytes(big)
    _, place = take_snapshot(bundle, tmp_path / "cache")
    assert (place / "big.bin").read_bytes() == big
