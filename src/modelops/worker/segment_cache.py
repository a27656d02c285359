"""Segments that were read and verified a moment ago: aggregates of one job read the same ones again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from modelops.store import read_segment

if TYPE_CHECKING:
    from modelops.store import Objects, SegmentTable
    from modelops.study.ids import JobId
    from modelops.study.ranges import Range
    from modelops.worker.messages import SegmentRef

MAX_BYTES = 128 * 1024 * 1024


class SegmentCache:
    """The segments used last, up to ``max_bytes`` (the one asked for is always kept). Thread-safe."""

    def __init__(self, objects: Objects, *, max_bytes: int = MAX_BYTES) -> None:
        self._objects, self._max_bytes = objects, max_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[JobId, str, tuple[Range, ...]], SegmentTable] = OrderedDict()
        self._n_bytes = 0

    def read(self, job: JobId, ref: SegmentRef) -> SegmentTable:
        """Return a segment. Raises IntegrityError if what is stored is not what was committed."""
        key = (job, ref.digest, ref.ranges)  # which of its rows count may change
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        table = read_segment(self._objects, job, ref)
        with self._lock:
            if key not in self._held:
                self._held[key] = table
                self._n_bytes += table.table.nbytes
            while self._n_bytes > self._max_bytes and len(self._held) > 1:
                self._n_bytes -= self._held.popitem(last=False)[1].table.nbytes
        return table
