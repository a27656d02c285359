"""How many parameter sets fit one request to a runner. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.processes.outcome import part
from modelops.rpc import ReplicateTable

if TYPE_CHECKING:
    from modelops.processes.outcome import AnySet

FRAME_BYTES: Final = 8 * 1024 * 1024
DIGITS: Final = 21  # of a seed, at most, and what is between two


def first_frame(sets: list[AnySet], limit_bytes: int) -> list[AnySet]:
    """Return as many sets from the front as fit one request (at least part of one)."""
    size = 0
    for i, one in enumerate(sets):
        if isinstance(one, ReplicateTable):
            each, head, n_sets = one.each, 40, one.n_sets
        else:
            each, head, n_sets = len(one.seeds), 200, 1
        whole = len(one.params) + (head + DIGITS * each) * n_sets
        if size + whole <= limit_bytes:
            size += whole
            continue
        fitting = 0
        sizes = map(len, one.each_params() if isinstance(one, ReplicateTable) else [one.params])
        for n_bytes in sizes:
            size += n_bytes + head
            n = max((limit_bytes - size) // DIGITS, 0)
            if n < each:
                fitting += n if n or i or fitting else 1
                break
            fitting += each
            size += DIGITS * each
        return [*sets[:i], *part(one, 0, fitting)]
    return sets
