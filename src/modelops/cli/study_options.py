"""The options of ``modelops run`` and ``modelops submit`` that make a study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from modelops.study import Study

Target = Annotated[str, typer.Argument(help="A study file (.toml), a bundle folder, or a bundle .py file.")]
Parameter = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter",
        "-p",
        help="NAME=VALUE[,VALUE...] or NAME=LO:HI:N. Repeat for more names; all combinations run.",
    ),
]
ParametersFile = Annotated[
    Path | None,
    typer.Option("--parameters", help="A table of parameter sets: .csv, .parquet, .json or .jsonl."),
]
Model = Annotated[str | None, typer.Option(help="Model entry point or its name in the bundle.")]
Replicates = Annotated[
    str | None,
    typer.Option(
        "--replicates",
        "-n",
        help="Replicates per parameter set; or until:half_width=0.01,of=OUTPUT[,min=,max=]: as many as it needs.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="The study's seed, 0 to 2**63-1.")]
Seeds = Annotated[str | None, typer.Option(help="The seeds themselves, as 11,977,35; one per replicate.")]
Aggregate = Annotated[
    list[str] | None, typer.Option("--aggregate", "-a", help="Aggregate entry point. Repeat for more.")
]
Isolation = Annotated[str | None, typer.Option(help="warm, fork or spawn; default: the bundle's choice.")]
ReplicateTimeout = Annotated[str | None, typer.Option(help="Longest time of one replicate, as 10m.")]
Timeout = Annotated[str | None, typer.Option(help="Longest time of the job, as 12h.")]
Memory = Annotated[str | None, typer.Option(help="Memory limit of one replicate, as 2GiB.")]
MinSuccess = Annotated[
    str | None,
    typer.Option(help="Replicates that must succeed for an aggregate: 0.9 (fraction), 180 (count)."),
]
Pool = Annotated[
    list[str] | None,
    typer.Option(help="Run only on workers of this pool, or with this label. Repeat for more."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def study_of_options(
    target: str,
    *,
    parameter: list[str] | None,
    replicates: str | None,
    seeds: str | None,
    min_success: str | None,
    **options: Any,
) -> Study:
    """Return the study that the words of a command ask for."""
    from modelops.client.study_arguments import (
        min_success_of_text,
        replicates_of_text,
        seeds_of_text,
        study_of_target,
    )

    return study_of_target(
        target,
        axes=parameter or (),
        replicates=replicates_of_text(replicates),
        seeds=seeds_of_text(seeds),
        min_success=min_success_of_text(min_success),
        **options,
    )
