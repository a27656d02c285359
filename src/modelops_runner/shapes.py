"""Outputs that are floats and nothing else: their names cross once, their values as the bits they are.

Writing a float as text and reading it again costs more than everything else a quick replicate costs.
"""

from __future__ import annotations

from struct import Struct

from modelops_runner.values import is_unicode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from modelops_runner.channel import Channel

MAX_SHAPES = 1_000  # a model that invents new names all the time gains nothing
MAX_FLOATS = 4_096  # of one replicate; more of them are better off in an array
_FLOAT, _TEXT = frozenset({float}), frozenset({str})


class Shapes:
    """The lists of names that the parent has been told, each under a number."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._known: dict[tuple[Any, ...], tuple[str, Any] | None] = {}
        self._n = 0

    def packed(self, result: Any) -> str | None:
        """Return number and values as they stand in `replicate/floats`; None if it is no dict of floats."""
        if (
            type(result) is not dict
            or not _FLOAT.issuperset(map(type, result.values()))
            or not _TEXT.issuperset(map(type, result))  # others may have a hash of the bundle's own
        ):
            return None
        names = tuple(result)
        try:
            shape = self._known[names]
        except KeyError:
            shape = self._announced(names)
        if shape is None:
            return None
        head, pack = shape
        return f'{head}"{pack(*result.values()).hex()}"'

    def _announced(self, names: tuple[Any, ...]) -> tuple[str, Any] | None:
        """Tell the parent of a new shape; None if it must not be one."""
        good = 0 < len(names) <= MAX_FLOATS and all(map(is_unicode, names))
        if not good or self._n >= MAX_SHAPES:
            if len(self._known) < 2 * MAX_SHAPES:
                self._known[names] = None
            return None
        self._n += 1
        self._channel.notify("replicate/shape", {"shape": self._n, "names": names})
        self._known[names] = shape = (f"{self._n},", Struct(f"<{len(names)}d").pack)
        return shape
