"""Cutting stderr at its marks: exact, however the stream was cut, in bounded memory."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from modelops.processes.stderr import Attribution, Mark, StderrSplitter, Tail

MARKER = "c0ffee00c0ffee00"
# Text that is full of what could be taken for a mark, and never is one.
noise = st.lists(
    st.sampled_from([b"\x1e", b"\n", b":", b"-", b"7", MARKER.encode(), b"\x1ec0ffee", b"\xff\xfe", b"text "])
).map(b"".join)
texts = noise.filter(lambda text: not any(isinstance(p, Mark) for p in StderrSplitter(MARKER).feed(text)))
indices = st.none() | st.integers(0, 10**19 - 1)


def mark(index: int | None) -> bytes:
    return b"\x1e%s:%s\n" % (MARKER.encode(), b"-" if index is None else b"%d" % index)


def pieces_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [stream[lo:hi] for lo, hi in pairwise(edges)]


@settings(deadline=None, max_examples=300)
@given(first=texts, rest=st.lists(st.tuples(indices, texts), max_size=8), cuts=st.lists(st.integers(0, 400)))
def test_text_is_attributed_exactly_however_the_stream_was_cut(
    first: bytes, rest: list[tuple[int | None, bytes]], cuts: list[int]
) -> None:
    stream = first + b"".join(mark(index) + text for index, text in rest)
    splitter = StderrSplitter(MARKER)
    got: list[tuple[int | None, bytes]] = [(None, b"")]
    for piece in pieces_of(stream, cuts):
        for part in splitter.feed(piece):
            if isinstance(part, Mark):
                got.append((part.index, b""))
            else:
                assert part
                got[-1] = (got[-1][0], got[-1][1] + part)
    got[-1] = (got[-1][0], got[-1][1] + splitter.close())
    # The end of a text and the mark after it never make another mark, since a mark begins with \x1e.
    assert got == [(None, first), *rest]


@settings(deadline=None, max_examples=200)
@given(data=st.lists(noise | indices.map(mark)))
def test_at_most_one_unfinished_mark_is_held_back(data: list[bytes]) -> None:
    splitter = StderrSplitter(MARKER)
    for piece in data:
        list(splitter.feed(piece))
        assert len(splitter._held) <= len(mark(10**19 - 1))


def test_without_a_marker_everything_is_text() -> None:
    splitter = StderrSplitter("")
    assert list(splitter.feed(b"\x1e:5\n")) == [b"\x1e:5\n"]
    assert splitter.close() == b""


@settings(deadline=None)
@given(parts=st.lists(st.binary(max_size=50)), limit=st.integers(1, 60))
def test_a_tail_is_the_end_of_all_text(parts: list[bytes], limit: int) -> None:
    tail = Tail(limit)
    for part in parts:
        tail.add(part)
    assert tail.value() == b"".join(parts)[-limit:]


@settings(deadline=None, max_examples=200)
@given(
    sections=st.lists(st.tuples(st.booleans(), st.integers(0, 300)), max_size=6),
    cuts=st.lists(st.integers(0, 2000)),
    quota=st.integers(0, 120),
)
def test_what_is_passed_on_is_head_and_tail_and_says_what_it_left_out(
    sections: list[tuple[bool, int]], cuts: list[int], quota: int
) -> None:
    texts = [bytes(97 + (i + j) % 26 for j in range(size)) for i, (_, size) in enumerate(sections)]
    names = [i if inside else None for i, (inside, _) in enumerate(sections)]
    stream = b"".join(mark(name) + text for name, text in zip(names, texts, strict=True))
    attribution = Attribution(MARKER, quota=quota, tail_bytes=40)
    passed: dict[int | None, bytes] = {}
    for piece in pieces_of(stream, cuts):
        for index, text in attribution.feed(piece):
            passed[index] = passed.get(index, b"") + text
    for index, text in attribution.close():
        passed[index] = passed.get(index, b"") + text
    for name, text in zip(names, texts, strict=True):
        if name is None:
            continue
        assert attribution.tail(name) == text[-40:]
        left_out = max(0, len(text) - quota - 40)
        note = b"\n[... %d bytes left out ...]\n" % left_out if left_out else b""
        expected = text if not left_out else text[:quota] + note + text[-40:]
        assert passed.get(name, b"") == expected


def test_tails_of_many_failures_stay_bounded() -> None:
    attribution = Attribution(MARKER, quota=10)
    for index in range(2000):
        for _ in attribution.feed(mark(index) + b"x" * 16384):
            pass
    assert sum(map(len, attribution._tails.values())) <= 8 * 1024 * 1024
    assert attribution.closed(1998)
    assert not attribution.closed(1999)
    assert attribution.tail(1998) == b"x" * 16384


@settings(deadline=None, max_examples=300)
@given(data=st.lists(texts | indices.map(mark), max_size=8).map(b"".join))
def test_the_last_of_many_marks_is_the_last_mark_and_text_is_never_one(data: bytes) -> None:
    last = StderrSplitter(MARKER).last_of_marks(data)
    parts = list(StderrSplitter(MARKER).feed(data))
    marks = [part.index for part in parts if isinstance(part, Mark)]
    if last is not None:
        assert len(marks) == len(parts)
        assert marks[-1] == last
    elif marks:
        assert len(marks) < len(parts) or None in marks or data.count(b"\x1e") > len(marks)
