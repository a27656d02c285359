"""Checkpoints of replicates as objects: each is whole, or it does not exist. ``docs/reference/layout.md``.

The rules of the file:

- Bytes first, as pieces named by their SHA-256; then the manifest, which lists them. A checkpoint without a
  manifest is none, and one whose manifest or pieces are not what was written is passed over.
- A manifest refers to pieces of its own attempt only, and an attempt removes only what is older than itself.
  So two attempts at one replicate (one of them given up, and still running somewhere) cannot harm each other.
- The last two are kept. What is older is removed when a newer one is whole, manifests before pieces.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from modelops.errors import IntegrityError, NotFoundError, StorageError
from modelops.states import STORED, ReplicateStatus
from modelops.store.checkpoint_folder import FileThere, FolderThere, LinkThere, look_through, pieces_of
from modelops.store.objects import AlreadyExistsError
from modelops.store.segments import job_folder
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.store.contents import JobContents
    from modelops.store.objects import Objects
    from modelops.study.ids import AttemptId, JobId

log = logging.getLogger(__name__)
FORMAT: Final = 1
MANIFEST: Final = "manifest"
KEPT: Final = 2  # the newest, and the one before in case that one is damaged


class Place(NamedTuple):
    """Where a checkpoint lies below its replicate's folder. Later ones compare greater."""

    epoch: int
    number: int
    n: int
    name: str

    @classmethod
    def of_manifest(cls, name: str) -> Place | None:
        """Return the place of a manifest with this name below its replicate's folder; None if it is none."""
        parts = name.split("/")
        if len(parts) != 3 or parts[2] != MANIFEST:
            return None
        with suppress(ValueError):
            epoch, number = map(int, parts[0].split("-"))
            return cls(epoch, number, int(parts[1]), name)
        return None


class Piece(msgspec.Struct, frozen=True):
    """Bytes of a file. ``name``: of the object, below the replicate's folder."""

    name: str
    n_bytes: int
    sha256: str


class File(msgspec.Struct, frozen=True):
    """A file, made of its pieces in order."""

    path: str
    mode: int
    mtime_ns: int
    pieces: tuple[Piece, ...]


class Manifest(msgspec.Struct, frozen=True):
    """All that a checkpoint holds. ``name``: its own, below the replicate's folder."""

    name: str
    folders: tuple[FolderThere, ...] = ()
    links: tuple[LinkThere, ...] = ()
    files: tuple[File, ...] = ()
    format: int = FORMAT

    @property
    def names(self) -> set[str]:
        """The names of all its objects."""
        return {self.name, *(piece.name for file in self.files for piece in file.pieces)}


class _Head(msgspec.Struct, frozen=True):
    format: int


