"""Frames: ``Content-Length: N``, an empty line, N bytes. The base protocol of LSP, sans-IO.

Bytes in, bodies out. Both sides of the pipe use this module. Every buffer is bounded: a header block by
`MAX_HEADER_BYTES`, a body by `MAX_BODY_BYTES`; a sender that breaks a rule gets a `FrameError`, and the
stream is unusable from then on, because nobody can know where the next frame begins.
"""

from __future__ import annotations

MAX_HEADER_BYTES = 8 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
_END = b"\r\n\r\n"
_PLAIN = b"Content-Length: "
_PLAIN_LEN, _PLAIN_MAX = len(_PLAIN), len(_PLAIN) + 9


class FrameError(Exception):
    """The other side sent bytes that are no frame."""


def encode_frame(body: bytes) -> bytes:
    """Return the body with its header.

    Raises
    ------
    ValueError
        The body is longer than the other side would accept.
    """
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {MAX_BODY_BYTES}")
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


class FrameSplitter:
    """Cut a stream of bytes into frame bodies, however it was cut before.

    Parameters
    ----------
    max_body_bytes
        A frame that announces more is refused before any of it is kept.
    """

    def __init__(self, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._max = max_body_bytes
        self._buffer = bytearray()
        self._length = -1  # of the body that is being awaited; -1: a header is
        self.broken = ""  # why nothing more can be read, once it is so

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes of the stream and return the bodies they complete, in order.

        Raises
        ------
        FrameError
            A header is no header, too long, or announces too much. Bodies that were complete before it are
            returned first; then the error comes with the next call.
        """
        if self.broken:
            raise FrameError(self.broken)
        if self._length >= 0 and len(self._buffer) + len(data) < self._length:
            self._buffer += data
            return []
        buffer = bytes(self._buffer) + data if self._buffer else data
        self._buffer.clear()
        bodies = []
        at = 0
        try:
            while True:
                if self._length < 0:
                    end = buffer.find(_END, at, at + MAX_HEADER_BYTES)
                    if end < 0:
                        if len(buffer) - at >= MAX_HEADER_BYTES:
                            raise FrameError(
                                f"no header ends within {MAX_HEADER_BYTES} bytes: {_show(buffer, at)}"
                            )
                        break
                    self._length = self._content_length(buffer, at, end)
                    at = end + len(_END)
                if len(buffer) - at < self._length:
                    break
                bodies.append(buffer[at : at + self._length])
                at += self._length
                self._length = -1
        except FrameError as e:
            self.broken = str(e)
            if not bodies:
                raise
            return bodies
        self._buffer += buffer[at:]
        return bodies

    def close(self) -> None:
        """Say that the stream has ended.

        Raises
        ------
        FrameError
            It ended inside a frame.
        """
        if self.broken:
            raise FrameError(self.broken)
        if self._length >= 0:
            raise FrameError(f"the stream ended after {len(self._buffer)} of {self._length} bytes of a frame")
        if self._buffer:
            raise FrameError(f"the stream ended inside a header: {_show(self._buffer, 0)}")

    def _content_length(self, buffer: bytes, start: int, end: int) -> int:
        if end - start <= _PLAIN_MAX and buffer.startswith(_PLAIN, start):  # what our own side sends
            digits = buffer[start + _PLAIN_LEN : end]
            if digits.isdigit() and (length := int(digits)) <= self._max:
                return length
        length = -1
        for line in bytes(buffer[start:end]).split(b"\r\n"):
            name, colon, value = line.partition(b":")
            if not colon or not name.strip():
                raise FrameError(f"a header line without a name and a colon: {_show(line, 0)}")
            if name.strip().lower() == b"content-length":
                number = value.strip()
                if length >= 0 or not number.isdigit() or len(number) > 18:
                    raise FrameError(f"not one Content-Length: {_show(buffer, start)}")
                length = int(number)
        if length < 0:
            raise FrameError(f"a header without Content-Length: {_show(buffer, start)}")
        if length > self._max:
            raise FrameError(f"a frame of {length} bytes is over the limit of {self._max}")
        return length


def _show(data: bytes | bytearray, start: int) -> str:
    return repr(bytes(data[start : start + 60]))
