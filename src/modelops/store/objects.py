"""Object storage: named bytes in a local folder, or in S3, Azure or GCS by URL.

Objects are written whole under a name that did not exist (`Objects.put_new`), so a reader never meets
half of one. In a local folder the bytes and the folder that names them are on disk before the call
returns: temporary file, fsync, hard link to the final name (which fails if that exists), fsync of the
folder. A crash in between leaves a file in ``.tmp/`` that nothing refers to.

What several objects at once need on disk is synced at the same time, before the first of them is linked, and then the
folders that name them: a file system writes its journal once for all who wait for it. Objects that nothing refers to
before the call has returned are linked first, and files and folders synced together: one wait for the disk instead of
two. If the machine loses its power before, half of such an object may be there, of which nobody knows.
"""

# ruff: noqa: D102  what the methods do is said once, in Objects

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from _thread import LockType, allocate_lock, start_new_thread
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Final
from uuid import uuid4

from modelops.counters import Counted, count
from modelops.errors import IntegrityError, NotFoundError, RequestError, StorageError
from modelops.home import make_private
from modelops.volumes import volume_of

Content = bytes | Path | Iterable[bytes]
COPY_BYTES: Final = 1 << 20
IN_MEMORY_BYTES: Final = 1 << 20  # of what is made before it is stored; for more a file is made first
_TMP: Final = ".tmp"


class AlreadyExistsError(RequestError):
    """An object of that name exists; it was left as it is."""


