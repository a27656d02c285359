"""The parent's side of the conversation with one runner: which requests are open, and what came back.

Bytes in, messages out; no pipe, thread or clock. What the runner does against the rules is a
`ProtocolError`, after which it cannot be trusted and should be killed. What *we* do against them is a
`ValueError`.
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import Final, Literal, TypeAlias

import msgspec

from modelops.errors import ProtocolError
from modelops.rpc.messages import (
    AggregateFinish,
    AggregateFinished,
    AggregateResult,
    AggregatesMade,
    AggregatesRun,
    AggregateStart,
    AggregateTake,
    ErrorObject,
    Finished,
    Floats,
    FunctionCall,
    FunctionResult,
    Initialize,
    Initialized,
    KeepCheckpoint,
    ProgressNote,
    ReplicatesRun,
    RestoreCheckpoint,
    RunResult,
    Shape,
    Shutdown,
    Wire,
)
from modelops_runner.frames import FrameError, FrameSplitter, encode_frame

Result: TypeAlias = Initialized | RunResult | AggregateResult | FunctionResult | None

BUNDLE_RAISED: Final = -32001
NOT_DONE: Final = -32005


class Answer(msgspec.Struct, frozen=True):
    """A request was done. ``result`` has the type that belongs to the request."""

    id: int
    request: Wire
    result: Result


class Failure(msgspec.Struct, frozen=True):
    """A request was refused or the bundle's code raised; then ``raised`` says what."""

    id: int
    request: Wire
    code: int
    message: str
    raised: ErrorObject | None = None


class FinishedFloats(msgspec.Struct, frozen=True):
    """Replicates that succeeded and returned a dict of floats, in the order of their messages.

    ``values``: 8 bytes for each name of each replicate, little-endian.
    """

    names: tuple[str, ...]
    indices: list[int]
    values: bytes
    seconds: list[float]
    cpu: list[float]

    def cut(self, lo: int, hi: int) -> FinishedFloats:
        """Return those at the positions ``lo <= i < hi``."""
        width = 8 * len(self.names)
        return FinishedFloats(
            self.names,
            self.indices[lo:hi],
            self.values[lo * width : hi * width],
            self.seconds[lo:hi],
            self.cpu[lo:hi],
        )


class Asked(msgspec.Struct, frozen=True):
    """The runner wants something done; answer with `Peer.done` or `Peer.not_done`."""

    id: int
    request: RestoreCheckpoint | KeepCheckpoint


Message: TypeAlias = (
    Finished | FinishedFloats | AggregateFinished | AggregatesMade | ProgressNote | Asked | Answer | Failure
)

_RESULTS: Final[dict[type[Wire], msgspec.json.Decoder[Result]]] = {
    Initialize: msgspec.json.Decoder(Initialized),
    ReplicatesRun: msgspec.json.Decoder(RunResult),
    AggregateStart: msgspec.json.Decoder(None),
    AggregateTake: msgspec.json.Decoder(None),
    AggregateFinish: msgspec.json.Decoder(AggregateResult),
    AggregatesRun: msgspec.json.Decoder(RunResult),
    FunctionCall: msgspec.json.Decoder(FunctionResult),
    Shutdown: msgspec.json.Decoder(None),
}
_NOTES: Final[
    dict[str, msgspec.json.Decoder[Finished | AggregateFinished | AggregatesMade | ProgressNote]]
] = {
    note.METHOD: msgspec.json.Decoder(note)
    for note in (Finished, AggregateFinished, AggregatesMade, ProgressNote)
}
_WISHES: Final[dict[str, msgspec.json.Decoder[RestoreCheckpoint | KeepCheckpoint]]] = {
    wish.METHOD: msgspec.json.Decoder(wish) for wish in (RestoreCheckpoint, KeepCheckpoint)
}


class _Error(msgspec.Struct, frozen=True):
    code: int
    message: str
    data: msgspec.Raw = msgspec.Raw(b"null")


