"""The folder of one process: where it works, and what of it is removed when it has ended."""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

_OF_THE_PROCESS = ("work", "tmp", "cache")
_SPOOL = "spool"  # outputs too large for a message; outcomes may own them


def make_folders(folder: Path) -> None:
    """Make ``work``, ``tmp``, ``cache`` and ``spool``."""
    for name in (*_OF_THE_PROCESS, _SPOOL):
        (folder / name).mkdir(parents=True)


def remove_folders(folder: Path, owned: Collection[str]) -> None:
    """Remove what a process leaves, but for the spooled files that are ``owned`` (their paths)."""
    for name in _OF_THE_PROCESS:
        _remove_tree(folder / name)
    with contextlib.suppress(FileNotFoundError):  # a model has removed it
        for file in (folder / _SPOOL).iterdir():
            if str(file) not in owned:
                file.unlink()
    _remove_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a process that has ended, if nobody owns a file in it any more."""
    if (folder / _SPOOL).exists() and not any((folder / name).exists() for name in _OF_THE_PROCESS):
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    for path in (folder / _SPOOL, folder):
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            return


def _remove_tree(folder: Path) -> None:
    if sys.version_info >= (3, 12):
        shutil.rmtree(folder, onexc=_make_writable_and_retry)
    else:
        shutil.rmtree(
            folder, onerror=lambda function, path, why: _make_writable_and_retry(function, path, why[1])
        )


def _make_writable_and_retry(function: Any, path: str, error: BaseException) -> None:
    """Let ``rmtree`` go on where a model has left folders without permissions."""
    if isinstance(error, FileNotFoundError):
        return
    parent = Path(path).parent
    parent.chmod(0o700)
    if Path(path).is_dir() and not Path(path).is_symlink():
        Path(path).chmod(0o700)
    function(path)
