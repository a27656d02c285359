"""What clients upload before they submit: archives of bundles, and files of parameter sets. Nothing is believed.

Parameter files wait in ``v1/uploads/<day>/<sha256>`` until a submission names them; after the next day
they are removed.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from datetime import timedelta
from hashlib import sha256
from typing import IO, TYPE_CHECKING, Final

from modelops.bundles import load_manifest, manifest_of_snapshot
from modelops.bundles.digest import is_digest
from modelops.bundles.pack import MAX_BYTES, MAX_FILES, check_archive, unpack_bundle
from modelops.bundles.snapshot import is_whole_snapshot
from modelops.errors import (
    BundleError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    ParametersMissingError,
    StorageError,
)
from modelops.store import AlreadyExistsError
from modelops.store.fetch import STORE_AGAIN, bundle_object, fetch_snapshot
from modelops.study.ids import BundleDigest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from pathlib import Path

    from modelops.bundles import Manifest
    from modelops.store import Objects

_FOLDER: Final = "v1/uploads"
_OLD_S: Final = 86_400.0
REMOVE_EVERY_S: Final = 3600.0


class Uploads:
    """Uploaded bundles and parameter files.

    Parameters
    ----------
    folder
        Where uploads are received; made if absent.
    snapshots
        The cache of unpacked bundles.
    max_files, max_bytes
        What an unpacked bundle may hold.
    """

    def __init__(
        self,
        objects: Objects,
        folder: Path,
        snapshots: Path,
        clock: Callable[[], datetime],
        *,
        max_files: int = MAX_FILES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.folder = folder
        self._objects, self._snapshots, self._clock = objects, snapshots, clock
        self._removed_at = -REMOVE_EVERY_S
        self._limits = {"max_files": max_files, "max_bytes": max_bytes}

    @contextlib.contextmanager
    def receiving(self) -> Iterator[IO[bytes]]:
        """Give a file to receive an upload in; it is gone when the block ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.NamedTemporaryFile(dir=self.folder, prefix="upload-")  # noqa: SIM115  closed below
        except OSError as e:
            raise StorageError(f"no upload can be received in {self.folder}: {e.strerror}") from e
        with file:
            yield file

    # Bundles

    def bundle_bytes(self, digest: str) -> int:
        """Return how long the stored archive of a bundle is. Raises NotFoundError."""
        try:
            return self._objects.size(bundle_object(_digest(digest)))
        except NotFoundError:
            raise NotFoundError(f"there is no bundle {digest} here; {STORE_AGAIN}") from None

    def has_bundle(self, digest: str) -> bool:
        """Say whether the archive of a bundle is stored."""
        return self._objects.exists(bundle_object(_digest(digest)))

    def add_bundle(self, digest: str, archive: Path) -> bool:
        """Check an archive, unpack it into the cache, and store it; False if it was stored before.

        Raises
        ------
        ConflictError
            It is damaged, or has another digest.
        BundleError
            It holds what no bundle may hold, more than the limits allow, or no manifest.
        """
        wanted = _digest(digest)
        try:
            if is_whole_snapshot(self._snapshots / wanted):  # then unpacking would not look at the archive
                check_archive(archive, wanted, **self._limits)
            snapshot = unpack_bundle(archive, wanted, self._snapshots, **self._limits)
        except (IntegrityError, BundleError) as e:
            kind = BundleError if isinstance(e, BundleError) else ConflictError
            raise kind(str(e).replace(str(archive), "the archive")) from e
        try:
            load_manifest(snapshot)
        except BundleError as e:
            raise BundleError(str(e).replace(f"{snapshot}/", "")) from e
        try:
            self._objects.put_new(bundle_object(wanted), archive)
        except AlreadyExistsError:
            return False
        return True

    def manifest(self, digest: str) -> Manifest:
        """Return what a stored bundle says of itself. Raises NotFoundError."""
        return manifest_of_snapshot(fetch_snapshot(self._objects, _digest(digest), self._snapshots))

    # Parameter files

    def add_parameters(self, digest: str, file: IO[bytes]) -> bool:
        """Keep a file of parameter sets until it is asked for; False if it is here already.

        Raises
        ------
        ConflictError
            It has another digest.
        """
        if time.monotonic() - self._removed_at > REMOVE_EVERY_S:
            self._removed_at = time.monotonic()
            self.remove_old()
        file.seek(0)
        actual = sha256()
        while piece := file.read(1 << 20):
            actual.update(piece)
        if actual.hexdigest() != digest:
            raise ConflictError(f"the parameter file has the SHA-256 {actual.hexdigest()}, not {digest}")
        if self._parameters_object(digest) is not None:
            return False
        file.seek(0)
        with contextlib.suppress(AlreadyExistsError):  # the same bytes, a moment ago
            self._objects.put_new(self._names(digest)[0], iter(lambda: file.read(1 << 20), b""))
        return True

    @contextlib.contextmanager
    def parameters(self, digest: str) -> Iterator[IO[bytes]]:
        """Open an uploaded file of parameter sets.

        Raises
        ------
        ParametersMissingError
            It is not, or no longer, here.
        """
        name = self._parameters_object(digest) if is_digest(digest) else None
        if name is None:
            raise ParametersMissingError(
                f"the server does not have, or no longer has, the parameters {digest}; upload the file to "
                f"/v1/parameters/{digest}, then submit again"
            )
        with self.receiving() as file:
            for piece in self._objects.stream(name):
                file.write(piece)
            file.seek(0)
            yield file

    def remove_old(self) -> None:
        """Remove parameter files of before yesterday, and what a server that was killed was receiving."""
        keep = {name.split("/")[-2] for name in self._names("")}
        for name in self._objects.list(_FOLDER):
            if name.split("/")[-2] not in keep:
                self._objects.delete(name)
        for left in self.folder.glob("upload-*") if self.folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _OLD_S:
                    left.unlink()

    def _names(self, digest: str) -> list[str]:
        now = self._clock()
        days = (now, now - timedelta(days=1), now + timedelta(days=1))  # of a clock that was set back, too
        return [f"{_FOLDER}/{day:%Y%m%d}/{digest}" for day in days]

    def _parameters_object(self, digest: str) -> str | None:
        return next((name for name in self._names(digest) if self._objects.exists(name)), None)


def _digest(text: str) -> BundleDigest:
    if not is_digest(text):
        raise NotFoundError(f"there is no bundle {text!r}: a digest has 64 hexadecimal digits")
    return BundleDigest(text)
