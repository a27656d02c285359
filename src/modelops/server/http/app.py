"""The application: every operation behind the guard, and every error a problem."""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route, Router

from modelops.errors import ClusterError, InternalError, ModelOpsError, StorageError
from modelops.server.http import jobs, results, system, tokens, uploads
from modelops.server.http.access import Keys
from modelops.server.http.api import Api, whole_body
from modelops.server.http.guard import ACCESS, Guard, respond_early
from modelops.server.http.openapi import document
from modelops.server.http.operations import Call, read_json, read_parameters
from modelops.server.http.problems import (
    ForbiddenError,
    MethodNotAllowedError,
    NoSuchRouteError,
    problem_response,
)
from modelops.server.http.waiting import LONGEST_S
from modelops.store.answers import since_text

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from modelops.server.http.access import Access
    from modelops.server.http.operations import Operation
    from modelops.server.service import JobService

log = logging.getLogger(__name__)
LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
OPERATIONS: Final[Sequence[Operation]] = (
    *system.OPERATIONS,
    *uploads.OPERATIONS,
    *jobs.OPERATIONS,
    *results.OPERATIONS,
    *tokens.OPERATIONS,
)


def make_app(
    service: JobService,
    *,
    token: str,
    allowed_hosts: Collection[str] = LOCAL_HOSTS,
    longest_wait_s: float = LONGEST_S,
) -> ASGIApp:
    """Return the ASGI application of a server.

    Parameters
    ----------
    token
        What every request but ``GET /health`` must carry as ``Authorization: Bearer``, unless it has a token of those
        that the store knows. This one allows everything.
    allowed_hosts
        The names by which clients may call the server, without ports; ``*`` allows any.
    longest_wait_s
        Who waits for news is answered after this time, also when there are none.
    """
    released = version("modelops")
    keys = Keys(token, service.records)
    api = Api(
        service,
        keys,
        released,
        system.Requests(),
        msgspec.json.encode(document(OPERATIONS, released)),
        longest_wait_s,
    )
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        by_path.setdefault(operation.path, {})[operation.method] = operation
    routes = [Route(path, Resource(api, methods)) for path, methods in by_path.items()]
    router = Router(routes, redirect_slashes=False, default=Resource(api, {}))
    return Guard(router, keys, allowed_hosts)


class Resource:
    """A path: answers each of its methods; with none, says that there is nothing."""

    def __init__(self, api: Api, operations: Mapping[str, Operation]) -> None:
        self._api, self._operations = api, operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        incoming = _Incoming(receive)
        request = Request(scope, incoming.receive)
        try:
            response = await self._answer(request)
        except ClientDisconnect:
            return
        self._api.requests.count(scope["method"], response.status_code)
        sends_body = (
            "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"
        )
        if sends_body and not incoming.ended:
            await respond_early(response, scope, receive, send)
        else:
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        try:
            operation = self._operation(request)
            if not operation.open:
                _check(request.scope[ACCESS], operation)
            given = read_parameters(operation, request)
            body = None
            if operation.body is not None and operation.body.type is not None:
                data = await whole_body(request, operation.body.max_bytes)
                body = read_json(operation, request.headers.get("content-type", ""), data)
            return await operation.handler(self._api, Call(request, operation, given, body))
        except StorageError as error:
            since = self._api.service.records.database.answers.away_since
            return problem_response(error if since is None else StorageError(f"{error} {since_text(since)}"))
        except ModelOpsError as error:
            return problem_response(error)
        except ClientDisconnect:
            raise
        except asyncio.CancelledError:  # by uvicorn alone, of whoever still waits when the server is to end
            return problem_response(ClusterError("the server is ending, and answers nobody who waits"))
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            return problem_response(
                InternalError("the server met a fault of its own; its log says which. Please report it")
            )

    def _operation(self, request: Request) -> Operation:
        method = request.method
        if method == "HEAD" and "HEAD" not in self._operations:
            method = "GET"
        if method in self._operations:
            return self._operations[method]
        if not self._operations:
            raise NoSuchRouteError(
                f"there is nothing at {request.url.path}; GET /v1/openapi.json says what there is"
            )
        known = {*self._operations, *(["HEAD"] if "GET" in self._operations else [])}
        raise MethodNotAllowedError(request.url.path, method, tuple(sorted(known)))


def _check(access: Access, operation: Operation) -> None:
    if not access.may(operation.scope):
        raise ForbiddenError(access.name, operation.scope)


class _Incoming:
    """Remembers whether the body of a request was read to its end."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self.ended = receive, False

    async def receive(self) -> Message:
        message = await self._receive()
        self.ended = self.ended or not message.get("more_body", False)
        return message
