"""The run folder of a home: who runs, where it listens, and the secrets of the pool.

Rules of the file:

- Who runs is a fact of the kernel, not of a file. A process of the pool holds a POSIX record lock on
  ``<role>.lock`` for as long as it lives, and ``F_GETLK`` names the holder. So what a killed process left
  behind, a file that was written by half, and a pid that belongs to somebody else by now mislead nobody.
- Files that say more (addresses, versions) are replaced whole, and count only together with such a lock.
- The folder has mode 0700 and each file 0600.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from modelops.errors import ClusterError, StorageError
from modelops.home import make_private

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.home import Home

KEEPER: Final = "keeper"
SERVER: Final = "server"
SCHEDULER: Final = "scheduler"
# struct flock, as the C compiler lays it out: type, whence, start, len, pid; BSD has start, len, pid, type, whence.
_LINUX: Final = sys.platform.startswith("linux")
_FLOCK: Final = struct.Struct("hhqqi4x" if _LINUX else "qqihh")
UP_LOCK: Final = "up.lock"
LISTENER: Final = "listener.json"  # where a keeper listens for the server, and which keeper


@dataclass(frozen=True)
class ServerAddress:
    """Where the server of a home listens, and the token it asks for."""

    url: str
    token: str

    def __repr__(self) -> str:
        return f"ServerAddress({self.url!r})"


class RunFolder:
    """The run folder of a home. Made, with its mode, when it is first used.

    Raises
    ------
    StorageError
        It cannot be made or written.
    ClusterError
        It belongs to another user.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self.path = home.run
        try:
            for folder in (home.data, home.cache, self.path):
                make_private(folder)
            found = self.path.stat()
            if found.st_uid != os.geteuid():
                raise ClusterError(
                    f"{self.path} belongs to another user (uid {found.st_uid}); set MODELOPS_HOME to a folder of yours"
                )
            if found.st_mode & 0o077:
                self.path.chmod(0o700)
        except OSError as error:
            raise StorageError(
                f"the folder {self.path} cannot be used ({error.strerror}); set MODELOPS_HOME to a folder that you "
                "can write to"
            ) from error

    @classmethod
    def if_there(cls, home: Home) -> RunFolder | None:
        """Return the run folder, None if there is none; makes nothing."""
        return cls(home) if home.run.is_dir() else None

    def hold(self, role: str, *, by_hand: bool = False) -> Hold | None:
        """Take the lock of a role for as long as this process lives; None if another process has it.

        ``by_hand``: a person has started it, and no keeper is to look after it.
        """
        path = self.path / f"{role}.lock"
        if path in _HELD:
            return None
        file = _open(path)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "by_hand": by_hand}).encode())
        file.flush()
        return Hold(path, file)

    def holder(self, role: str) -> int | None:
        """Return the pid of the process that holds a role, None if nobody does."""
        path = self.path / f"{role}.lock"
        if path in _HELD:  # POSIX takes a lock away when the holder closes any descriptor of its file
            return os.getpid()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if _LINUX:
                asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            else:
                asked = _FLOCK.pack(0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
            answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        finally:
            os.close(fd)
        kind, pid = (answer[0], answer[4]) if _LINUX else (answer[3], answer[2])
        return None if kind == fcntl.F_UNLCK else int(pid)

    def held_by_hand(self, role: str) -> int | None:
        """Return the pid of the process that holds a role if a person has started it."""
        pid, said = self.holder(role), self.read(f"{role}.lock")
        return pid if pid is not None and said.get("pid") == pid and said.get("by_hand") else None

    def scheduler_address(self) -> str | None:
        """Return the address of the scheduler of this home, None if none runs."""
        said = self.read("scheduler.json")
        return (
            str(said["address"]) if "address" in said and said.get("pid") == self.holder(SCHEDULER) else None
        )

    def roles(self) -> list[str]:
        """Return the names of all roles that were ever held here, the keeper's left out."""
        names = sorted(p.name.removesuffix(".lock") for p in self.path.glob("*.lock"))
        return [n for n in names if n not in (KEEPER, UP_LOCK.removesuffix(".lock"))]

    @contextlib.contextmanager
    def alone(self, *, nonblocking: bool = False) -> Iterator[None]:
        """Be the only one who starts or ends the pool within this block.

        Raises
        ------
        BlockingIOError
            ``nonblocking``, and somebody else is.
        """
        # flock, and not the other kind: threads of one process keep each other out as well.
        with _open(self.path / UP_LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if nonblocking else 0))
            yield

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replace a file that says more about what runs."""
        write_private(self.path / name, json.dumps(content, indent=1).encode())

    def read(self, name: str) -> dict[str, Any]:
        """Return what such a file says; nothing if it is missing or was not written by us."""
        path = self.path / name
        if path in _HELD:  # see `holder`
            return {}
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def remove(self, *names: str) -> None:
        """Remove such files."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def keep_token(self, token: str) -> None:
        """Make this the token of this home's server."""
        write_private(self.path / "token", token.encode())

    def token(self) -> str:
        """Return the token of this home's server; the first who asks makes it."""
        path = self.path / "token"
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mode & 0o077:
                    path.unlink()  # others could have read it
                elif (token := path.read_text("ascii", "replace").strip()) and _can_be_sent(token):
                    return token
                else:
                    path.unlink()
            write_private(path, secrets.token_urlsafe(32).encode(), only_if_absent=True)
        return path.read_text("ascii").strip()


class Hold:
    """A lock that this process holds until `release` or its end."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        _HELD.add(path)

    def release(self) -> None:
        """Give it up."""
        self._file.close()
        _HELD.discard(self._path)


_HELD: Final[set[Path]] = set()


def write_private(path: Path, content: bytes, *, only_if_absent: bool = False) -> None:
    """Write a file that only its user may read; others see the old one or the new one, never a part."""
    fd, temporary = tempfile.mkstemp(prefix=".", suffix=".new", dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        if only_if_absent:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        else:
            Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _can_be_sent(token: str) -> bool:
    """Say whether a token can stand in a header: what a crash has left of one need not."""
    return token.isascii() and token.isprintable()


def _open(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
