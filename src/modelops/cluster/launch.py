"""Find the pool of a home, start it, end it. Exactly one pool, however many processes ask at once."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import os
import signal
import ssl
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from modelops.cluster import spawn
from modelops.cluster.handles import Handle
from modelops.cluster.run_folder import KEEPER, LISTENER, SERVER, RunFolder, ServerAddress
from modelops.errors import ClusterError, ModelOpsError, StorageError
from modelops.logs import gave_up_with, tail

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from modelops.home import Home

START_S: Final = 60.0  # on a machine that is very busy
HEALTH_S: Final = 1.0
POLL_S: Final = 0.02
IDLE_S: Final = 30 * 60.0
END_S: Final = 60.0

__all__ = ["ServerAddress", "ensure_server", "find_server", "is_running", "start_pool", "stop_pool"]


def ensure_server(home: Home, *, environ: Mapping[str, str] = os.environ) -> ServerAddress:
    """Return the server of this home; start one, with workers, if none runs.

    One that was started by this ends when nobody has needed it for half an hour.

    Raises
    ------
    ClusterError
        It does not start (says what it wrote last, and where its log is), or the one that runs is of another
        version of ModelOps.
    StorageError
        The run folder cannot be written.
    """
    run = RunFolder(home)
    if (address := _answering(run)) is not None:
        return address
    with _naming_what_failed(run), run.alone():
        return _answering(run) or _started(run, {"idle_s": IDLE_S}, environ)


def find_server(home: Home) -> ServerAddress | None:
    """Return the server of this home if it runs, or is just being started anew; starts nothing.

    Raises
    ------
    ClusterError
        It is of another version of ModelOps.
    """
    run = RunFolder.if_there(home)
    if run is None:
        return None
    said = run.read("server.json")
    pid = run.holder(SERVER)
    is_said = pid is not None and said.get("pid") == pid
    if "url" not in said or not (is_said or _is_kept(run, said["url"])):
        return None
    _check_version(run, said)
    return ServerAddress(said["url"], run.token())


def start_pool(
    home: Home, *, n_workers: int | None = None, environ: Mapping[str, str] = os.environ
) -> ServerAddress:
    """Start the pool of this home to stay until `stop_pool`, or let the one that runs stay.

    Parameters
    ----------
    n_workers
        How many workers there shall be from now on; None: as many as there are, or as the settings say.

    Raises
    ------
    ClusterError, StorageError
        As `ensure_server`.
    """
    run = RunFolder(home)
    with _naming_what_failed(run), run.alone():
        wanted: dict[str, Any] = {"idle_s": None}
        if (workers := n_workers or run.read("wanted.json").get("workers")) is not None:
            wanted["workers"] = workers
        if (pid := run.held_by_hand(SERVER)) is not None:
            raise ClusterError(
                f"'modelops server' runs for this home, as process {pid}; use that, or end it first ('modelops down')"
            )
        address = _answering(run)
        if address is None:
            return _started(run, wanted, environ)
        run.write("wanted.json", wanted)
        _signal(run, KEEPER, signal.SIGHUP)
        return address


def stop_pool(home: Home, *, environ: Mapping[str, str] = os.environ) -> bool:
    """End the pool of this home and all it has started; False if none ran.

    Raises
    ------
    ClusterError
        A process could not be ended.
    """
    run = RunFolder.if_there(home)
    if run is None:
        return False
    with run.alone():
        ran = run.holder(KEEPER) is not None or any(run.holder(role) for role in run.roles())
        with _handle(run, KEEPER) as keeper:
            if keeper is not None:
                keeper.signal(signal.SIGCONT)
                keeper.signal(signal.SIGTERM)
                if not keeper.wait(END_S):
                    keeper.signal(signal.SIGKILL)
                    keeper.wait(END_S)
        if any(run.holder(role) for role in run.roles()):  # the keeper was killed before its time
            from modelops.cluster.keeper import Keeper

            Keeper(home, run, environ=environ).end_all("told to end")
        left = {role: pid for role in [KEEPER, *run.roles()] if (pid := run.holder(role)) is not None}
        if left:
            raise ClusterError(f"these processes could not be ended: {left}")
        return ran


def _is_kept(run: RunFolder, url: str) -> bool:
    """Say whether the keeper listens where the server was: whoever asks while that is started anew waits there.

    A keeper that has only just begun, or has found a server and taken it over, does not. Then the port may be anybody's
    once the server is dead, and whoever listens there would be told the token.
    """
    said = run.read(LISTENER)
    return said.get("pid") is not None and said == {"pid": run.holder(KEEPER), "port": urlsplit(url).port}


def is_healthy(url: str, timeout_s: float = HEALTH_S) -> bool:
    """Ask a server whether it is ready."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    if parts.scheme == "https":
        # Whose certificate it shows does not matter: nothing secret is said or believed.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def is_running(home: Home) -> bool:
    """Say whether the process of this home's server lives and is looked after; it is not asked.

    Raises
    ------
    ClusterError
        It is of another version of ModelOps.
    """
    run = RunFolder.if_there(home)
    return run is not None and _registered(run) is not None


def _answering(run: RunFolder) -> ServerAddress | None:
    """Return the server if it answers and somebody looks after it, or a person has started it."""
    address = _registered(run)
    return address if address is not None and is_healthy(address.url) else None


