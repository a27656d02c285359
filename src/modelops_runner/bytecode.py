"""Where compiled modules are kept, and what becomes of those that are damaged: they are compiled anew.

Python looks whether a compiled module belongs to its source, and not whether it is whole; what is cut is then an error
of the import. On a full disk it writes them cut itself (https://github.com/python/cpython/issues/126606).
"""

from __future__ import annotations

import _frozen_importlib_external as importing  # what importlib is made of, and loaded in every process
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DAMAGED = (EOFError, ImportError, MemoryError, SystemError, TypeError, ValueError)
# In every Python from 3.3 on. A loader in its place would be seen in every traceback.
_LOAD = "_compile_bytecode"
_load: Any = getattr(importing, _LOAD, None)


def keep_bytecode(folder: str | None) -> None:
    """Keep what is compiled from now on in this folder; without one nowhere."""
    sys.pycache_prefix = folder or sys.pycache_prefix
    sys.dont_write_bytecode = not sys.pycache_prefix
    if _load is not None and sys.pycache_prefix:
        setattr(importing, _LOAD, _load_or_compile)


def _load_or_compile(data: Any, name: Any = None, bytecode_path: Any = None, source_path: Any = None) -> Any:
    try:
        return _load(data, name=name, bytecode_path=bytecode_path, source_path=source_path)
    except _DAMAGED:
        if source_path is None or bytecode_path is None:
            raise
    try:
        os.unlink(bytecode_path)  # so that the next process keeps it again
    except OSError:
        pass
    with open(source_path, "rb") as source:
        return compile(source.read(), source_path, "exec", dont_inherit=True)
