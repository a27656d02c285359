"""Read the replicates of a parameter set from the segments that hold them, in replicate order."""

from __future__ import annotations

import heapq
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from modelops.processes import FileSlice, Row
from modelops.states import STORED
from modelops.store import PackSlice
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from modelops.states import ReplicateStatus
    from modelops.store import Objects, SegmentTable
    from modelops.store.segment_table import StoredOutput
    from modelops.study.ids import JobId
    from modelops.study.index_line import IndexLine
    from modelops.worker.messages import SegmentRef
    from modelops.worker.segment_cache import SegmentCache


class ReplicateReader:
    """Reads segments when they are needed; each is verified by its digest.

    A parameter set's replicates may lie in several segments, and in between each other: the first
    submission of a job is spread over the line.
    """

    def __init__(
        self,
        objects: Objects,
        segments: SegmentCache,
        job: JobId,
        refs: Sequence[SegmentRef],
        line: IndexLine,
    ) -> None:
        self._objects, self._segments, self._job, self.line = objects, segments, job, line
        self._refs = [(Ranges(ref.ranges), ref) for ref in refs]

    def count(self, param: int, status: ReplicateStatus) -> int:
        """Return how many replicates of a parameter set have this status."""
        code = STORED.index(status)
        n = 0
        for table, indices in self.tables(self.line.of_param(param)):
            for lo, hi in indices.pairs:
                first, last = np.searchsorted(table.index, (lo, hi))
                n += int(np.count_nonzero(table.status[first:last] == code))
        return n

    def rows(self, param: int) -> Iterator[Row]:
        """Yield the succeeded replicates of a parameter set in replicate order."""
        for _param, _first, index, n in self.line.ordered(param, param + 1):
            parts = [table.rows(indices) for table, indices in self.tables(Ranges([(index, index + n)]))]
            for at, returned_dict, outputs in heapq.merge(*parts, key=itemgetter(0)):
                yield Row(at, returned_dict, [self._for_runner(o) for o in outputs])

    def tables(self, wanted: Ranges) -> Iterator[tuple[SegmentTable, Ranges]]:
        """Yield the segments that hold some of these indices, and which."""
        for held, ref in self._refs:
            if here := held & wanted:
                yield self._segments.read(self._job, ref), here

    def _for_runner(self, output: StoredOutput) -> tuple[str, str, bytes | FileSlice]:
        name, kind, data = output
        if not isinstance(data, PackSlice):
            return name, kind, data
        path = self._objects.local_path(data.pack)
        if path is None:
            return name, kind, data.read(self._objects)
        data.verify(self._objects)  # the runner reads them by path, and knows no digest
        return name, kind, FileSlice(str(path), data.offset, data.length)
