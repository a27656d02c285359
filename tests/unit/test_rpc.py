"""The parent's side of the protocol: typed messages in, and a broken rule is named, never passed on."""

from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.errors import ProtocolError
from modelops.rpc import (
    AggregateAdd,
    AggregateFinish,
    Answer,
    Cancel,
    ErrorObject,
    Failure,
    Finished,
    FinishedFloats,
    Peer,
    ProgressNote,
    ReplicatesRun,
    RunResult,
    Shutdown,
    decode_output,
    spool_file,
)
from modelops.rpc.messages import encode_output
from modelops_runner import values
from modelops_runner.frames import FrameSplitter, encode_frame


def frame(**message: Any) -> bytes:
    return encode_frame(json.dumps({"jsonrpc": "2.0", **message}).encode())


FINISHED: dict[str, Any] = {
    "index": 7,
    "status": "succeeded",
    "returned": "dict",
    "outputs": [["a", "json", {"$float": "nan"}], ["b", "bytes", "AAEC"]],
    "seconds": 0.5,
    "cpu": 0.25,
    "error": None,
}


def test_a_request_is_one_frame_and_its_answer_has_its_type() -> None:
    peer = Peer()
    request = ReplicatesRun(entry="m:f", sets=())
    request_id, data = peer.request(request)
    (body,) = FrameSplitter().feed(data)
    assert json.loads(body) == {
        "jsonrpc": "2.0",
        "id": request_id,
        "method": "replicates/run",
        "params": {
            "entry": "m:f",
            "sets": [],
            "wire": False,
            "checkpoint_root": None,
            "replicate_timeout_s": None,
        },
    }
    assert peer.open_requests == {request_id: request}
    (answer,) = peer.receive(frame(id=request_id, result={"finished": 3, "stopped": True}))
    assert answer == Answer(request_id, request, RunResult(finished=3, stopped=True))
    assert peer.open_requests == {}


def test_a_finished_replicate_keeps_its_outputs_as_they_came() -> None:
    (note,) = Peer().receive(frame(method="replicate/finished", params=FINISHED))
    assert isinstance(note, Finished)
    assert [(name, kind, decode_output(kind, data)) for name, kind, data in note.outputs] == [
        ("a", "json", b'{"$float": "nan"}'),
        ("b", "bytes", b"\x00\x01\x02"),
    ]


def test_a_spooled_output_is_told_from_any_value() -> None:
    (note,) = Peer().receive(
        frame(
            method="replicate/finished",
            params={
                **FINISHED,
                "outputs": [
                    ["file", "json", {"$file": "/spool/1", "bytes": 3, "sha256": "00"}],
                    [
                        "value",
                        "json",
                        json.loads(values.dumps({"$file": "/spool/1", "bytes": 3, "sha256": "00"})),
                    ],
                ],
            },
        )
    )
    assert isinstance(note, Finished)
    files = [spool_file(data) for _, _, data in note.outputs]
    assert files[0] is not None
    assert (files[0].path, files[0].bytes, files[0].sha256) == ("/spool/1", 3, "00")
    assert files[1] is None


@given(kind=st.sampled_from(["json", "bytes", "npy"]), content=st.binary(max_size=50))
def test_stored_bytes_and_inline_data_are_inverse(kind: str, content: bytes) -> None:
    if kind == "json":
        content = values.dumps(content).encode()
    assert decode_output(kind, encode_output(kind, content)) == content


def test_an_error_of_the_bundle_arrives_typed() -> None:
    peer = Peer()
    request_id, _ = peer.request(AggregateFinish(id=1))
    error = {"type": "ValueError", "message": "no", "traceback": "Traceback", "file": "m.py", "line": 3}
    (failure,) = peer.receive(
        frame(id=request_id, error={"code": -32001, "message": "ValueError: no", "data": error})
    )
    assert isinstance(failure, Failure)
    assert failure.raised == ErrorObject(
        type="ValueError", message="no", traceback="Traceback", file="m.py", line=3
    )


