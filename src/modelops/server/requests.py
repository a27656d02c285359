"""What clients ask for, as it comes over the wire, and what tells one request from another."""

from __future__ import annotations

import contextlib
from hashlib import sha256
from typing import Annotated

import msgspec

from modelops.study.spec import JobSpec, decode_spec

ObjectText = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]


class SubmitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A study that leaves nothing open.

    ``spec``: what decides the results. ``parameters``: one JSON object for each parameter set, in canonical form;
    or ``parameters_sha256``, the digest of a file that was uploaded. ``why``: for the job's story.
    """

    spec: JobSpec
    parameters: list[ObjectText] | None = None
    parameters_sha256: str | None = None
    why: str = ""

    def digest(self) -> str:
        """Return what tells this request from another."""
        whole = sha256(msgspec.json.encode(self.spec, order="deterministic"))
        for part in (*(self.parameters or ()), (self.parameters_sha256 or "").encode()):
            whole.update(len(part).to_bytes(8, "little") + bytes(part))
        return whole.hexdigest()


class ResumeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``failed``: try those again, too, whose outcome is a failure."""

    failed: bool = False

    def digest(self, job: str) -> str:
        """Return what tells this request about a job from another."""
        return _digest_of(job, self)


class ExtendRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job is to have more.

    ``replicates``: of each parameter set afterwards, old and new. ``parameters``: sets to add, one JSON object each;
    or ``parameters_sha256``, the digest of a file that was uploaded. ``seeds``: of the added replicates, for a job
    with explicit seeds.
    """

    replicates: int | None = None
    parameters: list[ObjectText] | None = None
    parameters_sha256: str | None = None
    seeds: list[int] | None = None

    def digest(self, job: str) -> str:
        """Return what tells this request about a job from another."""
        return _digest_of(job, self)


def decode_submission(data: bytes) -> SubmitRequest:
    """Read a submission; a spec of a newer ModelOps is refused with a sentence before it is misunderstood.

    Raises
    ------
    msgspec.DecodeError
        It is no JSON, or not of this form.
    RequestError
        It is of a newer form.
    """
    try:
        return msgspec.json.decode(data, type=SubmitRequest)
    except msgspec.ValidationError:
        with contextlib.suppress(msgspec.ValidationError):
            decode_spec(bytes(msgspec.json.decode(data, type=_AnySpec).spec))
        raise


class _AnySpec(msgspec.Struct):
    spec: msgspec.Raw


def _digest_of(job: str, request: ResumeRequest | ExtendRequest) -> str:
    kind = type(request).__name__
    return sha256(msgspec.json.encode((kind, job, request), order="deterministic")).hexdigest()
