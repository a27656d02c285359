"""What a runner is asked for: parameters and seeds of replicates, the same in a job and outside of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from modelops.processes import ReplicateSet, ReplicateTable
from modelops.processes.outcome import runs
from modelops.study.seeds import entropy_key, seed_key, seed_keys, seeds_at, seeds_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from modelops.processes import AnySet
    from modelops.store.parameters import Parameters
    from modelops.study.ids import ParamId
    from modelops.study.index_line import Block
    from modelops.study.ranges import Ranges
    from modelops.study.spec import JobSpec


def replicate_sets(spec: JobSpec, parameters: Parameters, indices: Ranges) -> list[AnySet]:
    """Return the sets of a request for these indices, in order of index, many in one piece where they are whole."""
    sets: list[AnySet] = []
    for lo, hi in indices.pairs:
        k = lo
        while k < hi:
            block = spec.line.block_of(k)
            end = min(hi, block.end)
            sets += _of_block(spec, parameters, block, k, end)
            k = end
    return sets


def _of_block(spec: JobSpec, parameters: Parameters, block: Block, lo: int, hi: int) -> list[AnySet]:
    """Return the sets of these indices: those at both edges may be parts of sets.

    Costs what these replicates cost, however many their parameter sets have.
    """
    each = block.n_replicates
    sets: list[AnySet] = []
    for start, end in runs(each, lo - block.base, hi - block.base):
        first, within = divmod(start, each)
        ids, params = parameters.listed(block.p0 + first, block.p0 + (end - 1) // each + 1)
        sets.append(
            ReplicateTable(
                each=min(each, end - start),
                params=msgspec.Raw(params),
                param=block.p0 + first,
                index=block.base + start,
                replicate=block.r0 + within,
                seeds=_seeds(spec, ids, *np.divmod(np.arange(within, within + end - start), each), block.r0),
                study_seed=spec.study_seed,
                param_ids=None if spec.common_random_numbers else ids,
            )
        )
    return sets


def _seeds(
    spec: JobSpec, ids: str, nth: npt.NDArray[np.int64], within: npt.NDArray[np.int64], r0: int
) -> tuple[int, ...]:
    """Return the seed of replicate ``r0 + within`` of the ``nth`` of these sets, of each."""
    replicates = within + r0
    if spec.seeds is not None:
        return tuple(spec.seeds[r] for r in replicates.tolist())
    if spec.common_random_numbers:
        key = seed_key(spec.study_seed, None)
        return tuple(seeds_at(np.uint32(key.a), np.uint32(key.b), replicates).tolist())
    keys = seed_keys(spec.study_seed, ids)[nth]
    return tuple(seeds_at(keys[:, 0], keys[:, 1], replicates).tolist())


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
