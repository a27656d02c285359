"""A pool that runs elsewhere: a Dask client that finds its scheduler again, and tells which workers come and go.

When the scheduler goes away every worker has left (not died): what ran there may be taken up when they are back.
Dask's own client would reconnect by itself to the address it knows and forget what it listened to; here each
connection is a client of its own, so nothing of the last one is mistaken for something of this one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Self

import dask
import msgspec
from distributed import Client

from modelops.cluster.announce import MEMBERSHIP, WORKERS_TOPIC
from modelops.cluster.dask_settings import DASK_SETTINGS
from modelops.cluster.handshake import why_no_handshake
from modelops.cluster.listeners import Listeners
from modelops.cluster.tls import security
from modelops.cluster.versions import VERSIONS, Versions, misfits, ours, table
from modelops.counters import Counted, count
from modelops.errors import ClusterError
from modelops.logs import quiet_dask
from modelops.study.pools import NO_POOL, Membership
from modelops.worker.sending import send_whatever_the_clock_says

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CONNECT_S: Final = 10.0
AGAIN_S: Final = 0.2
MENDED_S: Final = 2.0  # a person must do something first
HELLO_S: Final = 0.05
CLOSE_S: Final = 5.0
log = logging.getLogger(__name__)


class ConnectedCluster:
    """A scheduler at an address, and the workers it has. `start` returns at once; connecting goes on beside it.

    Parameters
    ----------
    find
        Returns the address of the scheduler, None as long as that is not known; asked before each try.
    tls
        The folder of the certificates; None: those that Dask's configuration names.
    """

    def __init__(self, find: Callable[[], str | None], tls: Path | None) -> None:
        self._find, self._tls = find, tls
        self._listeners = Listeners()
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._workers: dict[str, int] = {}
        self._memberships: dict[str, Membership] = {}  # of these
        self._refused: dict[str, str] = {}  # workers whose versions do not fit, and the table of these
        self._scheduler = Versions()  # its own
        self._early: list[dict[str, Any]] | None = None  # news while there is no list of the workers yet
        self._closing = threading.Event()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._keep_connected, name="modelops-connect", daemon=True)
        self._stack = contextlib.ExitStack()
        self.on_workers = self._listeners.on_workers
        self.on_topic = self._listeners.on_topic

    def start(self) -> Self:
        """Begin to connect."""
        self._stack.enter_context(dask.config.set(DASK_SETTINGS))
        quiet_dask()
        send_whatever_the_clock_says()
        self._thread.start()
        return self

    def close(self) -> None:
        """Leave the scheduler; workers and what they run go on."""
        self._closing.set()
        with self._lock:
            client = self._client
        if isinstance(client, _Connection):
            client.lost.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)  # it may be waiting for a scheduler that does not answer
        self._stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        with self._lock:
            return self._client is not None

    @property
    def client(self) -> Client:
        """The client of the present connection; after the scheduler was started again it is another one.

        Raises
        ------
        ClusterError
            There is no connection just now.
        """
        with self._lock:
            if self._client is None:
                raise ClusterError("the Dask scheduler is not reachable just now; 'modelops status' shows it")
            return self._client

    def workers(self) -> dict[str, int]:
        """Return the address of each worker and the number of its slots; none while the scheduler is away."""
        with self._lock:
            return dict(self._workers)

    def membership(self, worker: str) -> Membership:
        """Return the pool that a worker said it is in, also one that is refused."""
        with self._lock:
            return self._memberships.get(worker, NO_POOL)

    def refused(self) -> dict[str, str]:
        """Return the workers that get no work as their versions do not fit, and a table of these."""
        with self._lock:
            return dict(self._refused)

    def wait_for_workers(self, n: int, timeout_s: float) -> bool:
        """Wait until there are so many workers; False if there are not after that time."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._workers) >= n, timeout_s)

    def _keep_connected(self) -> None:
        said = ""
        while not self._closing.is_set():
            try:
                client = self._connect()
            except (OSError, TimeoutError, ClusterError) as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("the scheduler cannot be reached, and is tried again: %s", error)
                self._closing.wait(MENDED_S if isinstance(error, ClusterError) else AGAIN_S)
                continue
            if client is None:
                self._closing.wait(AGAIN_S)
                continue
            said = ""
            client.lost.wait()
            self._forget(client)

    def _connect(self) -> _Connection | None:
        address = self._find()
        if address is None:
            return None
        certificates = security(self._tls, "client")
        # Nobody listens there, or certificates do not fit: Dask would try again for a long time, and not say.
        if why := why_no_handshake(address, certificates, "client", who="server", timeout_s=CONNECT_S):
            raise ClusterError(why)
        connection = _Connection(
            address,
            security=certificates,
            timeout=CONNECT_S,
            set_as_default=False,
            name="modelops-driver",
        )
        client: Client = connection
        try:
            with self._lock:
                self._early = []
            client.subscribe_topic(WORKERS_TOPIC, self._heard)
            self._listeners.listen_to(client)
            scheduler = client.scheduler
            if scheduler is None:
                raise ConnectionResetError(f"the scheduler {address} went away at once")
            # A worker that joins or leaves from here on is heard of; all others are in the list.
            _wait_until_subscribed(client)
            # Not `Client.scheduler_info`: a timer of the client replaces what that returns by one without workers.
            found = client.sync(scheduler.identity, n_workers=-1, callback_timeout=CONNECT_S)["workers"]
            asked = {"keys": [VERSIONS], "default": None, "callback_timeout": CONNECT_S}
            said = client.sync(scheduler.get_metadata, **asked)
            self._scheduler = Versions() if said is None else _versions("the scheduler", said)
        except BaseException:
            self._listeners.listen_to(None)
            _close(connection)
            raise
        with self._changed:
            self._client = client
            self._changed.notify_all()
        log.info("connected to the scheduler %s, which has %s workers", address, len(found))
        for worker, info in found.items():
            self._join(worker, int(info["nthreads"]), info)
        while early := self._take_early():
            for message in early:
                self._take_in(message)
        return connection

    def _forget(self, client: _Connection) -> None:
        with self._changed:
            self._client = None
            gone, self._workers = self._workers, {}
            self._memberships.clear()
            self._refused.clear()
            self._changed.notify_all()
        self._listeners.listen_to(None)
        if not self._closing.is_set():
            log.warning("the scheduler went away, and with it %s workers", len(gone))
        for worker in gone:
            count(Counted.WORKERS_LEFT)
            self._listeners.left(worker, False)
        _close(client)

    def _heard(self, event: tuple[float, dict[str, Any]]) -> None:
        """Take in news, but not before the list: who hears of a worker may use the client at once."""
        message = event[1]
        with self._lock:
            if self._early is not None:
                self._early.append(message)
                return
        self._take_in(message)

    def _take_early(self) -> list[dict[str, Any]]:
        """Return the news that came before the list or while it was taken in; once there is none, it waits no more."""
        with self._lock:
            early, self._early = self._early, []
            if not early:
                self._early = None
            return early or []

    def _take_in(self, message: dict[str, Any]) -> None:
        worker = str(message["worker"])
        if message["event"] == "joined":
            self._join(worker, int(message["slots"]), message)
            return
        with self._changed:
            known = self._workers.pop(worker, None) is not None
            self._memberships.pop(worker, None)
            self._refused.pop(worker, None)
            self._changed.notify_all()
        if known:
            count(Counted.WORKERS_DIED if message["died"] else Counted.WORKERS_LEFT)
            self._listeners.left(worker, bool(message["died"]))

    def _join(self, worker: str, slots: int, said: Mapping[str, Any]) -> None:
        of = said.get(MEMBERSHIP)
        if slots and worker not in self._workers and (versions := self._skew(worker, said.get(VERSIONS))):
            self._refuse(worker, versions, NO_POOL if of is None else _membership(worker, of))
            return
        with self._changed:
            if slots == 0 and worker not in self._workers:
                return  # its own last word, which came later than what the scheduler said of its end
            if worker not in self._workers:
                count(Counted.WORKERS_JOINED)
            new = self._workers.get(worker) != slots
            if of is not None:  # its last word does not say it again
                self._memberships[worker] = _membership(worker, of)
            self._workers[worker] = slots
            self._changed.notify_all()
        if new:
            self._listeners.joined(worker, slots)

    def _skew(self, worker: str, said: Any) -> str:
        """Return how the versions of a worker and of those before it differ where it matters; empty: they do not."""
        parts = (ours(), self._scheduler, Versions() if said is None else _versions(worker, said))
        return table(*parts) if misfits(*parts) else ""

    def _refuse(self, worker: str, versions: str, of: Membership) -> None:
        with self._lock:
            is_new = versions not in self._refused.values()
            self._refused[worker] = versions
            self._memberships[worker] = of
        if is_new:  # not for each worker of a pool
            log.warning(
                "%s, and others like it, get no work: their versions do not fit\n%s", worker, versions
            )