def test_an_error_of_the_protocol_says_what_was_wrong() -> None:
    peer = Peer()
    request_id, _ = peer.request(Shutdown())
    (failure,) = peer.receive(frame(id=request_id, error={"code": -32601, "message": "unknown"}))
    assert failure == Failure(request_id, Shutdown(), -32601, "unknown", None)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"hello\r\n\r\n", "no frame"),
        (encode_frame(b"{"), "not as agreed"),
        (encode_frame(b"[]"), "not as agreed"),
        (encode_frame(b'{"jsonrpc":"1.0"}'), "not JSON-RPC"),
        (frame(id=99, result=None), "not open"),
        (frame(id=None, error={"code": -32700, "message": "bad"}), "did not understand"),
        (frame(), "did not understand"),
        (frame(method="nonsense", params={}), "no notification"),
        (frame(method="replicate/finished", id=1, params=FINISHED), "no notification"),
        (frame(method="replicate/finished", params={}), "not as agreed"),
        (frame(method="replicate/finished", params={**FINISHED, "index": "7"}), "not as agreed"),
        (frame(method="replicate/finished", params={**FINISHED, "status": "done"}), "not as agreed"),
        (frame(id="1", result=None), "not as agreed"),
    ],
)
def test_a_broken_rule_is_a_protocol_error(data: bytes, what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        Peer().receive(data)


def test_an_answer_of_the_wrong_type_or_a_second_one_is_refused() -> None:
    peer = Peer()
    first, _ = peer.request(ReplicatesRun(entry="m:f", sets=()))
    with pytest.raises(ProtocolError, match="not as agreed"):
        peer.receive(frame(id=first, result={"finished": "all", "stopped": False}))
    with pytest.raises(ProtocolError, match="not as agreed"):
        peer.receive(b"")
    peer = Peer()
    second, _ = peer.request(Shutdown())
    peer.receive(frame(id=second, result=None))
    with pytest.raises(ProtocolError, match="not open"):
        peer.receive(frame(id=second, result=None))


def test_we_cannot_ask_a_notification_or_notify_a_request() -> None:
    with pytest.raises(ValueError, match="notification"):
        Peer().request(Cancel(id=1))
    with pytest.raises(ValueError, match="request"):
        Peer().notify(Shutdown())
    rows = ((5, "dict", (("a", "json", msgspec.Raw(b"1.0")),)),)
    (body,) = FrameSplitter().feed(Peer().notify(AggregateAdd(id=1, rows=rows)))
    assert json.loads(body)["params"]["rows"] == [[5, "dict", [["a", "json", 1.0]]]]


def test_the_end_of_the_stream_inside_a_message_is_an_error() -> None:
    peer = Peer()
    peer.receive(frame(method="context/progress", params={"index": 1, "fraction": 0.5, "values": {}})[:-3])
    with pytest.raises(ProtocolError, match="incomplete"):
        peer.eof()
    Peer().eof()


def test_what_was_complete_before_a_broken_rule_stands() -> None:
    peer = Peer()
    good = frame(method="replicate/finished", params=FINISHED)
    assert len(peer.receive(good + good + b"garbage without end" + bytes(9_000))) == 2
    with pytest.raises(ProtocolError, match="no frame"):
        peer.receive(good)
    peer = Peer()
    assert len(peer.receive(good + frame(id=5, result=None) + good)) == 1
    with pytest.raises(ProtocolError, match="not open"):
        peer.eof()


def test_messages_do_not_depend_on_how_the_stream_was_cut() -> None:
    stream = frame(method="context/progress", params={"index": 1, "fraction": 0.5, "values": {"a": 1}}) * 3
    peer = Peer()
    notes = [note for i in range(len(stream)) for note in peer.receive(stream[i : i + 1])]
    assert [type(note) for note in notes] == [ProgressNote] * 3


FLOATS = (
    (1, [0.5, -0.0], 0.25, 0.125),
    (2, [float("inf"), 5e-324], 0.5, 0.25),
)


def packed(numbers: list[float]) -> str:
    return struct.pack(f"<{len(numbers)}d", *numbers).hex()


@pytest.mark.parametrize("compact", [True, False])
def test_floats_arrive_together_with_their_names(compact: bool) -> None:
    stream = frame(method="replicate/shape", params={"shape": 3, "names": ["b", "a"]})
    for index, numbers, seconds, cpu in FLOATS:
        message = {
            "jsonrpc": "2.0", "method": "replicate/floats", "params": [index, 3, packed(numbers), seconds, cpu],
        }  # fmt: skip
        stream += encode_frame(json.dumps(message, separators=(",", ":") if compact else None).encode())
    stream += frame(method="replicate/finished", params={**FINISHED, "index": 3})
    *notes, last = Peer().receive(stream)
    floats = [note for note in notes if isinstance(note, FinishedFloats)]
    assert len(floats) == len(notes) == (1 if compact else 2)
    assert isinstance(last, Finished)
    assert {note.names for note in floats} == {("b", "a")}
    assert b"".join(note.values for note in floats).hex() == "".join(packed(n) for _, n, _, _ in FLOATS)
    assert [(i, s, c) for n in floats for i, s, c in zip(n.indices, n.seconds, n.cpu, strict=True)] == [
        (index, seconds, cpu) for index, _, seconds, cpu in FLOATS
    ]


@pytest.mark.parametrize(
    "params",
    [
        [1, 4, packed([0.5]), 0.1, 0.1],  # nobody said what 4 is
        [1, 3, packed([0.5]), 0.1, 0.1],  # one float for two names
        [1, 3, packed([0.5, 0.5])[:-1] + "x", 0.1, 0.1],
        [1, 3, packed([0.5, 0.5]), 0.1],
        {"index": 1},
    ],
)
def test_floats_that_are_not_as_agreed_are_a_broken_rule(params: Any) -> None:
    peer = Peer()
    assert peer.receive(frame(method="replicate/shape", params={"shape": 3, "names": ["b", "a"]})) == []
    with pytest.raises(ProtocolError, match="floats that are not as agreed"):
        peer.receive(frame(method="replicate/floats", params=params))
