"""What a job left behind, what of it is not as it should be, and a table of all."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from killer import DEADLY, KINDS, OF_THE_POOL
from plans import MAX_RETRIES
from pool import LEAST_KILLS

from modelops.server.reconcile import Mismatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from journal import Line, Replicate
    from killer import Killer
    from plans import Plan
    from watchers import Watch

RESULT_FILES: Final = ("replicates.parquet", "aggregates.parquet")
RETRIED: Final = frozenset({"failed", "crashed"})  # by the policy of every plan
# What the death of a process may leave behind; that anything stored is damaged or gone it may not.
MAY_DIFFER: Final = frozenset({Mismatch.SEGMENT_UNRECORDED, Mismatch.NOBODY_RUNS, Mismatch.RUNS_AFTER_END})


class Commit(NamedTuple):
    """Outcomes of a range of indices count since a time. ``attempt``: whose segment holds them."""

    at: float
    attempt: str
    lo: int
    hi: int


@dataclass(frozen=True)
class Ended:
    """A job that ended.

    ``digests``: of its result files. ``rows``: of the replicates. ``attempts``: rows of ``attempts.parquet``.
    ``commits``: the database's own word. ``mismatches``: what was not as recorded. ``untrue``: what was said of the
    job while it ran, and cannot be.
    """

    job: str
    plan: Plan
    state: str
    counts: Mapping[str, int]
    digests: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    attempts: Sequence[Mapping[str, Any]]
    journal: Sequence[Line]
    commits: Sequence[Commit]
    mismatches: Sequence[str] = ()
    untrue: Sequence[str] = ()

    @cached_property
    def of_replicate(self) -> Mapping[Replicate, Sequence[Mapping[str, Any]]]:
        """The tries at each replicate that ended by themselves: rows of ``attempts.parquet``."""
        found: dict[Replicate, list[Mapping[str, Any]]] = {}
        for row in self.attempts:
            found.setdefault((row["param"], row["replicate"]), []).append(row)
        return found

    @cached_property
    def tries(self) -> Mapping[Replicate, int]:
        """The greatest attempt number of each replicate."""
        return {key: max(row["attempt_number"] for row in rows) for key, rows in self.of_replicate.items()}

    @cached_property
    def committed(self) -> Mapping[Replicate, Commit]:
        """What made the outcome of each replicate count."""
        n = self.plan.replicates
        return {(k // n, k % n): commit for commit in self.commits for k in range(commit.lo, commit.hi)}

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
    for wrong in wrong_attempts(job):
        yield f"{job.plan.name}, undisturbed: {wrong}"


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
    for wrong in (*wrong_attempts(job), *_unexplained_attempts(job, killer)):
        yield f"{where}: {wrong}"


def begun_after_commit(job: Ended) -> Iterator[str]:
    """Yield which replicates were begun again although their outcome was committed."""
    for line in job.journal:
        commit = job.committed.get(line.replicate)
        if commit is not None and line.what == "begin" and line.at > commit.at:
            yield f"replicate {line.replicate} was begun {line.at - commit.at:.3f} s after its outcome was committed"


def what_was_said_wrongly(job: Ended, watches: Sequence[Watch]) -> Iterator[str]:
    """Yield what anybody was told of a job and is not true, a sentence each."""
    where = f"{job.plan.name} ({job.job})"
    for untrue in job.untrue:
        yield f"{where}: {untrue}"
    for mismatch in job.mismatches:  # nothing here damages or removes what is stored
        if mismatch.partition(":")[0] not in MAY_DIFFER:
            yield f"{where}: found by the reconciler: {mismatch}"
    for watch in watches:
        for wrong in watch.what_is_wrong(job.state, job.counts):
            yield f"{where}: {wrong}"
    if not watches:
        yield f"{where}: nobody has watched it"


def wrong_attempts(job: Ended) -> Iterator[str]:
    """Yield what ``attempts.parquet`` says that its own rows, the outcomes and the commits contradict.

    A worker that was thought lost may come back: then there are two tries of one number, and the outcome is that of
    either. Otherwise a number stands for one try, each but the last one ended so that the next was begun.
    """
    for row in job.rows:
        replicate = (row["param"], row["replicate"])
        tries, commit = job.of_replicate.get(replicate, ()), job.committed.get(replicate)
        where = f"replicate {replicate}"
        if commit is None:
            yield f"{where} is {row['status']}, and no segment with its outcome is recorded"
            continue
        numbers = {one["attempt_number"] for one in tries}
        if numbers != set(range(1, len(numbers) + 1)):
            yield f"{where} has attempts of numbers {sorted(numbers)}"
        last = [one for one in tries if one["attempt"] == commit.attempt]
        if [one["status"] for one in last] != [row["status"]]:
            yield f"{where} is {row['status']}, and its attempt was {[one['status'] for one in last]}"
            continue
        for number in range(1, last[0]["attempt_number"]):
            if not {one["status"] for one in tries if one["attempt_number"] == number} & RETRIED:
                yield f"{where}: its attempt {number} neither failed nor crashed, and was retried"
    if unknown := job.of_replicate.keys() - {(row["param"], row["replicate"]) for row in job.rows}:
        yield f"there are attempts at replicates that it does not have: {sorted(unknown)}"


def _unexplained_attempts(job: Ended, killer: Killer) -> Iterator[str]:
    """Yield which replicates had more retries than failures and crashes, or fewer than their policy says."""
    failed = Counter(line.replicate for line in job.journal if line.what == "fail")
    for replicate, number in job.tries.items():
        # A runner that is stopped for five seconds is given up as crashed; on a slow machine it may be.
        crashed = sum(of(job.job, replicate, "runner") for of in (killer.deaths, killer.stops))
        explained = failed[replicate] + crashed
        ends = Counter(row["status"] for row in job.of_replicate[replicate])
        if ends["failed"] > failed[replicate] or ends["crashed"] > crashed:
            yield (
                f"replicate {replicate} has {ends['failed']} failed and {ends['crashed']} crashed attempts; it "
                f"failed {failed[replicate]} times, and {crashed} times its runner was struck"
            )
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