def _versions(whose: str, said: Any) -> Versions:
    try:
        return msgspec.convert(said, Versions)
    except msgspec.ValidationError as error:
        log.warning("what %s says of its versions cannot be read: %s", whose, error)
        return Versions()


def _membership(worker: str, said: Any) -> Membership:
    try:
        return msgspec.convert(said, Membership)
    except msgspec.ValidationError as error:
        log.warning("what %s says of its pool cannot be read, so it is in none: %s", worker, error)
        return NO_POOL


class _Connection(Client):
    """A client that ends with its connection, and says so."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.lost = threading.Event()
        super().__init__(*arguments, **options)  # type: ignore[no-untyped-call]  # Dask does not say

    async def _reconnect(self) -> None:
        """Dask calls this when the connection is lost."""
        for state in list(self.futures.values()):
            state.cancel(reason="scheduler-connection-lost", msg="the scheduler went away")
        self.futures.clear()
        self.lost.set()
        self.status = "closing"


def _wait_until_subscribed(client: Client) -> None:
    """Return when the scheduler has this client's subscriptions; they travel on another connection than questions do.

    What is subscribed to last is heard last: so when a topic of its own is heard, all are.
    """
    topic, heard = f"modelops-hello-{client.id}", threading.Event()
    client.subscribe_topic(topic, lambda _event: heard.set())
    deadline = time.monotonic() + CONNECT_S
    while True:
        client.log_event(topic, "hello")
        if heard.wait(HELLO_S):
            break
        if time.monotonic() > deadline:
            raise TimeoutError("the scheduler answers, and sends no events")
    client.unsubscribe_topic(topic)


def _close(client: Client) -> None:
    began = time.monotonic()
    try:
        client.close(timeout=CLOSE_S)
    except (OSError, TimeoutError) as error:
        log.info("closing a lost connection took %.1f s: %s", time.monotonic() - began, error)
