"""Does a job stand still for longer than its own replicates explain, and why? Pure: what was seen in, a sentence out.

Nothing is known of how long a replicate takes but what the job itself has shown: the longest chunk, the longest time
that passed between two steps forward, or its ``replicate_timeout``. Of aggregates it is the longest chunk of these.
Before anything is known a running job has a day: longer than most replicates take, and whoever knows that theirs do
not can say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from modelops.states import JobState
from modelops.study.wording import counted

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

PATIENCE_S: Final = 120.0  # nothing is said of what takes less
TIMES_LONGEST: Final = 10  # the longest step so far, before another is too long
PREPARING_S: Final = 900.0  # an environment may take that long to build
FINALIZING_S: Final = 1800.0  # result files may take that long to write
STOPPING_S: Final = 300.0  # a driver waits a minute for what workers could still hand in
UNMEASURED_S: Final = 86_400.0  # for a step of which nobody knows how long it takes
_UNMEASURED_AGGREGATES: Final = "nothing has shown yet how long its aggregates take"
_UNMEASURED: Final = (
    "nothing has shown yet how long its replicates take; a `replicate_timeout` says how long they may, and a model's "
    "`context.report` that they get on"
)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One look at a job that has not ended.

    ``mark``: differs whenever the job has made a step: an outcome, an aggregate, progress that a replicate reports, a
    change of state. ``waiting_for``: what it cannot go on without: the answer of the database or the storage, the
    scheduler, its turn. ``n_refused``: workers that get no work as their versions do not fit. ``pools``: those it asks
    for, if any; then ``n_workers`` are of these.
    ``n_running``: replicates that workers hold; ``n_running_of_others``: of other jobs; ``n_aggregating``: parameter
    sets whose aggregates they make. ``longest_chunk_s``: of replicates and of aggregates, if any has been measured.
    ``n_lost_with_worker``: attempts that ended with the death of their worker.
    ``retry_delay_s``: as long as a replicate may have to wait before it is tried again.
    """

    state: JobState
    mark: Hashable
    waiting_for: str = ""
    is_driven: bool = True
    n_workers: int = 0
    n_refused: int = 0
    pools: tuple[str, ...] = ()
    n_running: int = 0
    n_running_of_others: int = 0
    n_aggregating: int = 0
    longest_chunk_s: tuple[float | None, float | None] = (None, None)
    n_lost_with_worker: int = 0
    replicate_timeout_s: float | None = None
    retry_delay_s: float = 0.0

    @property
    def phase(self) -> Hashable:
        """What a job goes through; how long it stays in one says nothing of how long steps take in another."""
        return self.state, self.is_driven


@dataclass(frozen=True)
class Watched:
    """What is remembered of a job between two looks.

    ``longest_s``: between two steps of one phase, None before there were two.
    """

    mark: Hashable
    since_s: float
    longest_s: float | None = None
    n_steps: int = 0
    phase: Hashable = None


class Stall(NamedTuple):
    """Why a job stands still, and since how many seconds."""

    reason: str
    idle_s: float

    def __str__(self) -> str:
        return f"no progress for {_rounded(self.idle_s)}: {self.reason}"


def look(before: Watched | None, seen: Seen, now_s: float) -> tuple[Watched, Stall | None]:
    """Return what to remember, and why the job stands still; None: it does not, or that is explained."""
    if before is None:
        return Watched(seen.mark, now_s, phase=seen.phase), None
    if before.mark != seen.mark:
        took_s = now_s - before.since_s
        # The first step has the start of everything in it: interpreters, imports, compilation.
        counts = before.n_steps and before.phase == seen.phase
        longest_s = max(took_s, before.longest_s or 0.0) if counts else before.longest_s
        return Watched(seen.mark, now_s, longest_s, before.n_steps + 1, seen.phase), None
    idle_s = now_s - before.since_s
    explained_s, reason = _explanation(seen, before.longest_s)
    if idle_s < max(PATIENCE_S, explained_s):
        return before, None
    return before, Stall(reason, idle_s)


def _explanation(seen: Seen, longest_s: float | None) -> tuple[float, str]:
    """Return how long a stand is explained, and the reason once it is not."""
    if seen.waiting_for:
        return 0.0, seen.waiting_for
    if seen.state in (JobState.QUEUED, JobState.PREPARING):
        return PREPARING_S, "its environment is still being prepared"
    if seen.state is JobState.CANCELLING and seen.n_running:
        n = counted(seen.n_running, "replicate")
        return STOPPING_S, f"it is being cancelled, and workers have not stopped {n} of it"
    if seen.state is JobState.CANCELLING:
        return FINALIZING_S, "it is being cancelled, and what is kept of it is still being written"
    if seen.state is JobState.FINALIZING:
        return FINALIZING_S, "its result files are still being written"
    if not seen.n_workers:
        if seen.n_refused:
            return (
                0.0,
                f"connected is only what gets no work: {counted(seen.n_refused, 'worker')} of versions that do not fit",
            )
        if seen.pools:
            return 0.0, no_worker_of(seen.pools) + _deaths(seen)
        return 0.0, f"no worker is connected{_deaths(seen)}"
    if not (seen.n_running or seen.n_aggregating):
        if seen.n_running_of_others:
            return seen.retry_delay_s, "all workers are busy with other jobs"
        return seen.retry_delay_s, "workers are connected, and nothing of it runs on them"
    return max(_of_replicates(seen, longest_s), _of_aggregates(seen))


def _of_replicates(seen: Seen, longest_s: float | None) -> tuple[float, str]:
    if not seen.n_running:
        return 0.0, ""
    if seen.replicate_timeout_s is not None:
        limit = _rounded(seen.replicate_timeout_s)
        return seen.replicate_timeout_s, f"replicates run for longer than their limit of {limit}"
    known = [s for s in (longest_s, seen.longest_chunk_s[0]) if s is not None]
    if not known:
        return UNMEASURED_S, _UNMEASURED
    return TIMES_LONGEST * max(known), f"until now no step took longer than {_rounded(max(*known, 1.0))}"


def _of_aggregates(seen: Seen) -> tuple[float, str]:
    if not seen.n_aggregating:
        return 0.0, ""
    chunk_s = seen.longest_chunk_s[1]
    if chunk_s is None:
        return UNMEASURED_S, _UNMEASURED_AGGREGATES
    return TIMES_LONGEST * chunk_s, f"until now no aggregates took longer than {_rounded(max(chunk_s, 1.0))}"


def no_worker_of(pools: Sequence[str]) -> str:
    """Say that none of these pools has a worker."""
    return f"no worker of the pools that it asks for is connected: {', '.join(pools)}"


def _deaths(seen: Seen) -> str:
    """Say whether it may be the job itself that ends its workers: one that died may have had another reason."""
    n = seen.n_lost_with_worker
    return (
        f"; {n:,} attempts of this job ended as their workers died, so its model may be why" if n > 1 else ""
    )


def _rounded(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
