"""The command tree. Each command imports what it needs when it is called, so ``--help`` stays quick."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from modelops.cli.bundle import bundle_app
from modelops.cli.doctor import doctor
from modelops.cli.env import env_app
from modelops.cli.run import run
from modelops.errors import ModelOpsError

app = typer.Typer(
    name="modelops",
    help="Run stochastic simulations: parameter sets x replicates, each in its bundle's own environment.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.add_typer(bundle_app, name="bundle")
app.add_typer(env_app, name="env")
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"modelops {version('modelops')}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what ModelOps does, on stderr.")
    ] = False,
    _version_asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Set up logging for every command."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(message)s",
        stream=sys.stderr,
    )


def run_app() -> None:
    """Run a command; a `ModelOpsError` becomes a sentence on stderr and an exit code, never a traceback."""
    from modelops.cli.exits import Exit, exit_of_error

    try:
        app()
    except ModelOpsError as error:
        logging.getLogger(__name__).debug("", exc_info=True)
        typer.echo(f"error: {error}", err=True)
        sys.exit(exit_of_error(error))
    except KeyboardInterrupt:
        sys.exit(Exit.CANCELLED)
    except BrokenPipeError:
        # The reader of our output went away, as in `modelops ... | head`; a write at exit must not fail again.
        sys.stderr.close()
        sys.exit(Exit.FAILED)
