"""One file that holds a bundle: a gzipped tar named by digest, written deterministically, unpacked safely.

Nothing in an archive is believed. It is read once to compute its digest, within limits and writing nothing,
and only then unpacked: no absolute path, no ``..``, no link that leads out, nothing but files and links.
"""

from __future__ import annotations

import gzip
import hashlib
import posixpath
import tarfile
import zlib
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from modelops.bundles.digest import EXECUTABLE, FILE, LINK, Entry, digest_of
from modelops.bundles.files import BLOCK_BYTES, find_files, link_leads_out, path_trouble, read_entry
from modelops.bundles.snapshot import is_whole_snapshot, publish, staging
from modelops.errors import BundleError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.study.ids import BundleDigest

FORMAT = 1
MAX_FILES = 100_000
MAX_BYTES = 4 << 30
_MAX_HEADER_BYTES = 1 << 20


def pack_bundle(bundle: Path, stream: BinaryIO) -> BundleDigest:
    """Write a bundle as one archive; the same files give the same tar, whoever owns them and when.

    Parameters
    ----------
    bundle
        A folder or a `.py` file; best a snapshot, which nobody edits.
    stream
        Where to write.

    Returns
    -------
        The digest of what was written, by which the archive is to be named.

    Raises
    ------
    BundleError
        The bundle holds what cannot travel, or changed while it was read.
    """
    entries = []
    with (
        gzip.GzipFile(fileobj=stream, mode="wb", mtime=0, filename="") as compressed,
        tarfile.open(
            fileobj=compressed,
            mode="w",
            format=tarfile.PAX_FORMAT,
            pax_headers={"modelops.format": str(FORMAT)},
        ) as tar,
    ):
        for found in find_files(bundle):
            info = tarfile.TarInfo(found.path)
            info.mode = 0o755 if found.mode == EXECUTABLE else 0o644
            if found.mode == LINK:
                info.type, info.linkname = tarfile.SYMTYPE, found.target
                tar.addfile(info)
                entries.append(read_entry(found))
                continue
            info.size = found.size
            with found.source.open("rb") as source:
                content = _HashingReader(source)
                tar.addfile(info, content)
            entries.append(Entry(found.path, found.mode, content.sha256.hexdigest()))
    return digest_of(entries)


