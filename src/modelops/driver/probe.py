"""The probe: a few replicates from all over the line run first, so that a broken model is found at once.

The rest is held back until one of them succeeds, or two fail differently, or the probe has taken a while.
If the first attempts of all of them fail with one fingerprint, and nothing else has succeeded, the job stops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.study.ranges import EMPTY, Ranges

if TYPE_CHECKING:
    from modelops.worker.messages import ErrorExample

PROBE_SIZE: Final = 32
WORTH_PROBING: Final = 8  # replicates


class Probe:
    """Chooses the probe from the missing indices and judges its outcomes."""

    def __init__(self, missing: Ranges, *, wanted: bool) -> None:
        n = len(missing)
        self.passed = not wanted or n < WORTH_PROBING
        self.indices = EMPTY
        if not self.passed:
            size = min(PROBE_SIZE, n)
            self.indices = Ranges.of(missing.at(i * (n - 1) // (size - 1)) for i in range(size))
        self.held_back = missing - self.indices
        self._open = self.indices
        self._example: ErrorExample | None = None

    def judge(self, ended: Ranges, n_succeeded: int, examples: list[ErrorExample]) -> ErrorExample | None:
        """Take in first attempts that ended; return the error that stops the job, if it is clear now."""
        if self.passed:
            return None
        self._open = self._open - ended
        fingerprints = {e.fingerprint for e in examples}
        if self._example is not None:
            fingerprints.add(self._example.fingerprint)
        if n_succeeded or len(fingerprints) > 1:
            self.passed = True
            return None
        if examples and self._example is None:
            self._example = examples[0]
        return self._example if not self._open else None

    def withdraw(self, indices: Ranges) -> None:
        """Hold these back no longer: they run."""
        self.held_back = self.held_back - indices

    def release(self) -> Ranges:
        """Hand out what was held back."""
        released, self.held_back = self.held_back, EMPTY
        return released
