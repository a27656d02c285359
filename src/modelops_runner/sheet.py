"""A sheet of memory that worker and runner share: outcomes of quick replicates are written there, not sent.

To send a message costs a system call and wakes a reader; to write eight bytes costs next to nothing. What is written
here is there for the worker at once, and stays when this process dies, just like what was sent. The layout is in
``docs/reference/protocol.md``. A record is counted when it is complete: the count is a word of its own, written last.
"""

from __future__ import annotations

import os
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from modelops_runner.shapes import Shape

HEAD_WORDS = 8  # of 8 bytes: how many records were written, how many the worker has taken, their shape
WRITTEN, TAKEN, SHAPE = 0, 1, 2
FIELDS = 3  # of a record, before its values: index, seconds, CPU seconds


class Sheet:
    """The runner's side of the sheet. It holds records of one shape in each request.

    Parameters
    ----------
    fd
        Of the memory; closed here.
    """

    def __init__(self, fd: int) -> None:
        from mmap import mmap

        self._map = mmap(fd, 0)
        os.close(fd)
        self._words: Any = memoryview(self._map).cast("Q")
        self.begin()

    def begin(self) -> None:
        """Begin a request: the worker has cleared the head."""
        self._shape: Shape | None = None
        self._n = self._limit = self._capacity = 0

    def put(self, shape: Shape, index: int, seconds: float, cpu: float, result: dict[Any, Any]) -> bool:
        """Write what a replicate returned; False if there is no room for it now, or for floats of this shape."""
        if shape is not self._shape:
            if self._shape is not None:
                return False
            self._adopt(shape)
        n = self._n
        if n == self._limit:
            self._limit = self._words[TAKEN] + self._capacity
            if n == self._limit:
                return False
        place = 8 * HEAD_WORDS + n % self._capacity * self._width
        self._pack(self._map, place, index, seconds, cpu, *result.values())
        self._n = self._words[WRITTEN] = n + 1
        return True

    def _adopt(self, shape: Shape) -> None:
        self._shape = shape
        record = Struct(f"=q{FIELDS - 1 + shape.n}d")
        self._pack, self._width = record.pack_into, record.size
        self._capacity = (len(self._words) - HEAD_WORDS) * 8 // self._width
        self._words[SHAPE] = shape.number
