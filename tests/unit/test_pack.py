"""Archives: the same bytes for the same bundle, and nothing of a hostile one reaches the disk."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from typing import TYPE_CHECKING

import pytest

from modelops.bundles import bundle_digest, snapshot_changed
from modelops.bundles.pack import pack_bundle, unpack_bundle
from modelops.errors import BundleError, IntegrityError, ModelOpsError
from modelops.study.ids import BundleDigest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "données").mkdir(parents=True)
    (folder / "model.py").write_text("x = 1\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "données" / "empty").touch()
    (folder / "données" / "big").write_bytes(os.urandom(3_000_000))
    (folder / "link").symlink_to("données/big")
    return folder


def packed(bundle: Path, archive: Path) -> BundleDigest:
    with archive.open("wb") as stream:
        return pack_bundle(bundle, stream)


def test_unpacking_gives_the_snapshot_that_was_packed(bundle: Path, tmp_path: Path) -> None:
    digest = packed(bundle, tmp_path / "a")
    assert digest == bundle_digest(bundle)
    place = unpack_bundle(tmp_path / "a", digest, tmp_path / "cache")
    assert place == tmp_path / "cache" / digest
    assert bundle_digest(place) == digest
    assert snapshot_changed(place) == []
    assert (place / "run.sh").stat().st_mode & 0o777 == 0o555
    assert unpack_bundle(tmp_path / "no such archive", digest, tmp_path / "cache") == place  # it is there


def test_an_archive_does_not_depend_on_times_modes_or_owners(bundle: Path, tmp_path: Path) -> None:
    packed(bundle, tmp_path / "a")
    os.utime(bundle / "model.py", (1, 1))
    (bundle / "model.py").chmod(0o600)
    packed(bundle, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_digest_than_the_one_asked_for_is_refused(bundle: Path, tmp_path: Path) -> None:
    packed(bundle, tmp_path / "a")
    with pytest.raises(IntegrityError, match="not 0000"):
        unpack_bundle(tmp_path / "a", BundleDigest("0" * 64), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 0.999])
def test_damaged_and_truncated_archives_are_refused(bundle: Path, tmp_path: Path, position: float) -> None:
    digest = packed(bundle, tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    at = int(len(whole) * position)
    (tmp_path / "flipped").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    (tmp_path / "cut").write_bytes(whole[:at])
    for name in ("flipped", "cut"):
        with pytest.raises(ModelOpsError):
            unpack_bundle(tmp_path / name, digest, tmp_path / "cache")
        assert not (tmp_path / "cache").exists()


def hostile(fill: Callable[[tarfile.TarFile], None], path: Path, *, file_format: str | None = "1") -> Path:
    headers = {"modelops.format": file_format} if file_format else {}
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        fill(tar)
    return path


def file(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content) if kind == tarfile.REGTYPE else 0
    return info


def add(tar: tarfile.TarFile, *members: tarfile.TarInfo) -> None:
    for member in members:
        tar.addfile(member, io.BytesIO(b"x" * member.size))


HOSTILE = [
    # what it tries              its members                                       what is said
    ("absolute path", [file("/tmp/evil")], "unsafe path"),
    ("parent", [file("../evil")], "leads out"),
    ("hidden parent", [file("a/../../evil")], "unsafe path"),
    ("dot", [file("./a")], "unsafe path"),
    ("link out", [file("l", kind=tarfile.SYMTYPE, link="../evil")], "leads out"),
    ("absolute link", [file("l", kind=tarfile.SYMTYPE, link="/etc")], "leads out"),
    ("through a link", [file("l", kind=tarfile.SYMTYPE, link="d"), file("l/evil")], "below a file or link"),
    ("link over a folder", [file("d/f"), file("d", kind=tarfile.SYMTYPE, link="x")], "there twice"),
    (
        "chain of links",
        [file("a", kind=tarfile.SYMTYPE, link="b"), file("b", kind=tarfile.SYMTYPE, link="c"), file("c")],
        "points to another link",
    ),
    ("long name", [file("a" * 256)], "a name has more than 255 bytes"),
    ("long name in UTF-8", [file("é" * 128)], "a name has more than 255 bytes"),
    ("deep", [file("/".join("d" * 2500))], "more than 100 folders deep"),
    ("long path", [file("/".join(["d" * 200] * 11))], "more than 2000 bytes"),
    ("the folder itself", [file(".")], "unsafe path"),
    ("link to nothing", [file("l", kind=tarfile.SYMTYPE)], "leads nowhere"),
    ("long link", [file("l", kind=tarfile.SYMTYPE, link="a" * 5000)], "a name has more than 255 bytes"),
    ("hard link", [file("h", kind=tarfile.LNKTYPE, link="/etc/passwd")], "neither a file nor"),
    ("device", [file("dev", kind=tarfile.CHRTYPE)], "neither a file nor"),
    ("pipe", [file("fifo", kind=tarfile.FIFOTYPE)], "neither a file nor"),
    ("folder", [file("folder", kind=tarfile.DIRTYPE)], "neither a file nor"),
    ("twice", [file("a"), file("a")], "there twice"),
    ("too many", [file(str(i)) for i in range(101)], "limits are 100 files"),
    ("too large", [file("a", b"x" * 10_001)], "limits are 100 files and 10000 bytes"),
]


@pytest.mark.parametrize(("tries", "members", "says"), HOSTILE, ids=[h[0] for h in HOSTILE])
def test_a_hostile_archive_is_refused_before_anything_is_written(
    tmp_path: Path, tries: str, members: list[tarfile.TarInfo], says: str
) -> None:
    archive = hostile(lambda tar: add(tar, *members), tmp_path / "a")
    with pytest.raises(BundleError, match=says):
        unpack_bundle(archive, BundleDigest("0" * 64), tmp_path / "cache", max_files=100, max_bytes=10_000)
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


def test_a_header_that_unpacks_to_gigabytes_is_stopped_early(tmp_path: Path) -> None:
    bomb = tarfile.TarInfo("a")
    bomb.pax_headers = {"comment": "x" * 64_000_000}
    archive = hostile(lambda tar: add(tar, bomb), tmp_path / "a")
    with pytest.raises(BundleError, match="header larger than"):
        unpack_bundle(archive, BundleDigest("0" * 64), tmp_path / "cache")


def test_an_archive_of_another_kind_or_a_newer_format_is_refused(tmp_path: Path) -> None:
    archive = hostile(lambda tar: add(tar, file("a")), tmp_path / "a", file_format=None)
    with pytest.raises(BundleError, match="not packed by"):
        unpack_bundle(archive, BundleDigest("0" * 64), tmp_path / "cache")
    archive = hostile(lambda tar: add(tar, file("a")), tmp_path / "b", file_format="2")
    with pytest.raises(BundleError, match="newer ModelOps"):
        unpack_bundle(archive, BundleDigest("0" * 64), tmp_path / "cache")
    (tmp_path / "c").write_bytes(gzip.compress(b"no tar at all" * 1_000))
    with pytest.raises(IntegrityError):
        unpack_bundle(tmp_path / "c", BundleDigest("0" * 64), tmp_path / "cache")