def sealed(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest: a line of JSON, and a line with its SHA-256."""
    body = msgspec.json.encode(manifest)
    return body + b"\n" + sha256(body).hexdigest().encode() + b"\n"


def unsealed(data: bytes, name: str) -> Manifest:
    """Return the manifest that these bytes hold.

    Raises
    ------
    IntegrityError
        They are not as they were written, or of another checkpoint, or of a later format.
    """
    body, _, seal = data.partition(b"\n")
    if seal != sha256(body).hexdigest().encode() + b"\n":
        raise IntegrityError("its manifest does not have the digest that ends it")
    try:
        found = msgspec.json.decode(body, type=_Head).format
        if found > FORMAT:
            raise IntegrityError(f"its format is {found}, this version of ModelOps reads {FORMAT}; upgrade")
        manifest = msgspec.json.decode(body, type=Manifest)
    except msgspec.MsgspecError as e:
        raise IntegrityError(f"its manifest is not as agreed: {e}") from e
    if manifest.name != name:
        raise IntegrityError(f"its manifest is that of {manifest.name}")
    return manifest


@dataclass
class ReplicateCheckpoints:
    """The checkpoints of one replicate, as one attempt sees and makes them.

    Parameters
    ----------
    folder
        Prefix of the names of the replicate's objects.
    attempt
        The attempt that makes new ones.
    patiently
        Calls a function that stores something, again and again for as long as storage is away.
    """

    objects: Objects
    folder: str
    attempt: AttemptId
    patiently: Callable[[Callable[[], object]], object] = lambda do: do()

    def __post_init__(self) -> None:
        self._n = 0
        self._held: list[Manifest] = []  # oldest first
        self._stale: list[str] = []  # names of what earlier attempts left

    # --- keeping

    def save(self, source: Path) -> Manifest:
        """Store what lies in a folder; return when it is durable.

        Raises
        ------
        CheckpointError
            It holds what cannot be kept, or too much.
        StorageError
            Storage is away, and patience at an end.
        """
        there = look_through(source)
        n = self._n + 1
        own = [m for m in self._held if m.name.startswith(f"{self.attempt}/")]
        known = {piece.sha256: piece for m in own for file in m.files for piece in file.pieces}
        files = tuple(self._save_file(source, file, n, known) for file in there.files)
        while True:
            manifest = Manifest(f"{self.attempt}/{n}/{MANIFEST}", there.folders, there.links, files)
            if self._put(manifest.name, sealed(manifest)):
                break
            n += 1  # this very attempt has run before, and Dask has begun it again
        self._n = n
        self._held.append(manifest)
        self._remove_older()
        return manifest

    def _save_file(self, source: Path, file: FileThere, n: int, known: dict[str, Piece]) -> File:
        pieces = []
        for data in pieces_of(source, file):
            digest = sha256(data).hexdigest()
            if digest not in known:
                piece = Piece(f"{self.attempt}/{n}/{digest}", len(data), digest)
                self._put(piece.name, data)
                known[digest] = piece
            pieces.append(known[digest])
        return File(file.path, file.mode, file.mtime_ns, tuple(pieces))

    def _put(self, name: str, data: bytes) -> bool:
        """Store an object; return whether it is there now (and not another one of that name)."""
        name = f"{self.folder}/{name}"
        try:
            self.patiently(lambda: self.objects.put_new(name, data))
        except AlreadyExistsError:  # stored by us, and the answer was lost; pieces have names of their own
            return name.endswith(sha256(data).hexdigest()) or self.objects.get(name) == data
        return True

    def _remove_older(self) -> None:
        """Remove all but the newest ones. What cannot be removed now is removed with the replicate's folder."""
        stale = set(self._stale)
        while len(self._held) > KEPT:
            gone = self._held.pop(0)
            if not self._is_of_younger(gone):
                stale |= gone.names
        for manifest in self._held:
            stale -= manifest.names
        self._stale = []
        try:
            for name in sorted(stale, key=lambda name: (not name.endswith(f"/{MANIFEST}"), name)):
                self.objects.delete(f"{self.folder}/{name}")
        except StorageError as e:
            log.warning("an old checkpoint could not be removed from %s: %s", self.folder, e)

    def _is_of_younger(self, manifest: Manifest) -> bool:
        """Say whether it was another attempt, begun after this one, that made a checkpoint: that one builds on it."""
        is_own = manifest.name.startswith(f"{self.attempt}/")
        return not is_own and not _is_before(manifest.name, self.attempt)

    # --- restoring

    def restore(self, target: Path) -> tuple[Manifest | None, list[str]]:
        """Make a folder with the newest whole checkpoint in it.

        Returns
        -------
            The checkpoint, None if there is none; and a sentence for each that was damaged and passed over.

        Raises
        ------
        StorageError
            Storage is away, or the folder cannot be written. Nothing of it is to be used then.
        """
        bad: dict[Place, str] = {}
        clear(target)
        while True:
            names = self._names()
            places = sorted(filter(None, map(Place.of_manifest, names)), reverse=True)
            place = next((p for p in places if p not in bad), None)
            restored = None
            if place is not None:
                try:
                    restored = self._restore(place, target)
                except (IntegrityError, NotFoundError) as e:
                    # Damaged; or removed since we looked, because a newer one took its place: look again.
                    bad[place] = str(e)
                    continue
            else:
                clear(target)  # of what was found to be damaged
            kept = restored.names if restored is not None else set()
            self._held = [restored] if restored is not None else []
            self._n = max((p.n for p in places if p.name.startswith(f"{self.attempt}/")), default=0)
            self._stale = [name for name in names if name not in kept and _is_before(name, self.attempt)]
            return restored, [f"checkpoint {p.name}: {why}" for p, why in bad.items() if p in places]

    def _names(self) -> list[str]:
        return [name.removeprefix(f"{self.folder}/") for name in self.objects.list(self.folder)]

    def _get(self, name: str) -> bytes:
        return self.objects.get(f"{self.folder}/{name}")

    def _restore(self, place: Place, target: Path) -> Manifest:
        manifest = unsealed(self._get(place.name), place.name)
        try:
            clear(target)
            for folder in manifest.folders:
                _within(target, folder.path).mkdir()
            for file in manifest.files:
                self._restore_file(file, _within(target, file.path))
            for link in manifest.links:
                _within(target, link.path).symlink_to(link.target)
            for folder in reversed(manifest.folders):
                _within(target, folder.path).chmod(folder.mode)
        except OSError as e:
            raise StorageError(f"restoring a checkpoint into {target} failed: {e}") from e
        return manifest

    def _restore_file(self, file: File, path: Path) -> None:
        with path.open("xb") as f:
            for piece in file.pieces:
                data = self._get(piece.name)
                if len(data) != piece.n_bytes or sha256(data).hexdigest() != piece.sha256:
                    raise IntegrityError(f"{piece.name} does not have its digest")
                f.write(data)
        path.chmod(file.mode)
        os.utime(path, ns=(file.mtime_ns, file.mtime_ns))


def _within(target: Path, path: str) -> Path:
    if not all(part not in ("", ".", "..") for part in path.split("/")):
        raise IntegrityError(f"its manifest names {path!r}")
    return target / path


def clear(folder: Path) -> None:
    """Make a folder anew, empty, whatever a model has left there. Raises StorageError."""
    remove(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise StorageError(f"making {folder} failed: {e}") from e


def remove(folder: Path) -> None:
    """Remove a folder, whatever a model has left there or put in its place. Raises StorageError."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink(missing_ok=True)
            return
        folder.chmod(0o700)
        for parent, names, _ in os.walk(folder):
            for path in (Path(parent, name) for name in names):
                if not path.is_symlink():  # it is listed next: the model may have made it unreadable
                    path.chmod(0o700)
        shutil.rmtree(folder)
    except OSError as e:
        raise StorageError(f"removing {folder} failed: {e}") from e


def _is_before(name: str, attempt: AttemptId) -> bool:
    """Say whether an object is of an attempt that was begun before this one."""
    with suppress(ValueError):
        epoch, number = map(int, name.split("/")[0].split("-"))
        own_epoch, own_number = map(int, attempt.split("-"))
        return (epoch, number) < (own_epoch, own_number)
    return False


_OVER: Final = (ReplicateStatus.SUCCEEDED, ReplicateStatus.NOT_NEEDED)


def remove_settled(contents: JobContents) -> None:
    """Remove checkpoints of replicates that have succeeded or are not needed; others may go on from theirs later."""
    prefix = f"{job_folder(contents.job)}/checkpoints"
    firsts = {name.removeprefix(f"{prefix}/").split("/")[0] for name in contents.objects.list(prefix)}
    left = Ranges.of(int(first) for first in firsts if first.isdecimal())
    for number, ref in enumerate(contents.segments):
        if here := left & Ranges(ref.ranges):
            segment = contents.read(number)
            for index in here:
                if STORED[segment.status[segment.row_of(index)]] in _OVER:
                    contents.objects.remove_folder(f"{prefix}/{index}")


def remove_all(objects: Objects, job: JobId) -> None:
    """Remove all checkpoints of a job: what they were made by does not count any more."""
    objects.remove_folder(f"{job_folder(job)}/checkpoints")


def remove_beyond(objects: Objects, job: JobId, size: int) -> None:
    """Remove checkpoints of indices that a job with a line of this size does not have."""
    prefix = f"{job_folder(job)}/checkpoints"
    firsts = {name.removeprefix(f"{prefix}/").split("/")[0] for name in objects.list(prefix)}
    for first in firsts:
        if first.isdecimal() and int(first) >= size:
            objects.remove_folder(f"{prefix}/{first}")
