"""Run jobs on a real pool while a killer strikes; compare what comes out with an undisturbed run.

``python tests/chaos/soak.py --jobs 200 --seed 7`` is the long one, by hand (``make chaos``).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

import sqlalchemy as sa
from journal import in_flight, read_journal
from killer import Killer
from services import Postgres

import modelops as mo
from modelops.cluster.run_folder import RunFolder
from modelops.home import Home
from modelops.states import FINAL_JOB_STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from journal import Line

T = TypeVar("T")
BUNDLE = Path(__file__).parents[1] / "data" / "chaos"
COMMAND = [str(Path(sys.executable).with_name("modelops"))]
RESULT_FILES = ("replicates.parquet", "aggregates.parquet")
GIVE_UP_S = 900.0


@dataclass(frozen=True)
class Plan:
    """One study of the soak: its name, how long a replicate takes on average, how many there are."""

    name: str
    seconds: float
    params: int
    replicates: int
    checkpoints: bool = False
    isolation: str = "warm"

    def study(self, journals: Path) -> mo.Study:
        """Return the study; the same one each time, so that its results are."""
        given = {
            "name": self.name,
            "journal": str(journals),
            "seconds": self.seconds,
            "checkpoints": self.checkpoints,
        }
        return mo.Study(
            bundle=BUNDLE,
            parameters=[{**given, "p": p} for p in range(self.params)],
            replicates=self.replicates,
            seed=7,
            aggregate="model:summarize",
            min_success=0.5,
            isolation=self.isolation,
            # A kill of a runner is a crash like any other. The replicate that always fails ends by the same rule.
            retry=mo.Retry(max_retries=12, initial_delay=0.05, on=["crashed", "failed"]),
        )


PLANS = (
    Plan("steady", 0.3, 4, 20),
    Plan("quick", 0.05, 10, 30),
    Plan("forked", 0.3, 2, 24, isolation="fork"),
    Plan("slow", 1.5, 2, 12, checkpoints=True),
)
LONG = Plan("minute", 60.0, 1, 2, checkpoints=True)


@dataclass
class Pool:
    """The pool under fire: a home of its own on a PostgreSQL of its own."""

    root: Path
    postgres: Postgres
    workers: int = 4
    watchers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    live: dict[str, str] = field(default_factory=dict)  # ids of the jobs that run now, by names of studies

    def environ(self) -> dict[str, str]:
        """The variables by which commands find this pool and no other."""
        return {**os.environ, **self.settings}

    @property
    def settings(self) -> dict[str, str]:
        """What makes it a pool of its own."""
        return {"MODELOPS_HOME": str(self.root / "home"), "MODELOPS_DATABASE": self.url}

    def __post_init__(self) -> None:
        self.url = self.postgres.new_database()
        self.journals = self.root / "journals"
        self.journals.mkdir(parents=True)

    def command(self, *words: str, check: bool = True) -> str:
        """Run a command and return what it printed."""
        done = subprocess.run(
            [*COMMAND, *words], env=self.environ(), capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def pids(self) -> dict[str, list[int]]:
        """Return the pids by kind. Of the runners, those that are in a replicate."""
        found: dict[str, list[int]] = {"server": [], "worker": []}
        run = RunFolder(Home.at(self.root / "home"))
        for role in run.roles():
            pid, kind = run.holder(role), role.partition("-")[0]
            if pid is not None and kind in found:
                found[kind].append(pid)
        found["runner"] = [
            pid for lines in self.journal_lines().values() for pid in in_flight(lines) if _alive(pid)
        ]
        found["client"] = [w.pid for w in self.watchers.values() if w.poll() is None]
        found["postgres"] = [self.postgres.pid]
        return found

    def journal_lines(self) -> dict[str, list[Line]]:
        """Return the journal of each study."""
        names = [p.name for p in self.journals.iterdir() if "-failed-" not in p.name]
        return {name: read_journal(self.journals / name) for name in names}

    def crash_postgres(self) -> None:
        """Kill the database server as a whole, and start it again."""
        self.postgres.stop()
        self.postgres.start()

    def watch(self, job: str) -> None:
        """Have a client watch a job; one that was killed is started again."""
        watcher = self.watchers.get(job)
        if watcher is None or watcher.poll() is not None:
            self.watchers[job] = subprocess.Popen(
                [*COMMAND, "jobs", "watch", job],
                env=self.environ(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def close(self) -> None:
        """End clients and pool."""
        for watcher in self.watchers.values():
            watcher.kill()
            watcher.wait()
        self.command("down")


@dataclass
class Ended:
    """A job that ended: its counts, the digests of its result files, and its journal."""

    job: str
    plan: Plan
    state: str
    counts: dict[str, int]
    digests: dict[str, str]
    journal: list[Line]
    commits: list[tuple[float, tuple[int, int]]]


def run_jobs(pool: Pool, plans: Sequence[Plan], *, at_once: int, killer: Killer | None = None) -> list[Ended]:
    """Run jobs, a few at once, never two of one study (they would share a journal)."""
    waiting, running, ended = list(plans), dict[str, Plan](), list[Ended]()
    began = time.monotonic()
    if killer is not None:
        striking = threading.Thread(target=killer.run, name="killer")
        striking.start()
    try:
        while waiting or running:
            assert time.monotonic() - began < GIVE_UP_S, f"these never ended: {running}"
            busy = {plan.name for plan in running.values()}
            for plan in [p for p in waiting if p.name not in busy][: max(0, at_once - len(running))]:
                if plan.name in {p.name for p in running.values()}:
                    continue
                waiting.remove(plan)
                for old in pool.journals.glob(f"{plan.name}*"):
                    old.unlink()
                submitted = str(_patiently(partial(mo.submit, plan.study(pool.journals))).id)
                running[submitted], pool.live[plan.name] = plan, submitted
            for job, plan in list(running.items()):
                pool.watch(job)
                state = _patiently(lambda: mo.Client().job(job).status().state)  # noqa: B023  called at once
                if state in FINAL_JOB_STATES:
                    del running[job], pool.live[plan.name]
                    ended.append(_ended(pool, job, plan))
            threading.Event().wait(0.3)
    finally:
        if killer is not None:
            killer.end()
            striking.join()
    return ended


def _ended(pool: Pool, name: str, plan: Plan) -> Ended:
    job = _patiently(lambda: mo.Client().job(name))
    status = _patiently(job.status)
    folder = pool.root / "results" / name
    _patiently(lambda: job.sync(folder))
    digests = {f: hashlib.sha256((folder / "results" / f).read_bytes()).hexdigest() for f in RESULT_FILES}
    segments = _commits(pool.url, name)
    return Ended(
        name,
        plan,
        str(status.state),
        dict(status.counts),
        digests,
        read_journal(pool.journals / plan.name),
        segments,
    )


def _commits(url: str, job: str) -> list[tuple[float, tuple[int, int]]]:
    """Return when each range of indices was committed: the database's own word."""
    query = (
        "SELECT committed_at, lo, hi FROM segments JOIN segment_ranges USING (job, attempt) WHERE job = :job"
    )
    engine = sa.create_engine(url)
    try:
        with engine.connect() as sql:
            return [(at.timestamp(), (lo, hi)) for at, lo, hi in sql.execute(sa.text(query), {"job": job})]
    finally:
        engine.dispose()


