"""The pool under fire: a home of its own on a PostgreSQL of its own, and what of it can be struck."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from journal import in_flight, read_journal
from killer import OF_THE_POOL, Flight
from processes import ancestors, below, bury, end_all, heir_of_all
from services import Postgres
from watchers import Watchers

from modelops.cluster.run_folder import RunFolder
from modelops.home import Home
from modelops.states import OUTCOMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from journal import Line
    from killer import Strike
    from plans import Plan

    from modelops.client.status import JobStatus

COMMAND: Final = [str(Path(sys.executable).with_name("modelops"))]
WORKERS: Final = 6
LEAST_KILLS: Final = 3  # of each job, before it may end
UNMOVED_S: Final = 10.0  # jobs that run again for so long are back, also if nothing has ended meanwhile
END_S: Final = 300.0
SETTLED: Final = tuple(str(status) for status in OUTCOMES)


@dataclass
class Live:
    """A job that has not ended."""

    job: str
    plan: Plan
    counts: dict[str, int] = field(default_factory=dict)  # of its last status
    kills: Counter[str] = field(default_factory=Counter)  # that hit its live work, by kind
    untrue: list[str] = field(default_factory=list)  # what was said of it and cannot be


@dataclass
class Pool:
    """Knows the jobs that are live and the processes of each kind. ``gates``: jobs end only when they were hit."""

    root: Path
    postgres: Postgres
    say: Callable[[str], None]
    live: dict[str, Live] = field(default_factory=dict)
    gates: bool = False
    left: list[str] = field(default_factory=list)  # processes that had to be killed after the end
    _driven_at: float = 0.0  # when a server said last that replicates of a job run
    _moved_at: float = 0.0  # when it said last that one more has settled
    _driven_first: dict[float, float] = field(default_factory=dict)
    _crashing: threading.Lock = field(default_factory=threading.Lock)  # PostgreSQL

    def __post_init__(self) -> None:
        self.url = self.postgres.new_database()
        self.home = Home.at(self.root / "home")
        (self.root / "studies").mkdir(parents=True)
        self.watchers = Watchers(self.root / "watched", lambda: (COMMAND, self.environ()))

    @property
    def settings(self) -> dict[str, str]:
        """The variables that make it a pool of its own."""
        return {"MODELOPS_HOME": str(self.root / "home"), "MODELOPS_DATABASE": self.url}

    def environ(self) -> dict[str, str]:
        """The variables by which commands find this pool and no other."""
        return {**os.environ, **self.settings}

    def command(self, *words: str) -> None:
        """Run a command that must succeed."""
        done = subprocess.run(
            [*COMMAND, *words], env=self.environ(), capture_output=True, text=True, check=False, timeout=END_S
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    # Jobs.

    def folder(self, plan: Plan) -> Path:
        """Return the folder that a study's model writes to."""
        return self.root / "studies" / plan.name

    def journal(self, plan: Plan) -> list[Line]:
        """Return the journal of a study."""
        return read_journal(self.folder(plan) / "journal")

    def make_ready(self, plan: Plan) -> None:
        """Empty a study's folder for its next job."""
        shutil.rmtree(self.folder(plan), ignore_errors=True)
        self.folder(plan).mkdir()
        if not self.gates:
            (self.folder(plan) / "go").touch()

    def heard(self, one: Live, status: JobStatus, asked_at: float) -> None:
        """Take in what the server says of a job."""
        counts = dict(status.counts)
        if status.unknown_since is not None:
            return
        if counts.get("running"):
            self._driven_at = asked_at
        if sum(counts.get(s, 0) for s in SETTLED) > sum(one.counts.get(s, 0) for s in SETTLED):
            self._moved_at = asked_at
        if one.counts and sum(counts.values()) != sum(one.counts.values()):
            one.untrue.append(f"first {one.counts}, then {counts}: not as many in all")
        for word in SETTLED:
            if counts.get(word, 0) < (before := one.counts.get(word, 0)):
                one.untrue.append(f"first {before} {word}, then {counts.get(word, 0)}")
        one.counts = counts

    def look_after_processes(self) -> None:
        """Have a client watch each live job, and bury the dead."""
        self.watchers.look_after(self.live)
        if self._crashing.acquire(blocking=False):
            try:
                bury({self.postgres.pid} if self.postgres.runs else ())
            finally:
                self._crashing.release()

    def standing(self) -> Iterator[str]:
        """Yield where each live job stands, a line each, and what the logs said last."""
        for job, one in list(self.live.items()):
            lines = Counter(line.what for line in self.journal(one.plan))
            yield f"{one.plan.name} ({job}): {one.counts}, journal {dict(lines)}, kills {dict(one.kills)}"
        for name in ("server", "keeper"):
            log = self.home.logs / f"{name}.log"
            if log.exists():
                yield from log.read_text(errors="replace").splitlines()[-10:]

    # What the killer asks (see `Ground`), in its thread.

    def flights(self, kind: str, pid: int | None = None) -> dict[int, list[Flight]]:
        """Return the processes of a kind (or that one) and the live work in each."""
        workers = [self.run.holder(role) for role in self.run.roles() if role.startswith("worker-")]
        flying: list[tuple[Flight, list[int]]] = []
        for job, one in list(self.live.items()):
            for runner, line in in_flight(self.journal(one.plan)).items():
                above = list(ancestors(runner))
                if any(worker in above for worker in workers):  # a pid may have been given anew
                    flight = Flight(job, line.replicate, runner, one.plan, time.time() - line.at)
                    flying.append((flight, above))
        everything = [flight for flight, _ in flying]
        match kind:
            case "runner":
                return {f.pid: [f] for f in everything if pid in (None, f.pid)}
            case "worker":
                pids = [w for w in workers if w is not None and pid in (None, w)]
                return {w: [f for f, above in flying if w in above] for w in pids}
            case "server":
                holder = self.run.holder("server")
                return {} if holder is None or pid not in (None, holder) else {holder: everything}
            case "client":
                watching = self.watchers.watching()
                return {p: [f for f in everything if f.job == j] for p, j in watching if pid in (None, p)}
            case _:
                return {self.postgres.pid: everything}

    def is_back(self, kind: str, struck_at: float) -> bool:
        """Whether a kind that was struck does its work again.

        Server and database: jobs go on, too, and have done so for as long as they had stood still.
        """
        match kind:
            case "worker":
                roles = [f"worker-{n}" for n in range(WORKERS)]
                return all(self._is_ready(role) for role in roles)
            case "server" | "postgres":
                if self._driven_at <= struck_at or not self._is_ready("server"):
                    return False
                first = self._driven_first.setdefault(struck_at, time.monotonic())
                up_s, down_s = time.monotonic() - first, first - struck_at
                return up_s > down_s and (self._moved_at > struck_at or up_s > UNMOVED_S)
            case _:
                return True

    def strike_postgres(self, how: str) -> Callable[[], None]:
        """Kill or stop the database server as a whole; return what starts it again, or lets it go on."""
        if how == "SIGSTOP":
            standing_still = contextlib.ExitStack()
            standing_still.enter_context(self.postgres.stopped())
            return standing_still.close
        with self._crashing:
            self.postgres.stop()
        return self._start_postgres

    def _start_postgres(self) -> None:
        with self._crashing:
            self.postgres.start()

    def struck(self, strike: Strike) -> None:
        """Count a strike, and let go those jobs that were hit enough."""
        self.say(str(strike))
        if strike.how != "SIGKILL" or strike.kind not in OF_THE_POOL:
            return
        for job in strike.jobs:
            if (one := self.live.get(job)) is None:
                continue
            one.kills[strike.kind] += 1
            if one.kills.total() >= LEAST_KILLS and (not one.plan.is_long or one.kills["runner"]):
                (self.folder(one.plan) / "go").touch()

    def _is_ready(self, role: str) -> bool:
        pid = self.run.holder(role)
        return pid is not None and self.run.read(f"{role}.json").get("pid") == pid

    # Beginning and end.

    def up(self) -> None:
        """Start it."""
        deadline = time.monotonic() + END_S
        while True:
            try:
                self.command("up", "--workers", str(WORKERS))
                break
            except AssertionError as error:  # it does not wait for ever, and this machine may be slower
                self.say(str(error))
                if time.monotonic() > deadline:
                    raise
        self.run = RunFolder(self.home)

    def down(self) -> None:
        """End clients and pool."""
        self.watchers.kill()
        self.command("down")


