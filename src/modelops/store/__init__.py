"""Take outcomes from workers and decisions from the driver, keep them, and hand on results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelops.store.aggregate_segments import AggregateRow, AggregateWriter
from modelops.store.objects import AlreadyExistsError, Objects
from modelops.store.segment_body import Cells, Listed, SpooledFile, StoredError
from modelops.store.segment_table import SegmentTable, read_aggregates, read_segment
from modelops.store.segments import (
    Execution,
    FloatRows,
    PackSlice,
    SegmentWriter,
)

if TYPE_CHECKING:
    from modelops.store.records import ChangedMeanwhileError, EventRow, JobRow, LeaseLostError, Records

__all__ = [
    "AggregateRow",
    "AggregateWriter",
    "AlreadyExistsError",
    "Cells",
    "ChangedMeanwhileError",
    "EventRow",
    "Execution",
    "FloatRows",
    "JobRow",
    "LeaseLostError",
    "Listed",
    "Objects",
    "PackSlice",
    "Records",
    "SegmentTable",
    "SegmentWriter",
    "SpooledFile",
    "StoredError",
    "read_aggregates",
    "read_segment",
]


def __getattr__(name: str) -> Any:
    # SQL is for drivers and clients; a worker, which starts often, does without its import.
    if name in __all__:
        from modelops.store import records

        return getattr(records, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
