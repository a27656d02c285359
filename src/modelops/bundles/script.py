"""A bundle that is one `.py` file: its PEP 723 metadata, and the functions it has, without importing it."""

from __future__ import annotations

import ast
import re
import threading
from typing import Any, Final

from modelops.bundles.toml import parse_toml
from modelops.errors import BundleError

# The regular expression of the specification (PEP 723, "Reference Implementation").
_BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")

# Python 3.11 counts its depth in one place for all threads: when a garbage collection's callback (Dask has one) lets
# another thread in, which parses too, it ends with "SystemError: AST constructor recursion depth mismatch".
_ONE_AT_A_TIME: Final = threading.Lock()


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


def parsed(source: str, where: str) -> ast.Module:
    """Return the syntax tree of a module. May be called from many threads. Raises BundleError if it has none."""
    try:
        with _ONE_AT_A_TIME:
            return ast.parse(source, filename=where)
    except SyntaxError as e:
        raise BundleError(f"{where}, line {e.lineno}: not valid Python: {e.msg}") from e
    except (ValueError, RecursionError, MemoryError) as e:  # a NUL; nested too deeply
        raise BundleError(f"{where}: not valid Python: {str(e) or type(e).__name__}") from e


def top_level_functions(source: str, where: str) -> list[str]:
    """Return the names of a module's functions and classes, in order, without importing it."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in parsed(source, where).body if isinstance(node, kinds)]
