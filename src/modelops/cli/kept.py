"""The program of every process of a pool: ``python -m modelops.cli.kept ROLE``. See `modelops.cluster.spawn`.

Nothing heavy is imported before the role is held and the starter has said go.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from modelops.cluster.run_folder import KEEPER, SCHEDULER, SERVER, RunFolder
from modelops.cluster.spawn import GO, HELD, log_of
from modelops.cluster.upkeep import ExitCode
from modelops.errors import ModelOpsError, RequestError
from modelops.garbage import give_back_at_once, look_seldom
from modelops.home import Home
from modelops.logs import IN_FULL, set_up_logging
from modelops.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Hold the role, wait for the word, be it."""
    role = argv[0]
    os.umask(0o077)  # what a pool writes is for its user
    if role == KEEPER and os.fork():
        os._exit(0)  # the keeper is nobody's child, and whoever starts one waits for nothing
    if role == KEEPER:
        os.setsid()
    home = Home.from_environ(os.environ)
    set_up_logging(log_of(home, role))
    run = RunFolder(home)
    hold = run.hold(role)
    if hold is None:
        log.info("%s runs already, as process %s", role, run.holder(role))
        return ExitCode.ALREADY_RUNNING
    os.write(1, HELD)
    if sys.stdin.buffer.readline() != GO:
        return 0  # whoever started this has died, and so knows nothing of it
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    try:
        return be(role, home, run, argv[1:])
    except RequestError as error:
        log.critical("%s", error)
        return ExitCode.WRONG_SETTINGS
    except ModelOpsError as error:
        log.critical("%s", error)
        log.info(IN_FULL, exc_info=error)
        return 1
    except Exception:  # the top of a process
        log.critical("%s ends, and this is a bug of ModelOps", role, exc_info=True)
        return 1


def be(role: str, home: Home, run: RunFolder, arguments: Sequence[str]) -> int:
    """Do the work of a role until it ends; return the exit code."""
    if role == KEEPER:
        from modelops.cluster.keeper import Keeper

        return Keeper(home, run, environ=os.environ).work()
    settings = Settings.read(os.environ)
    look_seldom()
    if role == SERVER:
        from modelops.server.serve import serve_kept

        give_back_at_once()
        return serve_kept(settings, home, run, fd=int(arguments[0]))
    if role == SCHEDULER:
        from modelops.cluster.scheduler import run_kept_scheduler

        return run_kept_scheduler(run)
    from modelops.cluster.worker import run_kept_worker

    return run_kept_worker(home, run, name=role, membership=settings.membership)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    os._exit(code)  # a thread that still waits for somebody else must not keep the process
