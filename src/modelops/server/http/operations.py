"""What a route is: one value from which both the handler's input and the schema are made, so they cannot differ."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from modelops.errors import ConflictError
from modelops.server.http.problems import MalformedRequestError, MediaTypeError, NoSuchRouteError
from modelops.store.tokens import TokenScope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from modelops.server.http.api import Api

JSON: Final = "application/json"
BINARY: Final = "application/octet-stream"


class Place(StrEnum):
    """Where a parameter stands in a request."""

    PATH = "path"
    QUERY = "query"
    HEADER = "header"


def at(place: Place, description: str, **constraints: Any) -> msgspec.Meta:
    """Say where a field of a parameters' struct comes from, what it means and what it may be."""
    return msgspec.Meta(extra={"in": place}, description=description, **constraints)


class Nothing(msgspec.Struct, frozen=True):
    """No parameters."""


@dataclass(frozen=True)
class Body:
    """The body of a request: JSON of a type, or bytes that the handler takes as they come (``type`` None).

    ``decode``: reads JSON, if it takes more than its type. ``max_bytes``: a larger one is refused.
    """

    type: Any = None
    media_type: str = JSON
    max_bytes: int = 1 << 16
    required: bool = True
    decode: Callable[[bytes], Any] | None = None


@dataclass(frozen=True)
class Answer:
    """What a route answers when all is well: JSON of a type, or something else of a media type, or no body."""

    description: str
    type: Any = None
    media_type: str | None = JSON
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Operation:
    """A method of a path.

    Parameters
    ----------
    path
        As OpenAPI writes it; a last part ``{name:path}`` may hold slashes.
    name
        The operation's id.
    parameters
        A struct whose fields say by `at` where they come from.
    answers
        By status.
    problems
        The statuses of problems that this route has beside those that every one has.
    scope
        What a token must allow.
    open
        It needs no token.
    """

    method: str
    path: str
    name: str
    summary: str
    handler: Callable[[Api, Call], Awaitable[Response]]
    answers: Mapping[int, Answer]
    parameters: type[msgspec.Struct] = Nothing
    body: Body | None = None
    problems: tuple[int, ...] = ()
    scope: TokenScope = TokenScope.READ
    open: bool = False


@dataclass(frozen=True)
class Call:
    """One request to one route. ``given``: an instance of its parameters' struct; ``body``: its decoded JSON."""

    request: Request
    operation: Operation
    given: Any
    body: Any = None


_INTEGER: Final = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_BOOLEAN: Final = re.compile(r"true|false")
_ANYTHING: Final = re.compile(r".*", re.DOTALL)


def read_parameters(operation: Operation, request: Request) -> Any:
    """Return what the path, the query and the headers of a request say, checked.

    Raises
    ------
    NoSuchRouteError
        A part of the path cannot be what it stands for.
    MalformedRequestError
        Something else is not as the schema says.
    """
    known = _parameters_of(operation.parameters)
    query = _query(request)
    for name in query:
        if name not in known or known[name].place is not Place.QUERY:
            others = (name for name, one in known.items() if one.place is Place.QUERY)
            raise MalformedRequestError(
                f"unknown query parameter {name!r}; known here: {', '.join(others) or 'none'}"
            )
    values: dict[str, Any] = {}
    for name, one in known.items():
        if one.place is Place.PATH:
            values[name] = request.path_params[name]
        elif one.place is Place.HEADER and name.lower() in request.headers:
            values[name] = request.headers[name]
        elif name in query:
            values[name] = _one_or_many(name, query[name], one)
    try:
        return msgspec.convert(values, operation.parameters, strict=False)
    except msgspec.ValidationError as e:
        in_path = any(f"`$.{name}`" in str(e) for name, one in known.items() if one.place is Place.PATH)
        if in_path:
            raise NoSuchRouteError(f"there is nothing at {request.url.path}: {e}") from e
        raise MalformedRequestError(f"a parameter of the request is not as the schema says: {e}") from e


class _Parameter(NamedTuple):
    """``many``: whether it may be repeated; ``kind``: what it must be, as ``pattern`` says."""

    place: Place
    many: bool
    kind: str
    pattern: re.Pattern[str]


@functools.cache  # there are a few dozen, and to look at the types of one takes longer than all else
def _parameters_of(given: type) -> dict[str, _Parameter]:
    """Return the parameters that a struct stands for, by name."""
    return {
        f.encode_name: _Parameter(place_of(f), is_many(f), *_pattern(f))
        for f in msgspec.structs.fields(given)
    }


def place_of(field: msgspec.structs.FieldInfo) -> Place:
    """Return where a parameter stands."""
    return Place(_meta(field)["in"])


def is_many(field: msgspec.structs.FieldInfo) -> bool:
    """Say whether a query parameter may be repeated."""
    info = msgspec.inspect.type_info(field.type)
    return isinstance(_bare(info), msgspec.inspect.CollectionType)


def read_json(operation: Operation, content_type: str, data: bytes) -> Any:
    """Return the body of a request as the type it must have.

    Raises
    ------
    MediaTypeError
        It is said to be something else than JSON.
    MalformedRequestError
        It is not as the schema says.
    ConflictError
        It is, and its parts do not fit one another.
    """
    body = operation.body
    if body is None or body.type is None:
        return None
    if not data and not body.required:
        return body.type()
    if content_type.partition(";")[0].strip().lower() not in ("", JSON):
        raise MediaTypeError(f"the body must be {JSON}, not {content_type!r}")
    try:
        return body.decode(data) if body.decode else msgspec.json.decode(data, type=body.type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        if isinstance(e.__cause__, ValueError):  # of the form that the schema says, and yet impossible
            raise ConflictError(str(e)) from e
        raise MalformedRequestError(f"the body is not as the schema says: {e}") from e


def _query(request: Request) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    raw = request.scope["query_string"].decode("latin-1")
    try:
        pairs = parse_qsl(raw, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError as e:
        raise MalformedRequestError(f"the query cannot be read: {e}") from e
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return found


def _one_or_many(name: str, values: list[str], parameter: _Parameter) -> Any:
    if parameter.many:
        return values
    if len(values) > 1:
        raise MalformedRequestError(
            f"the query parameter {name!r} is there {len(values)} times; give it once"
        )
    # Looked at here: the lax reading of msgspec takes more than the schema, such as "null" and "nan".
    if not parameter.pattern.fullmatch(values[0]):
        raise MalformedRequestError(
            f"the query parameter {name!r} must be {parameter.kind}, not {values[0]!r}"
        )
    return values[0]


def _pattern(field: msgspec.structs.FieldInfo) -> tuple[str, re.Pattern[str]]:
    info = _bare(msgspec.inspect.type_info(field.type))
    if isinstance(info, msgspec.inspect.IntType):
        return "an integer", _INTEGER
    if isinstance(info, msgspec.inspect.FloatType):
        return "a number", _NUMBER
    if isinstance(info, msgspec.inspect.BoolType):
        return "true or false", _BOOLEAN
    return "text", _ANYTHING


def _bare(info: Any) -> Any:
    """Return a type without what is said about it."""
    while isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    return info


def _meta(field: msgspec.structs.FieldInfo) -> Mapping[str, Any]:
    info = msgspec.inspect.type_info(field.type)
    while isinstance(info, msgspec.inspect.Metadata):
        if info.extra and "in" in info.extra:
            return info.extra
        info = info.type
    raise TypeError(f"the parameter {field.name} does not say where it comes from")
