"""The quantile of Student's t distribution, the same number on every machine.

No scipy, which a driver does not need otherwise. The result is rounded to ten significant digits, so that the last bit
of a machine's ``atan`` or ``log`` decides nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Final

LARGE: Final = 1000  # degrees of freedom from which the expansion is exact to more digits than are kept
DIGITS: Final = 10


@lru_cache(maxsize=4096)
def t_quantile(level: float, df: int) -> float:
    """Return the ``t`` for which a variable with Student's t distribution lies in ``-t..t`` with this probability.

    Parameters
    ----------
    level
        Above 0 and below 1.
    df
        Degrees of freedom, 1 or more.

    Source
    ------
    Abramowitz & Stegun (1964), Handbook of Mathematical Functions: 26.7.3 and 26.7.4 (the probability for integer
    ``df``, solved for ``t`` by bisection), 26.7.5 (the expansion for large ``df``).
    """
    z: float = NormalDist().inv_cdf((1.0 + level) / 2.0)
    t = _expansion(z, df) if df >= LARGE else _solved(level, df, z)
    return float(f"{t:.{DIGITS}g}")


def _expansion(z: float, df: int) -> float:
    w = z * z
    terms = (
        z * (w + 1.0) / 4.0,
        z * ((5.0 * w + 16.0) * w + 3.0) / 96.0,
        z * (((3.0 * w + 19.0) * w + 17.0) * w - 15.0) / 384.0,
        z * ((((79.0 * w + 776.0) * w + 1482.0) * w - 1920.0) * w - 945.0) / 92160.0,
    )
    return z + math.fsum(term / df ** (i + 1) for i, term in enumerate(terms))


def _solved(level: float, df: int, z: float) -> float:
    lo, hi = z, 2.0 * z + 1.0
    while _probability(hi, df) < level:
        lo, hi = hi, 2.0 * hi
    while hi - lo > 1e-14 * hi:
        middle = (lo + hi) / 2.0
        if not lo < middle < hi:
            break
        if _probability(middle, df) < level:
            lo = middle
        else:
            hi = middle
    return hi


def _probability(t: float, df: int) -> float:
    """Return the probability of ``-t..t``."""
    cos2 = df / (df + t * t)
    sin, cos = t / math.sqrt(df + t * t), math.sqrt(cos2)
    if df % 2 == 0:
        term = total = 1.0
        for i in range(2, df, 2):
            term *= cos2 * (i - 1) / i
            total += term
        return sin * total
    term, total = cos, 0.0
    for i in range(1, df, 2):
        if i > 1:
            term *= cos2 * (i - 1) / i
        total += term
    return 2.0 / math.pi * (math.atan2(t, math.sqrt(df)) + sin * total)
