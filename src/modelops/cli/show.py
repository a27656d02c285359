"""Show things line by line: checks as they become known, what is being done, one JSON object at the end."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from modelops.checks import Check

_COLOURS = {"ok": "green", "warning": "yellow", "FAILED": "red"}


def utc_text(at: datetime) -> str:
    """Return a time as all JSON of ours has it: RFC 3339, UTC, as ``2026-01-01T12:00:00Z``."""
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def show_json(value: Any) -> None:
    """Print one JSON object on stdout; NaN and the infinities, which JSON lacks, and times become text."""
    typer.echo(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def _json_asked() -> bool:
    """Say whether this command line asks for JSON; also one that cannot be understood."""
    words = sys.argv[1:]
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def show_error(error: str, message: str, code: int, *, kind: str | None = "error: ") -> None:
    """Say on stderr why a command cannot answer, and on stdout, too, if it was asked for JSON.

    ``error``: the name of the error. ``kind``: what stands before the sentence on stderr; None: it is said already.
    """
    if kind is not None:
        typer.echo(f"{kind}{message}", err=True)
    if _json_asked():
        show_json({"error": error, "message": message, "exit_code": int(code)})


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return repr(value)
        case datetime():
            return utc_text(value)
        case dict():
            return {key: _finite(v) for key, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
        case _:
            return value


def show_check(check: Check) -> None:
    """Print one check on stdout; what follows its first line is indented below it."""
    first, *more = check.message.splitlines() or [""]
    head = typer.style(f"{check.status:<8}", fg=_COLOURS[check.status], bold=check.status != "ok")
    typer.echo(f"{head} {check.name}: {first}")
    for line in more:
        typer.echo(f"           {line}")
    if check.advice:
        typer.echo(f"           -> {check.advice}")


def shown_checks(checks: Iterable[Check], *, quietly: bool) -> list[Check]:
    """Return all checks; show each as soon as it is known."""
    seen = []
    for check in checks:
        seen.append(check)
        if not quietly:
            show_check(check)
    return seen


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Give a function that shows, on a terminal only, what is being done: a line that goes away."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update
