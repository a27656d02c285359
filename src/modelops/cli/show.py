"""Show things line by line: checks as they become known, what is being done, one JSON object at the end."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from modelops.checks import Check

_COLOURS = {"ok": "green", "warning": "yellow", "FAILED": "red"}


def show_json(value: Any) -> None:
    """Print one JSON object on stdout; NaN and the infinities, which JSON lacks, become text."""
    typer.echo(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return repr(value)
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
