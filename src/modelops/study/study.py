"""The study a modeler writes: a bundle, parameter sets, replicates, and how to treat them.

A `Study` holds what was said, and None where nothing was; the bundle's own ``[tool.modelops.study]`` and then
the defaults below fill the gaps (`Study.filled_from`). What is wrong is refused here, when it is written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelops.errors import RequestError
from modelops.states import FAILURES, ReplicateStatus
from modelops.study.parameter_sets import ParameterSets
from modelops.study.pools import checked_pools
from modelops.study.quantities import n_bytes, seconds
from modelops.study.seeds import MAX_EXPLICIT_SEED, MAX_REPLICATES, MAX_STUDY_SEED
from modelops.study.spec import ISOLATIONS, NO_RETRY, Limits, RetryPolicy
from modelops.study.stopping import Until, checked
from modelops.study.wording import did_you_mean, known_words

if TYPE_CHECKING:
    from types import UnionType

MAX_NAME: Final = 500  # characters of a job's name
_NAME: Final = re.compile("[^\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]+")


def Retry(  # noqa: N802  reads as the value it makes: retry=mo.Retry(max_retries=5)
    *,
    max_retries: int = 5,
    initial_delay: float | str = 30.0,
    backoff: float = 1.0,
    max_delay: float | str | None = None,
    on: Iterable[str] = ("crashed",),
) -> RetryPolicy:
    """Say how often and when a replicate that did not succeed is tried again.

    Parameters
    ----------
    max_retries
        A replicate is tried at most ``1 + max_retries`` times.
    initial_delay, max_delay
        Before the first retry, and at most: seconds, or text like ``"30s"``. 0 means at once.
    backoff
        Each further delay is this many times the one before.
    on
        The statuses that are tried again: ``failed``, ``timed_out``, ``out_of_memory``, ``crashed``,
        ``invalid_output``.
    """
    for key, value in (("max_retries", max_retries), ("initial_delay", initial_delay), ("on", on)):
        if value is None:
            raise RequestError(f"Retry: {key} cannot be None; leave it out for the default")
    _check_int("Retry: max_retries", max_retries, 0, 2**31)
    factor = _factor(backoff)
    known = sorted(FAILURES)
    _check_kind("Retry: on", on, Iterable, f"it must be a list of statuses; known are {', '.join(known)}")
    statuses = [on] if isinstance(on, str) else list(on)
    for status in statuses:
        if status not in known:
            raise RequestError(
                f"Retry: on has {status!r}, which is no failure{known_words(str(status), known)}"
            )
    return RetryPolicy(
        max_retries=max_retries,
        initial_delay=_delay(initial_delay, "initial_delay"),
        backoff=factor,
        max_delay=None if max_delay is None else _delay(max_delay, "max_delay"),
        on=frozenset(ReplicateStatus(status) for status in statuses),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """What to run. None means: as the bundle says in ``[tool.modelops.study]``, else the default.

    Parameters
    ----------
    bundle
        Path of a folder or `.py` file, or a digest.
    model
        Name or entry point of the model; by default the first of the bundle.
    parameters
        `grid`, `sobol`, `latin_hypercube`, a list of dicts, a table, or the path of a CSV, Parquet or JSON
        file. By default one parameter set without parameters.
    replicates, seed
        How many replicates of each parameter set (default 1), or `until`: as many as each needs. Their seeds derive
        from ``seed`` (default 0).
    seeds
        Instead: the seeds themselves, one per replicate, used exactly as given.
    common_random_numbers
        Give replicate r of every parameter set the same seed.
    aggregate
        Names or entry points; by default all aggregates of the bundle. ``[]``: none.
    isolation
        ``warm``, ``fork`` or ``spawn``; by default what the bundle says.
    min_success
        How many replicates of a parameter set must succeed for its aggregate to run: a float is a fraction
        (default 1.0), an integer a count.
    timeout, replicate_timeout
        Of the whole job, and of one replicate: seconds, or text like ``"12h"``. Default: none.
    memory
        What one replicate may use: bytes, or text like ``"2GiB"``. Default: no limit.
    threads
        How many threads BLAS, OpenMP and the like may use in a replicate (default 1).
    retry
        `Retry`; by default nothing is tried again.
    fail_fast
        Stop the job when the first replicates all fail in the same way (default True).
    max_failures
        Stop the job when more replicates than this did not succeed.
    pools
        Run on workers of these pools only: names of pools, or values of their labels. By default, and for ``[]``,
        everywhere.
    name
        What the job is called; by default the bundle's name.
    """

    bundle: str | Path
    model: str | None = None
    parameters: Any = None
    replicates: int | Until | None = None
    seed: int | None = None
    seeds: Sequence[int] | None = None
    common_random_numbers: bool | None = None
    aggregate: str | Sequence[str] | None = None
    isolation: str | None = None
    min_success: float | int | None = None
    timeout: float | str | None = None
    replicate_timeout: float | str | None = None
    memory: int | str | None = None
    threads: int | None = None
    retry: RetryPolicy | None = None
    fail_fast: bool | None = None
    max_failures: int | None = None
    pools: str | Sequence[str] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not str(self.bundle):
            raise RequestError(f"bundle = {self.bundle!r} is no path; give a folder, a .py file, or a digest")
        _check_kind("model", self.model, str, "it must be a name or an entry point, one")
        self._check_replicates()
        seconds(self.timeout, "timeout")
        seconds(self.replicate_timeout, "replicate_timeout")
        n_bytes(self.memory, "memory")
        if self.isolation is not None and self.isolation not in ISOLATIONS:
            close = did_you_mean(str(self.isolation), ISOLATIONS)
            raise RequestError(f"isolation = {self.isolation!r} is none of {', '.join(ISOLATIONS)}{close}")
        _check_kind("retry", self.retry, RetryPolicy, "write retry=mo.Retry(max_retries=...)")
        if self.retry is not None:
            _check_retry(self.retry)
        for key, value in (("threads", self.threads), ("max_failures", self.max_failures)):
            _check_int(key, value, 1 if key == "threads" else 0, 2**31)
        for key in ("common_random_numbers", "fail_fast"):
            _check_kind(key, getattr(self, key), bool, "it must be true or false")
        self._check_min_success()
        if self.aggregate is not None:
            _check_kind("aggregate", self.aggregate, Collection, "it must be a name or a list of names")
            given = [self.aggregate] if isinstance(self.aggregate, str) else self.aggregate
            for name in given:
                _check_kind("aggregate", name, str, "it must be a name or a list of names")
            if len(set(given)) < len(given):
                raise RequestError(f"aggregate = {list(given)!r} names one twice")
        if self.pools is not None:
            checked_pools("pools", self.pools)
        if self.name is not None and self.name != "":
            _check_name(self.name)
        if not isinstance(self.parameters, ParameterSets | str | Path | None):
            object.__setattr__(self, "parameters", parameter_sets(self.parameters))

    @property
    def n_replicates(self) -> int:
        """How many replicates each parameter set has; with `until`, at most."""
        if self.seeds is not None:
            return len(self.seeds)
        if isinstance(self.replicates, Until):
            return self.replicates.max
        return 1 if self.replicates is None else self.replicates

    @property
    def until(self) -> Until | None:
        """When a parameter set has enough replicates, if that is not said by their number."""
        return self.replicates if isinstance(self.replicates, Until) else None

    @property
    def limits(self) -> Limits:
        """What one replicate may use."""
        return Limits(
            replicate_timeout_s=seconds(self.replicate_timeout, "replicate_timeout"),
            memory_bytes=n_bytes(self.memory, "memory"),
            threads=self.threads or 1,
        )

    @property
    def timeout_s(self) -> float | None:
        """Seconds the whole job may take, or None."""
        return seconds(self.timeout, "timeout")

    @property
    def retry_policy(self) -> RetryPolicy:
        """`retry`, or no retry."""
        return self.retry or NO_RETRY

    def sets(self) -> ParameterSets:
        """Return the parameter sets; one without parameters when none were given.

        Raises
        ------
        RequestError
            They are in a file that was not read yet (`modelops.client.study_files.with_parameters_read`).
        """
        if self.parameters is None:
            return ParameterSets.of_rows([{}])
        if not isinstance(self.parameters, ParameterSets):
            raise RequestError(f"the parameters are in the file {self.parameters}, which was not read yet")
        return self.parameters

    def filled_from(self, defaults: Study) -> Study:
        """Return this study with what it leaves open taken from another; the bundle is never taken.

        Explicit ``seeds`` exclude ``seed`` and ``replicates``: who says one has decided against the other.
        """
        said = {f.name for f in fields(self) if getattr(self, f.name) is not None}
        if "seeds" in said:
            said |= {"seed", "replicates"}
        if said & {"seed", "replicates"}:
            said.add("seeds")
        return replace(
            self, **{f.name: getattr(defaults, f.name) for f in fields(self) if f.name not in said}
        )

    def _check_replicates(self) -> None:
        if isinstance(self.replicates, Until):
            checked(self.replicates)
        else:
            _check_int("replicates", self.replicates, 1, MAX_REPLICATES)
        _check_int("seed", self.seed, 0, MAX_STUDY_SEED)
        if self.seeds is None:
            return
        _check_kind(
            "seeds", self.seeds, Iterable, "give a list with one seed per replicate; or seed, one for all"
        )
        seeds = tuple(
            int(s) if hasattr(s, "__index__") and not isinstance(s, bool) else s for s in self.seeds
        )
        for i, seed in enumerate(seeds):
            _check_int(f"seeds[{i}]", seed, 0, MAX_EXPLICIT_SEED)
        if not seeds:
            raise RequestError("seeds is empty; give one seed per replicate")
        if isinstance(self.replicates, Until):
            if self.replicates.max != len(seeds):
                raise RequestError(
                    f"until: max = {self.replicates.max}, but {len(seeds)} seeds were given; give max of them, or seed"
                )
        elif self.replicates is not None and self.replicates != len(seeds):
            raise RequestError(
                f"replicates = {self.replicates}, but {len(seeds)} seeds were given; leave replicates out, "
                "or give one seed per replicate"
            )
        if self.seed is not None:
            raise RequestError(
                "give either seed or seeds: explicit seeds are used as they are, and derive from nothing"
            )
        object.__setattr__(self, "seeds", seeds)

    def _check_min_success(self) -> None:
        value = self.min_success
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(
                f"min_success = {value!r}: a float is a fraction (0.9), an integer a count (180)"
            )
        if isinstance(value, float) and not 0 <= value <= 1:
            raise RequestError(
                f"min_success = {value!r}: a fraction must lie in 0.0..1.0; a count is an integer"
            )
        if isinstance(value, int) and value < 1:
            raise RequestError(f"min_success = {value!r}: a count must be 1 or more")


def parameter_sets(given: Any) -> ParameterSets:
    """Read parameter sets from whatever holds them in memory: a design, dicts, a table."""
    if isinstance(given, ParameterSets):
        return given
    if isinstance(given, dict):
        raise RequestError(
            "parameters is a dict; write mo.grid(beta=[0.2, 0.3]) for all combinations, or a list of dicts"
        )
    if (
        isinstance(given, Iterable)
        and not hasattr(given, "__arrow_c_stream__")
        and not hasattr(given, "iloc")
    ):
        return ParameterSets.of_rows(given)
    return ParameterSets.of_table(given)


def _check_name(name: Any) -> None:
    """Refuse what no list of jobs could show in a line, or no record hold. Raises RequestError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise RequestError(
            f"name = {name!r:.60} must be one line of 1 to {MAX_NAME} characters of Unicode, without control characters"
        )


def _factor(value: Any) -> float:
    """Return `Retry`'s ``backoff``, which JSON must be able to hold. Raises RequestError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= sys.float_info.max:
        raise RequestError(f"Retry: backoff must be a finite number, 1 or more, not {value!r:.60}")
    return float(value)


def _check_retry(given: RetryPolicy) -> None:
    """Refuse what `Retry` would not have made. Raises RequestError."""
    _factor(given.backoff)
    for key in ("initial_delay", "max_delay"):
        if (value := getattr(given, key)) is not None:
            _delay(value, key)


def _delay(value: float | str, what: str) -> float:
    if value == 0 and not isinstance(value, str):
        return 0.0
    return seconds(value, f"Retry: {what}") or 0.0


def _check_kind(key: str, value: object, kind: type | UnionType, advice: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"{key} = {value!r}: {advice}")


def _check_int(key: str, value: object, lo: int, hi: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not lo <= value <= hi):
        raise RequestError(f"{key} must be an integer in {lo}..{hi}, not {value!r}")
