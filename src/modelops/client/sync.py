"""Copy the files of a job into a folder, each appearing whole and verified or not at all.

While a file is copied it has no name where the file system allows that (``O_TMPFILE``): a copy that is killed
leaves nothing. What is copied stands in ``modelops-sync.json``, before it appears; so a file that no longer belongs to
the job, because its results were repaired or made anew, is taken away again, and nothing else ever is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Final

import msgspec

from modelops.errors import IntegrityError, RequestError, StorageError
from modelops.study.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.client.source import JobSource
    from modelops.client.status import JobFile
    from modelops.home import Home

LIST: Final = "modelops-sync.json"
TRIES: Final = 3
_BLOCK: Final = 1 << 20
_NO_FOLDER: Final = frozenset(
    {errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
)
_ADVICE: Final = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your space there",
    errno.EROFS: "have its volume mounted so that it can be written",
    errno.EACCES: "let yourself write there (chmod, chown)",
    errno.EPERM: "let yourself write there (chmod, chown, chattr)",
}


@dataclass(frozen=True)
class Synced:
    """What a copy did. ``copied``, ``unchanged``, ``removed``: names; ``final``: the job had ended."""

    folder: Path
    copied: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    n_bytes: int
    final: bool

    def then(self, later: Synced) -> Synced:
        """Return what this copy and a later one into the same folder did together."""
        copied = dict.fromkeys((*self.copied, *later.copied))
        for name in later.removed:
            copied.pop(name, None)
        return Synced(
            folder=self.folder,
            copied=tuple(copied),
            unchanged=tuple(name for name in later.unchanged if name not in copied),
            removed=tuple(dict.fromkeys((*self.removed, *later.removed))),
            n_bytes=self.n_bytes + later.n_bytes,
            final=later.final,
        )


class _Listed(msgspec.Struct, frozen=True):
    """``modelops-sync.json``: what was or is being copied from which job, digests by name; ``final``: all of it."""

    job: str
    final: bool
    files: dict[str, str]
    format: int = 1


def refuse_own_folder(home: Home, folder: Path) -> None:
    """Refuse a folder in which ModelOps keeps its own files: what is copied there could not be told from them.

    Raises
    ------
    RequestError
        It is that of the database, or lies in that of the objects, the cache, or the state.
    """
    kept = {"its objects": home.objects, "its cache": home.cache, "its state": home.state}
    if home.objects_at is not None and "://" not in home.objects_at:
        kept["the storage"] = Path(home.objects_at)
    wanted = folder.absolute().resolve()
    whose = next((what for what, path in kept.items() if wanted.is_relative_to(path.resolve())), None)
    if whose is None and wanted == home.data.resolve():
        whose = "its database"
    if whose is not None:
        raise RequestError(
            f"{folder} belongs to ModelOps itself, which keeps {whose} there; name a folder of your own"
        )


def sync_files(source: JobSource, job: JobId, folder: Path, *, only: str = "") -> Synced:
    """Copy into ``folder`` what the job has and the folder has not.

    Parameters
    ----------
    only
        Copy the files below this folder of the job's, without that prefix, and keep no list.

    Raises
    ------
    RequestError
        The folder holds the files of another job, is none and cannot be one, or a name that leads out of it was
        offered.
    StorageError
        The folder cannot be written.
    IntegrityError
        What arrives is again and again not what was listed.
    """
    with _writing(folder):
        before = {} if only else _listed(folder, job)  # first: then the job's own list is the newer one
    listing = source.files(job)
    wanted = {f.name.removeprefix(only): f for f in listing.files if f.name.startswith(only)}
    paths = {name: folder / _safe(name) for name in sorted(wanted)}
    digests = {name: wanted[name].sha256 for name in paths}
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not only and not digests.keys() <= before.keys():
            _list(folder, _Listed(job, False, before | digests))
    copied, unchanged, n_bytes = [], [], 0
    for name, path in paths.items():
        file = wanted[name]
        if _is_there(path, file):
            unchanged.append(name)
            continue
        _copy(source, job, file, path)
        copied.append(name)
        n_bytes += file.n_bytes
    with _writing(folder):
        removed = sorted(name for name in before if name not in wanted and (folder / _safe(name)).exists())
        for name in removed:
            (folder / _safe(name)).unlink(missing_ok=True)
        if not only:
            _list(folder, _Listed(job, listing.final, digests))
    return Synced(folder, tuple(copied), tuple(unchanged), tuple(removed), n_bytes, listing.final)


def _copy(source: JobSource, job: JobId, file: JobFile, path: Path) -> None:
    """Copy one file; what arrives damaged is asked for anew."""
    for _ in range(TRIES):
        with _writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _Nameless(path.parent) as part:
            digest, n = sha256(), 0
            for piece in source.pieces(job, file):
                digest.update(piece)
                n += len(piece)
                with _writing(path.parent):
                    part.file.write(piece)
            if n == file.n_bytes and digest.hexdigest() == file.sha256:
                with _writing(path.parent):
                    part.appear(path)
                return
    raise IntegrityError(
        f"{file.name} of job {job} arrives damaged: {n} bytes that do not have the digest which was recorded; "
        "'modelops jobs reconcile' compares what is stored with the records"
    )


def _is_there(path: Path, file: JobFile) -> bool:
    """Say whether the folder has the file already, byte for byte."""
    try:
        if path.stat().st_size != file.n_bytes:
            return False
        with path.open("rb") as f:
            return _digest(f) == file.sha256
    except OSError:  # what cannot be read is copied anew, and if it is in the way that says so
        return False


def _digest(f: IO[bytes]) -> str:
    digest = sha256()
    while block := f.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _listed(folder: Path, job: JobId) -> dict[str, str]:
    """Return what an earlier copy put here. Raises RequestError if it was of another job."""
    try:
        known = msgspec.json.decode((folder / LIST).read_bytes(), type=_Listed)
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError:
        raise RequestError(f"{folder / LIST} was not written by ModelOps; name another folder") from None
    if known.job != job:
        raise RequestError(
            f"{folder} holds the files of job {known.job}; name another folder for job {job}, so that they "
            "are not mixed"
        )
    return known.files


def _list(folder: Path, listed: _Listed) -> None:
    """Write the list. Raises RequestError if a copy of another job was faster."""
    _listed(folder, JobId(listed.job))
    _appear(folder / LIST, msgspec.json.encode(listed))


def _safe(name: str) -> PurePosixPath:
    """Refuse a name that would lead out of the folder: a server may not write where it likes."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name or "\\" in name:
        raise RequestError(f"the server names a file {name!r}, which does not stay in the folder")
    return path


