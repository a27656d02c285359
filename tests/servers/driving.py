"""A process that drives jobs, as a server does, on the cluster of a test: to be killed, stopped and replaced.

As a program it drives until its stdin ends, and prints a line of JSON whenever something has changed.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from distributed import Client

from modelops.cluster.announce import WORKERS_TOPIC
from modelops.cluster.listeners import Listeners
from modelops.home import Home
from modelops.server.supervisor import Supervisor
from modelops.store import Objects, Records
from modelops.store.leases import ClockLeases, FileLeases, leases_for
from modelops.study.pools import NO_ALIASES, NO_POOL, Aliases, Membership
from modelops.study.ranges import Ranges
from modelops.who import this_process

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.states import JobState
    from modelops.study import Study
    from modelops.study.ids import JobId

DEADLINE_S = 120.0


class Server:
    """The part of a server that drives, in this process, over a database of its own."""

    def __init__(self, cluster: EmbeddedCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.url = f"sqlite:///{folder}/modelops.db"
        self.records = Records.open(self.url)
        self.objects = Objects.open(cluster.home.storage)
        self._stack = ExitStack()

    def start(self, max_driven: int = 64, aliases: Aliases = NO_ALIASES, **more: Any) -> Supervisor:
        driving = Supervisor(
            records=self.records,
            objects=self.objects,
            cache=self.cluster.home.cache,
            pool=self.cluster,
            leases=FileLeases(self.records, self.folder / "leases"),
            who="test",
            max_driven=max_driven,
            aliases=aliases,
            **more,
        )
        driving.start()
        self._stack.callback(driving.stop)
        return driving

    def stop(self) -> None:
        self._stack.close()

    def wait_for(self, job: JobId, state: JobState) -> None:
        wait_for(lambda: self.records.job(job).state == state, f"{job} is {state}")


class AttachedPool:
    """The workers of a cluster that another process has started."""

    def __init__(self, address: str, security: Any) -> None:
        self.client: Client = Client(address, security=security, set_as_default=False)
        self.listeners = Listeners()
        self.on_workers, self.on_topic = self.listeners.on_workers, self.listeners.on_topic
        self.client.subscribe_topic(WORKERS_TOPIC, self._heard)
        self.listeners.listen_to(self.client)

    def workers(self) -> dict[str, int]:
        assert self.client.scheduler is not None
        found = self.client.sync(self.client.scheduler.identity, n_workers=-1)["workers"]
        return {address: int(info["nthreads"]) for address, info in found.items()}

    def membership(self, worker: str) -> Membership:
        return NO_POOL

    def refused(self) -> dict[str, str]:
        return {}

    def _heard(self, event: tuple[float, dict[str, Any]]) -> None:
        message = event[1]
        if message["event"] == "joined":
            self.listeners.joined(message["worker"], int(message["slots"]))
        else:
            self.listeners.left(message["worker"], bool(message["died"]))


class DriverProcess:
    """The program, started by a test. Use it in a ``with`` block, which kills it."""

    def __init__(
        self, cluster: EmbeddedCluster, *, database: str | None = None, lease_s: float | None = None
    ) -> None:
        assert cluster.client.scheduler is not None
        self.database = database or cluster.home.database_url
        self._config = {
            "address": cluster.client.scheduler.address,
            "security": base64.b64encode(pickle.dumps(cluster.client.security)).decode(),
            "home": str(cluster.home.data),
            "database": self.database,
            "lease_s": lease_s,
        }
        self._said: list[dict[str, Any]] = []
        self._news = threading.Condition()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._config) + "\n")
        self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._wait()

    def stop(self) -> None:
        """Let it stop as a server does that is told to."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._wait()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    @property
    def n_said(self) -> int:
        """How many lines it has said."""
        return len(self._said)

    def wait_until(
        self, condition: Callable[[dict[str, Any]], bool], what: str, *, after: int = 0
    ) -> dict[str, Any]:
        """Wait for a line that is so, beyond so many, and return it."""
        with self._news:
            found = self._news.wait_for(lambda: any(map(condition, self._said[after:])), DEADLINE_S)
            assert found, f"not within {DEADLINE_S} s: {what}; {self._said[-3:]}"
            return next(line for line in self._said[after:] if condition(line))

    def wait_until_running(self, job: JobId, indices: list[int]) -> None:
        """Wait until its driver knows that workers hold just these."""
        pairs = [list(pair) for pair in Ranges.of(indices).pairs]
        self.wait_until(lambda line: line.get(job, {}).get("running") == pairs, f"{job} runs {pairs}")

    def _wait(self) -> None:
        self._process.wait(DEADLINE_S)
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self._said.append(json.loads(line))
                self._news.notify_all()


def submitted(study: Study, home: Home, *, database: str | None = None) -> JobId:
    """Record a job that nobody drives."""
    from modelops.client.prepare import prepare_job

    with closing(Records.open(database or home.database_url)) as records:
        return prepare_job(study, home, records, Objects.open(home.storage)).job


def main() -> None:
    config = json.loads(sys.stdin.readline())
    home = Home.at(Path(config["home"]))
    records = Records.open(config["database"])
    lease_s = config["lease_s"]
    of_another_machine = home.state / f"leases-{os.getpid()}"
    leases = (
        leases_for(records, home.state / "leases")
        if lease_s is None
        else ClockLeases(records, of_another_machine, lease_s=lease_s)
    )
    pool = AttachedPool(config["address"], pickle.loads(base64.b64decode(config["security"])))
    supervisor = Supervisor(
        records=records,
        objects=Objects.open(home.storage),
        cache=home.cache,
        pool=pool,
        leases=leases,
        who=this_process(),
        renew_every_s=5.0 if lease_s is None else lease_s / 4,
    )
    supervisor.start()
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    said = ""
    while not ended.wait(0.02):
        views = {job: supervisor.view(job) for job in supervisor.driven()}
        line = json.dumps(
            {
                job: {
                    "state": view.state,
                    "running": [list(pair) for pair in view.running.pairs],
                    "waiting_for": view.waiting_for,
                }
                for job, view in views.items()
                if view is not None
            }
        )
        if line != said:
            said = line
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    supervisor.stop()
    pool.client.close()
    os._exit(0)


def wait_for(condition: Callable[[], bool], what: str, within_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        threading.Event().wait(0.02)


if __name__ == "__main__":
    main()
