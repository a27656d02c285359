"""Read-only copies of bundles in ``cache/bundles/<digest>/``: what a job runs, whatever its author edits.

A snapshot appears whole or not at all (copied aside, then renamed), once however many ask. Beside it lies
``<digest>.stats.json``, the stats of its files; comparing them costs microseconds per file and shows
whether anybody wrote into the snapshot since.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from filelock import FileLock

from modelops.bundles.digest import EXECUTABLE, LINK, Entry, digest_of
from modelops.bundles.files import Found, find_files, read_entry
from modelops.bundles.ignore import ONLY_CACHES
from modelops.errors import BundleError, IntegrityError, StorageError
from modelops.home import make_private
from modelops.volumes import NO_ROOM, volume_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.study.ids import BundleDigest

FORMAT = 1
_TRIES = 3


class Stats(msgspec.Struct, frozen=True):
    """``<digest>.stats.json``: for each path [inode, size, mtime in ns, mode] of the files in a snapshot."""

    files: dict[str, tuple[int, int, int, int]]
    format: int = FORMAT


def take_snapshot(bundle: Path, cache: Path) -> tuple[BundleDigest, Path]:
    """Copy a bundle, as it is now, into the cache, unless it is there already.

    Parameters
    ----------
    bundle
        A folder, or one `.py` file.
    cache
        The folder that holds snapshots, ``<cache home>/bundles``; made if absent.

    Returns
    -------
        Its digest, and the read-only folder. A single-file bundle becomes a folder with that file.

    Raises
    ------
    BundleError
        It holds what cannot travel, or kept changing while it was copied.
    StorageError
        The cache has no room for it.
    """
    for _ in range(_TRIES):
        before = find_files(bundle)
        entries = [read_entry(found) for found in before]
        digest = digest_of(entries)
        if is_whole_snapshot(cache / digest):
            return digest, cache / digest
        with _written_into(cache), staging(cache) as aside:
            copied = [_copy(found, aside) for found in before]
            # The digest is that of the copied bytes; the second look catches what changed in between
            # and would otherwise be a mixture of two versions that never existed.
            if digest_of(copied) == digest and find_files(bundle) == before:
                return digest, publish(aside, digest, cache)
    raise BundleError(f"{bundle} kept changing while it was copied; submit again when nothing writes to it")


@contextlib.contextmanager
def _written_into(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise StorageError(
            f"copying the bundle into {cache} failed: {error.strerror} ({volume_of(cache)}); free some space there "
            "('modelops env gc --max-age 30d' removes environments that were not used for so long)"
        ) from error


def _copy(found: Found, folder: Path) -> Entry:
    place = folder / found.path
    place.parent.mkdir(parents=True, exist_ok=True)
    if found.mode == LINK:
        place.symlink_to(found.target)
        return read_entry(found)
    with place.open("xb") as copy:
        entry = read_entry(found, copy)
    place.chmod(0o555 if found.mode == EXECUTABLE else 0o444)
    return entry


@contextlib.contextmanager
def staging(cache: Path) -> Iterator[Path]:
    """Give an empty folder beside the snapshots, and remove it if it was not published."""
    make_private(cache)
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=cache))
    try:
        yield aside
    finally:
        remove_tree(aside)


def publish(aside: Path, digest: BundleDigest, cache: Path) -> Path:
    """Turn a staged folder into the snapshot of this digest. First one wins; a damaged one is replaced."""
    place = cache / digest
    with FileLock(cache / f"{digest}.lock"):
        if is_whole_snapshot(place) or _adopt(place, digest):
            return place
        _stats_file(place).unlink(missing_ok=True)
        remove_tree(place)
        for folder, _, _ in os.walk(aside):
            Path(folder).chmod(0o755)  # a folder must be writable to be renamed; read-only comes after
        aside.rename(place)
        for folder, _, _ in os.walk(place):
            Path(folder).chmod(0o555)
        _write_stats(place)
    return place


def snapshot_changed(snapshot: Path) -> list[str]:
    """Name what is not as it was when the snapshot was made, cheaply, by stats.

    Returns
    -------
        One line per path, sorted: ``"changed: model.py"``, ``"missing: ..."``, ``"added: ..."``.
        ``__pycache__`` folders are no change: Python makes them, and never reads a stale one.
    """
    try:
        stats = msgspec.json.decode(_stats_file(snapshot).read_bytes(), type=Stats)
    except (FileNotFoundError, msgspec.DecodeError):
        return ["missing: its list of stats"]
    if stats.format != FORMAT:  # of another ModelOps that shares this cache; the bytes decide then
        return ["missing: a list of stats that this version reads"]
    before = stats.files
    now = _stats(snapshot)
    return sorted(
        [f"missing: {path}" for path in before.keys() - now.keys()]
        + [f"added: {path}" for path in now.keys() - before.keys()]
        + [f"changed: {path}" for path in before.keys() & now.keys() if before[path] != now[path]]
    )


def snapshot_mark(snapshot: Path) -> str:
    """Return what tells this snapshot from one that was made anew in its place; empty if there is none."""
    try:
        stats = _stats_file(snapshot).stat()
    except FileNotFoundError:
        return ""
    return f"{stats.st_ino}-{stats.st_mtime_ns}"


def disown_snapshot(snapshot: Path, mark: str) -> None:
    """Let nobody take the snapshot of this mark, which was changed, for whole; it stays where it is until it is needed."""
    with FileLock(snapshot.with_name(f"{snapshot.name}.lock")):
        if snapshot_mark(snapshot) == mark:
            _stats_file(snapshot).unlink(missing_ok=True)


def check_snapshot(snapshot: Path) -> None:
    """Read every byte of a snapshot and compare with its digest, which is its name.

    Raises
    ------
    IntegrityError
        They differ.
    """
    if not _holds(snapshot, snapshot.name):
        raise IntegrityError(
            f"the bundle snapshot {snapshot} was changed: {'; '.join(snapshot_changed(snapshot))}"
        )


def drop_snapshot(snapshot: Path) -> None:
    """Remove a snapshot and its stats, e.g. because it was changed."""
    with FileLock(snapshot.with_name(f"{snapshot.name}.lock")):
        _stats_file(snapshot).unlink(missing_ok=True)
        remove_tree(snapshot)


def remove_tree(folder: Path) -> None:
    """Remove a folder whose parts are read-only; nothing happens if it is not there."""
    if not folder.exists():
        return
    for inner, _, _ in os.walk(folder):
        Path(inner).chmod(0o755)
    shutil.rmtree(folder)


def is_whole_snapshot(snapshot: Path) -> bool:
    """Say whether the cache has this snapshot, unchanged by its stats."""
    return snapshot.is_dir() and not snapshot_changed(snapshot)


def _adopt(snapshot: Path, digest: BundleDigest) -> bool:
    """Take over a snapshot whose maker was killed before it wrote the stats: its bytes decide."""
    if not snapshot.is_dir() or not _holds(snapshot, digest):
        return False
    _write_stats(snapshot)
    return True


def _holds(snapshot: Path, digest: str) -> bool:
    """Read a snapshot and say whether its bytes have this digest."""
    # Unlike in a bundle nothing is ignored here: every file counts but Python's own caches.
    try:
        return digest_of(read_entry(found) for found in find_files(snapshot, ignore=ONLY_CACHES)) == digest
    except BundleError:  # something appeared in it that no bundle can hold
        return False


def _stats_file(snapshot: Path) -> Path:
    return snapshot.with_name(f"{snapshot.name}.stats.json")


def _write_stats(snapshot: Path) -> None:
    file = _stats_file(snapshot)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_bytes(msgspec.json.encode(Stats(_stats(snapshot))))
    aside.replace(file)


def _stats(snapshot: Path) -> dict[str, tuple[int, int, int, int]]:
    found: dict[str, tuple[int, int, int, int]] = {}
    folders = [""]  # texts, as this is done after every chunk
    while folders:
        below = folders.pop()
        with contextlib.suppress(FileNotFoundError), os.scandir(f"{snapshot}/{below}") as entries:
            for entry in entries:
                path = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != "__pycache__":
                        folders.append(f"{path}/")
                    continue
                with contextlib.suppress(FileNotFoundError):  # somebody is just removing it
                    stats = entry.stat(follow_symlinks=False)
                    mode = stat.S_IFMT(stats.st_mode) | stat.S_IMODE(stats.st_mode)
                    found[path] = (stats.st_ino, stats.st_size, stats.st_mtime_ns, mode)
    return found
