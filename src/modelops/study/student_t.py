"""The quantile of Student's t distribution, the same number on every machine.

No scipy, which a driver does not need otherwise. The result is rounded to ten significant digits, so that the last bit
of a machine's ``atan`` or ``log`` decides nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

EXTREME: Final = 0.999999  # levels above it
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
    ``df``, solved for ``t`` by bisection), 26.7.5 (the expansion for large ``df``). For levels near 1, of which these
    know too few digits: 26.7.1 (what lies outside, as an incomplete beta function) and 26.5.8 (its continued fraction).
    """
    if level > EXTREME:
        outside = 1.0 - level  # exact
        z: float = -NormalDist().inv_cdf(outside / 2.0)
        t = _solved(lambda t: _outside(t, df) > outside, z)
    else:
        z = NormalDist().inv_cdf((1.0 + level) / 2.0)
        t = _expansion(z, df) if df >= LARGE else _solved(lambda t: _probability(t, df) < level, z)
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


def _solved(is_below: Callable[[float], bool], z: float) -> float:
    """Return where a ``t`` above ``z`` ceases to be below the quantile."""
    lo, hi = z, 2.0 * z + 1.0
    while is_below(hi):
        lo, hi = hi, 2.0 * hi
    while hi - lo > 1e-14 * hi:
        middle = (lo + hi) / 2.0
        if not lo < middle < hi:
            break
        if is_below(middle):
            lo = middle
        else:
            hi = middle
    return hi


def _outside(t: float, df: int) -> float:
    """Return the probability outside of ``-t..t``, to as many digits however small it is."""
    a, b, x = df / 2.0, 0.5, df / (df + t * t)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(-a * math.log1p(t * t / df) + b * math.log(t * t / (df + t * t)) - log_beta) / a
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0))  # Lentz's way of evaluating a continued fraction
    fraction = d
    for m in range(1, 1_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0)),
        ):
            d, c = 1.0 / (1.0 + step * d), 1.0 + step / c
            fraction *= d * c
        if abs(d * c - 1.0) < 1e-16:
            break
    return front * fraction


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
