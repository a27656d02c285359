"""Designs of parameter sets: grids, and samples of a space (Sobol' points, Latin hypercubes).

Samples need scipy, the extra ``modelops[sampling]``; the same seed gives the same points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from modelops.errors import RequestError
from modelops.study.parameter_sets import Axis, Column, Listed, ParameterSets

if TYPE_CHECKING:
    from types import ModuleType

MAX_SETS = 2**31


@dataclass(frozen=True, slots=True)
class LogRange:
    """From ``lo`` to ``hi``, evenly on a logarithmic scale. Both above zero."""

    lo: float
    hi: float


@dataclass(frozen=True, slots=True)
class IntRange:
    """The integers ``lo, ..., hi``, both included, all equally likely."""

    lo: int
    hi: int


Range = tuple[float, float] | LogRange | IntRange


def log_range(lo: float, hi: float) -> LogRange:
    """Say that a parameter is to be sampled evenly on a logarithmic scale, ``0 < lo < hi``."""
    return LogRange(lo, hi)


def ints(lo: int, hi: int) -> IntRange:
    """Say that a parameter takes the integers from ``lo`` to ``hi``, both included."""
    return IntRange(lo, hi)


def grid(**axes: Iterable[Any]) -> ParameterSets:
    """Return every combination of the values of each axis; the last axis varies fastest.

    Raises
    ------
    RequestError
        An axis has no value, or is a single one (write ``beta=[0.3]``).
    """
    listed: dict[str, list[Any]] = {}
    for name, values in axes.items():
        if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
            raise RequestError(
                f"grid: {name} = {values!r} is one value, not a list; write {name}=[{values!r}]"
            )
        listed[name] = values.tolist() if isinstance(values, np.ndarray) else list(values)
        if not listed[name]:
            raise RequestError(f"grid: {name} has no values")
    n = math.prod(len(values) for values in listed.values())
    _check_n(n, "grid")
    columns: dict[str, Column] = {}
    repeat = n
    for name, values in listed.items():
        repeat //= len(values)
        columns[name] = Axis(values, repeat)
    return ParameterSets(columns, n)


def sobol(n: int, /, *, seed: int = 0, **ranges: Range) -> ParameterSets:
    """Return ``n`` scrambled Sobol' points. Best spread when ``n`` is a power of two.

    Parameters
    ----------
    ranges
        Of each parameter: ``(lo, hi)``, `log_range`, or `ints`.

    Source
    ------
    Owen (1998), doi:10.1006/jcom.1998.0487, as in ``scipy.stats.qmc.Sobol``.
    """
    qmc = _qmc("sobol")
    _check_sample(n, ranges, seed, "sobol")
    sampler = qmc.Sobol(len(ranges), scramble=True, rng=np.random.default_rng(seed))
    # `random` warns when n is no power of two, though the first n points of a power of two are the same.
    points = sampler.random_base2((n - 1).bit_length())[:n]
    return _scaled(points, ranges)


def latin_hypercube(n: int, /, *, seed: int = 0, **ranges: Range) -> ParameterSets:
    """Return a Latin hypercube of ``n`` points: in each parameter, one point in every n-th of its range.

    Source
    ------
    McKay, Beckman & Conover (1979), doi:10.1080/00401706.1979.10489755, as in
    ``scipy.stats.qmc.LatinHypercube``.
    """
    qmc = _qmc("latin_hypercube")
    _check_sample(n, ranges, seed, "latin_hypercube")
    return _scaled(qmc.LatinHypercube(len(ranges), rng=np.random.default_rng(seed)).random(n), ranges)


def _qmc(what: str) -> ModuleType:
    try:
        from scipy.stats import qmc  # type: ignore[import-untyped]  # scipy ships no stubs
    except ImportError as e:
        raise RequestError(f"{what} needs scipy: pip install 'modelops[sampling]'") from e
    module: ModuleType = qmc
    return module


def _check_n(n: object, what: str) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_SETS:
        raise RequestError(f"{what}: {n!r} is no number of parameter sets; it must lie in 1..2**31")


def _check_sample(n: int, ranges: Mapping[str, object], seed: object, what: str) -> None:
    _check_n(n, what)
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex) or seed.__index__() < 0:
        raise RequestError(f"{what}: seed = {seed!r} is no seed; it must be an integer, 0 or more")
    if not ranges:
        raise RequestError(f"{what} needs at least one range, e.g. {what}({n}, beta=(0.1, 0.5))")
    for name, value in ranges.items():
        pair: object = (value.lo, value.hi) if isinstance(value, LogRange | IntRange) else value
        if not _is_pair(pair):
            raise RequestError(f"{what}: {name} = {value!r} is no range; write {name}=(lo, hi) with lo < hi")
        if isinstance(value, LogRange) and value.lo <= 0:
            raise RequestError(f"{what}: {name} = {value!r}: a logarithmic range must lie above zero")
        if isinstance(value, IntRange) and not all(isinstance(end, int) for end in (value.lo, value.hi)):
            raise RequestError(f"{what}: {name} = {value!r}: the ends of ints(lo, hi) must be integers")


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return False
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in pair)
    return numbers and -math.inf < pair[0] < pair[1] < math.inf


def _scaled(points: npt.NDArray[np.float64], ranges: dict[str, Range]) -> ParameterSets:
    columns: dict[str, Column] = {}
    for (name, value), unit in zip(ranges.items(), points.T, strict=True):
        match value:
            case LogRange(lo, hi):
                low, high = math.log(lo), math.log(hi)
                # exp(log(x)) may miss x by a rounding error; a range is a promise.
                columns[name] = Listed(np.clip(np.exp(low + (high - low) * unit), lo, hi))
            case IntRange(first, last):
                steps = np.floor(unit * (last - first + 1)).astype(np.int64)
                columns[name] = Listed(np.minimum(steps, last - first) + first)
            case (lo, hi):
                columns[name] = Listed(float(lo) + (float(hi) - float(lo)) * unit)
    return ParameterSets(columns, len(points))
