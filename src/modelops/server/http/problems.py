"""Errors as RFC 9457 problems: the one place where the tree of errors becomes HTTP statuses."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.responses import Response

from modelops.errors import (
    BundleError,
    BundleMissingError,
    ClusterError,
    ConflictError,
    IntegrityError,
    ModelOpsError,
    NotFoundError,
    ParametersMissingError,
    QueueFullError,
    RequestError,
    RetryableError,
    StudyDamagedError,
)
from modelops.store import AlreadyExistsError, ChangedMeanwhileError

if TYPE_CHECKING:
    from collections.abc import Mapping

MEDIA_TYPE: Final = "application/problem+json"


class MalformedRequestError(RequestError):
    """The request is not as the schema says."""


class UnauthorizedError(RequestError):
    """The request has no token, or a wrong one."""


class ForbiddenError(RequestError):
    """The token does not allow this."""

    def __init__(self, name: str, needed: str) -> None:
        super().__init__(name, needed)
        self.name, self.needed = name, needed

    def __str__(self) -> str:
        return f"the token {self.name!r} has not the scope '{self.needed}', which this needs"


class WrongHostError(RequestError):
    """The request is for another host than this server answers for."""


class NoSuchRouteError(NotFoundError):
    """Nothing has this path."""


class MethodNotAllowedError(RequestError):
    """The path does not know this method."""

    def __init__(self, path: str, method: str, known: tuple[str, ...]) -> None:
        super().__init__(path, method, known)
        self.path, self.method, self.known = path, method, known

    def __str__(self) -> str:
        return f"{self.path} knows {', '.join(self.known)}, not {self.method}"


class TooLargeError(RequestError):
    """The body is larger than the server takes."""


class TooSlowError(RequestError):
    """The body did not come in time."""


class MediaTypeError(RequestError):
    """The body is of a media type that the route does not take."""


class RangeError(RequestError):
    """The range lies outside the file."""

    def __init__(self, wanted: str, n_bytes: int) -> None:
        super().__init__(wanted, n_bytes)
        self.wanted, self.n_bytes = wanted, n_bytes

    def __str__(self) -> str:
        return f"the range {self.wanted!r} lies outside the file, which has {self.n_bytes} bytes"


STATUS: Final[Mapping[type[ModelOpsError], int]] = {  # the first one that fits; narrower ones come first
    MalformedRequestError: 400,
    UnauthorizedError: 401,
    ForbiddenError: 403,
    NotFoundError: 404,
    BundleMissingError: 404,
    ParametersMissingError: 404,
    MethodNotAllowedError: 405,
    TooSlowError: 408,
    ConflictError: 409,
    AlreadyExistsError: 409,
    ChangedMeanwhileError: 409,
    TooLargeError: 413,
    MediaTypeError: 415,
    RangeError: 416,
    WrongHostError: 421,
    QueueFullError: 429,
    RequestError: 422,
    BundleError: 422,
    IntegrityError: 500,
    ClusterError: 503,
    RetryableError: 503,
    ModelOpsError: 500,
}
RETRY_AFTER_S: Final = {429: 10, 503: 5}
ADVICE: Final = {
    401: "whoever runs this server makes tokens with 'modelops tokens create NAME'; set MODELOPS_TOKEN to one, beside "
    "MODELOPS_SERVER, or send the header 'Authorization: Bearer TOKEN'. On the server's own machine its token is "
    "in the file 'token' of its run folder",
    403: "ask the operator for a token with that scope ('modelops tokens create')",
    500: "the server's log has more; 'modelops jobs reconcile' looks for damage and repairs it",
    503: "what was recorded stays as it is; give the request again in a few seconds",
}


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong (RFC 9457).

    ``error``: the name of the class in `modelops.errors`, or of one that only the server has. ``detail``: what
    happened, to what, and what to do.
    """

    type: str
    title: str
    status: int
    detail: str
    error: str
    advice: str = ""


def status_of(error: ModelOpsError) -> int:
    """Return the HTTP status of an error."""
    return next(status for kind, status in STATUS.items() if isinstance(error, kind))


def problem_response(error: ModelOpsError) -> Response:
    """Say an error to a client."""
    status, name = status_of(error), type(error).__name__
    problem = Problem(
        type=f"urn:modelops:error:{name}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=str(error),
        error=name,
        advice="" if isinstance(error, StudyDamagedError) else ADVICE.get(status, ""),  # that says what to do
    )
    sent = {}
    if status in RETRY_AFTER_S:
        sent["Retry-After"] = str(RETRY_AFTER_S[status])
    if status == HTTPStatus.UNAUTHORIZED:
        sent["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowedError):
        sent["Allow"] = ", ".join(error.known)
    if isinstance(error, RangeError):
        sent["Content-Range"] = f"bytes */{error.n_bytes}"
    return Response(msgspec.json.encode(problem), status, sent, MEDIA_TYPE)
