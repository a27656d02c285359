"""Read the files of a bundle from disk: walk, refuse what cannot travel, hash."""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from modelops.bundles.digest import EXECUTABLE, FILE, LINK, Entry, digest_of
from modelops.bundles.ignore import IGNORE_FILE, Ignore
from modelops.errors import BundleError, NotFoundError
from modelops.study.wording import shown_path, spelt_out

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.study.ids import BundleDigest

BLOCK_BYTES = 1 << 20
# What every file system that a bundle may be unpacked on can hold, below whatever folder its cache lies in.
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 2000
MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Found:
    """A file or link of a bundle before it is read. ``stamp`` changes whenever somebody writes to it."""

    path: str
    source: Path
    mode: str
    stamp: tuple[int, int, int, int]
    target: str = ""

    @property
    def size(self) -> int:
        """Bytes it had when it was found."""
        return self.stamp[1]


def find_files(bundle: Path, *, ignore: Ignore | None = None) -> list[Found]:
    """List what belongs to a bundle: a folder without what it ignores, or one `.py` file. Sorted by path.

    Parameters
    ----------
    ignore
        What to leave out; by default the default patterns and those of its `.modelopsignore`.

    Raises
    ------
    NotFoundError
        There is nothing at this path.
    BundleError
        It holds something that cannot be packed: a link that leads out or nowhere, a socket, a device,
        a name that is not UTF-8. The message names it.
    """
    if bundle.is_file():
        _refuse_name(bundle.name, f"rename {shown_path(bundle)}")
        return [_found(bundle.name, bundle, bundle.stat())]
    if not bundle.is_dir():
        raise NotFoundError(f"there is no bundle at {bundle}: no such file or folder")
    if ignore is None:
        file = bundle / IGNORE_FILE
        ignore = Ignore(file.read_text("utf-8").splitlines() if file.is_file() else ())
    found = sorted(_walk(bundle, "", ignore), key=lambda f: f.path.encode())
    _check_links(found)
    return found


def read_entry(found: Found, copy_to: BinaryIO | None = None) -> Entry:
    """Hash one file (and, asked to, copy it): the entry describes exactly the bytes that were read."""
    if found.mode == LINK:
        return Entry(found.path, LINK, hashlib.sha256(found.target.encode()).hexdigest())
    content = hashlib.sha256()
    with found.source.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            content.update(block)
            if copy_to is not None:
                copy_to.write(block)
    return Entry(found.path, found.mode, content.hexdigest())


def bundle_digest(bundle: Path) -> BundleDigest:
    """Return the digest of a bundle as it lies on disk now."""
    return digest_of(read_entry(found) for found in find_files(bundle))


def _walk(folder: Path, prefix: str, ignore: Ignore) -> Iterator[Found]:
    with os.scandir(folder) as items:
        for item in items:
            path = prefix + item.name
            is_dir = item.is_dir(follow_symlinks=False)
            if ignore.matches(path, is_dir=is_dir):
                continue
            _refuse_name(item.name, f"rename {shown_path(item.path)}, or list it in {IGNORE_FILE}")
            if trouble := path_trouble(path):
                raise BundleError(f"{item.path}: {trouble}; shorten it, or list it in {IGNORE_FILE}")
            if is_dir:
                yield from _walk(Path(item.path), path + "/", ignore)
            else:
                yield _found(path, Path(item.path), item.stat(follow_symlinks=False))


def _found(path: str, source: Path, stats: os.stat_result) -> Found:
    stamp = (stats.st_ino, stats.st_size, stats.st_mtime_ns, stats.st_mode)
    if stat.S_ISLNK(stats.st_mode):
        target = str(source.readlink())
        _refuse_name(target, f"point the link {shown_path(source)} at a file with another name, or remove it")
        return Found(path, source, LINK, stamp, target)
    if not stat.S_ISREG(stats.st_mode):
        raise BundleError(
            f"{source} is neither a file nor a folder (a socket, pipe or device); "
            f"remove it, or list it in {IGNORE_FILE}"
        )
    return Found(path, source, EXECUTABLE if stats.st_mode & stat.S_IXUSR else FILE, stamp)


def _refuse_name(name: str, advice: str) -> None:
    """Refuse a name whose bytes no other machine need have a file for. Raises BundleError."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BundleError(f"the name {spelt_out(name)} is not valid UTF-8; {advice}") from None


def path_trouble(path: str) -> str:
    """Say what is too much about a path in a bundle, so that a machine may be unable to hold it; empty: nothing."""
    parts = path.split("/")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"a name has more than {MAX_NAME_BYTES} bytes"
    if len(parts) > MAX_DEPTH:
        return f"it lies more than {MAX_DEPTH} folders deep"
    return f"the path has more than {MAX_PATH_BYTES} bytes" if len(path.encode()) > MAX_PATH_BYTES else ""


def link_leads_out(path: str, target: str) -> bool:
    """Say whether a link at ``path`` with this target leaves the bundle, judged by the text alone."""
    if target.startswith("/") or "\\" in target or "\0" in target:
        return True
    resolved = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return resolved == ".." or resolved.startswith("../")


def _check_links(found: list[Found]) -> None:
    present = {f.path for f in found}
    folders = {parent.as_posix() for f in found for parent in Path(f.path).parents}
    links = {f.path for f in found if f.mode == LINK}
    for link in (f for f in found if f.mode == LINK):
        if link_leads_out(link.path, link.target):
            raise BundleError(
                f"{link.source} is a link to {link.target}, outside the bundle; copy the file "
                f"into the bundle, or list the link in {IGNORE_FILE}"
            )
        end = posixpath.normpath(posixpath.join(posixpath.dirname(link.path), link.target))
        through_link = any(parent.as_posix() in links for parent in Path(end).parents)
        if end in links or through_link:
            # A chain of links can lead out although each text looks harmless.
            raise BundleError(
                f"{link.source} is a link to another link ({link.target}); point it at the file itself"
            )
        if end not in present and end not in folders:
            raise BundleError(
                f"{link.source} is a link to {link.target}, which is missing or ignored; "
                f"remove the link, or list it in {IGNORE_FILE}"
            )
