"""Take outcomes from the workers and decisions from the driver; keep them as rows and objects; hand on results."""

from modelops.store.objects import AlreadyExistsError, Objects
from modelops.store.records import ChangedMeanwhileError, EventRow, JobRow, LeaseLostError, Records
from modelops.store.segments import (
    AggregateWriter,
    Execution,
    PackSlice,
    SegmentTable,
    SegmentWriter,
    SpooledFile,
    StoredError,
    read_aggregates,
    read_segment,
)

__all__ = [
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
