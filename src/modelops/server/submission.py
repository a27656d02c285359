"""What makes a submission right: its spec, and how it fits the bundle. Pure; every refusal is a sentence.

The Python client checks the same while a study is written; here nobody is believed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from modelops.errors import RequestError
from modelops.states import FAILURES
from modelops.study.index_line import MAX_INDICES, IndexLine
from modelops.study.seeds import MAX_EXPLICIT_SEED, MAX_REPLICATES, MAX_STUDY_SEED
from modelops.study.spec import FIRST_PARAMETERS, FORMAT, ISOLATIONS
from modelops.study.wording import did_you_mean

if TYPE_CHECKING:
    from modelops.bundles import Manifest
    from modelops.study.spec import JobSpec, Limits, RetryPolicy

MAX_NAME = 500  # characters of a job's name and of its bundle's
MAX_SMALL = 2**31


def check_spec(spec: JobSpec) -> None:
    """Refuse a spec that no job can have, whatever its bundle.

    Raises
    ------
    RequestError
        ``str`` names the key, and what it may be.
    """
    if spec.format > FORMAT:
        raise RequestError(
            f"this study was written by a newer ModelOps (study format {spec.format}, this server reads up to "
            f"{FORMAT}); upgrade the server"
        )
    if spec.parameters != FIRST_PARAMETERS:
        raise RequestError(f"parameters = {spec.parameters!r} of a new job must be {FIRST_PARAMETERS!r}")
    for key, text in (("name", spec.name), ("bundle_name", spec.bundle_name)):
        _check_text(key, text)
    _check_line(spec)
    _check_seeds(spec)
    if spec.isolation not in ISOLATIONS:
        close = did_you_mean(spec.isolation, ISOLATIONS)
        raise RequestError(f"isolation = {spec.isolation!r} is none of {', '.join(ISOLATIONS)}{close}")
    _check_seconds("timeout_s", spec.timeout_s)
    _check_limits(spec.limits)
    _check_retry(spec.retry)
    _check_min_success(spec)
    if spec.max_failures is not None:
        _check_int("max_failures", spec.max_failures, 0, MAX_SMALL)
    for entry in {a for a in spec.aggregates if spec.aggregates.count(a) > 1}:
        raise RequestError(f"aggregates names {entry!r} twice")


def check_entries(spec: JobSpec, manifest: Manifest) -> None:
    """Refuse entry points that the bundle does not have.

    Raises
    ------
    RequestError
        Names those it has.
    """
    chosen = [("model", spec.model, manifest.model(spec.model))]
    chosen += [("aggregates", entry, manifest.aggregate(entry)) for entry in spec.aggregates]
    for key, given, entry in chosen:
        if given != entry:
            raise RequestError(f"{key}: {given!r} is a name; write its entry point, {entry!r}")


def check_count(spec: JobSpec, n_params: int) -> None:
    """Refuse another number of parameter sets than the line has."""
    if n_params != spec.line.n_params:
        raise RequestError(
            f"line has {spec.line.n_params} parameter sets, but {n_params} were given; they must be as many"
        )


def _check_text(key: str, text: str) -> None:
    if not text or len(text) > MAX_NAME or not text.isprintable():
        raise RequestError(
            f"{key} = {text[:50]!r} must be one line of 1 to {MAX_NAME} characters that can be printed"
        )


def _check_line(spec: JobSpec) -> None:
    line = spec.line
    n_params, n_replicates = line.n_params, max((b.n_replicates for b in line.blocks), default=0)
    if not n_params:
        raise RequestError("the study has no parameter sets; give at least one, e.g. parameters=[{}]")
    if line != IndexLine.of(n_params, n_replicates):
        raise RequestError("the line of a new job is one block: base, p0 and r0 are 0")
    _check_int("replicates", n_replicates, 1, MAX_REPLICATES)
    if line.size > MAX_INDICES:
        raise RequestError(
            f"{n_params} parameter sets x {n_replicates} replicates are more than one job can hold"
        )


def _check_seeds(spec: JobSpec) -> None:
    _check_int("study_seed", spec.study_seed, 0, MAX_STUDY_SEED)
    if spec.seeds is None:
        return
    n_replicates = spec.line.blocks[0].n_replicates
    if len(spec.seeds) != n_replicates:
        raise RequestError(
            f"seeds has {len(spec.seeds)}, but there are {n_replicates} replicates; give one seed per replicate"
        )
    if spec.study_seed:
        raise RequestError(
            "give either study_seed or seeds: explicit seeds are used as they are, and derive from nothing"
        )
    if not 0 <= min(spec.seeds) <= max(spec.seeds) <= MAX_EXPLICIT_SEED:
        at, seed = next((i, s) for i, s in enumerate(spec.seeds) if not 0 <= s <= MAX_EXPLICIT_SEED)
        _check_int(f"seeds[{at}]", seed, 0, MAX_EXPLICIT_SEED)


def _check_limits(limits: Limits) -> None:
    _check_seconds("limits.replicate_timeout_s", limits.replicate_timeout_s)
    if limits.memory_bytes is not None:
        _check_int("limits.memory_bytes", limits.memory_bytes, 1, 2**63 - 1)
    _check_int("limits.threads", limits.threads, 1, MAX_SMALL)


def _check_retry(retry: RetryPolicy) -> None:
    _check_int("retry.max_retries", retry.max_retries, 0, MAX_SMALL)
    for key, value in (("initial_delay", retry.initial_delay), ("max_delay", retry.max_delay)):
        if value is not None and not 0 <= value < math.inf:
            raise RequestError(f"retry.{key} = {value!r} must be 0 or more seconds")
    if not 1 <= retry.backoff < math.inf:
        raise RequestError(f"retry.backoff must be 1 or more, not {retry.backoff!r}")
    for status in sorted(retry.on - FAILURES):
        raise RequestError(f"retry.on has {str(status)!r}; known are {', '.join(sorted(FAILURES))}")


def _check_min_success(spec: JobSpec) -> None:
    value, n_replicates = spec.min_success, spec.line.blocks[0].n_replicates
    if isinstance(value, float) and not 0 <= value <= 1:
        raise RequestError(f"min_success = {value!r}: a fraction must lie in 0.0..1.0; a count is an integer")
    if isinstance(value, int) and not 1 <= value <= n_replicates:
        raise RequestError(
            f"min_success = {value!r}: a count must lie in 1..{n_replicates}, the replicates of a parameter set"
        )


def _check_seconds(key: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise RequestError(f"{key} = {value!r} must be more than 0 seconds; leave it out for no limit")


def _check_int(key: str, value: Any, lo: int, hi: int) -> None:
    if not lo <= value <= hi:
        raise RequestError(f"{key} must be an integer in {lo}..{hi}, not {value!r}")