def _registered(run: RunFolder) -> ServerAddress | None:
    """Return the server if its process lives and somebody looks after it, or a person has started it."""
    pid = run.holder(SERVER)
    said = run.read("server.json")
    if pid is None or said.get("pid") != pid or "url" not in said:
        return None
    _check_version(run, said)
    if run.holder(KEEPER) is None and run.held_by_hand(SERVER) is None:
        return None  # its keeper was killed, and another one shall take it over
    return ServerAddress(said["url"], run.token())


def _check_version(run: RunFolder, said: Mapping[str, Any]) -> None:
    ours = _ours()
    if said.get("version") not in (None, ours) and said.get("pid") == run.holder(SERVER):
        raise ClusterError(
            f"the server that runs for {run.home.data} is of ModelOps {said['version']}, and this is {ours}. "
            "'modelops down' ends it; the next command starts the new one, which goes on with its jobs"
        )


@functools.cache
def _ours() -> str:
    return version("modelops")


def _started(run: RunFolder, wanted: dict[str, Any], environ: Mapping[str, str]) -> ServerAddress:
    """Start a keeper unless there is one, and wait for the server. Called by one process at a time."""
    if run.held_by_hand(SERVER) is not None:
        return _wait_for_server(run)
    nothing_ran = run.holder(KEEPER) is None and not any(run.holder(role) for role in run.roles())
    if nothing_ran:
        run.remove("server.json", "scheduler.json", "keeper.json", "wanted.json")
    if nothing_ran or wanted.get("idle_s") is None:
        run.write("wanted.json", wanted)
    if run.holder(KEEPER) is None:
        began = spawn.start_keeper(run.home, environ=environ)
        if not began and run.holder(KEEPER) is None:
            raise _failed(run, KEEPER, "did not start")
    else:
        _signal(run, KEEPER, signal.SIGCONT)  # one that somebody has stopped would start nothing anew
    try:
        return _wait_for_server(run)
    except (ClusterError, OSError):
        if nothing_ran:  # and nothing shall
            _signal(run, KEEPER, signal.SIGTERM)
            with _handle(run, KEEPER) as keeper:
                if keeper is not None:
                    keeper.wait(END_S)
        raise


@contextlib.contextmanager
def _naming_what_failed(run: RunFolder) -> Iterator[None]:
    """Say which file cannot be used and on which volume it is, or what else the system refuses."""
    try:
        yield
    except OSError as error:
        raise _explained(run, error) from error


def _explained(run: RunFolder, error: OSError) -> ModelOpsError:
    said = error.strerror or str(error)
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if path is None and error.errno not in _OF_A_VOLUME:
        advice = _OF_THE_SYSTEM.get(error.errno or 0, "'modelops doctor' looks at this machine")
        return ClusterError(f"the server of this home cannot be started: {said}; {advice}")
    if path is None or path.is_relative_to(run.path):
        what = f"the folder {run.path} cannot be written"
    else:
        what = f"the server of this home cannot be started, as {path} cannot be used"
    from modelops.volumes import volume_of

    advice = "free some space there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return StorageError(
        f"{what}: {said} ({volume_of(path or run.path)}); {advice}set MODELOPS_HOME to a folder on another volume"
    )


_OF_A_VOLUME: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_OF_THE_SYSTEM: Final = {
    errno.EAGAIN: "this user has as many processes as it may; end some, or raise that limit ('ulimit -u')",
    errno.ENOMEM: "this machine has no memory left; end something that uses much",
    errno.EMFILE: "this process has as many files open as it may; raise that limit ('ulimit -n')",
    errno.ENFILE: "this machine has as many files open as it may; end something that has many",
}


def _wait_for_server(run: RunFolder) -> ServerAddress:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if (address := _answering(run)) is not None:
            return address
        if run.held_by_hand(SERVER) is None and run.holder(KEEPER) is None:
            raise _failed(run, KEEPER, "ended while the server was started")
        state = run.read("keeper.json").get("roles", {}).get(SERVER, {})
        last_end = str(state.get("last_end", ""))
        if last_end.startswith("could not be started"):
            raise _failed(run, KEEPER, "cannot start the server")
        # One that was killed is not to blame; one that ended by itself will do so again.
        if state.get("failing") or last_end.startswith("exit code"):
            raise _failed(run, SERVER, f"does not start ({last_end})")
        time.sleep(POLL_S)
    raise _failed(run, SERVER, f"did not answer within {START_S:g} s")


def _failed(run: RunFolder, role: str, what: str) -> ClusterError:
    log = spawn.log_of(run.home, role)
    if sentence := gave_up_with(log):
        return ClusterError(f"the {role} of this home {what}: {sentence}. Its log is {log}")
    lines = "".join(f"\n  {line}" for line in tail(log))
    said = f"It wrote last, in {log}:{lines}" if lines else f"Its log {log} is empty"
    return ClusterError(f"the {role} of this home {what}. {said}")


def _handle(run: RunFolder, role: str) -> contextlib.AbstractContextManager[Handle | None]:
    handle = Handle.of_role(run, role)
    return handle if handle is not None else contextlib.nullcontext()


def _signal(run: RunFolder, role: str, number: int) -> None:
    with _handle(run, role) as handle:
        if handle is not None:
            handle.signal(number)