@contextlib.contextmanager
def started_pool(root: Path, say: Callable[[str], None]) -> Iterator[Pool]:
    """Start a pool under ``root`` and end it, whatever happens; this process is its client meanwhile.

    Afterwards no process is left, and ``pool.left`` names those that did not end by themselves.
    """
    before, left = below(os.getpid()), list[str]()
    with _raising_on_signals(), heir_of_all():
        try:
            with Postgres() as postgres:
                pool = Pool(root, postgres, say, left=left)
                variables = {name: os.environ.get(name) for name in pool.settings}
                os.environ.update(pool.settings)
                try:
                    pool.up()
                    yield pool
                finally:
                    for name, value in variables.items():
                        os.environ.pop(name) if value is None else os.environ.update({name: value})
                    with _deaf():
                        pool.down()
        finally:
            with _deaf():
                left += end_all(before, patience_s=END_S)
                bury(())


@contextlib.contextmanager
def _raising_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind this program, as SIGINT does."""

    def unwind(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(f"cut off by {signal.Signals(number).name}")

    with _handling({signal.SIGTERM: unwind, signal.SIGHUP: unwind}):
        yield


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Let nothing interrupt what must be done to the end."""
    with _handling(dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), signal.SIG_IGN)):
        yield


@contextlib.contextmanager
def _handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
