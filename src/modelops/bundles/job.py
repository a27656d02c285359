"""From a study and the bundle it names to the frozen record of a job. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from modelops.errors import RequestError
from modelops.study.index_line import MAX_INDICES, IndexLine
from modelops.study.pools import checked_pools
from modelops.study.seeds import MAX_REPLICATES
from modelops.study.spec import WITH_POOLS, WITH_UNTIL, JobSpec

if TYPE_CHECKING:
    from modelops.bundles.manifest import Manifest
    from modelops.study.ids import BundleDigest
    from modelops.study.study import Study


def job_spec(study: Study, manifest: Manifest, digest: BundleDigest) -> JobSpec:
    """Decide everything that the study left to the bundle or to the defaults.

    Parameters
    ----------
    study
        Filled from the bundle's defaults (`Study.filled_from`), its parameters read.

    Raises
    ------
    RequestError
        It asks for a model or an aggregate that the bundle does not have, or for too much.
    """
    n_params, n_replicates = len(study.sets()), study.n_replicates
    if not n_params:
        raise RequestError("the study has no parameter sets; give at least one, e.g. parameters=[{}]")
    if n_replicates > MAX_REPLICATES or n_params * n_replicates > MAX_INDICES:
        raise RequestError(
            f"{n_params} parameter sets x {n_replicates} replicates are more than one job can hold"
        )
    min_success = 1.0 if study.min_success is None else study.min_success
    if isinstance(min_success, int) and min_success > n_replicates:
        raise RequestError(
            f"min_success = {min_success}, but each parameter set has only {n_replicates} replicates; "
            "its aggregate would never run"
        )
    pools = checked_pools("pools", study.pools or ())
    return JobSpec(
        format=WITH_POOLS if pools else 1 if study.until is None else WITH_UNTIL,
        name=study.name or manifest.name,
        bundle=digest,
        bundle_name=manifest.name,
        model=manifest.model(study.model),
        aggregates=_aggregates(study, manifest),
        line=IndexLine.of(n_params, n_replicates),
        study_seed=study.seed or 0,
        seeds=None if study.seeds is None else tuple(study.seeds),
        common_random_numbers=bool(study.common_random_numbers),
        isolation=study.isolation or manifest.isolation,
        limits=study.limits,
        timeout_s=study.timeout_s,
        min_success=min_success,
        retry=study.retry_policy,
        fail_fast=study.fail_fast is not False,
        max_failures=study.max_failures,
        until=study.until,
        pools=pools or msgspec.UNSET,
    )


def _aggregates(study: Study, manifest: Manifest) -> tuple[str, ...]:
    if study.aggregate is None:
        return (*manifest.aggregates.values(), *manifest.targets.values())
    wanted = [study.aggregate] if isinstance(study.aggregate, str) else study.aggregate
    return tuple(manifest.aggregate(name) for name in wanted)
