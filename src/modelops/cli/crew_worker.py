"""The program of one worker of `modelops worker`: ``python -m modelops.cli.crew_worker SCHEDULER TLS HOST FD POOL``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import msgspec

from modelops.cluster.upkeep import ExitCode
from modelops.errors import ModelOpsError, RequestError
from modelops.garbage import look_seldom
from modelops.home import Home
from modelops.logs import set_up_logging


def main() -> int:
    """Be a worker until told otherwise; return the exit code."""
    set_up_logging()
    look_seldom()
    scheduler, tls, host, fd, pool = sys.argv[1:]  # fd: where it says that it has joined
    try:
        from modelops.cluster.place import Place
        from modelops.cluster.worker import run_worker_of_crew
        from modelops.study.pools import Membership

        return run_worker_of_crew(
            Home.from_environ(os.environ),
            Place(
                scheduler,
                Path(tls) if tls else None,
                1,
                host or None,
                msgspec.json.decode(pool, type=Membership),
            ),
            int(fd),
        )
    except RequestError as error:
        logging.getLogger(__name__).critical("%s", error)
        return ExitCode.WRONG_SETTINGS
    except ModelOpsError as error:
        logging.getLogger(__name__).critical("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
