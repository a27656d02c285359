"""A process that is a Dask scheduler: TLS only, no dashboard, health the only page without a certificate."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
from typing import TYPE_CHECKING, Final

import dask
from distributed import Scheduler

from modelops.cluster.announce import AnnounceWorkers
from modelops.cluster.dask_settings import DASK_SETTINGS
from modelops.cluster.run_folder import SCHEDULER
from modelops.cluster.tls import security
from modelops.errors import ClusterError
from modelops.logs import quiet_dask
from modelops.worker.sending import send_whatever_the_clock_says

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.cluster.run_folder import RunFolder

SAME_PORT_S: Final = 3.0  # so long the port of the last scheduler may still be taken by its last connections
log = logging.getLogger(__name__)


def run_kept_scheduler(run: RunFolder) -> int:
    """Be the scheduler of a pool on this machine, at the address that the one before had, if that is free."""
    before = run.read("ports.json").get(SCHEDULER)

    def listening(address: str) -> None:
        port = int(address.rpartition(":")[2])
        run.write("ports.json", {**run.read("ports.json"), SCHEDULER: port})
        run.write("scheduler.json", {"address": address, "pid": os.getpid()})

    port = before if isinstance(before, int) else 0
    return run_scheduler("127.0.0.1", port, run.path / "tls", listening, or_any_port=True)


def run_scheduler(
    host: str,
    port: int,
    tls: Path | None,
    listening: Callable[[str], None],
    *,
    or_any_port: bool = False,
    http_port: int = 0,
) -> int:
    """Be a scheduler until SIGTERM or SIGINT.

    Parameters
    ----------
    listening
        Called with the address as soon as it listens.
    or_any_port
        Take another port if this one stays taken.
    http_port
        Where ``/health`` is answered.

    Raises
    ------
    ClusterError
        The certificates cannot be read, or the port is taken.
    """
    quiet_dask()
    send_whatever_the_clock_says()
    with dask.config.set(DASK_SETTINGS):
        asyncio.run(_serve(host, port, tls, listening, or_any_port=or_any_port, http_port=http_port))
    return 0


async def _serve(
    host: str,
    port: int,
    tls: Path | None,
    listening: Callable[[str], None],
    *,
    or_any_port: bool,
    http_port: int,
) -> None:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    scheduler = await _started(host, port, tls, or_any_port=or_any_port, http_port=http_port)
    log.info("the scheduler listens at %s", scheduler.address)
    listening(scheduler.address)
    await told.wait()
    log.info("the scheduler ends, with %s workers", len(scheduler.workers))
    await scheduler.close(reason="told to end")


async def _started(host: str, port: int, tls: Path | None, *, or_any_port: bool, http_port: int) -> Scheduler:
    deadline = asyncio.get_running_loop().time() + SAME_PORT_S
    while True:
        scheduler = Scheduler(
            host=host, port=port, protocol="tls://", security=security(tls, "scheduler"), dashboard=False,
            dashboard_address=f"{host}:{http_port}", plugins=[AnnounceWorkers()],
        )  # fmt: skip
        try:
            await scheduler
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not port:
                raise
        except RuntimeError as error:
            if not _is_taken(error) or not port:
                raise
        else:
            return scheduler
        if asyncio.get_running_loop().time() > deadline:
            if not or_any_port:
                raise ClusterError(f"port {port} of {host} is taken; choose another with --port")
            log.warning("port %s is taken by somebody else; the scheduler takes another", port)
            port = 0
        await asyncio.sleep(0.1)


def _is_taken(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
