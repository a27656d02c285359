"""``modelops bundle``: write one, look at one, run a few of its replicates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bundle_app = typer.Typer(
    help="Write, check and try out bundles.", no_args_is_help=True, rich_markup_mode=None
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Bundle = Annotated[str, typer.Argument(help="A bundle folder, a bundle .py file, or a study file (.toml).")]
Parameter = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", help="NAME=VALUE[,VALUE...] or NAME=LO:HI:N. Repeat for more names."),
]
Seed = Annotated[
    int | None, typer.Option(help="The study's seed, from which those of the replicates derive.")
]
ReplicateTimeout = Annotated[str | None, typer.Option(help="Longest time of one replicate, as 10m.")]
Memory = Annotated[str | None, typer.Option(help="Memory limit of one replicate, as 2GiB.")]
Isolation = Annotated[str | None, typer.Option(help="warm, fork or spawn; default: the bundle's choice.")]
Model = Annotated[str | None, typer.Option(help="Model entry point or its name in the bundle.")]


@bundle_app.command()
def init(
    name: Annotated[str, typer.Argument(help="The folder to make; its last part is the bundle's name.")],
    as_json: AsJson = False,
) -> None:
    """Write a new bundle that runs: model, aggregate, study, README and a test.

    Exit code: 0 it is written, 2 the folder is not new and empty, or cannot be made.
    """
    from modelops.bundles.template import init_bundle
    from modelops.cli.show import show_json

    files = init_bundle(Path(name))
    if as_json:
        show_json({"bundle": name, "files": [str(f) for f in files]})
        return
    for file in files:
        typer.echo(f"wrote {file}")
    typer.echo(f"\nnext: modelops bundle check {name}\n      modelops run {name}")


@bundle_app.command()
def check(
    path: Bundle = ".",
    parameter: Parameter = None,
    replicates: Annotated[
        int | None, typer.Option("--replicates", "-n", help="Replicates per parameter set, for the estimate.")
    ] = None,
    model: Model = None,
    seed: Seed = None,
    isolation: Isolation = None,
    replicate_timeout: ReplicateTimeout = None,
    memory: Memory = None,
    upgrade: Annotated[bool, typer.Option("--upgrade", help="Resolve the dependencies anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell a bundle's author what would go wrong, before anything is submitted.

    Exit code: 0 nothing failed, 1 something did, 2 the request was wrong.
    """
    import os

    from modelops.cli.exits import exit_of_checks
    from modelops.cli.show import progress_line, show_json, shown_checks
    from modelops.client.bundle_check import check_bundle
    from modelops.client.study_arguments import axes_of_texts, existing, unfilled_study
    from modelops.home import Home

    study = unfilled_study(
        existing(path), replicates=replicates, model=model, seed=seed, isolation=isolation,
        replicate_timeout=replicate_timeout, memory=memory,
    )  # fmt: skip
    axes, home = axes_of_texts(parameter or ()), Home.from_environ(os.environ)
    with progress_line() as on_progress:
        checks = shown_checks(
            check_bundle(study, home, axes=axes, upgrade=upgrade, on_progress=on_progress), quietly=as_json
        )
    code = exit_of_checks(checks)
    if as_json:
        show_json({"bundle": str(study.bundle), "ok": not code, "checks": [c.as_json() for c in checks]})
    raise typer.Exit(code)


@bundle_app.command("run")
def run_replicates(
    path: Bundle = ".",
    parameter: Parameter = None,
    replicates: Annotated[
        int, typer.Option("--replicates", "-n", min=1, help="Replicates per parameter set.")
    ] = 1,
    model: Model = None,
    seed: Seed = None,
    seeds: Annotated[str | None, typer.Option(help="The seeds themselves, as 11,977.")] = None,
    isolation: Isolation = None,
    replicate_timeout: ReplicateTimeout = None,
    memory: Memory = None,
    job: Annotated[str | None, typer.Option(help="Run one replicate of this job again.")] = None,
    param: Annotated[
        str | None, typer.Option(help="With --job: number or param_id of the parameter set.")
    ] = None,
    replicate: Annotated[int | None, typer.Option(help="With --job: number of the replicate.")] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Keep checkpoints in this folder, and go on from those that are there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a few replicates here, without Dask, and print their outputs.

    Without -p: the first parameter set of the bundle's study. With --job: the same seed, parameters,
    bundle and environment as in that job.

    Exit code: 0 all succeeded, 3 some, 1 none, 2 the request was wrong.
    """
    import os

    from modelops.cli.bundle_output import replicate_json, show_replicate
    from modelops.cli.exits import exit_of_counts
    from modelops.cli.show import progress_line, show_json
    from modelops.client.local_run import of_job, of_study
    from modelops.client.server import look_at
    from modelops.client.study_arguments import axes_of_texts, existing, seeds_of_text, unfilled_study
    from modelops.errors import RequestError
    from modelops.home import Home

    home = Home.from_environ(os.environ)
    with progress_line() as on_progress:
        if job is not None:
            if param is None or replicate is None:
                raise RequestError(
                    "--job needs --param and --replicate as well: which replicate is to run again"
                )
            ran = of_job(look_at(job), param, replicate, checkpoints=checkpoints, on_progress=on_progress)
        else:
            if param is not None or replicate is not None:
                raise RequestError("--param and --replicate go with --job; without it, use -p and -n")
            explicit = seeds_of_text(seeds)
            study = unfilled_study(
                existing(path), replicates=None if explicit else replicates, seeds=explicit, seed=seed,
                model=model, isolation=isolation, replicate_timeout=replicate_timeout, memory=memory,
            )  # fmt: skip
            ran = of_study(
                study,
                axes_of_texts(parameter or ()),
                home,
                checkpoints=checkpoints,
                on_progress=on_progress,
            )
        succeeded, documents = [], []
        for one in ran:  # its large outputs are in files that go away after the last one
            succeeded.append(one.succeeded)
            if as_json:
                documents.append(replicate_json(one))
            else:
                show_replicate(one)
    if as_json:
        show_json({"replicates": documents})
    raise typer.Exit(exit_of_counts(sum(succeeded), succeeded.count(False)))
