"""Run jobs on a real pool while a killer strikes; compare what comes out with an undisturbed run.

``python tests/chaos/soak.py --jobs 200 --seed 7`` is the long one, by hand (``make chaos``). However it ends (done,
out of time, SIGTERM, SIGINT), it ends its pool and leaves no process.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

import pyarrow.parquet as pq
import sqlalchemy as sa
from killer import Killer
from plans import LONG, PLANS, Plan
from pool import END_S, Live, Pool, started_pool
from verdict import (
    RESULT_FILES,
    Commit,
    Ended,
    table,
    what_is_wrong,
    what_is_wrong_undisturbed,
    what_was_said_wrongly,
)

import modelops as mo
from modelops.errors import ClusterError, InternalError, ServerUnreachableError, StorageError
from modelops.states import FINAL_JOB_STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modelops.client import JobStatus

T = TypeVar("T")
AT_ONCE: Final = 5
LOOK_EVERY_S: Final = 0.3
WITHIN_S: Final = 2400.0
EVERY_S: Final = 1.5
ENOUGH_FOR_ALL: Final = 20  # jobs, for every kind to be struck in every way


class CutOffError(Exception):
    """The time was up before all jobs had ended."""


@dataclass
class Soak:
    """Jobs on a pool. ``within_s``: when to give up; far more than it takes anywhere."""

    pool: Pool
    seed: int
    every_s: float
    within_s: float = WITHIN_S
    _known: set[str] = field(default_factory=set)  # jobs
    _untrue: list[str] = field(default_factory=list)  # answers that no part that is away explains

    def run(self, n_jobs: int) -> tuple[list[str], list[str]]:
        """Run each study undisturbed, then ``n_jobs`` under fire; return a table of them, and what is wrong.

        Raises
        ------
        CutOffError
            Some have not ended in time; it says where they stand.
        """
        self._deadline = time.monotonic() + self.within_s
        plans = [LONG, *(PLANS[i % len(PLANS)] for i in range(n_jobs - 1))]
        self.pool.say(f"seed {self.seed}; first each study undisturbed")
        calm = {ended.plan: ended for ended in self._run(list(dict.fromkeys(plans)))}
        wrong = [line for ended in calm.values() for line in what_is_wrong_undisturbed(ended)]
        self.pool.say(f"now {n_jobs} jobs under fire")
        self.pool.gates = True
        killer = Killer(self.seed, self.every_s, self.pool)
        ended = self._run(plans, killer)
        for job in ended:
            wrong += what_is_wrong(job, calm[job.plan], killer)
        for job in (*calm.values(), *ended):
            wrong += what_was_said_wrongly(job, self.pool.watchers.of(job.job, killer.killed("client")))
        wrong += self._untrue
        ways = {strike.how for strike in killer.strikes if strike.kind == "postgres"}
        if n_jobs >= ENOUGH_FOR_ALL and len(ways) < 2:
            wrong.append(f"PostgreSQL was not both killed and stopped, only {ways}")
        if len(ended) != n_jobs:
            wrong.append(f"{len(ended)} jobs ended, not {n_jobs}")
        return table(ended, calm, killer), wrong

    def _run(self, plans: Sequence[Plan], killer: Killer | None = None) -> list[Ended]:
        """Run jobs, a few at once, never two of one study (they would share a journal)."""
        waiting, ended, live = list(plans), list[Ended](), self.pool.live
        if killer is not None:
            killer.start()
        try:
            while waiting or live:
                if killer is not None and killer.error is not None:
                    raise killer.error
                for plan in list(dict.fromkeys(waiting)):
                    if len(live) < AT_ONCE and plan not in [one.plan for one in live.values()]:
                        waiting.remove(plan)
                        self.pool.make_ready(plan)
                        job = self._submitted(plan)
                        live[job] = Live(job, plan)
                        self.pool.say(f"{plan.name} ({job}) is submitted")
                self.pool.look_after_processes()
                for job, one in list(live.items()):
                    if self._has_ended(job):
                        del live[job]
                        ended.append(self._ended(one))
                        self.pool.say(
                            f"{one.plan.name} ({job}) has ended; {len(waiting) + len(live)} are left"
                        )
                threading.Event().wait(LOOK_EVERY_S)
        finally:
            if killer is not None:
                killer.end()
        self.pool.watchers.wait(END_S)
        return ended

    def _submitted(self, plan: Plan) -> str:
        """Submit; if the answer got lost, find the job that was recorded, as a script of a modeler would."""
        while True:
            try:
                job = str(mo.submit(plan.study(self.pool.folder(plan))).id)
            except mo.ModelOpsError as error:
                self._hear(error)
                recorded = self._patiently(lambda: {str(job.id) for job in mo.Client().jobs()}) - self._known
                if not recorded:
                    continue
                (job,) = recorded
            self._known.add(job)
            return job

    def _has_ended(self, job: str) -> bool:
        asked_at = time.monotonic()
        status = self._patiently(lambda: mo.Client().job(job).status())
        self.pool.heard(self.pool.live[job], status, asked_at)
        return status.state in FINAL_JOB_STATES

    def _ended(self, one: Live) -> Ended:
        job = self._patiently(lambda: mo.Client().job(one.job))
        status = self._patiently(partial(_known, job))
        self.pool.heard(one, status, time.monotonic())
        folder = self.pool.root / "results" / one.job
        self._patiently(lambda: job.sync(folder))
        files = {name: folder / "results" / name for name in RESULT_FILES}
        return Ended(
            job=one.job,
            plan=one.plan,
            state=str(status.state),
            counts={str(status): n for status, n in status.counts.items()},
            digests={name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
            rows=pq.read_table(files["replicates.parquet"]).to_pylist(),
            attempts=pq.read_table(folder / "results" / "attempts.parquet").to_pylist(),
            journal=self.pool.journal(one.plan),
            commits=self._patiently(partial(_commits, self.pool.url, one.job)),
            mismatches=self._patiently(partial(_mismatches, self.pool.url, one.job)),
            untrue=tuple(one.untrue),
        )

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask again while the pool is being mended."""
        while True:
            if time.monotonic() > self._deadline:
                standing = "\n".join(self.pool.standing())
                untrue = "\n".join(self._untrue)
                raise CutOffError(f"not done within {self.within_s:.0f} s:\n{standing}\n{untrue}")
            try:
                return ask()
            except (mo.ModelOpsError, sa.exc.OperationalError) as error:
                self._hear(error)
                threading.Event().wait(LOOK_EVERY_S)

    def _hear(self, error: Exception) -> None:
        """Note an error, unless it says that a part is away which may be."""
        self.pool.say(f"asked again: {error}")
        if not says_what_is_away(error):
            self._untrue.append(f"an answer was {type(error).__name__}: {error}")


