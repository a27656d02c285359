"""How often a process of ours looks for cycles of objects that nobody refers to."""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = (
    20_000  # new containers; Python's 700 are made and dropped again hundreds of times for each chunk
)


def look_seldom() -> None:
    """Look for cycles at every 20,000th new container. What is in no cycle goes at once, as always."""
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
