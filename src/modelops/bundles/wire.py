"""The wire convention: how a bundle says where its function ``wire(entrypoint, params, seed)`` is.

Three ways, the first found counts: the entry-point group ``modelops.wire`` in `pyproject.toml` (or in that of
a package that the bundle depends on, which is known only in the bundle's environment),
``.modelops/manifest.json`` with ``{"wire": "pkg.mod:fn"}`` or ``{"wire": "path/file.py:fn"}``, and a file
`wire.py` with a function `wire` at the root. Nothing is imported to find it.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from modelops.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

GROUP = "modelops.wire"
MANIFEST = ".modelops/manifest.json"
WIRE_FILE = "wire.py"
OF_A_DEPENDENCY = "an entry point of a dependency"
_FUNCTION = re.compile(r"(?:[\w.]+|[\w./\- ]+\.py):[A-Za-z_]\w*")


class Wire(NamedTuple):
    """Where a bundle's wire function is: ``pkg.mod:fn`` or ``path/file.py:fn``, and who says so.

    ``function`` is empty where only the bundle's environment can tell.
    """

    function: str
    declared_in: str


def find_wire(bundle: Path, pyproject: Mapping[str, Any]) -> Wire | None:
    """Return where the wire function of this folder is, or None if it has none.

    Raises
    ------
    BundleError
        It is declared in a way that cannot be understood; the message says where and what to write.
    """
    group = pyproject.get("project", {}).get("entry-points", {}).get(GROUP)
    if group:
        if not isinstance(group, dict):
            raise BundleError(f'pyproject.toml: [project.entry-points."{GROUP}"] must be a table, not {group!r}')
        if len(group) > 1:
            raise BundleError(
                f'pyproject.toml: [project.entry-points."{GROUP}"] names {len(group)} functions '
                f"({', '.join(group)}); keep one"
            )
        return _wire(next(iter(group.values())), f'pyproject.toml, [project.entry-points."{GROUP}"]')
    file = bundle / MANIFEST
    if file.is_file():
        try:
            declared = json.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError) as e:
            raise BundleError(f"{MANIFEST} is not valid JSON: {e}") from e
        if isinstance(declared, dict) and "wire" in declared:
            return _wire(declared["wire"], MANIFEST)
    if (bundle / WIRE_FILE).is_file():
        return Wire(f"{WIRE_FILE}:wire", WIRE_FILE)
    return None


def wire_of_dependency() -> Wire:
    """Return the wire function of a folder that says nothing itself: a framework it depends on may bring one."""
    return Wire("", OF_A_DEPENDENCY)


def _wire(function: object, where: str) -> Wire:
    if not isinstance(function, str) or not _FUNCTION.fullmatch(function.strip()):
        raise BundleError(f"{where}: {function!r} is no function; write 'pkg.mod:fn' or 'path/file.py:fn'")
    return Wire(function.strip(), where)
