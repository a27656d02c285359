"""Start a process of a pool so that there is no moment in which it runs and nobody could find it.

The new process takes the lock of its role, says so, and waits for a word. If its starter dies before the word, it
ends; afterwards the lock tells that it runs. Its log is what it writes to stderr.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from modelops.cluster.run_folder import KEEPER
from modelops.logs import open_log

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from modelops.home import Home

PROGRAM: Final = "modelops.cli.kept"
HELD: Final = b"held\n"
GO: Final = b"go\n"
# They speak of a server elsewhere, not of the one of this pool.
NOT_FOR_THE_POOL: Final = ("MODELOPS_SERVER", "MODELOPS_TOKEN")


def log_of(home: Home, role: str) -> Path:
    """Return the log file of a role."""
    return home.logs / f"{role}.log"


def start(
    home: Home,
    role: str,
    arguments: Sequence[str] = (),
    *,
    environ: Mapping[str, str],
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start the process of a role in a session of its own; it waits for `GO` on its stdin."""
    log = open_log(log_of(home, role))
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", PROGRAM, role, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            env=_environ_of(home, environ),
            pass_fds=pass_fds,
            start_new_session=True,
        )
    finally:
        os.close(log)


def _environ_of(home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process; it is started in another folder, so its home must not depend on that."""
    kept = {k: v for k, v in environ.items() if k not in NOT_FOR_THE_POOL}
    return {**kept, "MODELOPS_HOME": str(home.data)} if kept.get("MODELOPS_HOME") else kept


def start_keeper(home: Home, *, environ: Mapping[str, str]) -> bool:
    """Start the keeper of a home, which then belongs to nobody; False if it did not come up."""
    process = start(home, KEEPER, environ=environ)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        held = process.stdout.readline() == HELD
        if held:
            process.stdin.write(GO)
            process.stdin.flush()
    process.wait()  # it has left a child behind, which is the keeper
    return held
