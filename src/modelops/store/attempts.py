"""Execution data: when and where replicates ran, how long, how often. Never part of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from modelops.errors import IntegrityError
from modelops.states import OUTCOMES, ReplicateStatus
from modelops.store import columns
from modelops.store.order import places
from modelops.store.replicate_rows import in_ranges
from modelops.store.segment_table import open_execution
from modelops.store.segments import FORMAT, job_folder
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.store.contents import JobContents
    from modelops.study.index_line import IndexLine

_ROWS: Final = 65_536
_WORDS: Final = [str(status) for status in OUTCOMES]
_SCHEMA: Final = pa.schema(
    [
        ("param", pa.int64()),
        ("replicate", pa.int64()),
        ("attempt", pa.string()),
        ("attempt_number", pa.int32()),
        ("status", pa.string()),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("seconds", pa.float64()),
        ("cpu_seconds", pa.float64()),
        ("max_rss_bytes", pa.int64()),
        ("worker", pa.string()),
        ("host", pa.string()),
        ("pid", pa.int64()),
    ],
    metadata={"modelops.format": str(FORMAT)},
)


def write_attempts(contents: JobContents, open_sink: Callable[[pa.Schema], Any]) -> None:
    """Write one row per finished try at a replicate; attempts by id (so by time), within one by index."""
    sink = open_sink(_SCHEMA)
    waiting: list[pa.Table] = []
    for table in _tables(contents):
        waiting.append(table)
        if sum(len(t) for t in waiting) >= _ROWS:
            together, waiting = pa.concat_tables(waiting).combine_chunks(), []
            sink.write(together)
    if waiting:
        sink.write(pa.concat_tables(waiting).combine_chunks())


def n_surplus(contents: JobContents) -> int:
    """Return how many replicates were run to their end though they are not needed."""
    ranges = (
        pair for ref in contents.segments if ReplicateStatus.NOT_NEEDED in ref.counts for pair in ref.ranges
    )
    not_needed = Ranges(ranges)
    if not not_needed:
        return 0
    found = [np.zeros(0, np.int64)]
    for name in contents.objects.list(f"{job_folder(contents.job)}/executions"):
        stored = open_execution(contents.objects.get(name), name)
        index = columns.fixed_values(columns.only_chunk(stored, "index"))
        found.append(index[in_ranges(not_needed, index)])
    return len(np.unique(np.concatenate(found)))


def _tables(contents: JobContents) -> Iterator[pa.Table]:
    for name in contents.objects.list(f"{job_folder(contents.job)}/executions"):
        yield rows_of(contents.spec.line, open_execution(contents.objects.get(name), name), name)


def rows_of(line: IndexLine, stored: pa.Table, name: str) -> pa.Table:
    """Return the execution data of one attempt as rows of the table of attempts. Raises IntegrityError."""
    try:
        return _table(line, stored)
    except (ValueError, LookupError, pa.ArrowException) as e:
        raise IntegrityError(f"{name} is damaged: {e!r}; 'modelops jobs reconcile' leaves it out") from e


def _table(line: IndexLine, stored: pa.Table) -> pa.Table:
    metadata = {k.decode(): v.decode() for k, v in stored.schema.metadata.items()}
    rows = places(line, columns.fixed_values(columns.only_chunk(stored, "index")))
    status = columns.fixed(
        columns.fixed_values(columns.only_chunk(stored, "status")).astype(np.int64), pa.int64()
    )
    n = len(stored)
    constant = {
        "attempt": columns.text([metadata["modelops.attempt"]]),
        "worker": columns.text([metadata.get("modelops.worker", "")]),
        "host": columns.text([metadata.get("modelops.host", "")]),
        "pid": columns.fixed(np.array([int(metadata.get("modelops.pid", 0))]), pa.int64()),
    }
    zeros = columns.fixed(np.zeros(n, np.int64), pa.int64())
    named = {
        "param": columns.fixed(rows.param, pa.int64()),
        "replicate": columns.fixed(rows.replicate, pa.int64()),
        "status": columns.text(_WORDS).take(status),
        **{name: one.take(zeros) for name, one in constant.items()},
    }
    arrays = [named[f.name] if f.name in named else stored[f.name] for f in _SCHEMA]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)
