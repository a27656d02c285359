"""Replace a file in one step."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file at once, so that a reader sees the old or the new content."""
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
        os.replace(temporary, path)  # noqa: PTH105  both are plain strings
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
