"""Volumes for tests that fill them and take away the permission to write: small file systems in memory. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

BUSY_S = 60.0


def can_mount(folder: Path) -> bool:
    """Say whether this process may mount a file system."""
    if os.geteuid() != 0:
        return False
    with contextlib.suppress(OSError, subprocess.CalledProcessError), Volume(folder / "try", "1m"):
        return True
    return False


class Volume:
    """A tmpfs of its own, mounted within a ``with`` block."""

    def __init__(self, path: Path, size: str) -> None:
        self.path, self._size = path, size

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={self._size},mode=0700", "tmpfs", str(self.path))
        return self

    def __exit__(self, *_: object) -> None:
        _run("umount", "--lazy", str(self.path))

    def fill(self) -> None:
        """Leave no byte free."""
        fd = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while os.write(fd, bytes(size)) == size:
                        pass
        finally:
            os.close(fd)

    def free(self) -> None:
        """Give back what `fill` took."""
        self._filler.unlink()

    def grow(self, size: str) -> None:
        """Make it larger."""
        _run("mount", "-o", f"remount,size={size}", str(self.path))

    def forbid_writing(self) -> None:
        """Make it read-only, as soon as nobody has a file open for writing."""
        deadline = time.monotonic() + BUSY_S
        command = ["mount", "-o", "remount,ro", str(self.path)]
        while (tried := subprocess.run(command, check=False, capture_output=True)).returncode:
            assert time.monotonic() < deadline, tried.stderr
            threading.Event().wait(0.01)

    def allow_writing(self) -> None:
        """Make it writable again."""
        _run("mount", "-o", "remount,rw", str(self.path))

    @property
    def _filler(self) -> Path:
        return self.path / "filler"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
