"""Reads the tables of a reference page, so that tests can hold the page to what it says."""

from __future__ import annotations

from pathlib import Path

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def rows_below(page: str, header: str) -> list[list[str]]:
    """Return the cells of the table whose header line begins with ``header``, without backticks."""
    lines = (REFERENCE / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    assert rows, f"{page} has no rows below {header!r}"
    return rows
