"""Reads the tables of a reference page, so that tests can hold the page to what it says."""

from __future__ import annotations

import re
from pathlib import Path

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
_BAR = re.compile(r"(?<!\\)\|")


def rows_below(page: str, header: str) -> list[list[str]]:
    r"""Return the cells of the table whose header line begins with ``header``, without backticks; ``\|`` is a bar."""
    lines = (REFERENCE / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = _BAR.split(line.strip("|"))
        rows.append([cell.strip().strip("`").replace("\\|", "|") for cell in cells])
    assert rows, f"{page} has no rows below {header!r}"
    return rows
