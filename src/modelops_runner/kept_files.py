"""Files that importing a bundle left in its working directory: forks share them, and find them as the import left them.

Their content is copied once, into one file without a name. What a fork did to one of them shows in its inode, size,
times or mode; then the content is put back, into the same inode where that is still there, as the bundle may have it
open.
"""

from __future__ import annotations

import os
from stat import S_IMODE, S_ISREG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Stamp = tuple[int, int, int, int, int]

MAX_BYTES = 256 * 1024 * 1024  # in all; larger ones are left as they are
FEW = (
    200  # so many are looked at after every fork; more, only when something has been written in their folders
)
_PIECE_BYTES = 1 << 20


class KeptFiles:
    """Files and their content.

    Parameters
    ----------
    folder
        Of the volume that the copies shall lie on.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._copy = -1
        self._end = 0
        self._found: dict[
            str, tuple[Stamp, int, int]
        ] = {}  # path -> its stamp, and place and length of the copy

    def take(self, paths: Iterable[str]) -> None:
        """Copy those of these files that are not kept as they are. Raises OSError if there is no room for it."""
        for path in paths:
            stamp = _stamp(path)
            known = self._found.get(path)
            if stamp is None or (known is not None and known[0] == stamp):
                continue
            n = stamp[1]
            if self._end + n > MAX_BYTES:
                self._found.pop(path, None)
                continue
            if self._copy < 0:
                self._copy = _nameless(self._folder)
            with open(path, "rb", buffering=0) as file:
                length = _copy(file.fileno(), 0, self._copy, self._end, n)
            self._found[path] = (stamp, self._end, length)
            self._end += length

    def changed(self) -> bool:
        """Return whether one of them is not as it was, as far as that is worth looking: if they are few."""
        if len(self._found) > FEW:
            return False
        return any(_stamp(path) != stamp for path, (stamp, _, _) in self._found.items())

    def put_back(self) -> None:
        """Make all of them what they were."""
        for path, (stamp, at, length) in list(self._found.items()):
            if _stamp(path) == stamp:
                continue
            fd = _opened(path)
            try:
                os.ftruncate(fd, 0)
                _copy(self._copy, at, fd, 0, length)
                os.fchmod(fd, S_IMODE(stamp[4]))
                os.utime(fd, ns=(stamp[2], stamp[2]))
            finally:
                os.close(fd)
            self._found[path] = (_stamp(path) or stamp, at, length)


def _stamp(path: str) -> Stamp | None:
    """Return what tells that a file is as it was; None if there is no regular file."""
    try:
        stats = os.lstat(path)
    except OSError:
        return None
    if not S_ISREG(stats.st_mode):
        return None
    return stats.st_ino, stats.st_size, stats.st_mtime_ns, stats.st_ctime_ns, stats.st_mode


def _opened(path: str) -> int:
    """Open a file for writing; a new one if it is gone, or if something else has its name."""
    if _stamp(path) is None:
        remove(path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.chmod(path, 0o600)
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def remove(path: str) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if os.path.islink(path) or not os.path.isdir(path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        return
    os.chmod(path, 0o700)
    for folder, folders, _ in os.walk(path):
        for name in folders:  # before they are listed: the model may have made them unreadable
            if not os.path.islink(os.path.join(folder, name)):
                os.chmod(os.path.join(folder, name), 0o700)
    from shutil import rmtree

    rmtree(path)


def _nameless(folder: str) -> int:
    """Open a file that is gone when this process is."""
    path = os.path.join(folder, f".kept-{os.getpid()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    return fd


def _copy(source: int, at: int, target: int, to: int, n: int) -> int:
    """Copy at most ``n`` bytes from one place to another; return how many there were."""
    done = 0
    while done < n:
        piece = os.pread(source, min(_PIECE_BYTES, n - done), at + done)
        if not piece:
            break
        view = memoryview(piece)
        while len(view):
            written = os.pwrite(target, view, to + done)
            view = view[written:]
            done += written
    return done
