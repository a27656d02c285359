"""A bundle that is one `.py` file: its PEP 723 metadata, and the functions it has, without importing it."""

from __future__ import annotations

import ast
import re
from typing import Any

from modelops.bundles.toml import parse_toml
from modelops.errors import BundleError

# The regular expression of the specification (PEP 723, "Reference Implementation").
_BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def script_metadata(source: str, where: str) -> dict[str, Any] | None:
    """Return the PEP 723 metadata of a script, or None if it has none.

    Parameters
    ----------
    source
        Text of the file.
    where
        Its name, for messages.
    """
    blocks = [m for m in _BLOCK.finditer(source.replace("\r\n", "\n")) if m["type"] == "script"]
    if not blocks:
        return None
    if len(blocks) > 1:
        raise BundleError(f"{where} has {len(blocks)} blocks '# /// script'; keep one")
    lines = blocks[0]["content"].splitlines(keepends=True)
    content = "".join(line[2:] if line.startswith("# ") else line[1:] for line in lines)
    first = source[: blocks[0].start()].count("\n") + 1
    return parse_toml(content, f"{where}: the '# /// script' block (from line {first})")


def top_level_functions(source: str, where: str) -> list[str]:
    """Return the names of a module's functions and classes, in order, without importing it."""
    try:
        tree = ast.parse(source, filename=where)
    except SyntaxError as e:
        raise BundleError(f"{where}, line {e.lineno}: not valid Python: {e.msg}") from e
    except (ValueError, RecursionError, MemoryError) as e:  # a NUL; nested too deeply
        raise BundleError(f"{where}: not valid Python: {str(e) or type(e).__name__}") from e
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds)]
