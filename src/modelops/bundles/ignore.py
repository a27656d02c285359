"""Which files of a folder belong to the bundle: everything but the default patterns and `.modelopsignore`.

Pure: patterns and paths in, yes or no out. The syntax is gitignore's; the user's lines come after the
defaults, so ``!results/`` takes a default back.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pathspec import GitIgnoreSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

IGNORE_FILE = ".modelopsignore"

# What tools leave behind, never what a model needs. `/x/` is anchored: only at the root of the bundle.
DEFAULT_PATTERNS = (
    ".git/",
    ".hg/",
    ".svn/",
    ".venv/",
    "venv/",
    ".tox/",
    ".nox/",
    "__pycache__/",
    "*.pyc",
    "*.egg-info/",
    ".mypy_cache/",
    ".ruff_cache/",
    ".pytest_cache/",
    ".hypothesis/",
    ".ipynb_checkpoints/",
    ".idea/",
    ".vscode/",
    ".DS_Store",
    "*.swp",
    "node_modules/",
    "/build/",
    "/dist/",
    "/results/",
)


class Ignore:
    """The patterns of one bundle.

    Parameters
    ----------
    lines
        The lines of its `.modelopsignore`, if it has one.
    defaults
        The patterns that come before them.
    """

    def __init__(self, lines: Iterable[str] = (), *, defaults: Iterable[str] = DEFAULT_PATTERNS) -> None:
        self._spec = _spec((*defaults, *lines))

    def matches(self, path: str, *, is_dir: bool) -> bool:
        """Say whether this path (relative to the bundle, ``/`` between its parts) is left out."""
        return self._spec.match_file(path + "/" if is_dir else path)


@functools.lru_cache(maxsize=32)  # a submission takes a millisecond for the patterns, and is seldom the only one
def _spec(lines: tuple[str, ...]) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(lines)


# In a snapshot every file counts; Python writes its caches there when it runs as root.
ONLY_CACHES = Ignore(defaults=("__pycache__/",))
