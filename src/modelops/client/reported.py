"""What models report while they run, as whoever watches wants to see it.

It travels as tagged JSON, see ``docs/reference/values.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def reported_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a report as numbers, text, lists and dicts, those of NumPy as what they hold.

    What is none of these, such as bytes, becomes text; what cannot be read here stays as it came.
    """
    if not any(isinstance(value, dict | list) for value in values.values()):
        return dict(values)  # as nearly always
    from modelops_runner.values import untagged

    try:
        read = untagged(dict(values))
    except (
        ValueError,
        TypeError,
        ImportError,
    ):  # of a later version, or of a library that is not installed here
        return dict(values)
    return {str(_plain(name)): _plain(value) for name, value in read.items()}


def _plain(value: Any) -> Any:
    import numpy as np  # takes longer to import than all else that a look at a job needs

    match value:
        case np.generic() | np.ndarray():
            held = value.tolist()
            return str(value) if isinstance(held, np.generic) else _plain(held)
        case None | bool() | int() | float():
            return value
        case str():
            return value.encode(errors="replace").decode()  # lone surrogates can be written nowhere
        case dict():
            return {str(_plain(name)): _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return str(value)
