"""What the handlers share: the service, those who wait, and threads for what blocks."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import anyio.to_thread
import msgspec
from starlette.responses import Response

from modelops.errors import StorageError
from modelops.server.http.guard import ACCESS
from modelops.server.http.in_time import in_time
from modelops.server.http.operations import JSON
from modelops.server.http.problems import TooLargeError, TooSlowError
from modelops.server.http.waiting import Waiting
from modelops.study.ids import JobId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from starlette.requests import Request

    from modelops.server.http.access import Keys
    from modelops.server.http.operations import Call
    from modelops.server.http.system import Requests
    from modelops.server.service import JobService
    from modelops.server.views import JobView

P = ParamSpec("P")
T = TypeVar("T")
QUICK_THREADS: Final = 12
SUBMIT_THREADS: Final = 8
STORAGE_THREADS: Final = 16
STORAGE_WITHIN_S: Final = (
    20.0  # a client waits 30 s for an answer, and then knows nothing of why there is none
)
SLOW_THREADS: Final = 4
BODY_IDLE_S: Final = 30.0


class Api:
    """One server's handlers' common things.

    `quick`, `submit`, `stored` and `slow` run what blocks in pools of threads of their own, so that statuses never
    queue behind submissions, a storage that is away, tables and archives.
    """

    def __init__(
        self,
        service: JobService,
        keys: Keys,
        version: str,
        requests: Requests,
        schema: bytes,
        longest_wait_s: float,
    ) -> None:
        self.service, self.keys = service, keys
        self.version, self.requests, self.schema = version, requests, schema
        self.waiting = Waiting(
            self.look, longest_s=longest_wait_s, goes_on=lambda job: service.supervisor.goes_on(JobId(job))
        )
        service.supervisor.listen(self.waiting.poke)
        self._quick = anyio.CapacityLimiter(QUICK_THREADS)
        self._submit = anyio.CapacityLimiter(SUBMIT_THREADS)
        self._stored = anyio.CapacityLimiter(STORAGE_THREADS)
        self._slow = anyio.CapacityLimiter(SLOW_THREADS)

    async def look(self, job: str) -> JobView:
        """Return a job as it is now. Raises NotFoundError."""
        return await self.quick(self.service.status, job)

    async def quick(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what takes milliseconds: rows. Raises StorageError, too, if the database does not answer in time."""
        call = functools.partial(function, *args, **kwargs)
        return await in_time(call, self._quick, self.service.records.database)

    async def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what records a small job: it writes bytes and waits for disks. Raises StorageError as `quick` does."""
        call = functools.partial(function, *args, **kwargs)
        return await in_time(call, self._submit, self.service.records.database)

    async def stored(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what reads a few bytes of stored objects.

        Raises
        ------
        StorageError
            Also if it has taken too long; then it goes on in its thread, alone.
        """
        call = functools.partial(function, *args, **kwargs)
        try:
            async with asyncio.timeout(STORAGE_WITHIN_S):
                return await anyio.to_thread.run_sync(call, limiter=self._stored, abandon_on_cancel=True)
        except TimeoutError:
            raise StorageError(
                f"the storage {self.service.objects.place} has not answered for {STORAGE_WITHIN_S:g} s; see whether it "
                "is up, and can be reached from the server"
            ) from None

    async def slow(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what may take seconds: segments, archives, large submissions. Raises StorageError as `quick` does."""
        call = functools.partial(function, *args, **kwargs)
        database = self.service.records.database
        if database.away:  # whoever may take seconds would take them all to find that out
            await in_time(database.check, self._quick, database)
        return await anyio.to_thread.run_sync(call, limiter=self._slow)


def who(call: Call) -> str:
    """Return who says to be asking, for the record, and by which token if it has a name."""
    client = call.request.client
    said = getattr(call.given, "user", "") or f"client at {client.host if client else 'an unknown address'}"
    name = call.request.scope[ACCESS].name
    return f"{said} (token {name})" if name else said


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer in JSON."""
    return Response(msgspec.json.encode(value), status, dict(headers or {}), JSON)


async def body_pieces(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body of a request as it comes.

    Raises
    ------
    TooLargeError
        It has, or says it has, more than ``max_bytes``.
    TooSlowError
        Nothing came for a while.
    """
    said = request.headers.get("content-length", "0")
    n_bytes = 0
    pieces = request.stream()
    while n_bytes <= max_bytes and int(said) <= max_bytes:
        try:
            async with asyncio.timeout(BODY_IDLE_S):
                piece = await anext(pieces, None)
        except TimeoutError as e:
            raise TooSlowError(f"nothing of the body came for {BODY_IDLE_S:.0f} s") from e
        if piece is None:
            return
        n_bytes += len(piece)
        if n_bytes <= max_bytes:
            yield piece
    raise TooLargeError(f"the body has more than {max_bytes} bytes, which is the most that this route takes")


async def whole_body(request: Request, max_bytes: int) -> bytes:
    """Return a small body at once; errors as `body_pieces`."""
    return b"".join([piece async for piece in body_pieces(request, max_bytes)])
