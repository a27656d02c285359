"""Show one replicate that was run here: its outputs as the model returned them, arrays by their shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from modelops.client.local_run import RanReplicate
    from modelops.processes import SpooledFile

MAX_TEXT = 500
MAX_PRINTED_LINES = 20


def replicate_json(one: RanReplicate) -> dict[str, Any]:
    """Return a replicate as ``--json`` shows it."""
    outcome = one.outcome
    error = outcome.error
    return {
        "param": one.param,
        "params": dict(one.params),
        "replicate": one.replicate,
        "seed": one.seed,
        "status": str(outcome.status),
        "seconds": outcome.seconds,
        "outputs": {name: output_json(kind, data) for name, kind, data in outcome.outputs},
        "error": None
        if error is None
        else {
            "type": error.type,
            "message": error.message,
            "traceback": error.traceback,
            "stderr": error.stderr,
            "file": error.file,
            "line": error.line,
        },
        "printed": one.printed,
    }


def output_json(kind: str, given: bytes | SpooledFile) -> dict[str, Any]:
    """Return an output: ``value`` where JSON can hold it, otherwise what it is and how large."""
    import numpy as np

    data = given if isinstance(given, bytes) else Path(given.path).read_bytes()
    shown: dict[str, Any] = {"kind": kind, "bytes": len(data)}
    if kind.startswith("arrow"):
        return shown | _table(data)
    if kind in ("bytes", "bytearray"):
        return shown | ({"text": data.decode()} if len(data) <= MAX_TEXT and _is_text(data) else {})
    from modelops_runner.values import decode

    value = decode(kind, data)
    if isinstance(value, np.ndarray | np.generic):
        shown |= {"dtype": str(value.dtype), "shape": list(value.shape)}
        if value.size and value.dtype.kind in "iuf":
            shown |= (
                {"min": float(np.nanmin(value)), "max": float(np.nanmax(value))} if _any_number(value) else {}
            )
        return shown
    return shown | {"value": _plain(value)}


def show_replicate(one: RanReplicate) -> None:
    """Print a replicate: a line, its outputs, what it printed, and what went wrong."""
    from modelops.bundles.check import shown_seconds

    params = " ".join(f"{name}={value!r}" for name, value in one.params.items())
    status = typer.style(
        str(one.outcome.status), fg="green" if one.succeeded else "red", bold=not one.succeeded
    )
    typer.echo(
        f"replicate {one.replicate} of parameter set {one.param} ({params or 'no parameters'}), "
        f"seed {one.seed}: {status} in {shown_seconds(one.outcome.seconds)}"
    )
    width = max((len(name) for name, _, _ in one.outcome.outputs), default=0)
    for name, kind, data in one.outcome.outputs:
        typer.echo(f"  {name:<{width}}  {_in_words(output_json(kind, data))}")
    if one.succeeded and not one.outcome.outputs:
        typer.echo("  (no outputs)")
    if error := one.outcome.error:
        typer.echo(_indented(error.traceback or f"{error.type}: {error.message}"))
        if error.traceback and not error.traceback.rstrip().endswith(error.message):
            typer.echo(_indented(f"{error.type}: {error.message}"))
    if one.printed.strip():
        lines = one.printed.rstrip().splitlines()
        cut = (
            f" (the last {MAX_PRINTED_LINES} of {len(lines):,} lines)"
            if len(lines) > MAX_PRINTED_LINES
            else ""
        )
        typer.echo(f"  printed{cut}:")
        typer.echo(_indented("\n".join(lines[-MAX_PRINTED_LINES:]), "  | "))


def _in_words(shown: dict[str, Any]) -> str:
    from modelops.bundles.check import shown_bytes

    if "value" in shown:
        text = repr(shown["value"])
        return (
            text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({shown_bytes(shown['bytes'])} of JSON)"
        )
    if "dtype" in shown:
        span = f", {shown['min']:.6g} to {shown['max']:.6g}" if "min" in shown else ""
        return f"array of {shown['dtype']}, shape {tuple(shown['shape'])}{span}"
    if "columns" in shown:
        columns = ", ".join(f"{name}: {kind}" for name, kind in shown["columns"].items())
        return f"{shown['kind'].partition('.')[2] or 'table'} of {shown['rows']:,} rows ({columns})"
    return f"{shown['kind']}, {shown_bytes(shown['bytes'])}" + (
        f": {shown['text']!r}" if "text" in shown else ""
    )


def _table(data: bytes) -> dict[str, Any]:
    import pyarrow as pa

    with pa.ipc.open_stream(data) as reader:
        schema = reader.schema
        rows = sum(batch.num_rows for batch in reader)
    return {"rows": rows, "columns": {field.name: str(field.type) for field in schema}}


def _plain(value: Any) -> Any:
    """Return what JSON can hold; what it cannot (NaN, tuples, bytes, arrays inside) as text."""
    import math

    import numpy as np

    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else repr(value)
        case list() | tuple():
            return [_plain(v) for v in value]
        case dict():
            return {str(k): _plain(v) for k, v in value.items()}
        case np.ndarray():
            return f"array of {value.dtype}, shape {value.shape}"
        case _:
            return repr(value)


def _any_number(value: Any) -> bool:
    import numpy as np

    return value.dtype.kind != "f" or not bool(np.isnan(value).all())


def _is_text(data: bytes) -> bool:
    try:
        return data.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _indented(text: str, by: str = "  ") -> str:
    return "\n".join(by + line for line in text.rstrip().splitlines())
