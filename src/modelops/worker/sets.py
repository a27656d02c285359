"""What a runner is asked for: parameters and seeds of replicates, the same in a job and outside of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from modelops.processes import ReplicateSet
from modelops.study.seeds import entropy_key, seed_key, seeds_of

if TYPE_CHECKING:
    from modelops.study.ids import ParamId
    from modelops.study.spec import JobSpec


def replicate_set(
    spec: JobSpec, param: int, param_id: ParamId, canonical: bytes, *, index: int, replicate: int, n: int
) -> ReplicateSet:
    """Return ``n`` consecutive replicates of a parameter set.

    Parameters
    ----------
    canonical
        The canonical form of the parameter set; ``param_id`` is its id.
    index, replicate
        Of the first one.
    """
    key_of = None if spec.common_random_numbers else param_id
    if spec.seeds is not None:
        seeds = spec.seeds[replicate : replicate + n]
    else:
        seeds = tuple(seeds_of(seed_key(spec.study_seed, key_of), replicate, n).tolist())
    return ReplicateSet(
        params=msgspec.Raw(canonical),
        param=param,
        index=index,
        replicate=replicate,
        seeds=seeds,
        entropy_key=entropy_key(spec.study_seed, key_of).hex(),
    )
