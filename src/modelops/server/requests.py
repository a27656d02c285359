"""What clients ask for, as it comes over the wire, and what tells one request from another."""

from __future__ import annotations

import contextlib
from hashlib import sha256
from typing import Annotated, Any, TypeVar

import msgspec

from modelops.server.submission import refuse_newer
from modelops.study.spec import JobSpec

T = TypeVar("T")
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
        return _decoded(data, SubmitRequest)
    except msgspec.ValidationError:
        with contextlib.suppress(msgspec.ValidationError):
            refuse_newer(msgspec.json.decode(data, type=_AnySpec).spec.format)
        raise


def decode_extension(data: bytes) -> ExtendRequest:
    """Read what a job is to have more. Raises msgspec.DecodeError."""
    return _decoded(data, ExtendRequest)


def _decoded(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        # The second error is raised: it is the first one again, unless that was about a whole number.
        return msgspec.json.decode(with_integers(data), type=kind)


def with_integers(data: bytes) -> bytes:
    """Write whole numbers without a fraction: to JSON Schema ``4.0`` is an integer, too.

    Not so in ``parameters``, where 1 and 1.0 differ, and in ``min_success``, where they mean different things.
    """
    parts = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    for key, part in parts.items():
        if key != "parameters":
            parts[key] = msgspec.Raw(msgspec.json.encode(_whole(msgspec.json.decode(part))))
    return msgspec.json.encode(parts)


def _whole(value: Any) -> Any:
    match value:
        case float():
            return int(value) if value.is_integer() else value
        case list():
            return [_whole(v) for v in value]
        case dict():
            return {k: v if k == "min_success" else _whole(v) for k, v in value.items()}
        case _:
            return value


class _AnyForm(msgspec.Struct):
    format: int


class _AnySpec(msgspec.Struct):
    spec: _AnyForm


def _digest_of(job: str, request: ResumeRequest | ExtendRequest) -> str:
    kind = type(request).__name__
    return sha256(msgspec.json.encode((kind, job, request), order="deterministic")).hexdigest()
