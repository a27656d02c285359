r"""Cut a runner's stderr at its marks and keep a bounded tail per replicate. Bytes in, text out; no I/O.

A runner writes ``\x1e<marker>:<index>\n`` before a replicate and ``\x1e<marker>:-\n`` after the last one
of a request (docs/reference/protocol.md). The marker is a secret of the process, so what a model prints is
never taken for a mark by chance.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DIGITS = 19
TAIL_BYTES = 16 * 1024
KEPT_TAILS_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Mark:
    """From here on the text belongs to this replicate; None: to none."""

    index: int | None


class StderrSplitter:
    """Split a stream at its marks, however it was cut into pieces.

    Parameters
    ----------
    marker
        The process's token; empty: there are no marks.
    """

    def __init__(self, marker: str) -> None:
        self._head = b"\x1e" + marker.encode() + b":"
        self._pattern = re.compile(re.escape(self._head) + rb"(-|\d{1,%d})\n" % MAX_DIGITS)
        self._marks = bool(marker)
        self._held = b""

    def feed(self, data: bytes) -> Iterator[bytes | Mark]:
        """Yield text (never empty) and marks in order; a mark that may still be incomplete is held back."""
        if self._held:
            data, self._held = self._held + data, b""
        if not self._marks or b"\x1e" not in data:
            if data:
                yield data
            return
        at = 0
        for found in self._pattern.finditer(data):
            if found.start() > at:
                yield data[at : found.start()]
            what = found[1]
            yield Mark(None if what == b"-" else int(what))
            at = found.end()
        # A mark holds one \x1e, so what may become a mark begins at the last one.
        last = data.rfind(b"\x1e", at)
        if last >= 0 and self._may_become_mark(data[last:]):
            self._held = data[last:]
        else:
            last = len(data)
        if last > at:
            yield data[at:last]

    def last_of_marks(self, data: bytes) -> int | None:
        """Return the index of the last mark, if this is nothing but whole marks of replicates; else None.

        That is what replicates leave that print nothing, and there may be very many of them.
        """
        head = self._head
        n = data.count(head)
        if not self._marks or self._held or not n or data.count(b"\n") != n or not data.endswith(b"\n"):
            return None
        if not data.startswith(head) or data.count(b"\n" + head) != n - 1:
            return None
        digits = data.replace(head, b"")
        if digits.translate(None, b"0123456789\n") or b"\n\n" in digits or digits.startswith(b"\n"):
            return None
        return int(digits[digits.rfind(b"\n", 0, -1) + 1 : -1])

    def close(self) -> bytes:
        """Return the text that was held back; the stream has ended."""
        held, self._held = self._held, b""
        return held

    def _may_become_mark(self, rest: bytes) -> bool:
        if len(rest) <= len(self._head):
            return self._head.startswith(rest)
        what = rest[len(self._head) :]
        return rest.startswith(self._head) and (what == b"-" or (what.isdigit() and len(what) <= MAX_DIGITS))


class Tail:
    """The last bytes of a text of any length, in bounded memory."""

    def __init__(self, limit: int = TAIL_BYTES) -> None:
        self._limit = limit
        self._bytes = bytearray()

    def add(self, data: bytes) -> None:
        """Append text."""
        self._bytes += data[-self._limit :]
        if len(self._bytes) > 4 * self._limit:
            del self._bytes[: -self._limit]

    def value(self) -> bytes:
        """Return the last bytes, at most the limit."""
        return bytes(self._bytes[-self._limit :])


class Attribution:
    """Give every piece of text to its replicate, within bounds.

    Parameters
    ----------
    quota
        Bytes of one replicate that are passed on as they come; of what follows only the tail is passed on,
        at the replicate's end, behind a line that says how much was left out.
    """

    def __init__(self, marker: str, *, quota: int, tail_bytes: int = TAIL_BYTES) -> None:
        self._splitter = StderrSplitter(marker)
        self._quota, self._tail_bytes = quota, tail_bytes
        self._tails: dict[int, bytes] = {}
        self._tails_size = 0
        self._outside = Tail(tail_bytes)  # what no replicate printed: imports, threads between requests
        self._tail: Tail | None = None
        self._passed = self._left_out = 0
        self.index: int | None = None  # the replicate that is open now
        self.last_index = -1  # the last one that was ever open since `begin`

    def begin(self) -> None:
        """Forget the tails of an earlier request."""
        self._tails.clear()
        self._tails_size = 0
        self.last_index = -1

    def closed(self, index: int) -> bool:
        """Whether all text of this replicate of the present request was seen (indices only rise)."""
        return self.last_index > index or (self.last_index == index and self.index is None)

    def tail(self, index: int | None) -> bytes:
        """Return the last bytes that a replicate printed; None: what was printed outside of all."""
        if index is None:
            return self._outside.value()
        if index == self.index:
            return self._tail.value() if self._tail else b""
        return self._tails.get(index, b"")

    def feed(self, data: bytes) -> Iterator[tuple[int | None, bytes]]:
        """Yield ``(index, text)`` to be logged."""
        if not (self._passed or self._left_out):
            last = self._splitter.last_of_marks(data)
            if last is not None:
                self.index = self.last_index = last
                return
        for piece in self._splitter.feed(data):
            if isinstance(piece, Mark):
                if self._passed or self._left_out:
                    yield from self._end_of_index()
                self.index = piece.index
                if piece.index is not None:
                    self.last_index = piece.index
            else:
                yield from self._text(piece)

    def close(self) -> Iterator[tuple[int | None, bytes]]:
        """Yield what is left; the stream has ended. The open replicate stays open."""
        if held := self._splitter.close():
            yield from self._text(held)
        if rest := self._rest():
            yield self.index, rest

    def _text(self, text: bytes) -> Iterator[tuple[int | None, bytes]]:
        if self.index is None:
            self._outside.add(text)
        else:
            if self._tail is None:
                self._tail = Tail(self._tail_bytes)
            self._tail.add(text)
        passed = text[: max(0, self._quota - self._passed)]
        self._passed += len(passed)
        self._left_out += len(text) - len(passed)
        if passed:
            yield self.index, passed

    def _end_of_index(self) -> Iterator[tuple[int | None, bytes]]:
        if rest := self._rest():
            yield self.index, rest
        if self._tail is not None and self.index is not None:
            self._keep(self.index, self._tail.value())
        self._tail = None
        self._passed = self._left_out = 0

    def _rest(self) -> bytes:
        if not self._left_out:
            return b""
        tail = (self._tail if self._tail is not None else self._outside).value()[-self._left_out :]
        skipped = self._left_out - len(tail)
        self._left_out = 0
        return (b"\n[... %d bytes left out ...]\n" % skipped if skipped else b"") + tail

    def _keep(self, index: int, tail: bytes) -> None:
        self._tails_size += len(tail) - len(self._tails.pop(index, b""))
        self._tails[index] = tail
        while self._tails_size > KEPT_TAILS_BYTES:
            self._tails_size -= len(self._tails.pop(next(iter(self._tails))))


def readable(text: bytes) -> str:
    """Decode what a process printed; what is no UTF-8 is replaced."""
    return text.decode("utf-8", "replace")
