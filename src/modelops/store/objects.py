"""Object storage: named bytes in a local folder, or in S3, Azure or GCS by URL.

Objects are written whole under a name that did not exist (`Objects.put_new`), so a reader never meets
half of one. In a local folder the bytes and the folder that names them are on disk before the call
returns: temporary file, fsync, hard link to the final name (which fails if that exists), fsync of the
folder. A crash in between leaves a file in ``.tmp/`` that nothing refers to.
"""

# ruff: noqa: D102  what the methods do is said once, in Objects

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Final
from uuid import uuid4

from modelops.counters import Counted, count
from modelops.errors import IntegrityError, NotFoundError, RequestError, StorageError
from modelops.home import make_private

Content = bytes | Path | Iterable[bytes]
COPY_BYTES: Final = 1 << 20
_TMP: Final = ".tmp"


class AlreadyExistsError(RequestError):
    """An object of that name exists; it was left as it is."""


class Objects(ABC):
    """Named bytes. Names are relative paths, e.g. ``v1/jobs/<job>/packs/<attempt>.pack``.

    Every method raises `StorageError`, naming the volume or service, when storage does not do its part.
    """

    @staticmethod
    def open(where: str | Path) -> Objects:
        """Open a folder (created if absent) or a URL that obstore knows (``s3://``, ``az://``, ``gs://``)."""
        if isinstance(where, Path) or "://" not in where:
            return FolderObjects(Path(where))
        if where.startswith("file://"):
            return FolderObjects(Path(where.removeprefix("file://")))
        from modelops.store.remote import RemoteObjects

        return RemoteObjects.from_url(where)

    @abstractmethod
    def put_new(self, name: str, content: Content) -> None:
        """Store under a name that does not exist yet, and return when it is durable.

        Raises
        ------
        AlreadyExistsError
            The name is taken. Of several writers at once exactly one does not get this.
        """

    @abstractmethod
    def put(self, name: str, content: Content) -> None:
        """Store, replacing atomically what had that name. Only for files that can be made again."""

    @abstractmethod
    def get(self, name: str) -> bytes:
        """Return all bytes of an object. Raises NotFoundError."""

    @abstractmethod
    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return a slice. Raises NotFoundError, and IntegrityError if the object is too short."""

    @abstractmethod
    def stream(self, name: str) -> Iterator[bytes]:
        """Yield an object piece by piece. Raises NotFoundError at the first piece."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return how many bytes an object has. Raises NotFoundError."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Say whether there is an object of that name."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names below a folder, sorted. A folder that does not exist is empty."""

    @abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size in bytes of every object below a folder, by name. One look, however many there are."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; one that does not exist is no error."""

    def remove_folder(self, prefix: str) -> None:
        """Remove all objects below a folder."""
        for name in self.list(prefix):
            self.delete(name)

    def local_path(self, name: str) -> Path | None:
        """Return where the object lies on this machine, or None if it does not lie here."""
        checked_name(name)
        return None


