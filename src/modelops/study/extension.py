"""Adding to a job: the spec that it has afterwards. Pure; nothing that the job has changes its meaning.

Seeds derive from the replicate number and the parameter set, so those of the old replicates stay as they are. Explicit
seeds are a list by replicate number, and more of them are appended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from modelops.errors import RequestError
from modelops.study.seeds import MAX_EXPLICIT_SEED, MAX_REPLICATES
from modelops.study.spec import FIRST_PARAMETERS
from modelops.study.stopping import checked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.study.spec import JobSpec


def extended_spec(
    spec: JobSpec,
    *,
    replicates: int | None = None,
    n_more_params: int = 0,
    more_seeds: Sequence[int] | None = None,
) -> JobSpec:
    """Return the spec of a job that is extended.

    Parameters
    ----------
    replicates
        How many replicates each parameter set has afterwards, old and new; the new ``max`` of a job with ``until``.
    n_more_params
        How many parameter sets are added. Which object holds them all is for the caller to say, see `stored_in`.
    more_seeds
        For a job with explicit seeds: those of the added replicates.

    Raises
    ------
    RequestError
        Nothing would be added, something would be taken away, or seeds are missing or not wanted.
    """
    seeds, replicates = _seeds(spec, replicates, more_seeds)
    if replicates is not None and not 1 <= replicates <= MAX_REPLICATES:
        raise RequestError(f"replicates must be in 1..{MAX_REPLICATES}, not {replicates}")
    try:
        line = spec.line.extended(replicates=replicates, n_more_params=n_more_params)
    except ValueError as error:
        raise RequestError(f"the job cannot be extended so: {error}") from error
    if line == spec.line:
        n = "it" if replicates is None else f"every parameter set has {replicates} replicates already, and it"
        raise RequestError(
            f"nothing would be added to the job: {n} gets no parameter sets. "
            "Say how many replicates each set is to have, more than now, or give parameter sets"
        )
    until = spec.until
    if until is not None and replicates is not None:
        until = checked(msgspec.structs.replace(until, max=replicates))
    return msgspec.structs.replace(spec, line=line, seeds=seeds, until=until)


def stored_in(spec: JobSpec, parameters: str) -> JobSpec:
    """Return the spec of a job whose parameter sets are in this object of its folder."""
    form = spec.format if parameters == FIRST_PARAMETERS else max(spec.format, 2)
    return msgspec.structs.replace(spec, parameters=parameters, format=form)


def _seeds(
    spec: JobSpec, replicates: int | None, more: Sequence[Any] | None
) -> tuple[tuple[int, ...] | None, int | None]:
    """Return the explicit seeds, if the job has such, and how many replicates there are to be."""
    if spec.seeds is None:
        if more is not None:
            raise RequestError(
                "the seeds of this job derive from the study's seed, also those of added replicates; leave seeds out"
            )
        return None, replicates
    for i, seed in enumerate(more or ()):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_EXPLICIT_SEED:
            raise RequestError(f"seeds[{i}] must be an integer in 0..{MAX_EXPLICIT_SEED}, not {seed!r}")
    seeds = (*spec.seeds, *(more or ()))
    if replicates is None:
        return seeds, (len(seeds) if more else None)
    if replicates > len(seeds) or (more and replicates != len(seeds)):
        raise RequestError(
            f"replicates = {replicates}, but the job has {len(spec.seeds)} explicit seeds and {len(more or ())} more "
            f"were given; give the seeds of the added replicates, {max(0, replicates - len(spec.seeds))} of them"
        )
    return seeds, replicates
