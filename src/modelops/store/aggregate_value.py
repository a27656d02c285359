"""Read one aggregate exactly as the bundle returned it, or as it is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from modelops.states import AggregateStatus
from modelops.store.segment_table import OutputsColumn, decoded, read_aggregates
from modelops.store.segments import job_folder

if TYPE_CHECKING:
    from modelops.store.contents import JobContents
    from modelops.store.segment_table import StoredOutput

_SUCCEEDED = list(AggregateStatus).index(AggregateStatus.SUCCEEDED)


def aggregate_value(contents: JobContents, param: int | str, target: str) -> Any:
    """Return the aggregate of one parameter set.

    Parameters
    ----------
    param
        Ordinal or ``param_id``.
    target
        Entry point of the aggregate.

    Raises
    ------
    KeyError
        There is none, or it did not succeed; the text says why.
    """
    return decoded(contents.objects, *stored_aggregate(contents, param, target))


def stored_aggregate(contents: JobContents, param: int | str, target: str) -> tuple[bool, list[StoredOutput]]:
    """Return what `aggregate_value` decodes: whether the bundle returned a dict, and the outputs as stored."""
    ordinal = contents.parameters.param_of(param) if isinstance(param, str) else param
    for ref in reversed(contents.aggregates):  # a later one replaces one that had become stale
        if not any(lo <= ordinal < hi for lo, hi in ref.params):
            continue
        table = read_aggregates(contents.objects, contents.job, ref)
        mine = pc.and_(pc.equal(table["param"], ordinal), pc.equal(table["target"].cast("string"), target))
        row = table.filter(mine).combine_chunks()
        if not row.num_rows:
            continue
        if row["status"][0].as_py() != _SUCCEEDED:
            status = list(AggregateStatus)[row["status"][0].as_py()]
            raise KeyError(
                f"aggregate {target} of parameter set {param} is {status}: {row['reason'][0].as_py()}"
            )
        outputs = OutputsColumn(row, f"{job_folder(contents.job)}/{ref.pack}").rows()[0]
        return row["returned"][0].as_py(), outputs
    raise KeyError(f"job {contents.job} has no aggregate {target!r} of parameter set {param}")
