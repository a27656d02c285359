"""A process that is one Dask worker with the ModelOps runtime, and no nanny: whoever keeps it starts it again.

Told to end (SIGTERM) it takes nothing new, gives back what it has not begun, finishes or stops the replicate that
runs, hands over its receipts, and leaves. When its scheduler goes away it ends with `ExitCode.SCHEDULER_GONE`,
because a Dask worker cannot come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import dask
import msgspec
from distributed import Worker
from distributed.comm.addressing import get_address_host_port
from distributed.core import Status

from modelops.cluster.announce import MEMBERSHIP, WORKERS_TOPIC
from modelops.cluster.dask_settings import DASK_SETTINGS
from modelops.cluster.handshake import why_no_handshake
from modelops.cluster.place import Place
from modelops.cluster.tls import security
from modelops.cluster.upkeep import ExitCode
from modelops.cluster.versions import VERSIONS, ours
from modelops.counters import Totals, totals
from modelops.logs import quiet_dask
from modelops.worker.plugin import ModelOpsWorker
from modelops.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from distributed.security import Security

    from modelops.cluster.run_folder import RunFolder
    from modelops.home import Home
    from modelops.study.pools import Membership

CONNECT_S: Final = 30.0  # then the process ends and the next one looks for the scheduler anew
EXPLAIN_AFTER_S: Final = 2.0  # then it looks why it has not joined yet, and says so
POLL_S: Final = 0.05
HAND_OVER_S: Final = 2.0
LEAVE_S: Final = 2.0
LAST_WORD_POLLS: Final = 4
TELL_EVERY_S: Final = 2.0
RETIRED: Final = "retire-workers-told-to-end"  # `AnnounceWorkers` knows by it that it did not die
CLOSE_S: Final = 5.0
T = TypeVar("T")
log = logging.getLogger(__name__)


def run_kept_worker(home: Home, run: RunFolder, *, name: str, membership: Membership) -> int:
    """Be a worker of the pool on this machine."""

    def place() -> Place | None:
        address = run.scheduler_address()
        return None if address is None else Place(address, run.path / "tls", 1, "127.0.0.1", membership)

    def joined(address: str) -> None:
        run.write(f"{name}.json", {"address": address, "pid": os.getpid()})

    log.info("%s begins", name)
    settings = replace(WorkerSettings.of_home(home), scratch=home.state / "workers" / name)
    shutil.rmtree(settings.scratch, ignore_errors=True)  # what a killed worker of this name has left
    return run_worker(settings, place, joined)


def run_worker_of_crew(home: Home, place: Place, fd: int) -> int:
    """Be a worker that ends when its stdin does: whoever started it has died. It says at ``fd`` that it has joined."""
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    said = Totals()

    def say(line: bytes) -> None:
        # Nobody listens any more: its stdin ends as well. The pipe is full: it is said the next time.
        with contextlib.suppress(OSError):
            os.write(fd, line + b"\n")

    def tell() -> None:
        nonlocal said
        if (now := totals()) != said:
            said = now
            say(msgspec.json.encode(now))

    return run_worker(
        WorkerSettings.of_home(home), lambda: place, lambda _address: say(b"joined"), tell, until_eof_of=0
    )


def run_worker(
    settings: WorkerSettings,
    place: Callable[[], Place | None],
    joined: Callable[[str], None] = lambda _address: None,
    tell: Callable[[], None] = lambda: None,
    *,
    until_eof_of: int | None = None,
) -> int:
    """Be a worker until SIGTERM, or until the scheduler is gone; never returns: the process ends.

    Parameters
    ----------
    place
        Says where the scheduler is; None as long as there is none.
    joined
        Called with the worker's address when the scheduler knows it.
    tell
        Called every few seconds, and at the end.
    until_eof_of
        A descriptor: its end of file means the same as SIGTERM.
    """
    quiet_dask()
    with dask.config.set(DASK_SETTINGS):
        # Not `asyncio.run`, which would wait for what cannot be cancelled before it returns: who is told to end while
        # it looks for its scheduler ends at once.
        code = asyncio.new_event_loop().run_until_complete(_work(settings, place, joined, tell, until_eof_of))
    tell()
    logging.shutdown()
    # Threads that still wait for something would keep the process; all they could do now is lost on everybody.
    os._exit(code)


async def _work(
    settings: WorkerSettings,
    find: Callable[[], Place | None],
    joined: Callable[[str], None],
    tell: Callable[[], None],
    until_eof_of: int | None,
) -> int:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told.set)
    if until_eof_of is not None:

        def ended() -> None:
            loop.remove_reader(until_eof_of)
            told.set()

        loop.add_reader(until_eof_of, ended)
    while (place := find()) is None:
        if await _within(told.wait(), POLL_S):
            return 0
    asked = asyncio.ensure_future(told.wait())
    try:
        host = place.host or await _unless(asked, asyncio.to_thread(_address_that_leads_to, place.scheduler))
    except OSError as error:
        log.warning("there is no way to the scheduler %s: %s", place.scheduler, error)
        return ExitCode.SCHEDULER_GONE
    if asked.done():
        return 0
    certificates = security(place.tls, "worker")
    worker = Worker(
        place.scheduler, nthreads=place.slots, security=certificates, protocol="tls://",
        host=host, dashboard_address=f"{place.host or ''}:0", memory_limit=0,
        local_directory=str(settings.scratch), plugins=(ModelOpsWorker(settings),), death_timeout=CONNECT_S,
        startup_information={
            MEMBERSHIP: lambda _worker: msgspec.to_builtins(place.membership),
            VERSIONS: lambda _worker: msgspec.to_builtins(ours()),
        },
    )  # fmt: skip
    starting = asyncio.ensure_future(_started(worker))
    await asyncio.wait([starting, asked], timeout=EXPLAIN_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
    if not (starting.done() or asked.done()):
        looking = asyncio.to_thread(_looked_for, place.scheduler, certificates)
        if await _unless(asked, looking) and not starting.done():
            return ExitCode.STRANGER
        await asyncio.wait([starting, asked], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        return 0
    if not starting.result():
        return ExitCode.SCHEDULER_GONE
    log.info("the worker %s has joined %s", worker.address, place.scheduler)
    joined(worker.address)
    finished = asyncio.ensure_future(worker.finished())
    while not (finished.done() or asked.done()):
        await asyncio.wait([finished, asked], timeout=TELL_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        tell()
    if told.is_set():
        await _leave(worker)
        log.info("the worker has left")
        return 0
    log.warning("the scheduler %s is gone", place.scheduler)
    return ExitCode.SCHEDULER_GONE


def _address_that_leads_to(scheduler: str) -> str:
    """Return the address of this machine from which it reaches the scheduler; raises OSError if there is no way.

    Dask would take the one that leads to the internet, and without such a way tell everybody that it is 127.0.0.1.
    """
    host, port = get_address_host_port(scheduler)
    family, kind, _, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as asked:
        asked.connect(there)  # of a datagram's socket, so nothing is sent
        return str(asked.getsockname()[0])


async def _unless(asked: asyncio.Future[Any], what: Coroutine[Any, Any, T]) -> T | None:
    """Return what comes of this; None, without waiting any longer, if the worker is asked to end."""
    doing = asyncio.ensure_future(what)
    await asyncio.wait([doing, asked], return_when=asyncio.FIRST_COMPLETED)
    return doing.result() if doing.done() else None


def _looked_for(scheduler: str, certificates: Security) -> bool:
    """Say in the log why the scheduler cannot be joined; return whether that is for the certificates."""
    try:
        why = why_no_handshake(scheduler, certificates, "worker", who="worker")
    except OSError as error:
        log.warning("the scheduler %s cannot be reached yet: %s", scheduler, error)
        return False
    if why:
        log.error("%s", why)
    return bool(why)


async def _started(worker: Worker) -> bool:
    try:
        await worker
    except (TimeoutError, OSError) as error:
        log.warning("the scheduler %s does not answer: %s", worker.scheduler.address, error)
        return False
    return True


async def _leave(worker: Worker) -> None:
    plugin = worker.plugins.get("modelops")
    if plugin is None:
        log.info("told to end; the scheduler ends as well, and has closed this worker")
        return
    assert isinstance(plugin, ModelOpsWorker)
    attempts = plugin.runtime.attempts
    log.info("told to end; %s attempts run", len(list(attempts)))
    worker.log_event(WORKERS_TOPIC, {"event": "joined", "worker": worker.address, "slots": 0})
    while running := list(attempts):  # each ends within the grace of its stop signal
        for attempt in running:
            attempt.stop.stop()
        if all(attempt.preparing for attempt in running):
            break  # an environment may take minutes, and nothing is lost with it
        await asyncio.sleep(POLL_S)
    # A receipt is Dask's result of the task: it is here until the driver has fetched it.
    try:
        async with asyncio.timeout(HAND_OVER_S):
            while worker.data or worker.state.executing_count or worker.state.long_running:
                await asyncio.sleep(POLL_S)
    except TimeoutError:  # nothing is lost by it: their segments are stored, and will be found
        log.info("nobody has fetched the receipts of %s attempts", len(worker.data))
    # As `Worker.close_gracefully` does, which does not wait for the scheduler's last word and calls it an error.
    retire = worker.scheduler.retire_workers(
        workers=[worker.address], close_workers=False, remove=True, stimulus_id=RETIRED
    )
    if not await _within(retire, LEAVE_S):
        log.warning("the scheduler did not hear that this worker leaves")
    for _ in range(LAST_WORD_POLLS):
        if worker.status is Status.closing_gracefully:
            break
        await asyncio.sleep(POLL_S)
    await _within(worker.close(timeout=CLOSE_S, executor_wait=False, reason="told to end"), CLOSE_S)


async def _within(what: Awaitable[object], seconds: float) -> bool:
    """Wait so long for something; whether it came to its end."""
    try:
        await asyncio.wait_for(what, seconds)
    except (TimeoutError, OSError):
        return False
    return True