def says_what_is_away(error: Exception) -> bool:
    """Whether an error is one that may be while parts are struck: the server or the database is away, by its name."""
    text = str(error)
    if isinstance(error, ServerUnreachableError):
        return not error.answers or "database" in error.why
    if isinstance(error, StorageError):
        return "database" in text and "damage" not in text
    # The server of this machine was to be started, and is not ready in time.
    return isinstance(error, sa.exc.OperationalError) or (
        type(error) is ClusterError and " of this home " in text and "damage" not in text
    )


def _known(job: mo.Job) -> JobStatus:
    """Return the status of a job that has ended."""
    status = job.status()
    if status.unknown_since is not None:
        raise ServerUnreachableError(job.id, status.reason, "")
    if not status.final:
        raise InternalError(f"job {job.id} had ended, and now is {status.state}")
    return status


def _commits(url: str, job: str) -> list[Commit]:
    """Return when each attempt's range of indices was committed: the database's own word."""
    query = (
        "SELECT committed_at, attempt, lo, hi FROM segments JOIN segment_ranges USING (job, attempt) "
        "WHERE job = :job"
    )
    return [Commit(at.timestamp(), attempt, lo, hi) for at, attempt, lo, hi in _asked(url, query, job)]


def _mismatches(url: str, job: str) -> list[str]:
    """Return what was not as recorded, a sentence each."""
    query = "SELECT data, text FROM events WHERE job = :job AND kind = 'mismatch'"
    return [f"{data['kind']}: {text}" for data, text in _asked(url, query, job)]


def _asked(url: str, query: str, job: str) -> list[Any]:
    engine = sa.create_engine(url)
    try:
        with engine.connect() as sql:
            return list(sql.execute(sa.text(query), {"job": job}))
    finally:
        engine.dispose()


def said() -> Callable[[str], None]:
    """Return what prints a line at once, with the seconds since now."""
    began = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"[{time.monotonic() - began:6.1f}] {text}\n")
        sys.stdout.flush()

    return say


def soak(
    root: Path, *, n_jobs: int, seed: int, every_s: float = EVERY_S, within_s: float = WITHIN_S
) -> list[str]:
    """Soak on a pool below ``root``, telling each strike; return what is wrong."""
    say = said()
    with started_pool(root, say) as pool:
        lines, wrong = Soak(pool, seed, every_s, within_s).run(n_jobs)
    wrong += [f"process {process} was left" for process in pool.left]
    cpu_s = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    for line in (*lines, *wrong, f"{n_jobs} jobs, {len(wrong)} wrong, seed {seed}; {cpu_s:.0f} CPU seconds"):
        say(line)
    return wrong


def main() -> None:
    """Soak for as many jobs as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between strikes, on average")
    parser.add_argument(
        "--within", type=float, help="seconds after which to give up; default: two minutes a job"
    )
    given = parser.parse_args()
    within_s = given.within or max(WITHIN_S, 120.0 * given.jobs)
    with tempfile.TemporaryDirectory(prefix="modelops-chaos-") as root:
        try:
            wrong = soak(
                Path(root), n_jobs=given.jobs, seed=given.seed, every_s=given.every, within_s=within_s
            )
        except (CutOffError, KeyboardInterrupt) as error:
            sys.exit(str(error) or "interrupted")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
