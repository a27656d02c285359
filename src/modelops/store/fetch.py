"""Bring a job's bundle from storage to this machine's cache of snapshots."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.bundles import snapshot_changed, unpack_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.store.objects import Objects
    from modelops.study.ids import BundleDigest


def bundle_object(digest: BundleDigest) -> str:
    """Return the name of the object that holds a packed bundle."""
    return f"v1/bundles/{digest}"


def fetch_snapshot(objects: Objects, digest: BundleDigest, cache: Path) -> Path:
    """Return the read-only folder of a bundle, unpacked from storage unless it is here and whole.

    Raises
    ------
    NotFoundError
        Storage does not have the bundle.
    BundleError
        What is stored under its name is not that bundle.
    """
    return unpacked(lambda: objects.stream(bundle_object(digest)), digest, cache)


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