def _patiently(ask: Callable[[], T]) -> T:
    """Ask again while the pool is being mended, as a script of a modeler would."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return ask()
        except mo.ModelOpsError:
            if time.monotonic() > deadline:
                raise
            threading.Event().wait(0.2)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def hit_by(pool: Pool, live: Callable[[], dict[str, str]]) -> Callable[[str, int], tuple[str, ...]]:
    """Return what tells the jobs whose live work a strike hits: ``live`` gives their ids by name of the study.

    A runner or a worker is hit when a replicate is in flight in it; server and database when the job has one in
    flight anywhere; a client when it watches the job.
    """

    def hit(kind: str, pid: int) -> tuple[str, ...]:
        jobs, lines = live(), pool.journal_lines()
        flying = {name: [p for p in in_flight(lines.get(name, [])) if _alive(p)] for name in jobs}
        if kind == "client":
            return tuple(job for job in jobs.values() if pool.watchers[job].pid == pid)
        if kind == "runner":
            return tuple(jobs[name] for name, pids in flying.items() if pid in pids)
        if kind == "worker":
            return tuple(
                jobs[name] for name, pids in flying.items() if any(pid in _ancestors(p) for p in pids)
            )
        return tuple(jobs[name] for name, pids in flying.items() if pids)

    return hit


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[1])
        except OSError:
            return
        yield pid


@contextlib.contextmanager
def started_pool(root: Path) -> Iterator[Pool]:
    """Start a pool under ``root`` and end it, whatever happens; this process is its client meanwhile."""
    with Postgres() as postgres:
        pool = Pool(root, postgres)
        before = {name: os.environ.get(name) for name in pool.settings}
        os.environ.update(pool.settings)
        try:
            pool.command("up", "--workers", str(pool.workers))
            yield pool
        finally:
            try:
                pool.close()
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})


def soak(
    pool: Pool, n_jobs: int, seed: int, *, every_s: float, long: bool
) -> tuple[list[Ended], dict[str, Ended], Killer]:
    """Run each study undisturbed, then ``n_jobs`` under fire; return those, the undisturbed ones, and the killer."""
    plans = [LONG] * long + [PLANS[i % len(PLANS)] for i in range(n_jobs - long)]
    calm = {e.plan.name: e for e in run_jobs(pool, sorted(set(plans), key=lambda p: -p.seconds), at_once=5)}
    killer = Killer(seed, every_s, pool.pids, hit_by(pool, pool.live.copy), pool.crash_postgres)
    return run_jobs(pool, plans, at_once=4 + long, killer=killer), calm, killer


def check(ended: Sequence[Ended], calm: dict[str, Ended], killer: Killer, *, least_hits: int) -> list[str]:
    """Return what is not as it should be, a sentence each."""
    wrong = []
    hits = Counter(job for strike in killer.strikes for job in strike.jobs)
    for job in ended:
        same = calm[job.plan.name]
        where = f"{job.plan.name} ({job.job})"
        if (job.state, job.counts) != (same.state, same.counts):
            wrong.append(f"{where} ended {job.state} {job.counts}, undisturbed {same.state} {same.counts}")
        wrong += [
            f"{where}: {name} differs" for name in RESULT_FILES if job.digests[name] != same.digests[name]
        ]
        if hits[job.job] < least_hits:
            wrong.append(f"{where} was hit only {hits[job.job]} times")
        wrong += [f"{where}: {again}" for again in begun_after_commit(job)]
    return wrong


def begun_after_commit(job: Ended) -> list[str]:
    """Return which replicates were begun again although their outcome was committed."""
    committed = {k: at for at, (lo, hi) in job.commits for k in range(lo, hi)}
    n = job.plan.replicates
    return [
        f"replicate {line.replicate} was begun {line.at - committed[k]:.3f} s after its outcome was committed"
        for line in job.journal
        if line.what == "begin" and line.at > committed[k := line.replicate[0] * n + line.replicate[1]]
    ]


def main() -> None:
    """Soak for as many jobs as asked; print the strikes and what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--every", type=float, default=3.0, help="seconds between strikes, on average")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modelops-chaos-") as root, started_pool(Path(root)) as pool:
        ended, calm, killer = soak(pool, arguments.jobs, arguments.seed, every_s=arguments.every, long=True)
        wrong = check(ended, calm, killer, least_hits=3)
    for line in (f"seed {arguments.seed}", *map(str, killer.strikes), *wrong):
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{len(ended)} jobs, {len(killer.strikes)} strikes, {len(wrong)} wrong\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
