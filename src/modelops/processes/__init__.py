"""Take chunks from the worker, run them in warm, limited runner processes, hand outcomes on to the worker."""

from modelops.processes.context import ContextDesk, GivenUpError
from modelops.processes.many_made import MadeCells, ManyMade
from modelops.processes.outcome import (
    AggregateOutcome,
    AnySet,
    FileSlice,
    FloatOutcomes,
    LogSink,
    Outcome,
    Output,
    ReplicateError,
    Row,
    RunEnd,
    RunnerSpec,
    SpooledFile,
)
from modelops.processes.pool import ProcessPool
from modelops.processes.stop import StopSignal
from modelops.rpc import AggregateSet, AggregateTable, ReplicateSet, ReplicateTable

__all__ = [
    "AggregateOutcome",
    "AggregateSet",
    "AggregateTable",
    "AnySet",
    "ContextDesk",
    "FileSlice",
    "FloatOutcomes",
    "GivenUpError",
    "LogSink",
    "MadeCells",
    "ManyMade",
    "Outcome",
    "Output",
    "ProcessPool",
    "ReplicateError",
    "ReplicateSet",
    "ReplicateTable",
    "Row",
    "RunEnd",
    "RunnerSpec",
    "SpooledFile",
    "StopSignal",
]
