"""What a model may leave in its ``checkpoint_dir``, and how it is read. Touches files, not storage."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from modelops.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_ENTRIES: Final = 1_000
MAX_BYTES: Final = 16 << 30
PIECE_BYTES: Final = 32 << 20  # what is held in memory, and what is stored again when some of it changed


class CheckpointError(RequestError):
    """A folder cannot be kept as a checkpoint; ``str`` names the file and the rule."""


class FileThere(msgspec.Struct, frozen=True):
    """A file. ``path``: below the folder, with ``/``."""

    path: str
    mode: int
    mtime_ns: int


class FolderThere(msgspec.Struct, frozen=True):
    """A folder below the folder."""

    path: str
    mode: int


class LinkThere(msgspec.Struct, frozen=True):
    """A symbolic link to something in the folder."""

    path: str
    target: str


@dataclass(frozen=True)
class Contents:
    """What lies in a folder, each kind sorted by path (so a folder comes before what is in it)."""

    folders: tuple[FolderThere, ...]
    files: tuple[FileThere, ...]
    links: tuple[LinkThere, ...]


def look_through(root: Path) -> Contents:
    """Return what lies in a folder.

    Raises
    ------
    CheckpointError
        Something there cannot be kept: it is no file, folder or link within, or there is too much.
    """
    folders, files, links, n_bytes = [], [], [], 0
    pending = [""]
    try:
        while pending:
            inside = pending.pop()
            with os.scandir(root / inside) as entries:
                for entry in entries:
                    path = f"{inside}/{entry.name}" if inside else entry.name
                    stats = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(stats.st_mode):
                        folders.append(FolderThere(path, stat.S_IMODE(stats.st_mode)))
                        pending.append(path)
                    elif stat.S_ISREG(stats.st_mode):
                        files.append(FileThere(path, stat.S_IMODE(stats.st_mode), stats.st_mtime_ns))
                        n_bytes += stats.st_size
                    elif stat.S_ISLNK(stats.st_mode):
                        links.append(LinkThere(path, _target(root, path)))
                    else:
                        raise CheckpointError(
                            f"checkpoint_dir holds {path!r}, which is no file, folder or link; remove it first"
                        )
                    _check(path, len(folders) + len(files) + len(links), n_bytes)
    except OSError as e:
        raise _unreadable(e) from e
    return Contents(
        tuple(sorted(folders, key=_path)), tuple(sorted(files, key=_path)), tuple(sorted(links, key=_path))
    )


def pieces_of(root: Path, file: FileThere) -> Iterator[bytes]:
    """Yield the bytes of a file, at most `PIECE_BYTES` at a time."""
    try:
        # Not through a link that has been put in its place since.
        fd = os.open(root / file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as f:
            while data := f.read(PIECE_BYTES):
                yield data
    except OSError as e:
        raise _unreadable(e) from e


def _target(root: Path, path: str) -> str:
    target = str((root / path).readlink())
    inside = os.path.normpath(os.path.join(os.path.dirname(path), target))  # noqa: PTH118, PTH120  text, no file
    if os.path.isabs(target) or inside.split("/")[0] == "..":  # noqa: PTH117
        raise CheckpointError(
            f"checkpoint_dir holds the link {path!r} to {target!r}, which is not in it; copy the file instead"
        )
    return target


def _check(path: str, n_entries: int, n_bytes: int) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"checkpoint_dir holds {path!r}; use names that are UTF-8") from None
    if n_entries > MAX_ENTRIES:
        raise CheckpointError(
            f"checkpoint_dir holds more than {MAX_ENTRIES} files and folders; put them into one file, as a .zip"
        )
    if n_bytes > MAX_BYTES:
        raise CheckpointError(
            f"checkpoint_dir holds more than {MAX_BYTES >> 30} GiB; keep only what is needed to go on"
        )


def _unreadable(error: OSError) -> CheckpointError:
    return CheckpointError(
        f"checkpoint_dir cannot be read: {error}; do not change it while checkpoint() runs"
    )


def _path(one: FileThere | FolderThere | LinkThere) -> str:
    return one.path