class Objects(ABC):
    """Named bytes. Names are relative paths, e.g. ``v1/jobs/<job>/packs/<attempt>.pack``.

    Every method raises `StorageError`, naming the volume or service, when storage does not do its part.
    """

    @property
    def place(self) -> str:
        """Where it is, for people: a folder, or a service and its address."""
        return repr(self)

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

    def put_together(self, contents: Mapping[str, Content], *, unknown: bool = False) -> frozenset[str]:
        """Store each under a name that does not exist yet, in this order, and return when all are durable.

        Parameters
        ----------
        unknown
            Nobody looks at these names before this has returned, also not after a crash.

        Returns
        -------
            The names that were taken, and left as they are.
        """
        taken = set()
        for name, content in contents.items():
            try:
                self.put_new(name, content)
            except AlreadyExistsError:
                taken.add(name)
        return frozenset(taken)

    def take_new(self, name: str, path: Path, check: Callable[[], object]) -> None:
        """Store a file of this machine as `put_new` does; the file may become the object itself, without a copy.

        Parameters
        ----------
        path
            Nobody may write to it any more. Whoever made it removes this name of it afterwards.
        check
            Reads the file, and raises if it is not what it shall be: then nothing is stored.
        """
        check()
        self.put_new(name, path)

    @abstractmethod
    def put(self, name: str, content: Content) -> None:
        """Store, replacing atomically what had that name. Only for files that can be made again."""

    def replace_together(self, contents: Mapping[str, Content], *, unknown: bool = False) -> None:
        """Do as `put` does with each, in this order, and return when all are durable.

        ``unknown``: whoever looks at these names after a crash makes the objects again.
        """
        for name, content in contents.items():
            self.put(name, content)

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

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.root)

    def put_new(self, name: str, content: Content) -> None:
        if self.put_together({name: content}):
            raise AlreadyExistsError(f"{name} exists in {self.root}")

    def put_together(self, contents: Mapping[str, Content], *, unknown: bool = False) -> frozenset[str]:
        # Looking spares the copying; the link decides.
        there = {name for name in contents if self._is_taken(name)}
        new = {name: content for name, content in contents.items() if name not in there}
        taken = self._place(new, os.link, unknown=unknown) if new else frozenset()
        return taken.union(there)

    def take_new(self, name: str, path: Path, check: Callable[[], object]) -> None:
        target = self.root / checked_name(name)
        if self._is_taken(name):
            raise AlreadyExistsError(f"{name} exists in {self.root}")
        try:
            with path.open("rb") as file:
                # Reading it for the check takes as long as a disk may take for it.
                _at_once([check, lambda: self._make_folders([target.parent], [file.fileno()])])
            try:
                self._in_its_folder(target, path, os.link)
            except FileExistsError:
                raise AlreadyExistsError(f"{name} exists in {self.root}") from None
            self._sync([target.parent])
        except OSError as e:
            if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise self._failed("storing", name, e) from e
            self.put_new(name, path)  # on another volume, or one without hard links: then it is copied

    def put(self, name: str, content: Content) -> None:
        self.replace_together({name: content})

    def replace_together(self, contents: Mapping[str, Content], *, unknown: bool = False) -> None:
        self._place(contents, os.replace, unknown=unknown)

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
        path = self.root / checked_name(name)
        try:
            if path.is_file():
                return True
            (self.root / _TMP).stat()  # or it is missing with all the others, see `_is_there`
        except OSError as e:
            raise self._failed("looking for", name, e) from e
        return False

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

    def _place(
        self, contents: Mapping[str, Content], place: Callable[[Path, Path], object], *, unknown: bool
    ) -> frozenset[str]:
        """Write each to a temporary file of this volume and put that in its place; return the names that were taken."""
        taken: set[str] = set()
        name = next(iter(contents))
        try:
            with contextlib.ExitStack() as stack:
                temporary = {}
                for name, content in contents.items():
                    path = self.root / _TMP / uuid4().hex
                    stack.callback(path.unlink, missing_ok=True)
                    temporary[name] = file = stack.enter_context(path.open("xb"))
                    _pour(content, file)
                    file.flush()
                folders = {(self.root / checked_name(name)).parent: None for name in contents}
                files = [file.fileno() for file in temporary.values()]
                if unknown:
                    made, unsynced = self._made(folders)
                else:
                    self._make_folders(folders, files)
                for name, file in temporary.items():
                    try:
                        self._in_its_folder(self.root / name, Path(file.name), place)
                    except FileExistsError:
                        taken.add(name)
                if unknown:
                    try:
                        self._sync(list(dict.fromkeys((*folders, *unsynced))), files)
                    except OSError:
                        for name in contents.keys() - taken:  # nobody may take them for stored
                            (self.root / name).unlink(missing_ok=True)
                        raise
                    self._known.update(made)
                else:
                    self._sync(list(folders))
        except OSError as e:
            raise self._failed("storing", name, e) from e
        return frozenset(taken)

    def _in_its_folder(self, path: Path, temporary: Path, place: Callable[[Path, Path], object]) -> None:
        """Put an object into its folder; once more if somebody removed the folder meanwhile."""
        try:
            place(temporary, path)
        except FileNotFoundError:
            self._known -= {path.parent, *path.parents}
            self._make_folders([path.parent])
            place(temporary, path)

    def _make_folders(self, folders: Iterable[Path], files: Sequence[int] = ()) -> None:
        """Create folders and their parents, and return when they are on disk, and these files too."""
        made, unsynced = self._made(folders)
        self._sync(unsynced, files)
        self._known.update(made)

    def _made(self, folders: Iterable[Path]) -> tuple[Sequence[Path], Sequence[Path]]:
        """Create folders and their parents; return which may not be on disk yet, and what is to be synced for that.

        A folder that exists already may be one that another process has made and not yet synced. Who finds a folder
        empty may remove it, so it is tried once more.
        """
        above = [[folder, *folder.parents] for folder in folders]
        needed = dict.fromkeys(new for line in above for new in reversed(line[: line.index(self.root)]))
        try:
            made = self._make(needed)
        except FileNotFoundError:
            self._known -= needed.keys()
            made = self._make(needed)
        return made, list(dict.fromkeys(folder.parent for folder in made))

    def _make(self, needed: Iterable[Path]) -> Sequence[Path]:
        new = [folder for folder in needed if folder not in self._known]
        for folder in new:
            folder.mkdir(exist_ok=True)
        return new

    def _sync(self, folders: Sequence[Path], files: Sequence[int] = ()) -> None:
        """Return when these files and what these folders name are on disk."""
        with contextlib.ExitStack() as stack:
            opened = []
            for folder in folders:
                opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
                stack.callback(os.close, opened[-1])
            _at_once([partial(os.fsync, file) for file in (*files, *opened)])

    def _is_taken(self, name: str) -> bool:
        try:
            return (self.root / checked_name(name)).exists()
        except OSError as e:
            raise self._failed("storing", name, e) from e

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


def _at_once(calls: Sequence[Callable[[], object]]) -> None:
    """Make these calls at the same time; return when all have ended, and raise what one has raised."""
    failed: list[Exception] = []

    def make(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  raised below, where it can be caught
            failed.append(error)

    def make_beside(call: Callable[[], object], running: LockType) -> None:
        make(call)
        running.release()

    # Not `threading.Thread`: its `start` waits until the thread runs, which takes as long as many a sync.
    others = [(call, allocate_lock()) for call in calls[1:]]
    for call, running in others:
        running.acquire()
        start_new_thread(make_beside, (call, running))
    for call in calls[:1]:
        make(call)
    for _, running in others:
        running.acquire()
    if failed:
        raise failed[0]
