"""Folders that a command line names."""

from __future__ import annotations

from pathlib import Path

from modelops.errors import RequestError


def folder_of_text(text: str) -> Path:
    """Return a folder to write to. Raises RequestError if it is empty: the variable of a script was not set."""
    if not text:
        raise RequestError("the folder to write to is '', which names none; write . for the current one")
    return Path(text)
