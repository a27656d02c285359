"""What libraries compile while a model runs, handed from one process to the next of the same bundle and environment.

numba's cache and matplotlib's list of fonts take seconds to make. numba's must not be shared by processes that run at
once: two that compile a function for two signatures may each write the file that the other's index names, and a third
then calls the wrong code. So each process has a folder of its own, begins with what one process before it has left,
and what it leaves takes the place of that, in one step, if it is more.

It lies in a file: SHA-256 of the rest, then a MessagePack map of paths and contents. A damaged one counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from modelops.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE: Final = ".modelops-compiled"  # in the folder of compiled modules
MAX_BYTES: Final = 64 << 20
_NUMBA: Final = (".nbi", ".nbc")
_FONTS: Final = "fontlist-"


class Compiled:
    """The cache folder of one process.

    Parameters
    ----------
    folder
        Of this process alone; exists.
    modules
        Where Python keeps the modules that it compiled for this bundle and environment, see `RunnerSpec`; None: nothing
        is taken from an earlier process and nothing is left for a later one.
    """

    def __init__(self, folder: Path, modules: str | None) -> None:
        self._folder = folder
        self._file = Path(modules, FILE) if modules is not None else None
        self._taken: set[str] = set()

    def take(self) -> None:
        """Begin with what an earlier process has left. What cannot be read or written is compiled again."""
        if self._file is None:
            return
        try:
            contents = _decoded(self._file.read_bytes())
            for path, data in contents.items():
                target = self._folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        except FileNotFoundError:
            return
        except (OSError, ValueError, msgspec.DecodeError):  # none is better than half of one
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(exist_ok=True)
            return
        self._taken = set(contents)

    def leave(self) -> None:
        """Keep what a process has compiled that ended while it was idle, if there is more than it began with."""
        if self._file is None:
            return
        try:
            found = dict(_files(self._folder))
            if not found.keys() - self._taken:
                return
            contents = {path: file.read_bytes() for path, file in found.items()}
        except OSError:  # a model has made it unreadable
            return
        if sum(map(len, contents.values())) > MAX_BYTES:
            return
        with contextlib.suppress(OSError):  # no room: the next process compiles again
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, _encoded(contents))


def _encoded(contents: dict[str, bytes]) -> bytes:
    data = msgspec.msgpack.encode(contents)
    return hashlib.sha256(data).digest() + data


def _decoded(data: bytes) -> dict[str, bytes]:
    """Return what `_encoded` was given; raises ValueError or DecodeError if this is something else."""
    digest, rest = data[:32], data[32:]
    if hashlib.sha256(rest).digest() != digest:
        raise ValueError("its digest is another")
    contents = msgspec.msgpack.decode(rest, type=dict[str, bytes])
    for path in contents:
        if os.path.isabs(path) or ".." in Path(path).parts:  # noqa: PTH117  a text, of no file yet
            raise ValueError(f"{path!r} leads out of the folder")
    return contents


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files that are worth keeping, and their paths below ``folder``; no links."""
    for root, _folders, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if (
                (name.endswith(_NUMBA) or name.startswith(_FONTS))
                and path.is_file()
                and not path.is_symlink()
            ):
                yield str(path.relative_to(folder)), path
