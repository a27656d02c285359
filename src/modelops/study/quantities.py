"""Durations and amounts of memory as people write them: ``"10m"``, ``"2GiB"``."""

from __future__ import annotations

import math
import re
from typing import Final

from modelops.errors import RequestError

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip
LONGEST_S: Final = 1e9  # thirty years, which clocks, timers and columns can hold
_PART = re.compile(r"([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*")


def seconds(value: object, what: str) -> float | None:
    """Read a duration: seconds as a number, or text such as ``"12h"``, ``"10m"``, ``"1.5s"``, ``"1h30m"``.

    Parameters
    ----------
    what
        What the duration is for, for the message.

    Raises
    ------
    RequestError
        It cannot be read, is not above zero and finite, or longer than `LONGEST_S`.
    """
    if value is None:
        return None
    total = _parsed_seconds(value) if isinstance(value, str) else value
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 < total < math.inf:
        raise RequestError(
            f"{what} = {value!r} is no duration; write seconds, or text with a unit "
            "(ms, s, m, h, d) like '10m' or '1h30m'"
        )
    if total > LONGEST_S:
        raise RequestError(
            f"{what} = {value!r} is longer than {LONGEST_S:,.0f} s (31 years), the longest there is"
        )
    return float(total)


def n_bytes(value: object, what: str) -> int | None:
    """Read an amount of memory: bytes as an integer, or text such as ``"2GiB"``, ``"500MB"``.

    Raises
    ------
    RequestError
        It cannot be read, or does not lie in 1..2**63-1.
    """
    if value is None:
        return None
    total = value
    if isinstance(value, str):
        match = _PART.fullmatch(value.strip())
        unit = _BYTES.get(match[2].upper()) if match else None
        size = float(match[1]) * unit if match and unit else math.inf
        total = int(size) if size < math.inf else None
    if isinstance(total, bool) or not isinstance(total, int) or not 0 < total < 2**63:
        raise RequestError(
            f"{what} = {value!r} is no amount of memory; write bytes, or text with a unit "
            "like '2GiB' or '500MB'"
        )
    return total


def _parsed_seconds(text: str) -> float | None:
    total, at, text = 0.0, 0, text.strip()
    while at < len(text):
        match = _PART.match(text, at)
        if match is None or match[2].lower() not in (_SECONDS if match[2] or at else {**_SECONDS, "": 1.0}):
            return None
        total += float(match[1]) * _SECONDS.get(match[2].lower(), 1.0)
        at = match.end()
    return total
