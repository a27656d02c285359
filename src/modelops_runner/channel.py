"""The runner's end of the pipe: whole JSON-RPC messages in, whole JSON-RPC messages out."""

from __future__ import annotations

import os
import select
from _thread import allocate_lock
from collections import deque
from json import loads

from modelops_runner.frames import MAX_BODY_BYTES, FrameError, FrameSplitter
from modelops_runner.values import to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = (
    -32700,
    -32600,
    -32601,
    -32602,
    -32603,
)
BUNDLE_RAISED, NOT_INITIALIZED, REFUSED, STORAGE_FAILED = -32001, -32002, -32003, -32004
_READ_BYTES = 256 * 1024
_LOOK_MS = 50  # another thread may have taken in what this one waits for
_IDS_OF_A_CHILD = 1 << 20


class RpcError(Exception):
    """What a request is answered with when it cannot be done."""

    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(code, message, data)
        self.code, self.message, self.data = code, message, data


class Channel:
    """Requests wait here in order; cancellations are seen at once.

    Attributes
    ----------
    poll
        Becomes readable when something arrives; others may register their descriptors too.
    cancelled
        Ids of requests that the parent wants stopped.
    detached
        Whether this is a child of the model's, which must not speak for it.
    relay
        While a child of ours runs a replicate: the descriptor that answers to its requests are passed on to.
    """

    def __init__(self, requests: int, messages: int) -> None:
        self.requests, self._messages = requests, messages
        self.cancelled: set[object] = set()
        self.poll = select.poll()
        self.poll.register(requests, select.POLLIN)
        self._splitter = FrameSplitter()
        self._waiting: deque[dict[str, Any]] = deque()
        self._waiting_bytes = 0
        # Whether nothing more can come: the parent has closed the pipe, or broken the rules. Looked at all the time.
        self.ended = False
        self._lines = False
        self._asked: dict[int, dict[str, Any] | None] = {}  # our own requests and their answers
        self._next_id = 1
        self._replies = -1  # of a child: the descriptor that answers to its requests come from
        self._rest = b""  # of what came from there
        self.relay = -1  # while a child runs a replicate: where answers to its requests go
        self.n_relayed = 0
        self.detached = False
        self._locks()

    def _locks(self) -> None:
        """Make new locks: a model may report or ask from a thread of its own."""
        self._lock = allocate_lock()
        self._pump_lock = allocate_lock()

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next request or notification; None when the parent has closed the pipe.

        Raises
        ------
        FrameError
            The parent sent bytes that are no frame.
        """
        while not self._waiting:
            if self.ended:
                self._splitter.close()
                return None
            self.pump_when_ready(None)
        message = self._waiting.popleft()
        if not self._waiting:
            self._waiting_bytes = 0
        return message

    def pump(self) -> None:
        """Take in what has arrived, or wait for it. May be called while a request runs."""
        data = os.read(self.requests, _READ_BYTES)
        if not data:
            self.ended = True
            return
        try:
            for body in self._splitter.feed(data):
                self._take(body)
        finally:
            self.ended = self.ended or bool(self._splitter.broken)
        if self._waiting_bytes > 2 * MAX_BODY_BYTES:
            raise FrameError(f"{len(self._waiting)} requests are waiting; send the next one after an answer")

    def pump_when_ready(self, wait_ms: int | None) -> None:
        """Take in what has arrived once something has, unless another thread has just done so."""
        arrived = select.poll()
        arrived.register(self.requests, select.POLLIN)
        if arrived.poll(wait_ms):
            with self._pump_lock:
                if arrived.poll(0):
                    self.pump()

    def _take(self, body: bytes) -> None:
        try:
            message = loads(body)
        except (ValueError, RecursionError) as e:
            self.fail(None, RpcError(PARSE_ERROR, f"a body that is no JSON: {type(e).__name__}: {e}"[:500]))
            return
        if (
            isinstance(message, dict)
            and "method" not in message
            and ("result" in message or "error" in message)
        ):
            self._take_answer(message, body)
        elif not isinstance(message, dict) or not isinstance(message.get("method"), str):
            identifier = message.get("id") if isinstance(message, dict) else None
            self.fail(identifier, RpcError(INVALID_REQUEST, "a JSON-RPC request is an object with a method"))
        elif message["method"] == "$/cancelRequest":
            params = message.get("params")
            if isinstance(params, dict) and isinstance(params.get("id"), (int, str)):
                self.cancelled.add(params["id"])
        else:
            self._waiting.append(message)
            self._waiting_bytes += len(body)

    def _take_answer(self, message: dict[str, Any], body: bytes) -> None:
        if self.relay >= 0 and isinstance(message.get("id"), int) and message["id"] >= self._next_id:
            self.n_relayed += 1
            try:
                os.write(self.relay, body + b"\n")
            except BrokenPipeError:  # the child that asked has ended
                pass
        elif isinstance(message.get("id"), int) and message["id"] in self._asked:
            self._asked[message["id"]] = message  # another one is of a child that has ended

    def request(self, method: str, params: object) -> None:
        """Ask the parent for something and wait until it is done. May be called in any thread of the model.

        Raises
        ------
        RpcError
            It cannot be done.
        """
        if self.detached:
            raise RpcError(
                REFUSED, f"{method}: only the process that runs the model can do this, no child of it"
            )
        with self._lock:
            identifier, self._next_id = self._next_id, self._next_id + 1
            self._asked[identifier] = None
        try:
            self.send(to_json({"jsonrpc": "2.0", "id": identifier, "method": method, "params": params}))
            while True:
                answer = self._asked[identifier]
                if answer is not None:
                    break
                if self._replies >= 0:
                    self._read_replies()
                elif self.ended:
                    raise RpcError(REFUSED, f"{method}: the worker is gone")
                else:
                    self.pump_when_ready(_LOOK_MS)
        finally:
            del self._asked[identifier]
        if "error" in answer:
            raise RpcError(REFUSED, str(answer["error"].get("message")))

    def _read_replies(self) -> None:
        arrived = select.poll()
        arrived.register(self._replies, select.POLLIN)
        if not arrived.poll(_LOOK_MS):
            return
        with self._pump_lock:
            if not arrived.poll(0):
                return
            data = os.read(self._replies, _READ_BYTES)
            if not data:
                raise RpcError(REFUSED, "the runner is gone")
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                message = loads(line)
                if message.get("id") in self._asked:
                    self._asked[message["id"]] = message

    def send(self, text: str) -> None:
        """Write one message, ASCII JSON, as one frame and at once."""
        if self._lines:
            frame = f"{text}\n".encode("ascii")
        else:
            frame = f"Content-Length: {len(text)}\r\n\r\n{text}".encode("ascii")
        with self._lock:
            n = os.write(self._messages, frame)
            if n != len(frame):
                rest = memoryview(frame)[n:]
                while len(rest):
                    rest = rest[os.write(self._messages, rest) :]

    def divert(self, pipe: int, replies: int) -> None:
        """Let go of both pipes in a child of our own; from now on write lines to this one, and read from that."""
        self.detach()
        self.detached = False
        os.dup2(pipe, self._messages, inheritable=False)
        os.close(pipe)
        self._lines, self._replies = True, replies

    def reserve_ids(self) -> None:
        """Let a child that is forked next use ids that no child has used before."""
        self._next_id += _IDS_OF_A_CHILD

    def detach(self) -> None:
        """Let go of both pipes in a forked child: it must neither speak on them nor hold them open."""
        self.detached = True
        self._locks()  # the old ones may be held by a thread that is not there
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (self.requests, self._messages):
            os.dup2(null, fd, inheritable=False)
        os.close(null)

    def notify(self, method: str, params: object) -> None:
        """Send a notification."""
        self.send(to_json({"jsonrpc": "2.0", "method": method, "params": params}))

    def answer(self, identifier: object, result: str) -> None:
        """Answer a request with a result that is JSON text already."""
        self.cancelled.discard(identifier)
        self.send(f'{{"jsonrpc":"2.0","id":{to_json(identifier)},"result":{result}}}')

    def fail(self, identifier: object, error: RpcError) -> None:
        """Answer a request with an error."""
        if isinstance(identifier, (int, str)):
            self.cancelled.discard(identifier)
        else:
            identifier = None
        body: dict[str, object] = {"code": error.code, "message": error.message}
        if error.data is not None:
            body["data"] = error.data
        self.send(to_json({"jsonrpc": "2.0", "id": identifier, "error": body}))
