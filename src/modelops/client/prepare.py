"""Turn a study into a stored job: snapshot the bundle, freeze the spec, write the parameters.

Bytes first, row second: the job exists when its row does, and then everything it needs is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from modelops.bundles import Manifest, load_manifest, pack_bundle, take_snapshot
from modelops.store.layout import bundle_object, job_object
from modelops.store.parameters import write_parameters
from modelops.study import job_spec, parameter_rows
from modelops.study.ids import BundleDigest, JobId, new_job_id

if TYPE_CHECKING:
    from pathlib import Path

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


def prepare_job(study: Study, home: Home, records: Records, objects: Objects) -> PreparedJob:
    """Store everything a job needs, then its row.

    Raises
    ------
    RequestError
        The study or the bundle is wrong; nothing was stored.
    """
    source = study.bundle_path()
    snapshot, digest = take_snapshot(source, home.cache / "bundles")
    manifest = load_manifest(snapshot)
    rows = parameter_rows(study, manifest)
    spec = job_spec(study, manifest, digest, n_params=len(rows))
    job = new_job_id()
    store_bundle(objects, snapshot, digest)
    write_parameters(objects, job, rows)
    objects.put_new(job_object(job, "study.json"), msgspec.json.encode(spec))
    records.create_job(job, name=spec.name, bundle=digest, n_replicates=spec.line.size, source=str(source))
    return PreparedJob(job, spec, manifest, snapshot)


def store_bundle(objects: Objects, snapshot: Path, digest: BundleDigest) -> None:
    """Keep the bundle's bytes, so that any worker and any later day can run the job."""
    name = bundle_object(digest)
    if not objects.exists(name):
        objects.put_new(name, pack_bundle(snapshot), existing_ok=True)
