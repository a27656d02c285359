"""Let Dask go on sending when the clock of a machine is put back.

Dask sends messages some milliseconds after one another, and keeps as a time of day when the next may go. After the
clock was put back by an hour, nothing would be sent for that hour: no chunk, no receipt.
"""

from __future__ import annotations

import time
from typing import Final

from distributed.batched import BatchedSend
from distributed.metrics import time as time_of_day

_KEPT: Final = "_modelops_next"


class _NextDeadline:
    """Given and taken as a time of day by Dask's clock; kept on one that nobody puts back."""

    def __get__(self, sender: BatchedSend, _owner: object = None) -> float | None:
        at: float | None = vars(sender).get(_KEPT)
        return None if at is None else time_of_day() + (at - time.monotonic())

    def __set__(self, sender: BatchedSend, when: float | None) -> None:
        wait_s = None if when is None else when - time_of_day()
        vars(sender)[_KEPT] = None if wait_s is None else time.monotonic() + wait_s


def send_whatever_the_clock_says() -> None:
    """Do so for all connections of this process, those that it has and those to come."""
    BatchedSend.next_deadline = _NextDeadline()