def unpack_bundle(
    archive: Path,
    digest: BundleDigest,
    cache: Path,
    *,
    max_files: int = MAX_FILES,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Make the snapshot of a packed bundle, unless the cache has it.

    Returns
    -------
        The read-only folder.

    Raises
    ------
    BundleError
        The archive holds what no bundle may hold, or more than the limits allow. Nothing was unpacked.
    IntegrityError
        It is damaged, or its content has another digest. Nothing was unpacked.
    """
    if is_whole_snapshot(cache / digest):
        return cache / digest
    limits = (max_files, max_bytes)
    check_archive(archive, digest, max_files=max_files, max_bytes=max_bytes)
    with staging(cache) as aside:
        with _opened(archive, limits) as members:
            # Digested again while it is written: the file may have been exchanged since the first reading.
            actual = digest_of(_entries(members, aside))
        if actual != digest:
            raise IntegrityError(f"{archive} was changed while it was unpacked")
        return publish(aside, digest, cache)


def check_archive(
    archive: Path, digest: BundleDigest, *, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES
) -> None:
    """Read a packed bundle, writing nothing.

    Raises
    ------
    BundleError
        The archive holds what no bundle may hold, or more than the limits allow.
    IntegrityError
        It is damaged, or its content has another digest.
    """
    with _opened(archive, (max_files, max_bytes)) as members:
        actual = digest_of(_entries(members))
    if actual != digest:
        raise IntegrityError(
            f"{archive} holds the bundle {actual}, not {digest}; it was damaged or exchanged"
        )


_Member = tuple[tarfile.TarInfo, tarfile.TarFile]


@contextmanager
def _opened(archive: Path, limits: tuple[int, int]) -> Iterator[Iterator[_Member]]:
    try:
        with gzip.open(archive, "rb") as compressed:
            bounded = _Bounded(compressed, archive)
            with tarfile.open(fileobj=cast("BinaryIO", bounded), mode="r|") as tar:
                yield _checked(tar, bounded, archive, limits)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, UnicodeError, ValueError) as e:
        raise IntegrityError(f"{archive} is no bundle archive, or a damaged one: {e}") from e


def _checked(
    tar: tarfile.TarFile, bounded: _Bounded, archive: Path, limits: tuple[int, int]
) -> Iterator[_Member]:
    """Yield the members that a bundle may have; raise at the first that it may not."""
    max_files, max_bytes = limits
    seen: set[str] = set()
    links: dict[str, str] = {}
    folders: set[str] = set()
    n_bytes = 0
    for member in tar:
        name = member.name
        _check_format(tar, archive)
        if name in ("", ".") or name.startswith("/") or "\\" in name or "\0" in name or posixpath.normpath(name) != name:
            raise BundleError(f"{archive}: unsafe path {_shown(name)}")
        if name.split("/")[0] == "..":
            raise BundleError(f"{archive}: the path {name!r} leads out of the bundle")
        if trouble := path_trouble(name):
            raise BundleError(f"{archive}: {_shown(name)}: {trouble}; shorten it, and pack the bundle again")
        if not member.isreg() and not member.issym():
            raise BundleError(f"{archive}: {name!r} is neither a file nor a symbolic link")
        parents = {parent.as_posix() for parent in Path(name).parents}
        if name in seen or name in folders or parents & seen:
            raise BundleError(f"{archive}: {name!r} is there twice, or lies below a file or link")
        if member.issym():
            if link_leads_out(name, member.linkname):
                raise BundleError(
                    f"{archive}: the link {name!r} -> {member.linkname!r} leads out of the bundle"
                )
            if not member.linkname or (trouble := path_trouble(member.linkname)):
                why = trouble if member.linkname else "it leads nowhere"
                raise BundleError(f"{archive}: the link {name!r} -> {_shown(member.linkname)}: {why}")
            links[name] = member.linkname
        seen.add(name)
        folders |= parents
        n_bytes += member.size
        if len(seen) > max_files or n_bytes > max_bytes:
            raise BundleError(
                f"{archive} holds more than a bundle may: limits are {max_files} files and {max_bytes} bytes"
            )
        bounded.allow(member.size + _MAX_HEADER_BYTES)
        yield member, tar
    for name, target in links.items():
        end = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if links.keys() & {end, *(parent.as_posix() for parent in Path(end).parents)}:
            raise BundleError(f"{archive}: the link {name!r} points to another link")


def _shown(path: str) -> str:
    return repr(path if len(path) <= 100 else f"{path[:100]}...")


def _check_format(tar: tarfile.TarFile, archive: Path) -> None:
    found = tar.pax_headers.get("modelops.format", "")
    if not found.isdigit():
        raise BundleError(f"{archive} was not packed by 'modelops bundle pack'")
    if int(found) > FORMAT:
        raise BundleError(
            f"{archive} was packed by a newer ModelOps (format {found}, this one reads up to {FORMAT}); "
            "upgrade modelops"
        )


def _entries(members: Iterator[_Member], folder: Path | None = None) -> Iterator[Entry]:
    """Digest each member; given a folder, write it there."""
    for member, tar in members:
        place = folder / member.name if folder else None
        if place:
            place.parent.mkdir(parents=True, exist_ok=True)
        if member.issym():
            if place:
                place.symlink_to(member.linkname)
            yield Entry(member.name, LINK, hashlib.sha256(member.linkname.encode()).hexdigest())
            continue
        content, source = hashlib.sha256(), tar.extractfile(member)
        with place.open("xb") if place else nullcontext() as out:
            while source and (block := source.read(BLOCK_BYTES)):
                content.update(block)
                if out:
                    out.write(block)
        mode = EXECUTABLE if member.mode & 0o100 else FILE
        if place:
            place.chmod(0o555 if mode == EXECUTABLE else 0o444)
        yield Entry(member.name, mode, content.hexdigest())


class _HashingReader:
    """A file that remembers the digest of what was read from it."""

    def __init__(self, source: BinaryIO) -> None:
        self._source, self.sha256 = source, hashlib.sha256()

    def read(self, n: int = -1) -> bytes:
        block = self._source.read(n)
        self.sha256.update(block)
        return block


class _Bounded:
    """A stream that may be read only as far as the headers seen so far allow, so that no bomb goes off."""

    def __init__(self, stream: gzip.GzipFile, archive: Path) -> None:
        self._stream, self._archive, self._left = stream, archive, _MAX_HEADER_BYTES

    def allow(self, n_bytes: int) -> None:
        """Let this much be read from now on."""
        self._left = n_bytes

    def read(self, n: int = -1) -> bytes:
        block = self._stream.read(n)
        self._left -= len(block)
        if self._left < 0:
            raise BundleError(f"{self._archive} has a header larger than {_MAX_HEADER_BYTES} bytes")
        return block
