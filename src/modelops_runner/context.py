"""What a model gets as its third argument, if it takes one."""

from __future__ import annotations

import os
from _thread import allocate_lock

from modelops_runner.channel import RpcError

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
        checkpoint_root: str | None,
        tmpdir: str,
        ask: Callable[[str, dict[str, Any]], None],
        report: Callable[[int, float, dict[str, Any]], object],
    ) -> None:
        self.param, self.replicate, self.seed = param, replicate, seed
        self.progress = 0.0
        self._index, self._entropy_key = index, entropy_key
        self._root, self._tmpdir, self._folder = checkpoint_root, tmpdir, ""
        self._ask_parent, self._report = ask, report
        self._lock = allocate_lock()  # the model may have threads

    @property
    def entropy(self) -> int:
        """128 bits that belong to this replicate alone, for ``numpy.random.SeedSequence``."""
        from hashlib import blake2b

        key = bytes.fromhex(self._entropy_key)
        digest = blake2b(self.replicate.to_bytes(8, "little"), key=key, digest_size=16).digest()
        return int.from_bytes(digest, "little")

    @property
    def checkpoint_dir(self) -> str:
        """A folder with the last checkpoint of this replicate; empty if there is none to go on from."""
        with self._lock:
            if not self._folder:
                folder = os.path.join(
                    self._root or os.path.join(self._tmpdir, "checkpoints"), str(self._index)
                )
                if self._root is not None:
                    self._ask("context/restore")
                self._folder = folder
            os.makedirs(self._folder, exist_ok=True)
            return self._folder

    def checkpoint(self) -> None:
        """Keep what now lies in `checkpoint_dir`: a later attempt at this replicate will find it there.

        Returns when it is stored for good. So an attempt that is killed costs no more than what it did since
        the last checkpoint. Do not write to the folder, from other threads, until it has returned.

        Raises
        ------
        ValueError
            The folder holds what cannot be kept: too much, or something that is no file, folder or link within it.
        """
        if self.checkpoint_dir and self._root is not None:
            with self._lock:
                self._ask("context/checkpoint")

    def report(self, fraction: float, **values: Any) -> None:
        """Show how far the replicate is (0 to 1), and values worth seeing while it runs.

        Costs a microsecond. However often it is called, a few reports per second are sent, the newest ones.

        Raises
        ------
        TypeError
            A value is none that JSON can hold.
        ValueError
            ``fraction`` is NaN, or the values are long.
        """
        fraction = float(fraction)
        if fraction != fraction:
            raise ValueError("context.report: the fraction is NaN")
        self.progress = fraction = min(max(fraction, 0.0), 1.0)
        self._report(self._index, fraction, values)

    def _ask(self, method: str) -> None:
        try:
            self._ask_parent(method, {"index": self._index})
        except RpcError as e:
            raise ValueError(e.message) from None
