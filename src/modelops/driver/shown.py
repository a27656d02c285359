"""What a machine shows of its job: counts, progress, time left, and whether anything can happen now.

Cheap, and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.driver.backlog import Kind
from modelops.states import AggregateStatus, JobState, ReplicateStatus
from modelops.study.ranges import Ranges

if TYPE_CHECKING:
    from modelops.driver.backlog import Backlog
    from modelops.driver.blame import Blame
    from modelops.driver.course import Course
    from modelops.driver.dispatch import Dispatcher
    from modelops.driver.ledger import Ledger
    from modelops.driver.outbox import Outbox
    from modelops.driver.places import Places
    from modelops.driver.plan import Plan
    from modelops.driver.pools import Pools, PoolView
    from modelops.driver.probe import Probe
    from modelops.driver.roster import Roster
    from modelops.study.spec import JobSpec

_SIMULATE: Final = Kind.SIMULATE
_AGGREGATE: Final = Kind.AGGREGATE


class Shown:
    """The part of `Machine` that is asked, and decides nothing."""

    spec: JobSpec
    _backlogs: dict[Kind, Backlog]
    _blame: Blame
    _course: Course
    _dispatcher: Dispatcher
    _ledger: Ledger
    _outbox: Outbox
    _places: Places
    _plan: Plan | None
    _pools: Pools
    _probe: Probe
    _roster: Roster

    @property
    def state(self) -> JobState:
        """The job's state."""
        return self._course.state

    @property
    def reason(self) -> str:
        """Why the job is in this state; may be empty."""
        return self._course.reason

    def counts(self) -> dict[ReplicateStatus, int]:
        """Return how many replicates have each status; they add up to the size of the line."""
        n_open = self._ledger.n_open
        is_final = self._course.is_final
        running = 0 if is_final else min(n_open, self._places.n_running)
        return {
            ReplicateStatus.PENDING: 0 if is_final else n_open - running,
            ReplicateStatus.RUNNING: running,
            **self._ledger.counts,
            ReplicateStatus.NOT_RUN: n_open if is_final and self.state is not JobState.CANCELLED else 0,
            ReplicateStatus.CANCELLED: n_open if self.state is JobState.CANCELLED else 0,
        }

    def aggregate_counts(self) -> dict[AggregateStatus, int]:
        """Return how many aggregates ended how; those not made are `not_run` once the job is over."""
        counts = dict(self._ledger.aggregate_counts)
        if self._course.is_final:
            counts[AggregateStatus.NOT_RUN] += self.n_aggregates - sum(counts.values())
        return counts

    @property
    def n_aggregates(self) -> int:
        """How many aggregates the job has: parameter sets times entry points."""
        return self._ledger.n_aggregates

    @property
    def progress(self) -> float:
        """The fraction of replicates that have a final outcome (1.0 for an empty job)."""
        size = self.spec.line.size
        return self._ledger.n_outcomes / size if size else 1.0

    def eta(self, now: float) -> float | None:
        """Return the expected seconds to the end, or None while nothing is known."""
        if self._course.is_final:
            return 0.0
        if self._outbox.paused or not self._roster.slots:
            return None
        n_open = self._ledger.n_open if self._plan is None else self._plan.needs.n_expected
        seconds = self._dispatcher.seconds_left(_SIMULATE, n_open)
        if seconds is None:
            if n_open:
                return None
            seconds = 0.0
        seconds += self._dispatcher.seconds_left(_AGGREGATE, self._ledger.n_open_params) or 0.0
        due = self._backlogs[_SIMULATE].next_at
        return max(seconds, due - now) if due is not None else seconds

    @property
    def running(self) -> Ranges:
        """The indices that workers run, or have ended, and that have no outcome yet."""
        return self._held(_SIMULATE)

    @property
    def n_aggregating(self) -> int:
        """Of how many parameter sets workers make the aggregates, or have made them and they are not recorded yet."""
        return len(self._held(_AGGREGATE))

    def _held(self, kind: Kind) -> Ranges:
        attempts = self._roster.attempts.values()
        held = [a.work.ranges for a in attempts if a.work.kind is kind and not a.stands]
        return self._ledger.lacks(kind, Ranges(pair for ranges in held for pair in ranges.pairs))

    @property
    def longest_s(self) -> tuple[float | None, float | None]:
        """The seconds of the longest chunk that this driver has seen, of replicates and of aggregates, if any."""
        return self._dispatcher.meters[_SIMULATE].longest_s, self._dispatcher.meters[_AGGREGATE].longest_s

    @property
    def n_lost_with_worker(self) -> int:
        """How many attempts ended, since this driver took the job up, with the death of the worker that ran them."""
        return self._blame.n_lost

    def pools(self) -> tuple[PoolView, ...]:
        """Return the pools that were asked for, or else those that workers are in, and what runs there."""
        running = {
            name: sum(
                len(a.work.ranges) for a in w.running.values() if a.work.kind is _SIMULATE and not a.waits
            )
            for name, w in self._roster.workers.items()
        }
        return self._pools.views(running)

    @property
    def n_live(self) -> int:
        """How many attempts workers hold."""
        return len(self._roster.attempts)

    @property
    def is_held_up(self) -> bool:
        """Whether workers can do nothing for it now: its pools have none, or all that is left is delayed retries."""
        if self.state is not JobState.RUNNING or self._roster.attempts:
            return False
        if self.spec.asked_pools and not self._roster.slots:
            return True
        ready = any(backlog.n_ready or backlog.suspects for backlog in self._backlogs.values())
        return not ready and self._backlogs[_SIMULATE].next_at is not None

    @property
    def sleeps_until(self) -> float | None:
        """When there is something to do again, and only recorded retries wait for it; None if something else may come.

        Another driver that begins then loses nothing: it is told of these retries, and when they were recorded.
        """
        if not self.is_held_up or self.spec.timeout_s is not None or not self._roster.slots:
            return None
        if self._outbox.paused or self._places.commits or not self._probe.passed or self._plan is not None:
            return None
        others = self._backlogs[_AGGREGATE].next_at is not None
        return (
            None
            if others or not self._backlogs[_SIMULATE].waits_only_for_retries
            else self._backlogs[_SIMULATE].next_at
        )
