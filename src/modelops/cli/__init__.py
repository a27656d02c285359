"""The ``modelops`` command: take words from a terminal, call the rooms, say what happened."""

from __future__ import annotations

import os
import signal
import sys

_CANCELLED = 4  # `modelops.cli.exits.Exit`, which is not imported yet when it is needed
_INTERRUPTED = 130  # what typer makes of Ctrl-C outside a command


def main() -> None:
    """Run the command line; the process ends with the exit code of `modelops.cli.exits`, also after an early Ctrl-C."""
    if (
        os.getpid() == 1
    ):  # of a container: the kernel keeps from it what it has no handler for, and nobody tells it twice
        signal.signal(signal.SIGTERM, _end_as_told)
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell may have let it be ignored
    if ours:
        signal.signal(signal.SIGINT, _end_at_once)
    from modelops.cli.app import run_app

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_app()
    except KeyboardInterrupt:
        _stopped()
    except SystemExit as end:
        if end.code != _INTERRUPTED:
            raise
        _stopped()


def _stopped() -> None:
    print("stopped", file=sys.stderr)  # noqa: T201  the command tree may not be there
    raise SystemExit(_CANCELLED) from None


def _end_as_told(signum: int, _frame: object) -> None:
    """End the process as the signal would: it has begun nothing yet that it would have to end, else it had its own."""
    os._exit(128 + signum)


def _end_at_once(_signum: int, _frame: object) -> None:
    """End the process while it only imports: an exception could be turned into another one on its way."""
    os.write(2, b"stopped\n")
    os._exit(_CANCELLED)
