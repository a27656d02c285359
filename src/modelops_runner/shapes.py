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


class Shape:
    """A list of ``n`` names, the number that stands for it, and how values are written in `replicate/floats`."""

    def __init__(self, number: int, n: int) -> None:
        self.number, self.n = number, n
        self._pack = Struct(f"<{n}d").pack

    def text(self, result: dict[Any, Any]) -> str:
        """Return number and values as they stand there."""
        return f'{self.number},"{self._pack(*result.values()).hex()}"'


class Shapes:
    """The lists of names that the parent has been told, each under a number."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._known: dict[tuple[Any, ...], Shape | None] = {}
        self._n = 0

    def of(self, result: Any) -> Shape | None:
        """Return the shape of what a model returned; None if it is no dict of floats, or of too many."""
        if (
            type(result) is not dict
            or not _FLOAT.issuperset(map(type, result.values()))
            or not _TEXT.issuperset(map(type, result))  # others may have a hash of the bundle's own
        ):
            return None
        names = tuple(result)
        try:
            return self._known[names]
        except KeyError:
            return self._announced(names)

    def _announced(self, names: tuple[Any, ...]) -> Shape | None:
        """Tell the parent of a new shape; None if it must not be one."""
        good = 0 < len(names) <= MAX_FLOATS and all(map(is_unicode, names))
        if not good or self._n >= MAX_SHAPES:
            if len(self._known) < 2 * MAX_SHAPES:
                self._known[names] = None
            return None
        self._n += 1
        self._channel.notify("replicate/shape", {"shape": self._n, "names": names})
        self._known[names] = shape = Shape(self._n, len(names))
        return shape
