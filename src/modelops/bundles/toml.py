"""TOML that a stranger wrote: it is read, or refused with a sentence."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

from modelops.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path


def read_text(file: Path) -> str:
    """Return the text of a file of a bundle. Raises BundleError if it is none."""
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise BundleError(f"{file} is not UTF-8 text: {e}") from e


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Return what a bundle says of itself; its tables ``project`` and ``tool.modelops`` are tables, if they are there.

    Parameters
    ----------
    where
        What holds the text, for messages.

    Raises
    ------
    BundleError
        It is not TOML, or something else stands where a table belongs.
    """
    try:
        found = tomllib.loads(text)
    except ValueError as e:  # TOMLDecodeError is one; a number of thousands of digits is another
        raise BundleError(f"{where} is not valid TOML: {e}") from e
    except RecursionError as e:
        raise BundleError(f"{where} is not valid TOML: it is nested too deeply") from e
    for path in (("project",), ("project", "entry-points"), ("tool",), ("tool", "modelops")):
        value: Any = found
        for key in path:
            value = value.get(key, {})
        if not isinstance(value, dict):
            raise BundleError(f"{where}: [{'.'.join(path)}] must be a table, not {value!r}")
    return found
