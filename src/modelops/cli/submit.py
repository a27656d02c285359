"""``modelops submit``: record a study as a job of the server, print its id, and leave."""

from __future__ import annotations

from modelops.cli.study_options import (
    Aggregate,
    AsJson,
    Isolation,
    Memory,
    MinSuccess,
    Model,
    Parameter,
    ParametersFile,
    Pool,
    Replicates,
    ReplicateTimeout,
    Seed,
    Seeds,
    Target,
    Timeout,
    study_of_options,
)


def submit(
    target: Target,
    parameter: Parameter = None,
    parameters: ParametersFile = None,
    model: Model = None,
    replicates: Replicates = None,
    seed: Seed = None,
    seeds: Seeds = None,
    aggregate: Aggregate = None,
    isolation: Isolation = None,
    replicate_timeout: ReplicateTimeout = None,
    timeout: Timeout = None,
    memory: Memory = None,
    min_success: MinSuccess = None,
    pool: Pool = None,
    as_json: AsJson = False,
) -> None:
    """Submit a bundle or a study and print the id of the job, which goes on when this terminal is closed.

    Exit code: 0 it is recorded, 1 not now, 2 the request was wrong, 5 the server cannot be reached.
    """
    import typer

    from modelops.cli.show import progress_line, show_json
    from modelops.client.client import submit as submit_study

    study = study_of_options(
        target, parameter=parameter, parameters=parameters, model=model, replicates=replicates, seed=seed,
        seeds=seeds, aggregate=aggregate, isolation=isolation, replicate_timeout=replicate_timeout,
        timeout=timeout, memory=memory, min_success=min_success, pools=pool,
    )  # fmt: skip
    with progress_line() as on_progress:
        job = submit_study(study, on_stage=on_progress)
    if as_json:
        status = job.status()
        show_json({"job": job.id, "state": status.state, "replicates": sum(status.counts.values())})
        return
    typer.echo(job.id)
    typer.echo(f"submitted; 'modelops jobs watch {job.id}' shows how it goes", err=True)
