"""What a runner is asked for: parameters and seeds of replicates, the same in a job and outside of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from modelops.processes import ReplicateSet, ReplicateTable
from modelops.processes.outcome import runs
from modelops.study.seeds import entropy_key, seed_key, seed_keys, seeds_at, seeds_of

if TYPE_CHECKING:
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
    each, lo, hi = block.n_replicates, lo - block.base, hi - block.base
    first = lo // each
    ids, texts = parameters.columns(block.p0 + first, block.p0 + (hi - 1) // each + 1)
    nth, replicates = np.divmod(np.arange(lo, hi, dtype=np.int64), each)
    replicates += block.r0
    if spec.seeds is not None:
        seeds = tuple(spec.seeds[r] for r in replicates.tolist())
    elif spec.common_random_numbers:
        key = seed_key(spec.study_seed, None)
        seeds = tuple(seeds_at(np.uint32(key.a), np.uint32(key.b), replicates).tolist())
    else:
        keys = seed_keys(spec.study_seed, ids)[nth - first]
        seeds = tuple(seeds_at(keys[:, 0], keys[:, 1], replicates).tolist())
    sets: list[AnySet] = []
    for start, end in runs(each, lo, hi):
        nth_first, within = divmod(start, each)
        of = slice(nth_first - first, -(-end // each) - first)
        sets.append(
            ReplicateTable(
                each=min(each, end - start),
                params=tuple(map(msgspec.Raw, texts[of])),
                param=block.p0 + nth_first,
                index=block.base + start,
                replicate=block.r0 + within,
                seeds=seeds[start - lo : end - lo],
                study_seed=spec.study_seed,
                param_ids=None if spec.common_random_numbers else ids[32 * of.start : 32 * of.stop],
            )
        )
    return sets


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
