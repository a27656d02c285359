"""What becomes of a receipt: outcomes are committed, failures retried, what was given back waits again.

An index has a final outcome when the store said so (`Committed`), never before. Doing the same twice, or too late,
changes nothing that is committed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from modelops.driver import commands as c
from modelops.driver.backlog import Kind, Work
from modelops.driver.places import Commit
from modelops.states import AggregateStatus, ReplicateStatus
from modelops.study.ranges import EMPTY, Ranges
from modelops.study.wording import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modelops.driver import events as e
    from modelops.driver.course import Course
    from modelops.driver.dispatch import Dispatcher
    from modelops.driver.ledger import Ledger
    from modelops.driver.outbox import Outbox
    from modelops.driver.places import Places
    from modelops.driver.plan import Plan
    from modelops.driver.pools import Pools
    from modelops.driver.probe import Probe
    from modelops.study.ids import AttemptId
    from modelops.study.spec import JobSpec
    from modelops.worker.messages import AggregateReceipt, ErrorExample, Receipt, SegmentRef

MAX_ERRORS: Final = 3  # of the machinery around one chunk, before the job stops
ERROR_DELAY_S: Final = 1.0  # before the first repetition; times four for each further one
GIVEN_BACK_DELAY_S: Final = 1.0  # when a worker returns a chunk untouched, unasked

_SIMULATE, _AGGREGATE = Kind.SIMULATE, Kind.AGGREGATE


class Intake:
    """Takes in receipts and the store's answers. ``stop`` ends the job early, for a reason."""

    def __init__(
        self,
        spec: JobSpec,
        *,
        ledger: Ledger,
        places: Places,
        dispatcher: Dispatcher,
        probe: Probe,
        course: Course,
        outbox: Outbox,
        stop: Callable[[str, float], None],
        pools: Pools,
        plan: Plan | None = None,
        failed_before: int | None = 0,
    ) -> None:
        self._spec, self._ledger, self._places, self._probe = spec, ledger, places, probe
        self._backlogs, self._meters = dispatcher.backlogs, dispatcher.meters
        self._course, self._outbox, self._stop, self._plan = course, outbox, stop, plan
        self._pools, self._failed_before = pools, failed_before
        self._noted: set[str] = set()

    # Receipts.

    def chunk(self, receipt: Receipt, now: float) -> None:
        """Take in what became of a chunk, or of a part of it."""
        for part in receipt.parts:  # in case they were not heard of before
            self.chunk(part, now)
        work, late = self._places.take_over(receipt.attempt, _SIMULATE)
        if work is None and receipt.part_of is not None:
            work, late = self._places.take_part(receipt.part_of, receipt.indices)
        if work is None:
            return
        for text in receipt.notes:
            if text not in self._noted:
                self._noted.add(text)
                self._outbox.write(c.Note("note", text))
        segment, fatal = receipt.segment, receipt.missing_import
        examples = [f.example for f in receipt.failures]
        stored = EMPTY
        if segment is not None:
            stored = work.ranges if segment.ranges == work.ranges.pairs else Ranges(segment.ranges)
        tried = stored
        again = EMPTY
        for _, ranges in receipt.retry:
            again |= Ranges(ranges)
        if again.pairs:
            tried = stored | again
        if tried.pairs:
            self._measure(len(tried), receipt)
        if segment is not None:
            kept = segment if self._plan is None else self._plan.needs.cut_segment(segment)
            if not self._probe.passed and segment.counts.get(ReplicateStatus.SUCCEEDED):
                self._judge(EMPTY, 1, [], now)  # it is no status yet, but reason enough to go on
            if kept is not None:
                needed = stored if kept is segment else Ranges(kept.ranges)
                if (pool := self._pools.of(receipt.worker)) is not None:
                    kept = msgspec.structs.replace(kept, pool=pool)
                commit = Commit(work.of(needed), c.CommitSegment(kept), examples, late)
                self._commit_if_new(receipt.attempt, commit)
        if not late:
            if again and self._plan is not None:
                again = self._plan.needs.cut(again)
            if again:
                self._retry(work, again & work.ranges, now)
            if (back := work.ranges - tried).pairs:
                unasked = not (tried or self._course.draining or fatal or receipt.part_of or receipt.parts)
                at = now + GIVEN_BACK_DELAY_S if unasked else None
                self._places.requeue(work._replace(ranges=back, errors=0), at)
        if fatal is not None:
            self._stop(fatal, now)
        elif not late and again and work.number == 1:
            self._judge(again - stored, 0, examples if segment is None else [], now)

    def aggregates(self, receipt: AggregateReceipt, now: float) -> None:
        """Take in what became of an aggregate chunk."""
        work, late = self._places.take_over(receipt.attempt, _AGGREGATE)
        if work is None:
            return
        stored = receipt.stored
        made = Ranges(stored.params) if stored else EMPTY
        if stored is not None:
            self._meters[_AGGREGATE].record(len(made), receipt.wall_seconds, small_bytes=stored.n_bytes)
            commit = Commit(work.of(made), c.CommitAggregates(stored), [], late)
            self._commit_if_new(receipt.attempt, commit)
        if not late and (back := work.ranges - made):
            stopped = receipt.stopped or stored is not None
            self._places.requeue(work._replace(ranges=back), None if stopped else now + GIVEN_BACK_DELAY_S)

    def _measure(self, n: int, receipt: Receipt) -> None:
        seconds = receipt.model_seconds
        if n >= 16:  # in smaller chunks, starting a process outweighs all else
            seconds = max(seconds, receipt.wall_seconds)
        segment = receipt.segment
        large, small = (segment.pack_bytes, segment.n_bytes) if segment is not None else (0, 0)
        self._meters[_SIMULATE].record(n, seconds, large, small)

    def _retry(self, work: Work, failed: Ranges, now: float) -> None:
        if not failed:
            return
        if work.number > self._spec.retry.max_retries:
            why = "a worker gave back outcomes that are not retried"
            self.erred(work._replace(ranges=failed), why, now)
        else:
            self._outbox.write(c.RecordRetry(failed, work.number + 1))
            next_try = Work(_SIMULATE, failed, work.number + 1)
            self._places.requeue(next_try, now + self._spec.retry.delay_s(work.number))

    # Commits.

    def _commit_if_new(self, attempt: AttemptId, commit: Commit) -> None:
        """Commit, unless other outcomes of these items are there already; then only run what nobody has."""
        if self._course.finalizing:
            return  # the result files are being written from what is committed; a resumed job runs it again
        if self._places.may_commit(commit):
            self.commit(attempt, commit)
        else:
            self._places.requeue(commit.work)

    def commit(self, attempt: AttemptId, commit: Commit) -> None:
        """Have outcomes written."""
        self._places.commits[attempt] = commit
        if not self._outbox.paused:  # otherwise it is given with all others when the store is back
            self._outbox.order(commit.command)

    def committed(self, event: e.Committed, now: float) -> Work | None:
        """Take in the store's answer. Returns what counts now and may be under way a second time."""
        commit = self._places.commits.pop(event.attempt, None)
        if commit is None:
            return None
        if isinstance(commit.command, c.CommitNotNeeded):
            self._dropped(commit.command, event, now)
            return None
        if not event.accepted:
            self._refused(commit, now)
            return None
        work, command = commit.work, commit.command
        match command:
            case c.CommitSegment():
                self._settle(work, command.segment.counts, command.segment, commit.examples, now)
            case c.CommitSynthetic():
                self._settle(work, {command.status: len(work.ranges)}, event.segment, commit.examples, now)
            case c.CommitAggregates():
                self._ledger.add_aggregates(work.ranges, command.stored.counts)
            case c.CommitSyntheticAggregates():
                n = len(work.ranges) * len(self._spec.aggregates)
                self._ledger.add_aggregates(work.ranges, {AggregateStatus.FAILED: n})
        return work if commit.late else None

    def _settle(
        self,
        work: Work,
        counts: dict[ReplicateStatus, int],
        segment: SegmentRef | None,
        examples: list[ErrorExample],
        now: float,
    ) -> None:
        settled = self._ledger.add_outcomes(work.ranges, counts, segment)
        if self._plan is not None:  # a set that has settled may have more than it needs
            closed = self._plan.settle(work.ranges, counts, segment)
            settled = closed if self._spec.aggregates else EMPTY
        if settled:
            self._backlogs[_AGGREGATE].add(Work(_AGGREGATE, settled))
        if work.number == 1 and not self._probe.passed:
            self._judge(work.ranges, 0, examples, now)
        self.stop_if_too_many_failed(now)

    def stop_if_too_many_failed(self, now: float) -> None:
        """End the job early if more replicates have failed in this run than it wants to bear."""
        limit, before = self._spec.max_failures, self._failed_before
        if limit is None or before is None or (n := self._ledger.n_failed - before) <= limit:
            return
        which = " of this run" if before else ""
        self._stop(f"{counted(n, 'replicate')}{which} failed, more than max_failures = {limit}", now)

    def _dropped(self, command: c.CommitNotNeeded, event: e.Committed, now: float) -> None:
        """Take in that the store has that some are not needed; their parameter sets can be aggregated."""
        if self._plan is None:
            return
        if not event.accepted or event.segment is None:
            if not self._plan.try_again(command):
                self._stop("the store refused to note which replicates are not needed", now)
            return
        params = self._plan.dropped(command.indices, event.segment)
        if self._spec.aggregates and (lacking := self._ledger.lacks(_AGGREGATE, params)):
            self._backlogs[_AGGREGATE].add(Work(_AGGREGATE, lacking))

    def _refused(self, commit: Commit, now: float) -> None:
        """Run what nobody has, as the store has other outcomes of these; never for ever."""
        work = commit.work
        if self._course.draining:
            return
        self._places.doubt(work)
        left = self._places.nobody_has(work.kind, work.ranges)
        if left:
            self.erred(work._replace(ranges=left), "the store refused outcomes as covered already", now)

    # Faults of the machinery, and the verdict of the probe.

    def erred(self, work: Work, reason: str, now: float) -> None:
        """Run again, some times, what a fault outside the model kept from an outcome."""
        if self._course.draining:
            return
        if work.errors >= MAX_ERRORS:
            self._stop(reason, now)
            return
        self._outbox.write(c.Note("chunk_erred", reason))
        delay = ERROR_DELAY_S * 4.0**work.errors
        self._places.requeue(work._replace(errors=work.errors + 1), now + delay)

    def _judge(self, ended: Ranges, n_succeeded: int, examples: Sequence[ErrorExample], now: float) -> None:
        if self._probe.passed:
            return
        error = self._probe.judge(ended, n_succeeded, list(examples))
        if error is not None:
            n = len(self._probe.indices)
            self._stop(f"all {n} replicates that were tried first failed alike: {describe(error)}", now)
        elif self._probe.passed:
            self._backlogs[_SIMULATE].add(Work(_SIMULATE, self._probe.release()))


def describe(error: ErrorExample) -> str:
    """Say what an error was in one line."""
    return f"{error.error_type}: {error.message}" if error.message else error.error_type
