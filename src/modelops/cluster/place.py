"""Where a worker belongs. Apart from the worker itself, whose imports take a while."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelops.study.pools import NO_POOL, Membership

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where the scheduler is, and what the worker shows to it.

    ``tls``: the folder of the certificates, None for those that Dask's configuration names. ``host``: the address that
    the worker listens on, None for the one that leads to the scheduler. ``membership``: the pool it is in.
    """

    scheduler: str
    tls: Path | None
    slots: int
    host: str | None = None
    membership: Membership = NO_POOL
