"""The digest of a bundle: SHA-256 over the sorted list of (path, mode, SHA-256 of content).

The same on every machine: no times, no owners, no order of a directory, of the mode only whether a file
may be executed. The byte layout and a test vector are in ``docs/reference/bundle.md``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelops.study.ids import BundleDigest

if TYPE_CHECKING:
    from collections.abc import Iterable

HEADER = b"modelops.bundle.1\n"
FILE, EXECUTABLE, LINK = "100644", "100755", "120000"  # as git writes them
MODES = (FILE, EXECUTABLE, LINK)
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or symbolic link of a bundle.

    ``path``: relative, ``/`` between its parts. ``mode``: one of `MODES`. ``sha256``: hexadecimal, of the
    content; of a link, of its target as text.
    """

    path: str
    mode: str
    sha256: str


def digest_of(entries: Iterable[Entry]) -> BundleDigest:
    """Return the digest of a bundle with these entries, in whatever order they come."""
    whole = hashlib.sha256(HEADER)
    for entry in sorted(entries, key=lambda e: e.path.encode()):
        whole.update(f"{entry.mode} {entry.sha256} {entry.path}\0".encode())
    return BundleDigest(whole.hexdigest())


def is_digest(text: str) -> bool:
    """Say whether this text has the form of a bundle digest: 64 hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None
