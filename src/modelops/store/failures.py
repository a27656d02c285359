"""Replicates that did not succeed, one by one and grouped by fingerprint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from modelops.errors import IntegrityError
from modelops.states import FAILURES, STORED, ReplicateStatus
from modelops.store import columns
from modelops.store.gather import Cover
from modelops.store.order import indices_in, places
from modelops.store.replicate_rows import replicate_statuses, row_seeds
from modelops.store.segment_table import open_execution
from modelops.store.segments import job_folder
from modelops.study.ranges import Ranges
from modelops.study.seeds import seed_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from modelops.store.contents import JobContents
    from modelops.worker.messages import SegmentRef

FAILURES_SCHEMA: Final = pa.schema(
    [
        ("param", pa.int64()),
        ("param_id", pa.string()),
        ("replicate", pa.int64()),
        ("seed", pa.int64()),
        ("status", pa.string()),
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("traceback", pa.string()),
        ("stderr", pa.string()),
        ("attempts", pa.int32()),
        ("fingerprint", pa.string()),
    ]
)
SUMMARY_SCHEMA: Final = pa.schema(
    [
        ("fingerprint", pa.string()),
        ("count", pa.int64()),
        ("status", pa.string()),
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("traceback", pa.string()),
        ("stderr", pa.string()),
        ("param", pa.int64()),
        ("param_id", pa.string()),
        ("replicate", pa.int64()),
        ("seed", pa.int64()),
        ("command", pa.string()),
    ]
)
_NO_FAILURE: Final = [code for code, status in enumerate(STORED) if status not in FAILURES]
_ERROR_FIELDS: Final = (
    ("error_type", "type"),
    ("message", "message"),
    ("traceback", "traceback"),
    ("stderr", "stderr"),
    ("fingerprint", "fingerprint"),
)
_ERRORS: Final = pa.schema([FAILURES_SCHEMA.field(name) for name in (*dict(_ERROR_FIELDS), "attempts")])
ROWS_AT_ONCE: Final = 2_048


def failures_table(contents: JobContents) -> pa.Table:
    """Return one row per replicate that did not succeed, sorted by (parameter set, replicate).

    Replicates that failed have an error. Those that are pending do not appear; once the job has ended,
    those that were cancelled or not run do, without an error, unless they are `JobContents.no_rows`.
    """
    schema, groups = failures_schema(contents), list(failure_groups(contents))
    if not groups:
        return schema.empty_table()
    return pa.concat_tables(groups).combine_chunks().replace_schema_metadata(schema.metadata)


def failures_schema(contents: JobContents) -> pa.Schema:
    """Return the columns of `failures_table`, and what is to be said of it."""
    return FAILURES_SCHEMA.with_metadata(contents.remarks(of_rows=_has_ended(contents)) or None)


def failure_groups(contents: JobContents) -> Iterator[pa.Table]:
    """Yield the rows of `failures_table`, some at a time: all errors of a job may be more than memory holds."""
    failed = [
        number
        for number, ref in enumerate(contents.segments)
        if any(n for status, n in ref.counts.items() if status in FAILURES)
    ]
    ranges = [contents.segments[number].ranges for number in failed]
    cover: Cover[_Failed] = Cover(
        ranges, lambda nth: _read_failed(contents, failed[nth]), lambda read: read.errors.nbytes
    )
    one_each = (np.array([pairs[0][0]], np.int64) for pairs in ranges if pairs)
    found = [read.key for one in one_each for read, _ in cover.find(one, once_more=True)]
    if _has_ended(contents):
        covered = Ranges(pair for ref in contents.segments for pair in ref.ranges)
        missing = contents.spec.line.all() - covered - contents.running - contents.no_rows
        found.append(indices_in(missing.pairs))
    indices = np.concatenate([np.zeros(0, np.int64), *found])
    rows = places(contents.spec.line, indices)
    indices = indices[np.lexsort((rows.replicate, rows.param))]
    _, rest, _ = replicate_statuses(contents)
    for lo in range(0, len(indices), ROWS_AT_ONCE):
        part = indices[lo : lo + ROWS_AT_ONCE]
        codes, row = np.full(len(part), rest, np.int64), np.full(len(part), -1, np.int64)
        parts: list[pa.Table] = []
        n = 0
        for read, at in cover.find(part):
            of = np.searchsorted(read.key, part[at])
            codes[at], row[at] = read.codes[of], np.arange(n, n + len(at))
            parts.append(read.errors.take(columns.fixed(of, pa.int64())))
            n += len(at)
        errors = pa.concat_tables(parts or [_ERRORS.empty_table()]).combine_chunks()
        errors = errors.take(columns.fixed(row, pa.int64(), row >= 0))  # the others have none
        yield _table(contents, part, codes, {f.name: columns.only_chunk(errors, f.name) for f in _ERRORS})


def failure_summary(failures: pa.Table, command: Callable[[dict[str, Any]], str] | None = None) -> pa.Table:
    """Group real failures by fingerprint: how often, and one full example, the most frequent first.

    Parameters
    ----------
    failures
        What `failures_table` returned.
    command
        Given an example (a row of ``failures``), the shell command that runs that replicate again.
    """
    real = {str(status) for status in FAILURES}
    examples: dict[str, dict[str, Any]] = {}
    for batch in failures.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            if row["status"] in real:
                known = examples.setdefault(row["fingerprint"] or "", {**row, "count": 0})
                known["count"] += 1
    found = sorted(examples.values(), key=lambda e: (-e["count"], e["param"], e["replicate"]))
    for example in found:
        example["command"] = command(example) if command is not None else None
    return columns.table(found, SUMMARY_SCHEMA)


class _Failed(NamedTuple):
    """The rows of a segment that failed. ``key``: their indices, sorted; ``codes``: of their statuses."""

    key: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int64]
    errors: pa.Table


def _read_failed(contents: JobContents, number: int) -> _Failed:
    segment = contents.read(number)
    bad = np.flatnonzero(~np.isin(segment.status, _NO_FAILURE))
    index = segment.index[bad]
    error = columns.only_chunk(segment.table, "error").take(columns.fixed(bad, pa.int64()))
    present = columns.bool_values(error.is_valid())
    named = {theirs: _masked(error.field(ours), present) for theirs, ours in _ERROR_FIELDS}
    named["attempts"] = _attempts(contents, contents.segments[number], index)
    errors = pa.Table.from_arrays([named[f.name] for f in _ERRORS], schema=_ERRORS)
    return _Failed(index, segment.status[bad].astype(np.int64), errors)


def _has_ended(contents: JobContents) -> bool:
    return contents.rest != ReplicateStatus.PENDING


def _table(contents: JobContents, indices: Any, codes: Any, named: dict[str, pa.Array]) -> pa.Table:
    rows = places(contents.spec.line, indices)
    words, _, _ = replicate_statuses(contents)
    params, nth = np.unique(rows.param, return_inverse=True)
    lost = bool(contents.lost_parameters)
    ids = columns.text([None if lost else contents.parameters[p].param_id for p in params.tolist()])
    named = {
        **named,
        "param": columns.fixed(rows.param, pa.int64()),
        "param_id": ids.take(columns.fixed(nth.astype(np.int64), pa.int64())),
        "replicate": columns.fixed(rows.replicate, pa.int64()),
        "seed": row_seeds(
            contents.spec,
            lambda: None if lost else seed_keys(contents.spec.study_seed, columns.joined(ids)),
            nth,
            rows.replicate,
        ),
        "status": columns.text([str(w) for w in words]).take(columns.fixed(codes, pa.int64())),
    }
    return pa.Table.from_arrays([named[f.name] for f in FAILURES_SCHEMA], schema=FAILURES_SCHEMA)


def _masked(array: pa.Array, present: Any) -> pa.Array:
    """Return the array, null where a struct around it is null."""
    at = columns.fixed(np.arange(len(array), dtype=np.int64), pa.int64(), present)
    return array.take(at)


def _attempts(contents: JobContents, ref: SegmentRef, indices: Any) -> pa.Array:
    """Return how often each replicate was tried, null where nothing is known of its execution."""
    if ref.execution is None:
        return pa.nulls(len(indices), pa.int32())
    name = f"{job_folder(contents.job)}/{ref.execution}"
    stored = open_execution(contents.objects.get(name), name)
    try:
        return _numbers(stored, indices)
    except (ValueError, LookupError, pa.ArrowException) as e:
        raise IntegrityError(f"{name} is damaged: {e!r}; 'modelops jobs reconcile' leaves it out") from e


def _numbers(stored: pa.Table, indices: Any) -> pa.Array:
    index = columns.fixed_values(columns.only_chunk(stored, "index"))
    number = columns.fixed_values(columns.only_chunk(stored, "attempt_number"))
    order = np.argsort(index, kind="stable")
    at = np.minimum(np.searchsorted(index[order], indices), max(len(index) - 1, 0))
    known = index[order][at] == indices
    return columns.fixed(number[order][at].astype(np.int32), pa.int32(), known)
