"""What a runner is asked for when replicates run outside of a cluster: the same seeds as in a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from modelops.processes import ReplicateSet
from modelops.study.canonical import param_id
from modelops.study.seeds import entropy_key, seed_key, seeds_of

if TYPE_CHECKING:
    from modelops.study.spec import JobSpec


def replicate_set(spec: JobSpec, param: int, canonical: bytes, first: int, n: int) -> ReplicateSet:
    """Return ``n`` replicates of a parameter set, from number ``first`` on, exactly as a job runs them.

    Parameters
    ----------
    canonical
        The canonical form of the parameter set.
    """
    key_of = None if spec.common_random_numbers else param_id(canonical)
    if spec.seeds is not None:
        seeds = list(spec.seeds[first : first + n])
    else:
        seeds = seeds_of(seed_key(spec.study_seed, key_of), first, n).tolist()
    return ReplicateSet(
        params=msgspec.Raw(canonical),
        param=param,
        index=spec.line.index(param, first),
        replicate=first,
        seeds=seeds,
        entropy_key=entropy_key(spec.study_seed, key_of).hex(),
    )
