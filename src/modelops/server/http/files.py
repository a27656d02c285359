"""Bytes that are sent as the client takes them: a slow client holds no thread, and no more memory than a piece."""

from __future__ import annotations

import re
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Final, cast

from starlette.requests import Request
from starlette.responses import Response

from modelops.server.http.problems import RangeError
from modelops.volumes import temporary_files_are

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.types import Receive, Scope, Send

    from modelops.server.http.api import Api
    from modelops.store import Objects

PIECE_BYTES: Final = 1 << 20
IN_MEMORY_BYTES: Final = 4 << 20
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def parse_range(header: str | None, n_bytes: int) -> tuple[int, int] | None:
    """Return the first byte and one past the last that a Range header asks for; None: the whole.

    Ranges of other units, several at once, what cannot be read, and what begins beyond the end, so that it is of
    another file, are passed over, as RFC 9110 allows.

    Raises
    ------
    RangeError
        It begins at the end: who asks has the whole already.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or (found[1] == "" and not found[2].strip("0")):
        return None
    if found[1] == "":  # the last so many
        lo, hi = max(0, n_bytes - int(found[2])), n_bytes
    else:
        lo, hi = int(found[1]), min(int(found[2]) + 1 if found[2] else n_bytes, n_bytes)
        if found[2] and int(found[2]) < lo:
            return None
    if lo > n_bytes or not n_bytes:
        return None
    if lo == n_bytes:
        raise RangeError(header or "", n_bytes)
    return lo, hi


async def send_object(
    api: Api, request: Request, objects: Objects, name: str, n_bytes: int, media_type: str, digest: str
) -> Response:
    """Answer with an object, or the part of it that is asked for.

    Raises
    ------
    StorageError, NotFoundError
        It cannot be read: found out before anything is sent, as nothing can be said afterwards.
    """
    headers = {"Accept-Ranges": "bytes"} | ({"ETag": f'"{digest}"'} if digest else {})
    wanted = request.headers.get("range")
    if request.headers.get("if-range", headers.get("ETag", "")) != headers.get("ETag", ""):
        wanted = None
    part = parse_range(wanted, n_bytes)
    lo, hi = part or (0, n_bytes)
    if part is not None:
        headers["Content-Range"] = f"bytes {lo}-{hi - 1}/{n_bytes}"

    def read(at: int, length: int) -> bytes:
        return objects.read(name, at, length)

    first = b""
    if request.method != "HEAD" and hi > lo:
        first = await api.stored(read, lo, min(PIECE_BYTES, hi - lo))

    async def read_on(at: int, length: int) -> bytes:
        return first if at == lo and length == len(first) else await api.stored(read, at, length)

    return _sent(read_on, lo, hi, media_type, headers, 206 if part is not None else 200)


async def send_written(api: Api, write: Callable[[IO[bytes]], None], media_type: str) -> Response:
    """Answer with what a function writes to a file, which is in memory while it is small.

    Raises
    ------
    StorageError
        It is not small, and the folder of temporary files has no room.
    """
    file = cast("IO[bytes]", SpooledTemporaryFile(max_size=IN_MEMORY_BYTES))  # noqa: SIM115  closed by the reader

    def read(at: int, length: int) -> bytes:
        file.seek(at)
        return file.read(length)

    def written() -> tuple[int, bytes]:
        with temporary_files_are("an answer"):
            write(file)
            return file.seek(0, 2), read(0, PIECE_BYTES)

    try:
        n_bytes, first = await api.slow(written)
    except BaseException:
        file.close()
        raise
    if n_bytes == len(first):  # nearly always: no other thread need be waited for
        file.close()
        return Response(first, media_type=media_type)

    async def read_on(at: int, length: int) -> bytes:
        return first if at == 0 else await api.quick(read, at, length)

    return _sent(read_on, 0, n_bytes, media_type, {}, 200, file)


def _sent(
    read: Callable[[int, int], Awaitable[bytes]],
    lo: int,
    hi: int,
    media_type: str,
    headers: Mapping[str, str],
    status: int,
    file: IO[bytes] | None = None,
) -> Response:
    all_headers = {"Content-Length": str(hi - lo), **headers}
    return PiecesResponse(read, (lo, hi), media_type, all_headers, status, file)


class PiecesResponse(Response):
    """A body that is read piece by piece, each when the client has taken the one before.

    Parameters
    ----------
    read
        Returns bytes from an offset on, of a length.
    part
        The first byte to send, and one past the last.
    file
        Closed at the end.
    """

    def __init__(
        self,
        read: Callable[[int, int], Awaitable[bytes]],
        part: tuple[int, int],
        media_type: str,
        headers: Mapping[str, str],
        status: int,
        file: IO[bytes] | None = None,
    ) -> None:
        self.status_code, self.media_type, self.background = status, media_type, None
        self.init_headers(headers)
        self._read, self._part, self._file = read, part, file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        request = Request(scope, receive)
        try:
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            lo, hi = self._part if scope["method"] != "HEAD" else (0, 0)
            for at in range(lo, hi, PIECE_BYTES):
                piece = await self._read(at, min(PIECE_BYTES, hi - at))
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if await request.is_disconnected():
                    return
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._file is not None:
                self._file.close()
