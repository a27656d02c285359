"""What the aggregates of many parameter sets returned: rows of outputs, or plain values of one shape as they came.

Numbers of thousands of sets need not become objects on their way from the runner to the store. Their JSON holds no
comma but those between two values, so it can be cut without being parsed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from modelops.processes.outcome import Output

Made = tuple[bool, tuple["Output", ...]]
"""Whether an aggregate returned a dict, and its outputs."""
_PLAIN: Final = b"0123456789+-.eE,truefalsn"  # all that numbers, truth values and nulls consist of


@dataclass(frozen=True, eq=False)
class MadeCells:
    """Dicts of these names, whose values are inline JSON: those of the first one after another, then of the second.

    ``sizes``: bytes of each value in ``data``.
    """

    names: tuple[str, ...]
    data: bytes
    sizes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sizes) // len(self.names)

    def first(self, n: int) -> MadeCells:
        """Return the first ``n`` dicts."""
        sizes = self.sizes[: n * len(self.names)]
        return MadeCells(self.names, self.data[: int(sizes.sum())], sizes)

    def rows(self) -> list[Made]:
        """Return the same, output by output."""
        ends = np.cumsum(self.sizes).tolist()
        cells = [self.data[lo:hi] for lo, hi in zip([0, *ends], ends, strict=False)]
        k = len(self.names)
        return [
            (
                True,
                tuple(
                    [(name, "json", cell) for name, cell in zip(self.names, cells[at : at + k], strict=True)]
                ),
            )
            for at in range(0, len(cells), k)
        ]


@dataclass
class ManyMade:
    """What aggregates of consecutive parameter sets returned, in order."""

    parts: list[Sequence[Made] | MadeCells] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def add(self, part: Sequence[Made] | MadeCells) -> None:
        """Take in what the next ones returned."""
        self.parts.append(part)

    def first(self, n: int) -> ManyMade:
        """Return what the first ``n`` returned."""
        found = ManyMade()
        for part in self.parts:
            if n <= 0:
                break
            found.add(part if len(part) <= n else part.first(n) if isinstance(part, MadeCells) else part[:n])
            n -= len(part)
        return found

    def rows(self) -> list[Made]:
        """Return all of it, output by output."""
        return [row for part in self.parts for row in (part.rows() if isinstance(part, MadeCells) else part)]


def cells_of(names: tuple[str, ...], listed: bytes) -> MadeCells:
    """Return the values of a JSON list, of ``names`` again and again, as they stand.

    Raises
    ------
    ValueError
        It is no list, or values are missing.
    """
    inner = listed[1:-1]
    if inner and listed.startswith(b"[") and not inner.translate(None, _PLAIN):
        commas = np.flatnonzero(np.frombuffer(inner, np.uint8) == ord(","))
        sizes = np.diff(commas, prepend=-1, append=len(inner)) - 1
        data = inner.replace(b",", b"")
    else:
        try:
            values = list(map(bytes, msgspec.json.decode(listed, type=list[msgspec.Raw])))
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from error
        sizes, data = np.fromiter(map(len, values), np.int64, len(values)), b"".join(values)
    if len(sizes) % len(names):
        raise ValueError(f"{len(sizes)} values are not of {len(names)} names each")
    return MadeCells(names, data, sizes)
