"""The command tree. Each command imports what it needs when it is called, so ``--help`` stays quick."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from modelops.cli.bundle import bundle_app
from modelops.cli.certs import certs_app
from modelops.cli.doctor import doctor
from modelops.cli.env import env_app
from modelops.cli.jobs import jobs_app
from modelops.cli.parts import scheduler, server, worker
from modelops.cli.run import run
from modelops.cli.submit import submit
from modelops.cli.tokens import tokens_app
from modelops.cli.up import down, status, up
from modelops.errors import ModelOpsError


class Commands(TyperGroup):
    """Turns what a command raises into a sentence on stderr and an exit code, never a traceback."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Understand the words before the command."""
        from modelops.cli.show import show_error

        try:
            return super().make_context(*args, **options)
        except TyperException as error:
            show_error("UsageError", error.format_message(), error.exit_code, kind=None)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        from modelops.cli.exits import Exit, exit_of_error
        from modelops.cli.show import show_error

        try:
            return super().invoke(ctx)
        except ModelOpsError as error:
            logging.getLogger(__name__).info("the error in full", exc_info=error)
            code = exit_of_error(error)
            show_error(type(error).__name__, str(error), code)
            raise typer.Exit(code) from error
        except TyperException as error:  # of the words; typer says it on stderr, with the usage
            show_error("UsageError", error.format_message(), error.exit_code, kind=None)
            raise
        except KeyboardInterrupt:
            show_error("Cancelled", "stopped", Exit.CANCELLED, kind="")
            raise typer.Exit(Exit.CANCELLED) from None


def _told(error: OSError) -> str:
    """Say what the system refused; what still waits to be printed where nothing can be is dropped."""
    try:
        sys.stdout.flush()
    except OSError as refused:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"what the command says cannot be written to where it was sent: {refused.strerror}"
    if not error.filename:
        return f"the system refused something: {error.strerror or error}; 'modelops -v' before the command shows where"
    return (
        f"{os.fspath(error.filename)!r} cannot be used: {error.strerror}. If it is below MODELOPS_HOME: that has to "
        "name a folder that you can write to, or one that can be made"
    )


app = typer.Typer(
    name="modelops",
    cls=Commands,
    help="Run stochastic simulations: parameter sets x replicates, each in its bundle's own environment.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing help with rich costs 0.25 s, most of it for importing pygments
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(submit)
app.add_typer(jobs_app, name="jobs")
app.add_typer(bundle_app, name="bundle")
app.add_typer(env_app, name="env")
app.command()(up)
app.command()(down)
app.command()(status)
app.command()(server)
app.command()(scheduler)
app.command()(worker)
app.add_typer(certs_app, name="certs")
app.add_typer(tokens_app, name="tokens")
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
    """Run the command that the shell asked for; the process ends with its exit code."""
    from modelops.cli.exits import Exit
    from modelops.cli.show import show_error

    try:
        app()
    except OSError as error:  # a closed pipe is none: whoever reads has seen enough
        logging.getLogger(__name__).info("the error in full", exc_info=error)
        if error.filename:
            show_error(type(error).__name__, _told(error), Exit.WRONG_REQUEST)
            raise SystemExit(Exit.WRONG_REQUEST) from error
        typer.echo(f"error: {_told(error)}", err=True)  # most likely of stdout, so no JSON can go there
        raise SystemExit(Exit.FAILED) from error
