"""The conversation of docs/reference/protocol.md: what each side sends is what the code sends and understands."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from doc_tables import rows_below

from modelops.rpc import Answer, Failure, Finished, Message, Peer
from modelops.rpc import messages as wire
from modelops_runner.frames import FrameSplitter, encode_frame
from modelops_runner.values import to_json

CONVERSATION = [
    (who, frame.replace(r"\r\n", "\r\n", 2).encode())
    for who, frame in rows_below("protocol.md", "| from | frame |")
]
SENT = {
    kind.METHOD: kind
    for kind in vars(wire).values()
    if isinstance(kind, type) and issubclass(kind, wire.Wire) and kind not in (wire.Wire, wire.AggregateTake)
}


def body_of(frame: bytes) -> bytes:
    """Return the one body that a frame holds."""
    splitter = FrameSplitter()
    (body,) = splitter.feed(frame)
    splitter.close()
    return body


@pytest.mark.parametrize(("who", "frame"), CONVERSATION)
def test_a_frame_is_its_body_with_its_length(who: str, frame: bytes) -> None:
    assert who in ("worker", "runner")
    assert encode_frame(body_of(frame)) == frame


def test_the_worker_sends_these_bytes_and_understands_the_answers() -> None:
    peer, heard = Peer(), list[Message]()
    for who, frame in CONVERSATION:
        message: dict[str, Any] = json.loads(body_of(frame))
        if who == "runner":
            heard += peer.receive(frame)
            continue
        params = msgspec.json.decode(msgspec.json.encode(message["params"]), type=SENT[message["method"]])
        if "id" in message:
            assert peer.request(params) == (message["id"], frame)
        else:
            assert peer.notify(params) == frame
    assert not peer.open_requests
    assert not [message for message in heard if isinstance(message, Failure)]
    good, bad = (message for message in heard if isinstance(message, Finished))
    assert [(name, kind, bytes(data)) for name, kind, data in good.outputs] == [
        ("x", "json", b"7.5"),
        ("b", "bytes", b'"AAE="'),
    ]
    assert bad.error is not None
    assert (bad.status, bad.error.type, bad.error.file, bad.error.line) == (
        "failed",
        "ValueError",
        "model.py",
        3,
    )
    results = [message.result for message in heard if isinstance(message, Answer)]
    assert results == [
        wire.Initialized(
            protocol=1,
            pid=4711,
            python="3.11.7",
            implementation="cpython",
            executable="/envs/e/bin/python",
            prefix="/envs/e",
            platform="linux-x86_64",
            bundle_digest="d",
            capabilities=wire.Capabilities(
                isolation=("warm", "fork", "spawn"), aggregate_incremental=True, tables=True
            ),
        ),
        wire.RunResult(finished=2, stopped=False),
        None,
        wire.AggregateResult(
            returned="value", outputs=(("value", "json", msgspec.Raw(b"7.5")),), seconds=0.25, cpu=0.125
        ),
        wire.RunResult(finished=2, stopped=False),
        wire.FunctionResult(value=("json", msgspec.Raw(b"2.0"))),
        None,
    ]


@pytest.mark.parametrize("body", [body_of(frame) for who, frame in CONVERSATION if who == "runner"])
def test_the_runner_writes_json_as_in_its_frames(body: bytes) -> None:
    assert to_json(json.loads(body)).encode() == body


def test_every_message_to_the_runner_occurs() -> None:
    said = {json.loads(body_of(frame)).get("method") for who, frame in CONVERSATION if who == "worker"}
    assert said == {kind.METHOD for kind in SENT.values()} - {
        "replicate/finished",
        "aggregate/finished",
        "aggregates/made",
        "context/progress",
        "context/checkpoint",
        "context/restore",
        "replicate/shape",
    }
