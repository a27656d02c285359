"""However a stream is cut, its frames are the same; whatever breaks a rule is refused, and bounded."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops_runner.frames import MAX_BODY_BYTES, MAX_HEADER_BYTES, FrameError, FrameSplitter, encode_frame

bodies_of = st.lists(st.binary(max_size=99))


@given(bodies=bodies_of, cuts=st.lists(st.integers(0, 5_000)))
def test_frames_do_not_depend_on_how_the_stream_was_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(encode_frame, bodies))
    edges = [0, *sorted(min(c, len(stream)) for c in cuts), len(stream)]
    splitter = FrameSplitter()
    assert [b for lo, hi in pairwise(edges) for b in splitter.feed(stream[lo:hi])] == bodies
    splitter.close()


@given(bodies=bodies_of.filter(bool), data=st.data())
def test_a_truncated_stream_gives_whole_frames_then_an_error(
    bodies: list[bytes], data: st.DataObject
) -> None:
    frames = [encode_frame(body) for body in bodies]
    stream = b"".join(frames)
    cut = data.draw(st.integers(0, len(stream) - 1))
    splitter = FrameSplitter()
    whole = splitter.feed(stream[:cut])
    assert whole == bodies[: len(whole)]
    if cut == sum(len(frame) for frame in frames[: len(whole)]):
        splitter.close()
    else:
        with pytest.raises(FrameError, match="ended"):
            splitter.close()


@given(garbage=st.binary(max_size=300))
def test_garbage_is_refused_or_awaited_but_never_a_crash(garbage: bytes) -> None:
    splitter = FrameSplitter(max_body_bytes=100)
    try:
        bodies = splitter.feed(garbage)
    except FrameError:
        with pytest.raises(FrameError):
            splitter.feed(encode_frame(b"{}"))
    else:
        assert sum(map(len, bodies)) <= len(garbage)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"Content-Length: 12x", "not one Content-Length"),
        (b"Content-Length: -1", "not one Content-Length"),
        (b"Content-Length: +1", "not one Content-Length"),
        (b"Content-Length:", "not one Content-Length"),
        (b"Content-Length: " + b"9" * 5_000, "not one Content-Length"),
        (b"Content-Length: \xd9\xa1", "not one Content-Length"),
        (b"Content-Length: 1\r\nContent-Length: 1", "not one Content-Length"),
        (b"Content-Type: x", "without Content-Length"),
        (b"", "without a name"),
        (b"nonsense", "without a name and a colon"),
        (b": 5", "without a name"),
        (b"Content-Length: %d" % (MAX_BODY_BYTES + 1), "over the limit"),
        (b"Content-Length: 999999999999999999", "over the limit"),
    ],
)
def test_a_wrong_header_is_refused_and_named(header: bytes, what: str) -> None:
    with pytest.raises(FrameError, match=what):
        FrameSplitter().feed(header + b"\r\n\r\n")


def test_header_names_are_case_insensitive_and_other_headers_ignored() -> None:
    stream = b"content-LENGTH:2\r\nContent-Type: application/vscode-jsonrpc; charset=utf-8\r\n\r\n{}"
    assert FrameSplitter().feed(stream) == [b"{}"]


def test_an_endless_header_is_refused_at_its_limit() -> None:
    splitter = FrameSplitter()
    assert splitter.feed(b"X: " + b"a" * (MAX_HEADER_BYTES - 10)) == []
    with pytest.raises(FrameError, match="no header ends within"):
        splitter.feed(b"a" * 20)


def test_a_body_that_is_announced_too_long_is_never_kept() -> None:
    splitter = FrameSplitter(max_body_bytes=1_000)
    with pytest.raises(FrameError):
        splitter.feed(b"Content-Length: 100000\r\n\r\n" + b"x" * 90_000)
    with pytest.raises(FrameError):
        splitter.feed(b"x" * 90_000)
    assert sys.getsizeof(splitter._buffer) < 1_000  # what a bound on memory means here


def test_we_do_not_send_what_the_other_side_would_refuse() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        encode_frame(bytes(MAX_BODY_BYTES + 1))
