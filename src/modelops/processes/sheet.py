"""The worker's side of the memory that a runner writes outcomes of quick replicates to (`modelops_runner.sheet`).

It has no name in any file system: it is gone with the last process that holds it. Where the system has no such memory
there is none, and all outcomes come as messages.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from modelops_runner.sheet import FIELDS, HEAD_WORDS, SHAPE, TAKEN, WRITTEN

if TYPE_CHECKING:
    import numpy.typing as npt

SHEET_BYTES: Final = 1 << 20  # 16,000 replicates with five floats each, more than come in a tenth of a second


class Records(NamedTuple):
    """Records of a sheet as columns; ``values``: 8 bytes for each float, little-endian, record after record."""

    indices: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]
    cpu_seconds: npt.NDArray[np.float64]
    values: bytes


class Sheet:
    """Memory shared with one runner. ``fd``: what the runner is to inherit; closed by `handed_over`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.ftruncate(fd, SHEET_BYTES)
        self._map = mmap.mmap(fd, SHEET_BYTES)
        self._words = np.frombuffer(self._map, np.int64)

    @classmethod
    def new(cls) -> Sheet | None:
        """Return a sheet; None where there can be none."""
        try:
            return cls(os.memfd_create("modelops-sheet"))
        except AttributeError:  # not Linux
            return None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EPERM):  # a sandbox without it
                return None
            raise

    def handed_over(self) -> None:
        """Say that the runner holds it, or that there will be none."""
        os.close(self.fd)

    def begin(self) -> None:
        """Clear it for the next request; before that is sent."""
        self._words[:HEAD_WORDS] = 0

    @property
    def shape(self) -> int:
        """The number of the shape of the records; 0: there are none."""
        return int(self._words[SHAPE])

    @property
    def n_waiting(self) -> int:
        """How many records were written and not taken.

        The runner writes the count after the record, hundreds of its instructions later; a processor that makes such
        writes visible in another order does so within a few. We read the record hundreds of instructions after this.
        """
        return int(self._words[WRITTEN] - self._words[TAKEN])

    def capacity(self, n_names: int) -> int:
        """Return how many records with so many values each it holds."""
        return (len(self._words) - HEAD_WORDS) // (FIELDS + n_names)

    def waiting(self, n_names: int, n: int) -> Records:
        """Return the first ``n`` of the records that wait, which have so many values each."""
        width = FIELDS + n_names
        capacity = self.capacity(n_names)
        rows = self._words[HEAD_WORDS : HEAD_WORDS + capacity * width].reshape(capacity, width)
        first = int(self._words[TAKEN]) % capacity
        found = np.concatenate([rows[first : first + n], rows[: max(0, first + n - capacity)]])
        numbers = found.view(np.float64)
        return Records(
            found[:, 0].copy(),
            numbers[:, 1].copy(),
            numbers[:, 2].copy(),
            numbers[:, FIELDS:].astype("<f8", copy=False).tobytes(),
        )

    def take(self, n: int) -> None:
        """Let the runner write over the first ``n`` of them."""
        self._words[TAKEN] += n
