"""From a study to a job of a server: snapshot the bundle, freeze the spec, upload what the server lacks.

A bundle travels only when the server does not have it; a table of parameters that is large goes before the job, by
digest. All of it can be repeated: submission has a key, and who asks twice with it gets the same job.
"""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import msgspec

from modelops.bundles import job_spec, load_manifest, pack_bundle, take_snapshot
from modelops.bundles.digest import is_digest
from modelops.client.entries import refuse_missing_entries
from modelops.client.http import READ_S, MissingUploadError
from modelops.client.served import who_asks
from modelops.client.study_files import completed
from modelops.errors import NotFoundError
from modelops.study.ids import BundleDigest, JobId
from modelops.study.parameter_sets import distinct_canonicals
from modelops.study.spec import encode_spec
from modelops.study.wording import shown_path
from modelops.volumes import temporary_files_are

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modelops.client.http import Answer
    from modelops.client.served import HttpSource
    from modelops.home import Home
    from modelops.study import Study
    from modelops.study.spec import JobSpec

MAX_BODY_BYTES: Final = 256 << 10  # parameters that take more travel as a file
UPLOAD_READ_S: Final = 300.0


class _Submitted(msgspec.Struct, frozen=True):
    job: str


@dataclass(frozen=True)
class Submission:
    """A study of which everything is known that a server is told. ``why``: where its bundle was."""

    spec: JobSpec
    canonicals: list[bytes]
    snapshot: Path
    why: str


def prepared(study: Study, home: Home, source: Callable[[], HttpSource]) -> Submission:
    """Snapshot the bundle and freeze the study. Asks the server (``source``) only for a bundle named by its digest.

    Raises
    ------
    RequestError, BundleError
        The study or the bundle is wrong.
    """
    named, path = str(study.bundle), Path(study.bundle)
    if path.exists():
        # First, as what is no bundle may be a home of 100 GB; and not of the snapshot: a folder without a name of its
        # own gives its.
        manifest = load_manifest(path)
        digest, snapshot = take_snapshot(path, home.cache / "bundles")
        why = f"submitted from {shown_path(path.resolve())}"
    elif is_digest(named):
        digest = BundleDigest(named)
        snapshot = source().fetch_bundle(digest)
        manifest = load_manifest(snapshot)
        why = f"submitted by digest {named}"
    else:
        raise NotFoundError(f"there is no bundle at {path}: no such file or folder")
    study = completed(study, manifest, snapshot)
    spec = job_spec(study, manifest, digest)
    refuse_missing_entries(spec, manifest, snapshot)
    # Not by way of an Arrow table: making one from Python values imports pandas where it is installed, for a second.
    return Submission(spec, distinct_canonicals(study.sets()), snapshot, why)


def submit(submission: Submission, source: HttpSource) -> JobId:
    """Have a server record a job, uploading what it lacks, and return the job's id.

    Raises
    ------
    RequestError
        The server refuses it; no job was recorded.
    """
    spec = msgspec.Raw(encode_spec(submission.spec))
    answer = ask_with_parameters(
        source, "/jobs", {"spec": spec, "why": submission.why}, submission.canonicals,
        upload=lambda: _upload_bundle(source, BundleDigest(submission.spec.bundle), submission.snapshot),
    )  # fmt: skip
    return JobId(answer.as_type(_Submitted).job)


def ask_with_parameters(
    source: HttpSource,
    path: str,
    asked: dict[str, Any],
    canonicals: Sequence[bytes],
    upload: Callable[[], None] = lambda: None,
) -> Answer:
    """Ask a server for what parameter sets are a part of; many of them go before, as a file.

    Parameters
    ----------
    upload
        Sends what else the server may lack.

    Raises
    ------
    RequestError
        The server refuses it.
    """
    with (
        temporary_files_are("the parameters of a study"),
        tempfile.SpooledTemporaryFile(MAX_BODY_BYTES) as file,
    ):
        body = _body(asked, canonicals, file)
        headers = {"Idempotency-Key": uuid.uuid4().hex, **who_asks()}
        read_s = UPLOAD_READ_S if file.tell() else READ_S  # very many sets take the server a while
        for _ in range(3):  # the bundle, then the parameters, may be missing
            try:
                return source.http.request("POST", path, body=body, headers=headers, read_s=read_s)
            except MissingUploadError as missing:
                if missing.error == "ParametersMissingError":
                    _put(source, f"/parameters/{_sha256(file)}", file)
                else:
                    upload()
    raise NotFoundError("the server loses what is uploaded; its log says more")


def _body(asked: dict[str, Any], canonicals: Sequence[bytes], file: IO[bytes]) -> bytes:
    if sum(map(len, canonicals)) > MAX_BODY_BYTES:
        from modelops.store.parameters import pour_canonicals

        pour_canonicals(file, canonicals)
        asked = {**asked, "parameters_sha256": _sha256(file)}
    elif canonicals:
        asked = {**asked, "parameters": [msgspec.Raw(canonical) for canonical in canonicals]}
    return msgspec.json.encode(asked)


def _upload_bundle(source: HttpSource, digest: BundleDigest, snapshot: Path) -> None:
    with temporary_files_are("an archive of the bundle"), tempfile.TemporaryFile() as archive:
        pack_bundle(snapshot, archive)
        _put(source, f"/bundles/{digest}", archive)


def _put(source: HttpSource, path: str, file: IO[bytes]) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    source.http.request("PUT", path, body=file, headers=headers, read_s=UPLOAD_READ_S)


def _sha256(file: IO[bytes]) -> str:
    file.seek(0)
    digest = sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
