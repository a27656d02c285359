"""Which versions a server, a scheduler and a worker run, and whether they understand one another.

Two things matter. The first is ModelOps' own protocol: what driver and workers say to each other, and what one of them
stores for the other to read (`modelops.worker.messages`); the scheduler does not look at it. The other is Dask, which
carries it and promises nothing between its versions. All else may differ: so an upgrade that changes neither goes on
while it is rolled out.
"""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version
from typing import Final

import msgspec

from modelops.worker.messages import PROTOCOL

VERSIONS: Final = (
    "modelops_versions"  # what a worker says of them when it joins, and a scheduler when it is asked
)
UNKNOWN: Final = "not told"
MATTERS: Final = ("protocol", "distributed")
MATTERS_TO_SCHEDULERS: Final = ("distributed",)


class Versions(msgspec.Struct, frozen=True):
    """What runs in a process. What an older worker does not tell is unknown."""

    protocol: str = UNKNOWN
    distributed: str = UNKNOWN
    modelops: str = UNKNOWN
    python: str = UNKNOWN
    msgspec: str = UNKNOWN
    pyarrow: str = UNKNOWN


@functools.cache
def ours() -> Versions:
    """Return what runs here."""
    packages = {name: version(name) for name in ("distributed", "modelops", "msgspec", "pyarrow")}
    return Versions(protocol=str(PROTOCOL), python=platform.python_version(), **packages)


def misfits(server: Versions, scheduler: Versions, worker: Versions) -> tuple[str, ...]:
    """Return what must be the same and is not; nothing: they understand one another.

    A scheduler that does not tell is taken as it is, as one of before it was asked.
    """
    return tuple(
        name for name in MATTERS
        if getattr(server, name) != getattr(worker, name)
        or (name in MATTERS_TO_SCHEDULERS and getattr(scheduler, name) not in (getattr(server, name), UNKNOWN))
    )  # fmt: skip


def table(server: Versions, scheduler: Versions, worker: Versions) -> str:
    """Return their versions side by side, those that do not fit marked."""
    bad = misfits(server, scheduler, worker)
    rows = [("", "server", "scheduler", "worker", "")]
    for name in Versions.__struct_fields__:
        theirs = (getattr(server, name), getattr(scheduler, name), getattr(worker, name))
        rows.append((name, *theirs, "must be the same" if name in bad else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True)).rstrip()
        for row in rows
    )
