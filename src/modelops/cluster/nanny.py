"""Worker processes that know nothing of the program that started them.

``multiprocessing`` imports the main module of the parent in each process it spawns. A script that calls
``mo.run`` at its top level would so be run again by every worker (and fail), one that is read from stdin has
no file to import, and what it imports would be imported by every worker. Ours need nothing of it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

from distributed import Nanny

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK = threading.Lock()
_hidden: dict[str, Any] = {}
_n_hiding = 0


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Make ``multiprocessing.spawn`` see a main module without a file; may be nested and concurrent."""
    global _n_hiding
    main = sys.modules["__main__"]
    with _LOCK:
        if not _n_hiding:
            _hidden.update({k: main.__dict__[k] for k in ("__file__", "__spec__") if k in main.__dict__})
            main.__dict__.pop("__file__", None)
            main.__spec__ = None
        _n_hiding += 1
    try:
        yield
    finally:
        with _LOCK:
            _n_hiding -= 1
            if not _n_hiding:
                main.__dict__.update(_hidden)
                _hidden.clear()


class DetachedNanny(Nanny):
    """A nanny whose worker process does not import the user's main module, nor when it is started again.

    The worker has no dashboard, which would be open to everybody, whatever `LocalCluster` says.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "dashboard": False})

    async def instantiate(self) -> Any:
        """Start the worker process."""
        with main_module_hidden():
            return await super().instantiate()
