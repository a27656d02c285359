"""Run a few replicates of a bundle, or one replicate of a job again, on this machine and without Dask."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.bundles import job_spec
from modelops.client.local_checkpoints import LocalCheckpoints
from modelops.client.local_runner import LocalRunner
from modelops.client.reported import reported_values
from modelops.client.study_files import completed
from modelops.errors import NotFoundError
from modelops.states import ReplicateStatus
from modelops.study.canonical import param_id, parse_canonical
from modelops.study.parameter_sets import ParameterSets
from modelops.worker.sets import replicate_set

if TYPE_CHECKING:
    from modelops.client.job import Job
    from modelops.home import Home
    from modelops.processes import Outcome, ReplicateSet
    from modelops.study.index_line import IndexLine
    from modelops.study.spec import JobSpec
    from modelops.study.study import Study
    from modelops.worker.desk import Report

logger = logging.getLogger(__name__)
PARAM_ID_DIGITS = 32
Progress = Callable[[str], None]


@dataclass(frozen=True)
class RanReplicate:
    """One replicate that was run here. ``printed``: what it wrote to stdout and stderr."""

    param: int
    params: Mapping[str, Any]
    replicate: int
    seed: int
    outcome: Outcome
    printed: str

    @property
    def succeeded(self) -> bool:
        """Whether it did."""
        return self.outcome.status is ReplicateStatus.SUCCEEDED


def of_study(
    study: Study,
    axes: Mapping[str, list[Any]],
    home: Home,
    *,
    checkpoints: Path | None = None,
    on_progress: Progress | None = None,
) -> Iterator[RanReplicate]:
    """Run the replicates of the first parameter set of a study, or of the sets that ``axes`` make of it.

    Parameters
    ----------
    checkpoints
        Where they are kept and looked for; None: each replicate begins anew.

    Raises
    ------
    ModelOpsError
        The study or the bundle is wrong, its environment cannot be had, or it cannot be imported.
    """
    runner = LocalRunner.of_bundle(Path(study.bundle), home, on_progress=on_progress)
    study = completed(study, runner.manifest, runner.snapshot)
    first = dict(study.sets()[0])
    rows = [{**first, **dict(zip(axes, values, strict=True))} for values in product(*axes.values())]
    study = replace(study, parameters=ParameterSets.of_rows(rows))
    spec = job_spec(replace(study, aggregate=[]), runner.manifest, runner.digest)
    canonical = study.sets().canonical()
    n = study.n_replicates
    sets = [
        replicate_set(spec, p, param_id(c), c, index=p * n + r, replicate=r, n=1)
        for p, c in enumerate(canonical)
        for r in range(n)
    ]
    return _run(runner, spec, sets, checkpoints, on_progress)


def of_job(
    job: Job,
    param: str,
    replicate: int,
    *,
    checkpoints: Path | None = None,
    on_progress: Progress | None = None,
) -> Iterator[RanReplicate]:
    """Run one replicate of a job again: the same seed, parameters, snapshot, environment and limits.

    Parameters
    ----------
    param
        Number of the parameter set, or its ``param_id``.
    checkpoints
        As for `of_study`; those of the job itself are not looked at.

    Raises
    ------
    NotFoundError
        There is no such job or replicate.
    """
    spec = job.spec
    n = spec.line.n_params
    try:
        row = job.source.parameter_set(job.id, int(param) if len(param) < PARAM_ID_DIGITS else param)
        index = spec.line.index(row.param, replicate)
    except (IndexError, NotFoundError, ValueError):
        raise NotFoundError(
            f"job {job.id} has no replicate {replicate} of parameter set {param}: it has {n} parameter sets "
            f"(0 to {n - 1}) with {_up_to(spec.line)} replicates each"
        ) from None
    runner = LocalRunner.of_job(job, on_progress=on_progress)
    one = replicate_set(spec, row.param, row.param_id, row.canonical, index=index, replicate=replicate, n=1)
    return _run(runner, spec, [one], checkpoints, on_progress)


def _up_to(line: IndexLine) -> str:
    """Say how many replicates the parameter sets of a job have."""
    found = sorted({n for _, _, n in line.replicates()})
    return f"{found[0]} to {found[-1]}" if len(found) > 1 else str(*found)


def _run(
    runner: LocalRunner,
    spec: JobSpec,
    sets: list[ReplicateSet],
    checkpoints: Path | None,
    on_progress: Progress | None,
) -> Iterator[RanReplicate]:
    """Run replicates, a set each, so that each is shown as soon as it has ended."""
    printed: dict[int | None, bytearray] = {}
    by_index = {one.index: one for one in sets}

    def log(index: int | None, text: bytes) -> None:
        printed.setdefault(index, bytearray()).extend(text)

    def name_of(index: int) -> str:
        one = by_index[index]
        return f"{runner.manifest.name}/{spec.model}/{param_id(bytes(one.params))}/{one.seeds[0]}"

    def show(report: Report) -> None:
        if on_progress is not None:
            values = " ".join(f"{name}={value}" for name, value in reported_values(report["values"]).items())
            on_progress(f"replicate {by_index[report['index']].replicate}: {report['fraction']:.0%} {values}")

    with runner, contextlib.ExitStack() as stack:
        process = runner.spec(isolation=spec.isolation, limits=spec.limits)
        kept = LocalCheckpoints(
            checkpoints or runner.root / "checkpoints", runner.root / "resumed", name_of, show
        )
        stack.enter_context(contextlib.closing(kept.desk))
        for one in sets:
            (outcome,) = runner.replicates(process, spec.model, [one], log=log, desk=kept.desk)
            kept.ended(one.index, succeeded=outcome.status is ReplicateStatus.SUCCEEDED)
            text = bytes(printed.pop(None, b"") + printed.pop(one.index, b""))
            yield RanReplicate(
                param=one.param,
                params=parse_canonical(bytes(one.params)),
                replicate=one.replicate,
                seed=one.seeds[0],
                outcome=outcome,
                printed=text.decode(errors="replace"),
            )
        for note in kept.desk.notes:
            logger.warning("%s", note)