class _Envelope(msgspec.Struct, frozen=True):
    jsonrpc: str
    id: int | None = None
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw(b"")
    result: msgspec.Raw = msgspec.Raw(b"")
    error: _Error | None = None


class _FinishedNote(msgspec.Struct, frozen=True):
    """The message that comes once per replicate, read in one go."""

    jsonrpc: Literal["2.0"]
    method: Literal["replicate/finished"]
    params: Finished
    id: None = None


_FINISHED_NOTE: Final = msgspec.json.Decoder(_FinishedNote)
_FINISHED_HEAD: Final = b'{"jsonrpc":"2.0","method":"replicate/finished"'  # as our runner writes it
_FLOATS_HEAD: Final = b'{"jsonrpc":"2.0","method":"replicate/floats","params":'
_FLOATS_METHOD: Final = "replicate/floats"
_FLOATS: Final = msgspec.json.Decoder(list[Floats])
_SHAPE: Final = msgspec.json.Decoder(Shape)
_ENVELOPE: Final = msgspec.json.Decoder(_Envelope)
_ERROR_OBJECT: Final = msgspec.json.Decoder(ErrorObject)


class Peer:
    """The state of one conversation."""

    def __init__(self) -> None:
        self._splitter = FrameSplitter()
        self._open: dict[int, Wire] = {}
        self._next_id = 1
        self._broken: ProtocolError | None = None
        self._shapes: dict[int, tuple[str, ...]] = {}

    @property
    def open_requests(self) -> dict[int, Wire]:
        """The requests that have no answer yet, by id, oldest first."""
        return dict(self._open)

    def shape(self, number: int) -> tuple[str, ...] | None:
        """Return the names that the runner has given this number to; None if it has not."""
        return self._shapes.get(number)

    def request(self, params: Wire) -> tuple[int, bytes]:
        """Return the id and the frame of a request."""
        if type(params) not in _RESULTS:
            raise ValueError(f"{params.METHOD} is a notification; it has no answer")
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._open[request_id] = params
        return request_id, _frame(
            {"jsonrpc": "2.0", "id": request_id, "method": params.METHOD, "params": params}
        )

    def notify(self, params: Wire) -> bytes:
        """Return the frame of a notification."""
        if type(params) in _RESULTS:
            raise ValueError(f"{params.METHOD} is a request; its answer would be lost")
        return _frame({"jsonrpc": "2.0", "method": params.METHOD, "params": params})

    def done(self, asked: Asked) -> bytes:
        """Return the frame that tells the runner that something was done."""
        return _frame({"jsonrpc": "2.0", "id": asked.id, "result": None})

    def not_done(self, asked: Asked, why: str) -> bytes:
        """Return the frame that tells the runner why something cannot be done."""
        return _frame({"jsonrpc": "2.0", "id": asked.id, "error": {"code": NOT_DONE, "message": why}})

    def receive(self, data: bytes) -> list[Message]:
        """Take the next bytes from the runner and return the messages they complete.

        Raises
        ------
        ProtocolError
            The runner broke a rule; the message says which. Messages that were complete before it are
            returned first (a finished replicate stays finished); then the error comes with the next call.
        """
        if self._broken is not None:
            raise self._broken
        messages: list[Message] = []
        try:
            floats: list[bytes] = []
            for body in self._splitter.feed(data):
                if body.startswith(_FLOATS_HEAD):
                    floats.append(body)
                    continue
                if floats:
                    messages += self._floats(floats)
                    floats = []
                if (message := self._message(body)) is not None:
                    messages.append(message)
            if floats:
                messages += self._floats(floats)
        except FrameError as e:
            self._broken = ProtocolError(f"the runner sent something that is no frame: {e}")
        except ProtocolError as e:
            self._broken = e
        if self._broken is not None and not messages:
            raise self._broken
        return messages

    def eof(self) -> None:
        """Say that the runner has closed its end.

        Raises
        ------
        ProtocolError
            It did so inside a frame, or broke a rule before. Open requests are no error: whoever watches
            the process knows why.
        """
        if self._broken is not None:
            raise self._broken
        try:
            self._splitter.close()
        except FrameError as e:
            raise ProtocolError(f"the runner's last message is incomplete: {e}") from e

    def _floats(self, bodies: list[bytes]) -> list[Message]:
        """Read messages of which there are very many, all at once."""
        cut = len(_FLOATS_HEAD)
        try:
            notes = _FLOATS.decode(b"[%b]" % b",".join([body[cut:-1] for body in bodies]))
            parts: list[Message] = []
            for shape, same in groupby(notes, attrgetter("shape")):
                part = list(same)
                names = self._shapes[shape]
                values = bytes.fromhex("".join([note.values for note in part]))
                if len(values) != 8 * len(names) * len(part):
                    raise ValueError(f"values of another length than {len(names)} floats have")
                parts.append(
                    FinishedFloats(
                        names,
                        [note.index for note in part],
                        values,
                        [note.seconds for note in part],
                        [note.cpu for note in part],
                    )
                )
        except (msgspec.MsgspecError, ValueError, KeyError) as e:
            raise ProtocolError(
                f"the runner sent floats that are not as agreed: {e}: {_show(bodies[0])}"
            ) from e
        if len(notes) != len(bodies):
            raise ProtocolError(f"the runner sent floats that are not as agreed: {_show(bodies[0])}")
        return parts

    def _message(self, body: bytes) -> Message | None:
        try:
            if body.startswith(_FINISHED_HEAD):
                return _FINISHED_NOTE.decode(body).params
            envelope = _ENVELOPE.decode(body)
            if envelope.jsonrpc != "2.0":
                raise ProtocolError(f"not JSON-RPC 2.0: {_show(body)}")
            if envelope.method is not None:
                return self._note(envelope.method, envelope, body)
            return self._answer(envelope, body)
        except msgspec.MsgspecError as e:
            raise ProtocolError(f"the runner sent a message that is not as agreed: {e}: {_show(body)}") from e

    def _note(self, method: str, envelope: _Envelope, body: bytes) -> Message | None:
        if method == Shape.METHOD and envelope.id is None:
            shape = _SHAPE.decode(envelope.params)
            self._shapes[shape.shape] = shape.names
            return None
        if method == _FLOATS_METHOD and envelope.id is None:  # not written as our runner writes it
            return self._floats([_FLOATS_HEAD + bytes(envelope.params) + b"}"])[0]
        if envelope.id is not None and (wish := _WISHES.get(method)) is not None:
            return Asked(envelope.id, wish.decode(envelope.params))
        decoder = _NOTES.get(method)
        if decoder is None or envelope.id is not None:
            raise ProtocolError(
                f"the runner sent {method!r}, which is no notification of protocol 1: {_show(body)}"
            )
        return decoder.decode(envelope.params)

    def _answer(self, envelope: _Envelope, body: bytes) -> Message:
        if envelope.id is None:
            reason = envelope.error.message if envelope.error else "no method, no id"
            raise ProtocolError(f"the runner did not understand a message: {reason}: {_show(body)}")
        request = self._open.pop(envelope.id, None)
        if request is None:
            raise ProtocolError(
                f"the runner answered request {envelope.id}, which is not open: {_show(body)}"
            )
        if envelope.error is None:
            return Answer(envelope.id, request, _RESULTS[type(request)].decode(envelope.result))
        error = envelope.error
        raised = _ERROR_OBJECT.decode(error.data) if error.code == BUNDLE_RAISED else None
        return Failure(envelope.id, request, error.code, error.message, raised)


def _frame(message: dict[str, object]) -> bytes:
    return encode_frame(msgspec.json.encode(message))


def _show(body: bytes) -> str:
    return repr(body[:200])
