"""Turn a study into a stored job: snapshot the bundle, freeze the spec, write the parameters.

Bytes first, row second: the job exists when its row does, and then everything it needs is stored.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.bundles import job_spec, load_manifest, pack_bundle, take_snapshot
from modelops.client.entries import refuse_missing_entries
from modelops.client.study_files import completed
from modelops.store import AlreadyExistsError
from modelops.store.fetch import bundle_object
from modelops.store.parameters import write_parameters
from modelops.study.ids import JobId, new_job_id
from modelops.study.parameter_sets import distinct_canonicals
from modelops.study.spec import encode_spec
from modelops.study.wording import shown_path
from modelops.who import whoami

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.home import Home
    from modelops.store import Objects, Records
    from modelops.study import Study
    from modelops.study.ids import BundleDigest
    from modelops.study.spec import JobSpec


@dataclass(frozen=True)
class PreparedJob:
    """A job whose row is written and that no driver has taken yet."""

    job: JobId
    spec: JobSpec


def prepare_job(
    study: Study,
    home: Home,
    records: Records,
    objects: Objects,
    *,
    reserve: Callable[[JobId], None] = lambda _job: None,
    check: Callable[[JobSpec], None] = lambda _spec: None,
) -> PreparedJob:
    """Store everything a job needs, then its row.

    ``reserve`` is called before there is a row, so that nobody else can drive the job, and ``check`` before anything is
    stored: it may refuse the job.

    Raises
    ------
    RequestError
        The study or the bundle is wrong; no job was recorded.
    """
    # First, as what is no bundle may be large; and not of the snapshot: a folder without a name of its own gives its.
    manifest = load_manifest(Path(study.bundle))
    digest, snapshot = take_snapshot(Path(study.bundle), home.cache / "bundles")
    study = completed(study, manifest, snapshot)
    spec = job_spec(study, manifest, digest)
    refuse_missing_entries(spec, manifest, snapshot)
    check(spec)
    canonicals = distinct_canonicals(study.sets())
    job = new_job_id()
    store_bundle(objects, snapshot, digest)
    spec_bytes = encode_spec(spec)
    write_parameters(objects, job, canonicals, beside={"study.json": spec_bytes})
    reserve(job)
    records.create_job(
        job,
        spec_bytes,
        name=spec.name,
        bundle=digest,
        who=whoami(),
        why=f"submitted from {shown_path(Path(study.bundle).resolve())}",
    )
    return PreparedJob(job, spec)


def store_bundle(objects: Objects, snapshot: Path, digest: BundleDigest) -> None:
    """Keep the bundle's bytes, so that any worker and any later day can run the job."""
    name = bundle_object(digest)
    if not objects.exists(name):
        archive = io.BytesIO()
        pack_bundle(snapshot, archive)
        with contextlib.suppress(AlreadyExistsError):  # somebody stored the same bytes meanwhile
            objects.put_new(name, archive.getvalue())
