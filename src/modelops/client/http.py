"""HTTP to a server: token, timeouts, repeats of what was interrupted, and answers that are errors of ours.

The rules of this file. A request whose connection was refused did nothing, and is made again. One that was
interrupted later may have been performed: it is made again only if performing it twice is the same as once (GET,
PUT, and what carries an idempotency key). Between tries the pause doubles, with some chance in it so that many
clients do not come back at once. After `patience_s` without an answer the error is `ServerUnreachableError`; sooner if
no connection can be made to a server that has never answered here: then the address is probably wrong. A wait that is
long enough to be noticed is logged as it begins. The address is asked for anew before each try: a server of this
machine may have been started again elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlencode

import msgspec
import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, SSLError

from modelops.errors import (
    BundleError,
    ClusterError,
    ConflictError,
    IntegrityError,
    InternalError,
    ModelOpsError,
    NotFoundError,
    QueueFullError,
    RequestError,
    RetryableError,
    ServerUnreachableError,
    StorageError,
    StudyDamagedError,
)
from modelops.settings import server_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

CONNECT_S: Final = 5.0
READ_S: Final = 30.0
PATIENCE_S: Final = 10.0
NEVER_MET_S: Final = 3.0
SAY_AFTER_S: Final = 1.0
LONG_WAIT_S: Final = 3.0  # shorter ones end before anybody wonders; who asks again and again says so itself
FIRST_PAUSE_S: Final = 0.05
LAST_PAUSE_S: Final = 1.0
_PIECE: Final = 1 << 20
_SAFE_TWICE: Final = frozenset({"GET", "HEAD", "PUT"})
_AWAY: Final = frozenset({502, 503, 504})
# Errors that a server may name; what it says becomes their only argument.
_NAMED: Final = {
    cls.__name__: cls
    for cls in (
        RequestError, NotFoundError, RetryableError, ClusterError,
        StorageError, IntegrityError, BundleError, InternalError,
        QueueFullError, ConflictError, StudyDamagedError,
    )
}  # fmt: skip
_ASK_AGAIN: Final = "ask again when that is back; what was recorded stays as it is"
_TO_UPLOAD: Final = frozenset({"BundleMissingError", "ParametersMissingError"})
log = logging.getLogger(__name__)
Query = Sequence[tuple[str, str | int | float | None]]
T = TypeVar("T")


class Address(NamedTuple):
    """Where a server is, and what lets one in.

    ``name``: how a user would call it. ``advice``: if it is away. ``no_entry``: if it does not accept the token.
    """

    url: str
    token: str
    name: str
    advice: str
    no_entry: str = "'modelops down', then 'modelops up', starts one that does; unfinished jobs go on"


class Problem(msgspec.Struct, frozen=True):
    """RFC 9457. ``error``: the name of the error in `modelops.errors`."""

    title: str = ""
    detail: str = ""
    error: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def as_type(self, kind: type[T]) -> T:
        """Decode the JSON of the body."""
        try:
            return msgspec.json.decode(self.body, type=kind)
        except msgspec.DecodeError as e:
            raise InternalError(f"the server's answer cannot be understood: {e}") from e


class MissingUploadError(RequestError):
    """The server does not have a bundle or a table of parameters yet: send it, then ask again.

    ``error``: the name of the error that says which.
    """

    def __init__(self, text: str, error: str) -> None:
        super().__init__(text, error)
        self.text, self.error = text, error

    def __str__(self) -> str:
        return self.text


class _InterruptedError(Exception):
    """No whole answer came. ``sent``: the server may have seen the request. ``final``: no use in repeating.

    ``said``: the server itself says why it cannot give one now.
    """

    def __init__(self, why: str, *, sent: bool, final: bool = False, said: bool = False) -> None:
        super().__init__(why)
        self.why, self.sent, self.final, self.said = why, sent, final, said


class _Silence(NamedTuple):
    """A request without an answer. ``final``: no use in repeating it."""

    error: ServerUnreachableError
    did_nothing: bool = False
    no_connection: bool = False
    final: bool = False


class Http:
    """A connection to one server. Safe to use from many threads.

    Parameters
    ----------
    find
        Returns the server's address now. Raises ServerUnreachableError if there is none.
    patience_s
        How long a request is repeated, unless it says otherwise.
    ca
        File of the only authority that is trusted; None: those that this machine trusts.
    """

    def __init__(
        self, find: Callable[[], Address], *, patience_s: float = PATIENCE_S, ca: Path | None = None
    ) -> None:
        self._find, self._patience_s = find, patience_s
        self.met = False  # whether the server has ever answered here
        self._pool = urllib3.PoolManager(
            num_pools=4, maxsize=8, retries=False, ca_certs=None if ca is None else str(ca)
        )

    def close(self) -> None:
        """Close every connection."""
        self._pool.clear()

    def get(self, path: str, query: Query = (), **options: Any) -> Answer:
        """Ask for something."""
        return self.request("GET", path, query, **options)

    def request(
        self,
        method: str,
        path: str,
        query: Query = (),
        *,
        body: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        read_s: float = READ_S,
        patience_s: float | None = None,
        repeatable: bool = False,
    ) -> Answer:
        """Make a request, again if it must be and may be, and return the answer.

        Parameters
        ----------
        body
            JSON as bytes, or an open file, sent from its beginning.
        repeatable
            Making it twice is the same as once, also if its method does not say so.

        Raises
        ------
        ServerUnreachableError
            No answer came in time.
        ModelOpsError
            What the server says is wrong.
        """
        target = f"/v1{path}" + (f"?{_encoded(query)}" if any(v is not None for _, v in query) else "")
        given = dict(headers or {})
        if isinstance(body, bytes):
            given.setdefault("Content-Type", "application/json")
        repeatable = repeatable or method in _SAFE_TWICE or "Idempotency-Key" in given
        patience_s = self._patience_s if patience_s is None else patience_s
        began, pause, said = time.monotonic(), FIRST_PAUSE_S, False
        while isinstance(answer := self._try(method, target, body, given, read_s), _Silence):
            waited_s = time.monotonic() - began
            if answer.no_connection and not self.met:
                patience_s = min(patience_s, NEVER_MET_S)
            if not (repeatable or answer.did_nothing) or answer.final or waited_s + pause > patience_s:
                raise answer.error
            if not said and waited_s + pause > SAY_AFTER_S and patience_s >= LONG_WAIT_S:
                said = True
                until = datetime.now() + timedelta(seconds=patience_s - waited_s)
                log.warning("%s; trying until %s", answer.error.what, f"{until:%H:%M:%S}")
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LAST_PAUSE_S)
        return answer

    def _try(
        self,
        method: str,
        target: str,
        body: bytes | IO[bytes] | None,
        headers: Mapping[str, str],
        read_s: float,
    ) -> Answer | _Silence:
        """Make a request once. Raises ModelOpsError: what the server says is wrong."""
        try:
            address = self._find()
            answer = self._once(address, method, target, body, headers, read_s)
        except ServerUnreachableError as e:  # none runs just now
            return _Silence(e, did_nothing=True)
        except _InterruptedError as e:
            error = ServerUnreachableError(address.name, e.why, address.advice)
            return _Silence(error, did_nothing=not e.sent, no_connection=not e.sent, final=e.final)
        self.met = True
        if answer.status not in _AWAY:
            if answer.status >= 400:
                raise error_of(answer, address)
            return answer
        if said := _detail(answer):
            advice = (
                _ASK_AGAIN
                if method in ("GET", "HEAD")
                else "this request has not been carried out, as far as anybody knows: when that is back, see what is "
                "recorded ('modelops jobs list'), and give it again"
            )
            return _Silence(ServerUnreachableError(address.name, said, advice, answers=True))
        why = f"it answered {answer.status}"
        return _Silence(ServerUnreachableError(address.name, why, address.advice))

    def stream(self, path: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a resource from an offset on; an interrupted transfer goes on where it was.

        Raises
        ------
        ServerUnreachableError
            No byte more has come for as long as an answer is waited for, or the server says that none can.
        """
        came_at = time.monotonic()
        while True:
            sent = 0
            try:
                for piece in self._stream_once(path, offset):
                    sent += len(piece)
                    offset += len(piece)
                    yield piece
            except _InterruptedError as why:
                came_at = time.monotonic() if sent else came_at
                if not sent:  # it does not get on: let the patient one find out, and raise
                    self._wait_for(path, why, came_at)
                continue
            return

    def _wait_for(self, path: str, why: _InterruptedError, since: float) -> None:
        """Return when there is something at a path again. Raises ServerUnreachableError."""
        if time.monotonic() - since > self._patience_s:  # whatever is said of it, nothing comes
            address = self._find()
            advice = _ASK_AGAIN if why.said else address.advice
            raise ServerUnreachableError(address.name, why.why, advice, answers=why.said)
        time.sleep(LAST_PAUSE_S if why.said else FIRST_PAUSE_S)
        try:
            self.request("HEAD", path)
        except ServerUnreachableError as error:
            if not why.said:
                raise
            # The answer to HEAD has no body, so it says nothing.
            raise ServerUnreachableError(error.server, why.why, _ASK_AGAIN, answers=True) from error

    def _stream_once(self, path: str, offset: int) -> Iterator[bytes]:
        address = self._find()
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._opened(address, "GET", f"/v1{path}", None, headers, READ_S) as response:
            if response.status == 416:  # nothing behind the offset
                return
            if response.status >= 400:
                answer = Answer(response.status, response.headers, response.read())
                if answer.status in _AWAY:
                    said = _detail(answer)
                    raise _InterruptedError(
                        said or f"it answered {answer.status}", sent=True, said=bool(said)
                    )
                raise error_of(answer, address)
            skip = offset if offset and response.status != 206 else 0  # it does not know ranges
            for piece in response.stream(_PIECE):
                yield piece[skip:]
                skip = max(0, skip - len(piece))

    def _once(
        self,
        address: Address,
        method: str,
        target: str,
        body: bytes | IO[bytes] | None,
        headers: Mapping[str, str],
        read_s: float,
    ) -> Answer:
        with self._opened(address, method, target, body, headers, read_s) as response:
            return Answer(response.status, response.headers, response.read())

    @contextlib.contextmanager
    def _opened(
        self,
        address: Address,
        method: str,
        target: str,
        body: bytes | IO[bytes] | None,
        headers: Mapping[str, str],
        read_s: float,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        given = {"Authorization": f"Bearer {address.token}", "User-Agent": "modelops", **headers}
        if body is not None and not isinstance(body, bytes):
            given["Content-Length"] = str(body.seek(0, 2))
            body.seek(0)
        timeout = urllib3.Timeout(connect=CONNECT_S, read=read_s)
        try:
            response = self._pool.request(
                method, address.url.rstrip("/") + target, body=body, headers=given, timeout=timeout,
                retries=False, redirect=False, preload_content=False,
            )  # fmt: skip
        except HTTPError as e:
            raise _interrupted(e) from e
        try:
            yield response
        except HTTPError as e:
            response.close()
            raise _interrupted(e) from e
        except BaseException:
            response.close()
            raise
        response.release_conn()


def checked_url(url: str) -> str:
    """Return the URL of a server if it can be one. Raises RequestError."""
    try:
        return server_url(url)
    except ValueError as error:
        raise RequestError(f"{url!r} is no address of a server: {error}") from None


def error_of(answer: Answer, address: Address) -> ModelOpsError:
    """Return the error that an answer of 400 or more is."""
    problem = _problem(answer)
    said = problem.detail or problem.title or f"{address.name} answered {answer.status} without a reason"
    if answer.status == 401:
        return RequestError(f"{address.name} does not accept the token: {said}; {address.no_entry}")
    if problem.advice and problem.advice not in said:
        said = f"{said}; {problem.advice}"
    if problem.error in _TO_UPLOAD:
        return MissingUploadError(said, problem.error)
    if problem.error in _NAMED:
        return _NAMED[problem.error](said)
    if answer.status == 404:
        return NotFoundError(said)
    if answer.status == 429:
        return QueueFullError(said)
    if answer.status >= 500:
        return InternalError(f"{said}; the log of {address.name} says more")
    return RequestError(said)


def _problem(answer: Answer) -> Problem:
    try:
        return msgspec.json.decode(answer.body, type=Problem, strict=False)
    except msgspec.DecodeError:  # not of ours: something stands between us and the server
        return Problem(detail=answer.body[:200].decode(errors="replace"))


def _detail(answer: Answer) -> str:
    return _problem(answer).detail


def _encoded(query: Query) -> str:
    return urlencode([(name, value) for name, value in query if value is not None])


def _interrupted(error: HTTPError) -> _InterruptedError:
    cause: Any = error.reason if isinstance(error, MaxRetryError) else error
    refused = isinstance(cause, (NewConnectionError, urllib3.exceptions.ConnectTimeoutError))
    text = str(cause).rpartition(": ")[2] or type(cause).__name__
    if isinstance(cause, SSLError):
        text += "; MODELOPS_CA names the file of the authority that signed its certificate, if that is a private one"
    return _InterruptedError(text, sent=not refused, final=isinstance(cause, SSLError))
