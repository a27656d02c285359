"""Volumes that have no room: which one it is, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelops.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def temporary_files_are(what: str) -> Iterator[None]:
    """Within this block, temporary files are written: ``what`` they hold.

    Raises
    ------
    StorageError
        Their folder has no room. It can be done again later: nothing of it was stored.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        folder = Path(tempfile.gettempdir())
        raise StorageError(
            f"writing {what} to a temporary file in {folder} failed: {error.strerror} ({volume_of(folder)}); "
            "free some space there, or set TMPDIR to a folder on another volume and start anew"
        ) from error


def volume_of(path: Path) -> str:
    """Name the mounted volume that holds a path, and what is free on it; as far as that can be seen."""
    # Not `Path.exists` and `Path.is_mount`, which raise where a folder may not be looked into.
    while not os.path.exists(path) and path != path.parent:  # noqa: PTH110
        path = path.parent
    try:
        free_bytes = shutil.disk_usage(path).free
    except OSError:
        return f"volume of {path}"
    while not os.path.ismount(path):
        path = path.parent
    return f"volume {path}, {free_bytes / 2**20:.1f} MiB free"
