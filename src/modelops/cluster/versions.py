"""Which versions a server and a worker run, and whether they understand one another.

Two things matter. The first is ModelOps' own protocol: what driver and workers say to each other, and what one of them
stores for the other to read (`modelops.worker.messages`). The other is Dask, which carries it and promises nothing
between its versions. All else may differ: so an upgrade that changes neither goes on while it is rolled out.
"""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version
from typing import Final

import msgspec

from modelops.worker.messages import PROTOCOL

VERSIONS: Final = "modelops_versions"  # what a worker says of them when it joins
UNKNOWN: Final = "not told"
MATTERS: Final = ("protocol", "distributed")


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


def misfits(server: Versions, worker: Versions) -> tuple[str, ...]:
    """Return what must be the same and is not; nothing: they understand one another."""
    return tuple(name for name in MATTERS if getattr(server, name) != getattr(worker, name))


def table(server: Versions, worker: Versions) -> str:
    """Return their versions side by side, those that do not fit marked."""
    bad = misfits(server, worker)
    rows = [("", "server", "worker", "")]
    for name in Versions.__struct_fields__:
        theirs = (getattr(server, name), getattr(worker, name))
        rows.append((name, *theirs, "must be the same" if name in bad else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    )
