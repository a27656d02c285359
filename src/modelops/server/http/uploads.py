"""The routes of uploads: archives of bundles, and files of parameter sets. Neither goes through memory."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Final

import msgspec

from modelops.errors import StorageError
from modelops.server.http.api import body_pieces, json_response
from modelops.server.http.files import send_object
from modelops.server.http.operations import BINARY, Answer, Body, Operation, Place, at
from modelops.store.fetch import bundle_object
from modelops.store.tokens import TokenScope
from modelops.study.ids import BundleDigest

if TYPE_CHECKING:
    from starlette.responses import Response

    from modelops.server.http.api import Api
    from modelops.server.http.operations import Call

MAX_BUNDLE_BYTES: Final = 1 << 30
MAX_PARAMETER_BYTES: Final = 1 << 30
PIECE_BYTES: Final = 1 << 20
_HEX: Final = "^[0-9a-f]{64}$"


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle."""

    digest: Annotated[str, at(Place.PATH, "Digest of a bundle.", pattern=_HEX)]


class BundlePart(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle, or a part of its archive."""

    digest: Annotated[str, at(Place.PATH, "Digest of a bundle.", pattern=_HEX)]
    range: Annotated[str, at(Place.HEADER, "The part that is wanted (RFC 9110).")] = msgspec.field(
        name="Range", default=""
    )


class ParameterFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of parameter sets."""

    sha256: Annotated[str, at(Place.PATH, "SHA-256 of the file.", pattern=_HEX)]


class Stored(msgspec.Struct, frozen=True):
    """What is stored now. ``new``: it was not before."""

    digest: str
    new: bool


async def get_bundle(api: Api, call: Call) -> Response:
    """Send the archive of a bundle."""
    digest = BundleDigest(call.given.digest)
    n_bytes = await api.stored(api.service.uploads.bundle_bytes, digest)
    return await send_object(
        api, call.request, api.service.objects, bundle_object(digest), n_bytes, BINARY, digest
    )


async def put_bundle(api: Api, call: Call) -> Response:
    """Take the archive of a bundle, and keep it if it is what it should be."""
    uploads, digest = api.service.uploads, call.given.digest
    if await api.stored(uploads.has_bundle, digest):
        return json_response(Stored(digest, new=False))
    with uploads.receiving() as file:
        await _receive(api, call, file)
        new = await api.slow(uploads.add_bundle, digest, Path(file.name))
    return json_response(Stored(digest, new), 201 if new else 200)


async def put_parameters(api: Api, call: Call) -> Response:
    """Take a file of parameter sets, and keep it until a submission names it."""
    uploads, digest = api.service.uploads, call.given.sha256
    with uploads.receiving() as file:
        await _receive(api, call, file)
        new = await api.slow(uploads.add_parameters, digest, file)
    return json_response(Stored(digest, new), 201 if new else 200)


async def _receive(api: Api, call: Call, file: IO[bytes]) -> None:
    """Write the body to a file, a megabyte at a time."""
    body = call.operation.body
    waiting = bytearray()
    async for piece in body_pieces(call.request, body.max_bytes if body is not None else 0):
        waiting += piece
        if len(waiting) >= PIECE_BYTES:
            await api.quick(_write, file, bytes(waiting))
            waiting.clear()
    await api.quick(_write, file, bytes(waiting))


def _write(file: IO[bytes], data: bytes) -> None:
    try:
        file.write(data)
        file.flush()
    except OSError as e:
        advice = "; free some space there" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(
            f"the upload cannot be kept in {Path(file.name).parent}: {e.strerror}{advice}"
        ) from e


_ANSWERS: Final = {
    201: Answer("Checked and stored.", Stored),
    200: Answer("It was stored before; nothing of the body was needed.", Stored),
}
OPERATIONS: Final[tuple[Any, ...]] = (
    Operation(
        "GET", "/v1/bundles/{digest}", "get_bundle", "Read the archive of a bundle.", get_bundle,
        {
            200: Answer("The archive.", None, BINARY, {"Accept-Ranges": "`bytes`."}),
            206: Answer("The part that was asked for.", None, BINARY, {"Content-Range": "Which part it is."}),
        },
        BundlePart, problems=(404, 416),
    ),
    Operation(
        "PUT", "/v1/bundles/{digest}", "put_bundle", "Upload the archive of a bundle.", put_bundle, _ANSWERS, Bundle,
        Body(None, BINARY, MAX_BUNDLE_BYTES), problems=(404, 409), scope=TokenScope.SUBMIT,
    ),
    Operation(
        "PUT", "/v1/parameters/{sha256}", "put_parameters", "Upload a parameters.parquet for one submission.",
        put_parameters, _ANSWERS, ParameterFile, Body(None, BINARY, MAX_PARAMETER_BYTES), problems=(404, 409),
        scope=TokenScope.SUBMIT,
    ),
)  # fmt: skip
