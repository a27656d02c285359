"""What a model gets as its third argument, if it takes one."""

from __future__ import annotations

import os

from modelops_runner.values import InvalidOutputError, tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable


class Context:
    """One replicate's place in its study, and its ways to the outside.

    Attributes
    ----------
    param, replicate
        Ordinal of the parameter set; number of the replicate within it.
    seed
        The same number that the model got as its second argument.
    progress
        The fraction that was reported last, 0.0 to begin with.
    """

    def __init__(
        self,
        *,
        index: int,
        param: int,
        replicate: int,
        seed: int,
        entropy_key: str,
        checkpoint_root: str,
        notify: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.param, self.replicate, self.seed = param, replicate, seed
        self.progress = 0.0
        self._index, self._entropy_key, self._notify = index, entropy_key, notify
        self._folder = os.path.join(checkpoint_root, str(index))
        self._checkpoints = 0

    @property
    def entropy(self) -> int:
        """128 bits that belong to this replicate alone, for ``numpy.random.SeedSequence``."""
        from hashlib import blake2b

        key = bytes.fromhex(self._entropy_key)
        digest = blake2b(self.replicate.to_bytes(8, "little"), key=key, digest_size=16).digest()
        return int.from_bytes(digest, "little")

    @property
    def checkpoint_dir(self) -> str:
        """A folder that survives attempts; empty if there is no checkpoint to go on from."""
        os.makedirs(self._folder, exist_ok=True)
        return self._folder

    def checkpoint(self) -> None:
        """Keep what now lies in `checkpoint_dir`: a retry of this replicate will find it there.

        The folder is copied before this returns, so the model may go on writing to it.
        """
        from shutil import copytree

        self._checkpoints += 1
        path = f"{self.checkpoint_dir}.{self._checkpoints}"
        copytree(self._folder, path)
        self._notify("context/checkpoint", {"index": self._index, "n": self._checkpoints, "path": path})

    def report(self, fraction: float, **values: Any) -> None:
        """Show how far the replicate is (0 to 1), and values worth seeing while it runs."""
        self.progress = float(fraction)
        try:
            tree = tagged(values)
        except InvalidOutputError as e:
            raise TypeError(f"context.report: {e}") from None
        self._notify("context/progress", {"index": self._index, "fraction": self.progress, "values": tree})
