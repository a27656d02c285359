"""Does a bundle's source hold what an entry point names? Read, never run: a doubt counts as yes.

The bundle's environment, its imports and its Python are known only on a worker, so only what the text rules out is
refused: a module that a bundle without dependencies does not have, a name that its module never binds.
"""

from __future__ import annotations

import ast
import re
import sys
from typing import TYPE_CHECKING, Final

from modelops.bundles.script import parsed
from modelops.errors import BundleError
from modelops.study.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# What can bind a name that the text does not show.
_HIDDEN: Final = frozenset({"globals", "vars", "locals", "exec", "setattr", "__dict__", "modules", "__getattr__"})


def what_is_missing(snapshot: Path, entry: str, *, alone: Callable[[], bool]) -> str | None:
    """Say what of an entry point ``module:function`` a bundle lacks; None if it may be there.

    Parameters
    ----------
    alone
        Asked if a module is not in the bundle: whether it has no dependencies, so that a module comes from it or from Python.
    """
    module, _, attribute = entry.partition(":")
    roots = (snapshot, snapshot / "src")
    file = _source_of(module, roots)
    if file is None:
        top = module.partition(".")[0]
        held = {name for root in roots for name in _top_modules(root)}
        if top in held or top in sys.stdlib_module_names or not alone():
            return None  # of a package that others may add to; of a dependency; of Python
        return f"the bundle has no module {top!r}, and no dependencies that could bring it{did_you_mean(top, held)}"
    name = attribute.partition(".")[0]
    text = file.read_text(encoding="utf-8", errors="replace")
    if not name or re.search(rf"(?m)^(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", text):
        return None
    try:
        tree = parsed(text, file.name)
    except BundleError:  # perhaps of a newer Python than ours
        return None
    bound = set(_bound(tree))
    if name in bound or bound & {"*", *_HIDDEN}:
        return None
    where = file.relative_to(snapshot)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return f"{where} has no {name!r}{did_you_mean(name, functions)}"


def _source_of(module: str, roots: tuple[Path, ...]) -> Path | None:
    parts = module.split(".")
    for root in roots:
        for file in (root.joinpath(*parts, "__init__.py"), root.joinpath(*parts).with_suffix(".py")):
            if file.is_file():
                return file
    return None


def _top_modules(root: Path) -> Iterator[str]:
    if root.is_dir():
        for path in root.iterdir():
            if path.is_dir() or path.suffix in {".py", ".so", ".pyc"}:
                yield path.name.partition(".")[0]


def _bound(tree: ast.Module) -> Iterator[str]:
    """Yield every name that a module's text may bind, and ``*`` where it binds names that it does not say."""
    for node in ast.walk(tree):
        match node:
            case ast.Global():
                yield from node.names
            case ast.Name() if node.id in _HIDDEN:
                yield node.id
            case ast.Attribute() if node.attr in _HIDDEN:
                yield node.attr
            case _:
                pass
    for node in _of_the_module(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Name() if isinstance(node.ctx, ast.Store):
                yield node.id
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
            case ast.MatchAs() | ast.MatchStar() if node.name:
                yield node.name
            case ast.MatchMapping() if node.rest:
                yield node.rest
            case _:
                pass


def _of_the_module(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when the module is imported: everything but the bodies of functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _of_the_module(child)
