"""The ``modelops`` command: take words from a terminal, call the rooms, say what happened."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the process ends with the exit code of `modelops.cli.exits`."""
    from modelops.cli.app import run_app

    run_app()
