"""Bring a job's bundle from storage to this machine's cache of snapshots."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelops.bundles import snapshot_changed, unpack_bundle
from modelops.bundles.pack import check_archive
from modelops.errors import BundleError, IntegrityError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.store.objects import Objects
    from modelops.study.ids import BundleDigest

STORE_AGAIN: Final = "submit a study from the bundle's folder, unchanged, and it is stored again"


def bundle_object(digest: BundleDigest) -> str:
    """Return the name of the object that holds a packed bundle."""
    return f"v1/bundles/{digest}"


def fetch_snapshot(objects: Objects, digest: BundleDigest, cache: Path) -> Path:
    """Return the read-only folder of a bundle, unpacked from storage unless it is here and whole.

    Raises
    ------
    NotFoundError
        Storage does not have the bundle.
    IntegrityError
        What is stored under its name is not that bundle.
    """
    name = bundle_object(digest)
    try:
        return unpacked(lambda: objects.stream(name), digest, cache)
    except NotFoundError as error:
        raise NotFoundError(f"the stored bundle is gone: {error}; {STORE_AGAIN}") from error
    except (BundleError, IntegrityError) as error:
        raise IntegrityError(
            f"the bundle's archive {name} is damaged: {error}; 'modelops jobs reconcile' removes it, then {STORE_AGAIN}"
        ) from error


def check_stored_bundle(objects: Objects, digest: BundleDigest) -> None:
    """Read the archive of a bundle. Raises NotFoundError, and IntegrityError if it is not that bundle."""
    name = bundle_object(digest)
    with tempfile.NamedTemporaryFile(prefix="modelops-archive-") as archive:
        for piece in objects.stream(name):
            archive.write(piece)
        archive.flush()
        try:
            check_archive(Path(archive.name), digest)
        except (BundleError, IntegrityError) as error:
            raise IntegrityError(str(error).replace(archive.name, name)) from error


def unpacked(pieces: Callable[[], Iterator[bytes]], digest: BundleDigest, cache: Path) -> Path:
    """Return the snapshot of this digest; unless it is here and whole, unpack the archive that ``pieces`` yields."""
    place = cache / digest
    if place.is_dir() and not snapshot_changed(place):
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, prefix=".fetch-") as archive:
        for piece in pieces():
            archive.write(piece)
        archive.flush()
        return unpack_bundle(Path(archive.name), digest, cache)
