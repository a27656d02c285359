"""``modelops doctor``: what is wrong with this machine, and how to mend it."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say what is wrong with this machine and how to mend it.

    Exit code: 0 nothing is wrong (warnings aside), 1 something is.
    """
    import os

    from modelops.cli.exits import exit_of_checks
    from modelops.cli.show import progress_line, show_json, shown_checks
    from modelops.client.machine_check import check_machine
    from modelops.home import Home

    with progress_line() as on_progress:
        checks = shown_checks(
            check_machine(Home.from_environ(os.environ), on_progress=on_progress), quietly=as_json
        )
    code = exit_of_checks(checks)
    if as_json:
        show_json({"ok": not code, "checks": [c.as_json() for c in checks]})
    raise typer.Exit(code)
