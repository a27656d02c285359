"""What a job left behind, what of it is not as it should be, and a table of all."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from killer import DEADLY, KINDS, OF_THE_POOL
from plans import MAX_RETRIES
from pool import LEAST_KILLS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from journal import Line, Replicate
    from killer import Killer
    from plans import Plan

RESULT_FILES: Final = ("replicates.parquet", "aggregates.parquet")


@dataclass(frozen=True)
class Ended:
    """A job that ended.

    ``digests``: of its result files. ``rows``: of the replicates. ``tries``: the greatest attempt number of each
    replicate. ``commits``: when each range of indices was committed, which is the database's own word.
    """

    job: str
    plan: Plan
    state: str
    counts: Mapping[str, int]
    digests: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    tries: Mapping[Replicate, int]
    journal: Sequence[Line]
    commits: Sequence[tuple[float, tuple[int, int]]]

    def n(self, what: str) -> int:
        """Return how many lines of the journal say this."""
        return sum(line.what == what for line in self.journal)

    @property
    def n_retries(self) -> int:
        """How many retries its replicates used."""
        return sum(number - 1 for number in self.tries.values())


def what_is_wrong_undisturbed(job: Ended) -> Iterator[str]:
    """Yield what is not as arithmetic says, a sentence each: these are the known results."""
    for row in job.rows:
        replicate = (row["param"], row["replicate"])
        where = f"{job.plan.name}, undisturbed: replicate {replicate}"
        if row["replicate"] % 11 == 5:
            if (row["status"], job.tries[replicate]) != ("failed", 1 + MAX_RETRIES):
                yield f"{where} is {row['status']} after {job.tries[replicate]} attempts"
            continue
        rng, walk = random.Random(row["seed"]), 0.0
        for _ in range(job.plan.steps(row["replicate"])):
            walk += rng.random() - 0.5
        if (row["status"], row["walk"]) != ("succeeded", walk):
            yield f"{where} is {row['status']} with {row['walk']}, not {walk}"
        if job.tries[replicate] != 1 + (row["replicate"] % 7 == 3):
            yield f"{where} took {job.tries[replicate]} attempts"


def what_is_wrong(job: Ended, calm: Ended, killer: Killer) -> Iterator[str]:
    """Yield what is not as it should be, a sentence each."""
    where = f"{job.plan.name} ({job.job})"
    if (job.state, job.counts) != (calm.state, calm.counts):
        yield f"{where} ended {job.state} {job.counts}, undisturbed {calm.state} {calm.counts}"
    for name in RESULT_FILES:
        if job.digests[name] != calm.digests[name]:
            yield f"{where}: {name} differs"
    if (n := killer.kills(job.job, *OF_THE_POOL)) < LEAST_KILLS:
        yield f"{where}: only {n} kills hit its work"
    for again in begun_after_commit(job):
        yield f"{where}: {again}"
    for wrong in _attempts(job, killer):
        yield f"{where}: {wrong}"


def begun_after_commit(job: Ended) -> Iterator[str]:
    """Yield which replicates were begun again although their outcome was committed."""
    committed = {k: at for at, (lo, hi) in job.commits for k in range(lo, hi)}
    for line in job.journal:
        param, number = line.replicate
        at = committed.get(param * job.plan.replicates + number)
        if at is not None and line.what == "begin" and line.at > at:
            yield f"replicate {line.replicate} was begun {line.at - at:.3f} s after its outcome was committed"


def _attempts(job: Ended, killer: Killer) -> Iterator[str]:
    """Yield which replicates had more retries than failures and crashes, or fewer than their policy says."""
    failed = Counter(line.replicate for line in job.journal if line.what == "fail")
    for replicate, number in job.tries.items():
        # A runner that is stopped for five seconds is given up as crashed; on a slow machine it may be.
        crashed = sum(of(job.job, replicate, "runner") for of in (killer.deaths, killer.stops))
        explained = failed[replicate] + crashed
        if number - 1 > min(explained, MAX_RETRIES):
            yield f"replicate {replicate} had {number} attempts, which {explained} failures and crashes do not explain"
        if replicate[1] % 11 == 5 and number != 1 + MAX_RETRIES:
            yield f"replicate {replicate} failed for good after {number} attempts"


HEAD: Final = (
    "study", "job", "state", "ok", "failed", "begun", "retries", *KINDS, "stops",
    "kills", "deaths", "identical",
)  # fmt: skip


def table(ended: Sequence[Ended], calm: Mapping[Plan, Ended], killer: Killer) -> list[str]:
    """Return a line per job: kills by kind that hit its live work.

    ``kills``: those of all kinds but clients. ``deaths``: how often a replicate died with its runner or its worker.
    """
    rows: list[tuple[str, ...]] = [HEAD]
    for job in ended:
        stops = sum(s.how == "SIGSTOP" and job.job in s.jobs for s in killer.strikes)
        deaths = sum(killer.deaths(job.job, replicate, *DEADLY) for replicate in job.tries)
        cells = [
            job.plan.name, job.job[-6:], job.state, job.counts.get("succeeded", 0), job.counts.get("failed", 0),
            job.n("begin"), job.n_retries, *(killer.kills(job.job, kind) for kind in KINDS), stops,
            killer.kills(job.job, *OF_THE_POOL), deaths, "yes" if job.digests == calm[job.plan].digests else "NO",
        ]  # fmt: skip
        rows.append(tuple(map(str, cells)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    kinds = Counter(f"{s.how} {s.kind}" for s in killer.strikes)
    n_hits = sum(len(s.jobs) for s in killer.strikes)
    return [
        *lines,
        f"{len(killer.strikes)} strikes, each at live work, {n_hits} times a job was hit: "
        + ", ".join(f"{n} {what}" for what, n in sorted(kinds.items())),
    ]
