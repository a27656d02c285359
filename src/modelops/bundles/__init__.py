"""Take a folder or file from a bundle's author; hand on its manifest, its digest and a read-only snapshot."""

from modelops.bundles.files import bundle_digest
from modelops.bundles.job import job_spec
from modelops.bundles.manifest import Manifest, load_manifest, manifest_of_snapshot
from modelops.bundles.pack import pack_bundle, unpack_bundle
from modelops.bundles.snapshot import disown_snapshot, snapshot_changed, snapshot_mark, take_snapshot

__all__ = [
    "Manifest",
    "bundle_digest",
    "disown_snapshot",
    "job_spec",
    "load_manifest",
    "manifest_of_snapshot",
    "pack_bundle",
    "snapshot_changed",
    "snapshot_mark",
    "take_snapshot",
    "unpack_bundle",
]
