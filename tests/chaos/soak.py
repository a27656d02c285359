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
from typing import TYPE_CHECKING, Final, TypeVar

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

import pyarrow.parquet as pq
import sqlalchemy as sa
from killer import Killer
from plans import LONG, PLANS, Plan
from pool import Live, Pool, started_pool
from verdict import RESULT_FILES, Ended, table, what_is_wrong, what_is_wrong_undisturbed

import modelops as mo
from modelops.errors import ServerUnreachableError
from modelops.states import FINAL_JOB_STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from journal import Replicate

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
                for job, one in list(live.items()):
                    if self._has_ended(job):
                        del live[job]
                        ended.append(self._ended(one))
                        self.pool.say(
                            f"{one.plan.name} ({job}) has ended; {len(waiting) + len(live)} are left"
                        )
                self.pool.look_after_watchers()
                threading.Event().wait(LOOK_EVERY_S)
        finally:
            if killer is not None:
                killer.end()
        return ended

    def _submitted(self, plan: Plan) -> str:
        """Submit; if the answer got lost, find the job that was recorded, as a script of a modeler would."""
        while True:
            try:
                job = str(mo.submit(plan.study(self.pool.folder(plan))).id)
            except mo.ModelOpsError:
                recorded = self._patiently(lambda: {str(job.id) for job in mo.Client().jobs()}) - self._known
                if not recorded:
                    continue
                (job,) = recorded
            self._known.add(job)
            return job

    def _has_ended(self, job: str) -> bool:
        asked_at = time.monotonic()
        status = self._patiently(lambda: mo.Client().job(job).status())
        self.pool.heard(job, status, asked_at)
        return status.state in FINAL_JOB_STATES

    def _ended(self, one: Live) -> Ended:
        job = self._patiently(lambda: mo.Client().job(one.job))
        status = self._patiently(partial(_known, job))
        folder = self.pool.root / "results" / one.job
        self._patiently(lambda: job.sync(folder))
        tries: dict[Replicate, int] = {}
        for row in self._patiently(job.attempts).to_pylist():
            replicate = (row["param"], row["replicate"])
            tries[replicate] = max(row["attempt_number"], tries.get(replicate, 0))
        files = {name: folder / "results" / name for name in RESULT_FILES}
        return Ended(
            job=one.job,
            plan=one.plan,
            state=str(status.state),
            counts={str(status): n for status, n in status.counts.items()},
            digests={name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
            rows=pq.read_table(files["replicates.parquet"]).to_pylist(),
            tries=tries,
            journal=self.pool.journal(one.plan),
            commits=self._patiently(partial(_commits, self.pool.url, one.job)),
        )

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask again while the pool is being mended."""
        while True:
            if time.monotonic() > self._deadline:
                standing = "\n".join(self.pool.standing())
                raise CutOffError(f"not done within {self.within_s:.0f} s:\n{standing}")
            try:
                return ask()
            except (mo.ModelOpsError, sa.exc.OperationalError) as error:
                self.pool.say(f"asked again: {error}")
                threading.Event().wait(LOOK_EVERY_S)


def _known(job: mo.Job) -> JobStatus:
    status = job.status()
    if not status.final:
        raise ServerUnreachableError(job.id, status.reason, "")
    return status


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
