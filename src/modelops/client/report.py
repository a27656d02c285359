"""Rank the parameter sets of a job, and let the bundle draw its own report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from modelops.client.job import Job


def ranked_aggregates(job: Job) -> pa.Table:
    """Return the succeeded aggregates, lowest objective first; no rows if the bundle names none.

    The objective is ``[tool.modelops] objective`` of the bundle, ``loss`` by default: a scalar output of an
    aggregate, smaller is better. Ties keep the order of the parameter sets.
    """
    import pyarrow.compute as pc

    table = job.aggregates()
    column = objective_column(table.column_names, job.manifest.objective)
    if column is None:
        return table.slice(0, 0)
    table = table.filter(pc.is_valid(table[column]))
    return table.take(pc.sort_indices(table, sort_keys=[(column, "ascending"), ("param", "ascending")]))


def objective_column(columns: list[str], objective: str) -> str | None:
    """Return the column that holds the objective: by its name, or ``<aggregate>.<name>``."""
    if objective in columns:
        return objective
    return next((c for c in columns if c.endswith(f".{objective}")), None)


def write_report(job: Job, folder: Path) -> str:
    """Call the bundle's ``report(rows, folder)`` in its environment; return the text it gives, if it has one.

    ``rows`` are the parameter sets, best first: ``{"param", "params", "aggregates"}`` with the aggregates exactly as
    the bundle returned them.
    """
    from modelops.client.local_runner import LocalRunner

    entry = job.manifest.report
    if entry is None:
        return ""
    order = ranked_aggregates(job)
    if not order.num_rows:
        return ""
    rows: list[dict[str, Any]] = [
        {"param": p, "params": job.params(p), "aggregates": aggregates_of(job, p)}
        for p in order["param"].to_pylist()
    ]
    with LocalRunner.of_job(job) as runner:
        text = runner.call(entry, [rows, str(folder.absolute())])
    return "\n".join(text) if isinstance(text, (list, tuple)) else str(text or "")


def aggregates_of(job: Job, param: int) -> dict[str, Any]:
    """Return what the aggregates of one parameter set returned, by the names of the columns in `Job.aggregates`."""
    from modelops.store.aggregate_rows import target_prefixes

    outputs: dict[str, Any] = {}
    for target, prefix in target_prefixes(job.spec.aggregates).items():
        value = job.aggregate(param, target)
        for name, output in (value if isinstance(value, dict) else {"value": value}).items():
            outputs[prefix + name] = output
    return outputs
