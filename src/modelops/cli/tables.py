"""Draw tables and failures on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from modelops.study.wording import shown_text

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

    from modelops.client import Job

MAX_COLUMNS = 10
_HIDDEN = {"param_id", "reason"}


def show_table(console: Console, table: pa.Table, *, title: str) -> None:
    """Draw the first columns of a table; wide ones lose their last columns, and say so."""
    names = [n for n in table.column_names if n not in _HIDDEN]
    drawn = Table(title=title, title_justify="left")
    for name in names[:MAX_COLUMNS]:
        drawn.add_column(name, justify="right")
    for row in table.select(names[:MAX_COLUMNS]).to_pylist():
        drawn.add_row(*(cell(v) for v in row.values()))
    console.print(drawn)
    if len(names) > MAX_COLUMNS:
        console.print(f"({len(names) - MAX_COLUMNS} more columns in the files)", highlight=False)


def cell(value: Any) -> str:
    """Return a value as it is shown in a cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def show_failures(console: Console, job: Job, summary: list[dict[str, Any]], *, limit: int = 5) -> None:
    """Show each kind of failure of a job once: how often, one full example, and the command that runs it again."""
    for entry in summary[:limit]:
        what = ": ".join(filter(None, (entry["status"], entry["error_type"], entry["message"])))
        head = f"{entry['count']:,} x {what}"
        _show_example(console, head, entry)
        if entry["error_type"] == "KeyError" and (hint := _no_such_parameter(job, entry)):
            console.print(hint, markup=False, highlight=False, soft_wrap=True)
        if entry.get("command"):
            console.print(f"run it again: {entry['command']}", markup=False, highlight=False, soft_wrap=True)
    if len(summary) > limit:
        console.print(
            f"({len(summary) - limit} more kinds of failure; see job.failure_summary())", highlight=False
        )


def _no_such_parameter(job: Job, entry: dict[str, Any]) -> str:
    """Say which parameters there are, if what was looked for in vain may have been one."""
    if entry["param_id"] is None:
        return ""  # the stored parameters are lost
    names = sorted(job.params(entry["param"]))
    if entry["message"] in {repr(name) for name in names}:
        return ""
    return (
        f"if {entry['message']} is a parameter of the model: this study does not give it (it gives "
        f"{', '.join(names) or 'none'}); add it and submit the study again"
    )


def show_aggregate_failures(console: Console, summary: list[dict[str, Any]], *, limit: int = 5) -> None:
    """Show each kind of aggregate that failed or was skipped once: how often, why, and one full example."""
    for entry in summary[:limit]:
        which = f"{entry['aggregate']}, parameter set {entry['param']}"
        _show_example(
            console, f"{entry['count']:,} x aggregate {entry['status']}: {which}: {entry['reason']}", entry
        )
    if len(summary) > limit:
        console.print(f"({len(summary) - limit} more kinds; see job.aggregate_failures())", highlight=False)


def _show_example(console: Console, head: str, entry: dict[str, Any]) -> None:
    console.print(f"\n{shown_text(head)}", style="red", markup=False, highlight=False, soft_wrap=True)
    for part in ("traceback", "stderr"):
        if entry.get(part):
            console.print(entry[part].rstrip(), markup=False, highlight=False, soft_wrap=True)
