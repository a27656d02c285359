"""What a result file is known by; the writer says it, the records keep it, whoever looks for damage compares."""

from __future__ import annotations

import msgspec


class ResultFile(msgspec.Struct, frozen=True):
    """A result file as it was written. ``sha256``: hexadecimal."""

    name: str
    n_bytes: int
    sha256: str