class FolderObjects(Objects):
    """Objects as files below a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._known: set[Path] = set()
        try:
            make_private(self.root)
            (self.root / _TMP).mkdir(exist_ok=True)
        except OSError as e:
            raise self._failed("opening", ".", e) from e

    def __repr__(self) -> str:
        return f"FolderObjects({str(self.root)!r})"

    def put_new(self, name: str, content: Content) -> None:
        path = self.root / checked_name(name)
        if path.exists():  # spares the copying; the link below decides
            raise AlreadyExistsError(f"{name} exists in {self.root}")
        try:
            temporary = self._write(content)
            try:
                self._in_its_folder(path, lambda: os.link(temporary, path))
            finally:
                temporary.unlink()
            _fsync_folder(path.parent)
        except FileExistsError:
            raise AlreadyExistsError(f"{name} exists in {self.root}") from None
        except OSError as e:
            raise self._failed("storing", name, e) from e

    def put(self, name: str, content: Content) -> None:
        path = self.root / checked_name(name)
        try:
            temporary = self._write(content)
            try:
                self._in_its_folder(path, lambda: temporary.replace(path))
            except OSError:
                temporary.unlink()
                raise
            _fsync_folder(path.parent)
        except OSError as e:
            raise self._failed("storing", name, e) from e

    def get(self, name: str) -> bytes:
        try:
            return (self.root / checked_name(name)).read_bytes()
        except OSError as e:
            raise self._failed("reading", name, e) from e

    def read(self, name: str, offset: int, length: int) -> bytes:
        try:
            with (self.root / checked_name(name)).open("rb") as f:
                f.seek(offset)
                data = f.read(length)
        except OSError as e:
            raise self._failed("reading", name, e) from e
        return checked_length(data, name, offset, length)

    def stream(self, name: str) -> Iterator[bytes]:
        try:
            with (self.root / checked_name(name)).open("rb") as f:
                while piece := f.read(COPY_BYTES):
                    yield piece
        except OSError as e:
            raise self._failed("reading", name, e) from e

    def size(self, name: str) -> int:
        try:
            with (self.root / checked_name(name)).open("rb") as f:  # opening refuses a folder; stat would not
                return os.fstat(f.fileno()).st_size
        except OSError as e:
            raise self._failed("reading", name, e) from e

    def exists(self, name: str) -> bool:
        return (self.root / checked_name(name)).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        folder = self.root / checked_name(prefix) if prefix else self.root
        names = []
        for where, folders, files in os.walk(folder, onerror=self._cannot_list):
            if Path(where) == self.root:
                folders[:] = [f for f in folders if f != _TMP]
            names += [(Path(where) / f).relative_to(self.root).as_posix() for f in files]
        return iter(sorted(names))

    def sizes(self, prefix: str) -> dict[str, int]:
        found = {}
        for name in self.list(prefix):
            try:
                found[name] = (self.root / name).stat().st_size
            except FileNotFoundError:  # removed since
                continue
            except OSError as e:
                raise self._failed("listing", name, e) from e
        return found

    def delete(self, name: str) -> None:
        path = self.root / checked_name(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise self._failed("deleting", name, e) from e

    def remove_folder(self, prefix: str) -> None:
        super().remove_folder(prefix)
        for where, _, _ in os.walk(self.root / prefix, topdown=False):
            with contextlib.suppress(OSError):  # somebody has put something there meanwhile
                Path(where).rmdir()

    def local_path(self, name: str) -> Path | None:
        return self.root / checked_name(name)

    def _write(self, content: Content) -> Path:
        """Write to a new temporary file on the same volume, durable, and return its path."""
        path = self.root / _TMP / uuid4().hex
        try:
            with path.open("xb") as f:
                _pour(content, f)
                f.flush()
                os.fsync(f.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _in_its_folder(self, path: Path, place: Callable[[], object]) -> None:
        """Make the folder of an object and put it there; once more if somebody removed the folder meanwhile."""
        try:
            self._make_folder(path.parent)
            place()
        except FileNotFoundError:
            self._known -= {path.parent, *path.parents}
            self._make_folder(path.parent)
            place()

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and its parents, each on disk before anything is put below it.

        A folder that exists already may be one that another process has made and not yet synced.
        """
        if folder in self._known or folder == self.root:
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync_folder(folder.parent)
        self._known.add(folder)

    def _is_there(self) -> bool:
        """Say whether this is the folder that was opened, and not what is left when its volume is not mounted."""
        return (self.root / _TMP).is_dir()

    def _cannot_list(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError) or not self._is_there():
            raise self._failed("listing", error.filename or ".", error) from error

    def _failed(self, doing: str, name: str, error: OSError) -> StorageError | NotFoundError:
        if (
            isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
            and doing == "reading"
            and self._is_there()
        ):
            return NotFoundError(f"there is no object {name} in {self.root}")
        said = f"{error.strerror or error} ({volume_of(self.root)}); {_advice(error)}"
        count(Counted.STORAGE_ERRORS)
        return StorageError(f"{doing} {name} in {self.root} failed: {said}")


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space there"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "allow writing there"
    if error.errno == errno.ENOENT:
        return "it is not as it was opened; is its volume mounted?"
    return "'modelops doctor' looks at the machine"


def pieces_of(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of an open file from its beginning."""
    file.seek(0)
    yield from iter(lambda: file.read(COPY_BYTES), b"")


def checked_name(name: str) -> str:
    """Return the name if it is a relative path without empty, ``.`` or ``..`` segments; refuse others."""
    if not all(part not in ("", ".", "..", _TMP) for part in name.split("/")) or "\0" in name or "\\" in name:
        raise RequestError(f"{name!r} cannot be the name of an object: use plain segments joined by '/'")
    return name


def checked_length(data: bytes, name: str, offset: int, length: int) -> bytes:
    """Return the bytes if there are as many as were asked for."""
    if len(data) != length:
        raise IntegrityError(
            f"{name} is too short: wanted {length} bytes at {offset}, found {len(data)}; was it cut?"
        )
    return data


def _pour(content: Content, f: IO[bytes]) -> None:
    if isinstance(content, bytes):
        f.write(content)
    elif isinstance(content, Path):
        with content.open("rb") as source:
            shutil.copyfileobj(source, f, COPY_BYTES)
    else:
        f.writelines(content)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def volume_of(path: Path) -> str:
    """Name the mounted volume that holds a path, and what is free on it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        free_bytes = shutil.disk_usage(path).free
    except OSError:
        return f"volume of {path}"
    while not path.is_mount():
        path = path.parent
    return f"volume {path}, {free_bytes / 2**20:.1f} MiB free"
