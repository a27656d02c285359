"""How many replicates a parameter set needs: until the confidence interval of an output is narrow enough.

The rule is a pure function of the outcomes of a set in replicate order. It looks at prefixes of fixed lengths only:
at the first `Until.min` replicates, then at a tenth more each time, at last at `Until.max`. A prefix is looked at when
every replicate in it has its final outcome, so neither the machine, nor the order in which replicates end, nor an
interruption changes what is decided. The reference, with test vectors, is ``docs/reference/until.md``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import msgspec

from modelops.errors import RequestError
from modelops.study.student_t import t_quantile
from modelops.study.wording import known_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MAX_OF_UNTIL: Final = 1_000_000  # what a set does not need is written down replicate by replicate
KEYS: Final = ("half_width", "of", "level", "min", "max")
EXAMPLE: Final = 'half_width=0.01, of="attack_rate"'


class Until(msgspec.Struct, frozen=True, kw_only=True):
    """When a parameter set has enough replicates; made by `until`."""

    half_width: float
    of: str
    level: float = 0.95
    min: int = 50
    max: int = 2000

    def looks(self) -> Iterator[int]:
        """Yield the lengths of the prefixes that are looked at, rising; the last one is ``max``."""
        n = self.min
        while n < self.max:
            yield n
            n = next_look(n)
        yield self.max

    def half_width_of(self, values: Sequence[float]) -> float:
        """Return half the width of the confidence interval of the mean of ``values``.

        ``inf`` for fewer than two values, and when one of them is not finite: there is no interval then.
        """
        m = len(values)
        if m < 2 or not all(map(math.isfinite, values)):
            return math.inf
        try:
            # `fsum` rounds once, so the order and the machine do not matter.
            mean = math.fsum(values) / m
            variance = math.fsum((x - mean) ** 2 for x in values) / (m - 1)
        except OverflowError:
            return math.inf
        return t_quantile(self.level, m - 1) * math.sqrt(variance / m)

    def is_enough(self, values: Sequence[float]) -> bool:
        """Say whether a set with these values of its succeeded replicates needs no more.

        At least ``min`` must have succeeded: an interval of fewer says too little.
        """
        return len(values) >= self.min and self.half_width_of(values) <= self.half_width

    def needed(self, outcomes: Sequence[float | None]) -> int | None:
        """Return how many replicates a set needs whose first ones ended like this; None: more must be seen.

        Parameters
        ----------
        outcomes
            In replicate order, without a gap: the output of a replicate, None if it did not succeed.
        """
        for n in self.looks():
            if n > len(outcomes):
                return None
            if n == self.max or self.is_enough([x for x in outcomes[:n] if x is not None]):
                return n
        return None

    def predicted(self, values: Sequence[float]) -> int:
        """Return how many succeeded replicates will probably be enough, going by these."""
        half_width = self.half_width_of(values)
        if not half_width < math.inf:
            return self.max
        ratio = half_width / self.half_width  # its square may be infinite, and is no error as a product
        return math.ceil(min(self.max, len(values) * ratio * ratio))


def next_look(n: int) -> int:
    """Return the length of the prefix that is looked at after ``n``: a tenth more."""
    return n + max(1, n // 10)


def until(
    *,
    half_width: float,
    of: str,
    level: float = 0.95,
    min: int = 50,  # noqa: A002  what it reads like matters more here
    max: int = 2000,  # noqa: A002
) -> Until:
    """Say that each parameter set is to get replicates until its mean is known well enough.

    A set is done with ``n`` replicates when ``t * s / sqrt(m) <= half_width``, where ``m`` of its first ``n``
    replicates succeeded, ``s`` is the standard deviation of the output among these, and ``t`` the two-sided quantile
    of Student's t distribution with ``m - 1`` degrees of freedom. It is looked at after ``min`` replicates, then after
    a tenth more each time, and at ``max`` it ends in any case. Replicates beyond end as ``not_needed``, also those that
    had been run by then.

    The interval is the mean plus and minus ``half_width``. It covers the true mean about as often as ``level`` says if
    ``min`` replicates are enough to show how the output varies (``docs/reference/until.md`` has measured coverage): for
    a yes-or-no output of probability p, choose ``min`` of about 10 / p or more, as an output that is the same in all of
    the first ``min`` replicates is taken for constant.

    Parameters
    ----------
    half_width
        Half the width of the confidence interval, in the unit of the output. Above 0.
    of
        The name of an output that is a number (or true or false, as 1 and 0) in every replicate that succeeds. A job in
        which it is missing, or anything else, ends and names the first such replicate; what has run is kept. Not a
        number (nan), or infinite: that set gets ``max``.
    level
        How often the interval is to cover the true mean, e.g. 0.95.
    min, max
        The smallest and the largest number of replicates of a parameter set. At least ``min`` must have succeeded, too.

    Source
    ------
    Chow & Robbins (1965), On the asymptotic theory of fixed-width sequential confidence intervals for the mean,
    doi:10.1214/aoms/1177700156; with the t quantile and a smallest number of replicates as in Law (2015), Simulation
    Modeling and Analysis, 9.4.1. What looking often and early costs in coverage: Singham & Schruben (2012),
    doi:10.1287/ijoc.1110.0471.
    """
    return checked(Until(half_width=_number("half_width", half_width), of=of, level=level, min=min, max=max))


def checked(given: Until) -> Until:
    """Return it if it can be kept to. Raises RequestError, which names the key."""
    if not 0.0 < _number("half_width", given.half_width) < math.inf:
        raise RequestError(f"until: half_width must be more than 0, not {given.half_width!r}")
    if not isinstance(given.of, str) or not given.of:  # type: ignore[redundant-expr]  # it may come from anywhere
        raise RequestError(f"until: of = {given.of!r} must be the name of an output, as in {EXAMPLE}")
    if not 0.0 < _number("level", given.level) < 1.0:
        raise RequestError(f"until: level must be between 0 and 1, e.g. 0.95, not {given.level!r}")
    _check_int("min", given.min, 2, MAX_OF_UNTIL)
    _check_int("max", given.max, given.min, MAX_OF_UNTIL)
    return given


def until_of_table(table: Mapping[str, Any]) -> Until:
    """Read the table ``replicates`` of a study file: the arguments of `until`. Raises RequestError."""
    for key in table:
        if key not in KEYS:
            raise RequestError(f"unknown key {key!r} in replicates{known_words(str(key), KEYS)}")
    for key in KEYS[:2]:
        if key not in table:
            raise RequestError(
                f"replicates is a table, so it needs {key}, as in {{ {EXAMPLE.replace('=', ' = ')} }}"
            )
    return until(**table)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"until: {key} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        raise RequestError(f"until: {key} is too large for a number that a machine calculates with") from None


def _check_int(key: str, value: Any, lo: int, hi: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lo <= value <= hi:
        raise RequestError(f"until: {key} must be an integer in {lo}..{hi}, not {value!r}")
