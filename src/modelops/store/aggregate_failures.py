"""Aggregates that failed or were skipped, grouped by what and where: one full example of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from modelops.states import AggregateStatus
from modelops.store import columns
from modelops.store.aggregate_segments import AGGREGATE_CODE, AGGREGATE_OUTCOMES
from modelops.store.segment_table import read_aggregates
from modelops.study.ranges import EMPTY, Ranges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.store.contents import JobContents

SUMMARY_SCHEMA: Final = pa.schema(
    [
        ("aggregate", pa.string()),
        ("count", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("traceback", pa.string()),
        ("stderr", pa.string()),
        ("param", pa.int64()),
    ]
)
_COLUMNS: Final = ("param", "target", "status", "reason", "error")


def aggregate_failures(contents: JobContents) -> pa.Table:
    """Return a row per kind, as `kinds_of_failure` does."""
    return columns.table(kinds_of_failure(contents), SUMMARY_SCHEMA)


def kinds_of_failure(contents: JobContents) -> list[dict[str, Any]]:
    """Return one row per kind, the most frequent first; the example is of the lowest parameter set.

    A kind of failure is an entry point with a fingerprint (type and place); what was skipped is one kind for each
    entry point.
    """
    kinds: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in _bad_rows(contents):
        error = row["error"] or {}
        status = AGGREGATE_OUTCOMES[row["status"]]
        failed = status is AggregateStatus.FAILED
        mark = (error.get("fingerprint") or row["reason"] or "") if failed else ""
        example = {
            "aggregate": row["target"],
            "count": 0,
            "status": str(status),
            "reason": row["reason"] or f"{error.get('type')}: {error.get('message')}",
            "traceback": error.get("traceback"),
            "stderr": error.get("stderr"),
            "param": row["param"],
        }
        key = (row["target"], str(status), mark)
        known = kinds.setdefault(key, example)
        if row["param"] < known["param"]:
            kinds[key] = known = {**example, "count": known["count"]}
        known["count"] += 1
    return sorted(kinds.values(), key=lambda kind: (-kind["count"], kind["param"], kind["aggregate"]))


def _bad_rows(contents: JobContents) -> Iterator[dict[str, Any]]:
    newer = EMPTY
    for ref in reversed(contents.aggregates):  # a later one replaces one that had become stale
        if any(n for status, n in ref.counts.items() if status != AggregateStatus.SUCCEEDED):
            table = read_aggregates(contents.objects, contents.job, ref)
            bad = table.filter(pc.not_equal(table["status"], AGGREGATE_CODE[AggregateStatus.SUCCEEDED]))
            for batch in bad.select(_COLUMNS).to_batches(max_chunksize=4096):
                yield from (row for row in batch.to_pylist() if row["param"] not in newer)
        newer |= Ranges(ref.params)
