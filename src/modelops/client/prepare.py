"""Turn a study into a stored job: snapshot the bundle, freeze the spec, write the parameters.

Bytes first, row second: the job exists when its row does, and then everything it needs is stored.
"""

from __future__ import annotations

import contextlib
import getpass
import io
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from modelops.bundles import (
    Manifest,
    job_spec,
    load_manifest,
    pack_bundle,
    snapshot_changed,
    snapshot_mark,
    take_snapshot,
)
from modelops.client.study_files import completed
from modelops.store import AlreadyExistsError
from modelops.store.fetch import bundle_object, fetch_snapshot
from modelops.store.parameters import write_parameters
from modelops.store.segments import job_folder
from modelops.study import parameter_table
from modelops.study.ids import BundleDigest, JobId, new_job_id

if TYPE_CHECKING:
    from modelops.home import Home
    from modelops.store import Objects, Records
    from modelops.study import Study
    from modelops.study.spec import JobSpec


@dataclass(frozen=True)
class PreparedJob:
    """A job whose row is written and that no driver has taken yet."""

    job: JobId
    spec: JobSpec
    manifest: Manifest
    snapshot: Path
    snapshot_mark: str

    def bundle_changes(self) -> list[str]:
        """Return how the bundle's snapshot differs from what it was when the job was prepared."""
        if snapshot_mark(self.snapshot) != self.snapshot_mark:
            return ["it was made anew meanwhile, as another job had found it changed"]
        return snapshot_changed(self.snapshot)

    def with_fresh_snapshot(self, home: Home, objects: Objects) -> PreparedJob:
        """Return the same job over a snapshot that was unpacked from storage, unless the one here is whole."""
        snapshot = fetch_snapshot(objects, BundleDigest(self.spec.bundle), home.cache / "bundles")
        return replace(self, snapshot=snapshot, snapshot_mark=snapshot_mark(snapshot))


def prepare_job(study: Study, home: Home, records: Records, objects: Objects) -> PreparedJob:
    """Store everything a job needs, then its row.

    Raises
    ------
    RequestError
        The study or the bundle is wrong; no job was recorded.
    """
    digest, snapshot = take_snapshot(Path(study.bundle), home.cache / "bundles")
    mark = snapshot_mark(snapshot)
    manifest = load_manifest(
        Path(study.bundle)
    )  # not of the snapshot: a folder without a name of its own gives its
    study = completed(study, manifest, snapshot)
    spec = job_spec(study, manifest, digest)
    parameters = parameter_table(study.sets())  # refuses duplicates
    job = new_job_id()
    store_bundle(objects, snapshot, digest)
    write_parameters(objects, job, (text.encode() for text in parameters["canonical"].to_pylist()))
    spec_bytes = msgspec.json.encode(spec)
    objects.put_new(f"{job_folder(job)}/study.json", spec_bytes)
    records.create_job(
        job,
        spec_bytes,
        name=spec.name,
        bundle=digest,
        who=whoami(),
        why=f"submitted from {Path(study.bundle).resolve()}",
    )
    return PreparedJob(job, spec, manifest, snapshot, mark)


def store_bundle(objects: Objects, snapshot: Path, digest: BundleDigest) -> None:
    """Keep the bundle's bytes, so that any worker and any later day can run the job."""
    name = bundle_object(digest)
    if not objects.exists(name):
        archive = io.BytesIO()
        pack_bundle(snapshot, archive)
        with contextlib.suppress(AlreadyExistsError):  # somebody stored the same bytes meanwhile
            objects.put_new(name, archive.getvalue())


def whoami() -> str:
    """Return user and host, for the record of who did something."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
