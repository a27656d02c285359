"""The output that ``until`` watches: its number in every outcome of a segment, for the driver.

A driver goes by what comes with the segments of receipts; one that takes a job over reads the same from what is stored.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelops.states import ReplicateStatus
from modelops.store.segments import OUTCOME_CODE, watched_bytes
from modelops_runner import values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.store.segment_body import Output
    from modelops.store.segment_table import SegmentTable, StoredOutput
    from modelops.store.segments import FloatRows
    from modelops.worker.messages import NoNumbers

_SUCCEEDED: Final = OUTCOME_CODE[ReplicateStatus.SUCCEEDED]
MAX_NAMED: Final = 20  # outputs in a sentence
_KINDS: Final = ("json", "npy0", "f8")
_PLAIN: Final = frozenset(b"-0123456789")
_NUMBERS: Final = (bool, int, float, np.bool_, np.integer, np.floating)


class NoNumberError(Exception):
    """What is watched is not there, or no number; ``str``: in words that follow on "of a replicate"."""


def number_in(outputs: Sequence[Output] | Sequence[StoredOutput], of: str) -> float:
    """Return an output of a replicate that succeeded as a number; true is 1, false 0. Raises NoNumberError."""
    found = next(((kind, data) for name, kind, data in outputs if name == of), None)
    if found is None:
        raise _missing(of, [name for name, _, _ in outputs])
    kind, data = found
    if not isinstance(data, tuple):  # a large one is in a file, and no number
        data = bytes(data)
        try:
            if kind == "json" and data[0] in _PLAIN:
                return float(data)
            value: Any = values.decode(kind, data) if kind in _KINDS else None
            if isinstance(value, _NUMBERS) and not isinstance(value, np.timedelta64):
                return float(value)
        except (ValueError, OverflowError, IndexError):
            pass
    raise NoNumberError(f"has an output {of!r} that is no number")


def numbers_in(rows: FloatRows, of: str) -> list[float]:
    """Return the same of each of many replicates that returned nothing but floats. Raises NoNumberError."""
    if of not in rows.names:
        raise _missing(of, rows.names)
    table = np.frombuffer(rows.values, "<f8").reshape(len(rows.indices), len(rows.names))
    numbers: list[float] = table[:, rows.names.index(of)].tolist()
    return numbers


def _missing(of: str, names: Sequence[str]) -> NoNumberError:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return NoNumberError(f"has no output {of!r}; it has: {', '.join(names[:MAX_NAMED]) or 'none'}{more}")


def watched_in(segment: SegmentTable, of: str) -> tuple[bytes, NoNumbers]:
    """Return what `watched_bytes` makes of a stored segment."""
    found: list[float | str] = [math.nan] * len(segment)
    rows = iter(segment.rows())
    for row in np.flatnonzero(segment.status == _SUCCEEDED).tolist():
        _, _, outputs = next(rows)
        try:
            found[row] = number_in(outputs, of)
        except NoNumberError as no:
            found[row] = str(no)
    return watched_bytes(segment.status, segment.index, found)
