"""``modelops run``: run a bundle or a study and wait, show the best sets, write the result files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelops.cli.folders import folder_of_text
from modelops.cli.study_options import (
    Aggregate,
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
from modelops.errors import RequestError

if TYPE_CHECKING:
    import pyarrow as pa

    from modelops.client import Job
    from modelops.study import Study


_COUNTS = {"param_id", "status", "n_succeeded", "n_replicates", "reason"}


def run(
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
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-w", min=1, help="Run it in this process, on so many workers, without the server."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the result files; default results/NAME, or results/JOB where NAME is no folder's name.",
            parser=folder_of_text,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Run a bundle or a study and wait for it. The server runs it, so it goes on when this terminal is closed.

    Ctrl-C cancels the job; what is finished is kept and written. Pressed again it does not wait for what still runs.

    Exit code: 0 succeeded, 1 failed, 2 the request was wrong, 3 partial, 4 cancelled, 5 the server cannot be reached.
    """
    from modelops.cli.exits import Exit, exit_of_state
    from modelops.cli.show import show_json
    from modelops.client.progress import ProgressBar
    from modelops.client.run import run as run_study

    study = study_of_options(
        target, parameter=parameter, parameters=parameters, model=model, replicates=replicates, seed=seed,
        seeds=seeds, aggregate=aggregate, isolation=isolation, replicate_timeout=replicate_timeout,
        timeout=timeout, memory=memory, min_success=min_success, pools=pool,
    )  # fmt: skip
    refuse_unwritable(out or expected_folder(study))
    watcher = None if quiet else ProgressBar()
    job = run_study(study, workers=workers, progress=False if quiet else None, watcher=watcher)
    status = job.status()
    folder = out or default_folder(job.spec.name, job.id)
    files = write_files(job, folder)
    report = _report(job, folder) if status.counts.get("succeeded") else ""
    if as_json:
        show_json(_as_json(job, files, report))
    else:
        _show(job, folder, files, report)
    # One that still is being stopped: Ctrl-C was pressed twice.
    raise typer.Exit(Exit.CANCELLED if status.state == "cancelling" else exit_of_state(status.state))


def expected_folder(study: Study) -> Path:
    """Return where the result files of a study go by default; ``results`` where its job's id decides."""
    from modelops.bundles import load_manifest
    from modelops.client.study_files import bundle_defaults

    bundle = Path(study.bundle)
    if not bundle.exists():  # which is said when it is submitted
        return Path("results")
    manifest = load_manifest(bundle)
    name = study.name or bundle_defaults(manifest, bundle).name or manifest.name
    return default_folder(name, "")


def default_folder(name: str, job: str) -> Path:
    """Return where result files go by default: below ``results``, whatever a job is called."""
    is_one_part = name == Path(name).name and name not in {"", ".", ".."} and name.isprintable()
    return Path("results") / (name if is_one_part else job)


def refuse_unwritable(folder: Path) -> None:
    """Refuse before anything runs what could not be written at the end. Raises RequestError."""
    from modelops.client.sync import refuse_own_folder
    from modelops.home import Home

    refuse_own_folder(Home.from_environ(os.environ), folder)
    there = next((p for p in [folder, *folder.absolute().parents] if p.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(
            f"the result files cannot be written to {folder}: {there} is no folder that you can write to; name "
            "another with --out. Nothing was run"
        )


def write_files(job: Job, folder: Path) -> list[Path]:
    """Copy the result files of a finished job into a folder, each appearing whole or not at all."""
    from modelops.client.sync import sync_files

    synced = sync_files(job.source, job.id, folder, only="results/")
    return [folder / name for name in sorted((*synced.copied, *synced.unchanged))]


def _report(job: Job, folder: Path) -> str:
    """Let the bundle draw its report. If that fails, the results stand, and it is said on stderr."""
    from modelops.client.report import write_report
    from modelops.errors import ModelOpsError

    try:
        return write_report(job, folder)
    except ModelOpsError as e:
        typer.echo(f"warning: the results are complete, but the bundle's report failed: {e}", err=True)
        return ""


def _as_json(job: Job, files: list[Path], report: str) -> dict[str, Any]:
    status = job.status()
    return {
        "job": job.id,
        "state": status.state,
        "reason": status.reason,
        "counts": status.counts,
        "aggregates": status.aggregates,
        "best": best_sets(job).to_pylist(),
        "failures": job.failure_summary().to_pylist(),
        "aggregate_failures": job.aggregate_failures().to_pylist(),
        "files": [str(f) for f in files],
        "report": report,
    }


def best_sets(job: Job, n: int = 5) -> pa.Table:
    """Return the aggregates ranked by the bundle's objective, lowest first; an empty table without one.

    Columns: the ordinal and the id, the parameters, the objective, then the other scalar outputs.
    """
    from modelops.client.report import objective_column, ranked_aggregates

    ranked = ranked_aggregates(job).slice(0, n)
    objective = objective_column(ranked.column_names, job.manifest.objective)
    if objective is None:
        return ranked
    names = [name for name in ranked.column_names if name not in _COUNTS]
    n_parameters = ranked.column_names.index("status") - 2
    parameters, outputs = names[1 : 1 + n_parameters], names[1 + n_parameters :]
    others = [name for name in outputs if name != objective]
    return ranked.select(["param", "param_id", *parameters, objective, *others])


def _show(job: Job, folder: Path, files: list[Path], report: str) -> None:
    from rich.console import Console

    from modelops.cli.tables import show_aggregate_failures, show_failures, show_table
    from modelops.study.wording import shown_text

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # nobody's window: let no cell be folded
    status = job.status()
    counts = ", ".join(f"{n:,} {s}" for s, n in status.counts.items() if n)
    reason = f": {shown_text(status.reason.rstrip())}" if status.reason else ""
    console.print(
        f"job {job.id} {status.state} ({counts}){reason}", markup=False, highlight=False, soft_wrap=True
    )
    best = best_sets(job)
    if best.num_rows:
        show_table(console, best.drop_columns(["param_id"]), title="best parameter sets")
    show_failures(console, job, job.failure_summary().to_pylist())
    show_aggregate_failures(console, job.aggregate_failures().to_pylist())
    if report:
        console.print(report, markup=False, highlight=False, soft_wrap=True)
    if files:
        written = ", ".join(map(str, files))
        console.print(f"files: {written}", markup=False, highlight=False, soft_wrap=True)
    pictures = sorted(p for p in folder.iterdir() if p.suffix in {".png", ".svg", ".pdf"})
    if pictures:
        console.print(
            "pictures: " + ", ".join(map(str, pictures)), markup=False, highlight=False, soft_wrap=True
        )
