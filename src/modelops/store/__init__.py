"""Take outcomes from workers and decisions from the driver, keep them, and hand on results."""

from modelops.store.objects import AlreadyExistsError, Objects
from modelops.store.records import ChangedMeanwhileError, EventRow, JobRow, LeaseLostError, Records
from modelops.store.segment_table import SegmentTable, read_aggregates, read_segment
from modelops.store.segments import (
    AggregateRow,
    AggregateWriter,
    Execution,
    PackSlice,
    SegmentWriter,
    SpooledFile,
    StoredError,
)

__all__ = [
    "AggregateRow",
    "AggregateWriter",
    "AlreadyExistsError",
    "ChangedMeanwhileError",
    "EventRow",
    "Execution",
    "JobRow",
    "LeaseLostError",
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