def _appear(path: Path, content: bytes) -> None:
    with _Nameless(path.parent) as part:
        part.file.write(content)
        part.appear(path)


class _Nameless:
    """A file without a name, or where that cannot be a hidden one, until `appear` gives it its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self.file: IO[bytes]

    def __enter__(self) -> _Nameless:
        with _writing(self._folder):
            try:
                fd = os.open(self._folder, os.O_TMPFILE | os.O_RDWR, 0o666)
            except (AttributeError, OSError) as e:  # not Linux, or a file system that cannot
                if isinstance(e, OSError) and e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                    raise
                fd, name = tempfile.mkstemp(prefix=".modelops-", suffix=".part", dir=self._folder)
                self._path = Path(name)
            self.file = os.fdopen(fd, "w+b")
        return self

    def appear(self, path: Path) -> None:
        """Give the file its name, durable, in the place of what had it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if self._path is None:
            try:
                return self._link(path)
            except FileExistsError:  # the older one is replaced in one step
                self._path = path.with_name(f".{path.name}.{os.getpid()}")
                self._path.unlink(missing_ok=True)
                self._link(self._path)
        self._path.replace(path)
        self._path = None
        return None

    def _link(self, path: Path) -> None:
        fd = self.file.fileno()
        # Only with a descriptor does Python tell the kernel to follow the link in /proc; its value is not used.
        os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say in a sentence why a folder cannot be written, and what helps."""
    try:
        yield
    except IsADirectoryError as e:  # `os.replace` names the new name second
        raise RequestError(
            f"{e.filename2 or e.filename or folder} is a folder, where a file of the job belongs; move it away, or "
            "name another folder to copy to"
        ) from e
    except OSError as e:
        if e.errno in _NO_FOLDER:
            raise RequestError(
                f"{folder} is no folder to copy to, and cannot be made: {e.strerror}; name one, or a path where one "
                "can be made"
            ) from e
        advice = (
            f"{_ADVICE[e.errno]}, or name another folder" if e.errno in _ADVICE else "name another folder"
        )
        raise StorageError(
            f"{folder} cannot be written: {e.strerror or e}; {advice}. "
            "What was copied is whole, and the same command copies the rest"
        ) from e
