"""Which work goes to which worker next. Decides; places nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.driver import commands as c
from modelops.driver.backlog import Backlog, Kind
from modelops.driver.chunking import WORTH_SHARING_S, Meter, chunk_size, queue_depth, queue_size
from modelops.worker.messages import AggregateChunk, Chunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.driver.backlog import Work
    from modelops.driver.ledger import Ledger
    from modelops.driver.roster import Roster, Worker
    from modelops.study.ids import AttemptId, JobId
    from modelops.study.spec import RetryPolicy
    from modelops.worker.messages import AggregateReceipt, Receipt

AGGREGATES_BEFORE_MEASURED: Final = 8
_SIMULATE, _AGGREGATE = Kind.SIMULATE, Kind.AGGREGATE


class Dispatcher:
    """Takes work out of the backlogs for free places on workers: suspects, then aggregates, then chunks.

    ``replicates_per_chunk``: instead of what the clock suggests.
    """

    def __init__(
        self, roster: Roster, ledger: Ledger, retry: RetryPolicy, *, replicates_per_chunk: int | None = None
    ) -> None:
        self._roster, self._ledger, self._pinned = roster, ledger, replicates_per_chunk
        self._max_retries, self._retry_on = retry.max_retries, tuple(sorted(retry.on))
        self.backlogs = {_SIMULATE: Backlog(_SIMULATE), _AGGREGATE: Backlog(_AGGREGATE)}
        self.meters = {_SIMULATE: Meter(), _AGGREGATE: Meter()}
        self._simulate, self._aggregate = self.backlogs[_SIMULATE], self.backlogs[_AGGREGATE]

    @property
    def has_work(self) -> bool:
        """Whether `placements` has anything to do."""
        simulate, aggregate, roster = self._simulate, self._aggregate, self._roster
        if (simulate.n_ready or aggregate.n_ready) and roster.has_room:
            return True
        return bool(simulate.suspects or aggregate.suspects) or roster.has_reserved

    def placements(self) -> Iterator[tuple[Work, Worker]]:
        """Yield what to submit where. Each must be in the roster before the next is asked for."""
        simulate, aggregate = self._simulate, self._aggregate
        if simulate.suspects or aggregate.suspects:
            yield from self._suspects()
        else:
            self._roster.release_reserved()
        if not (simulate.n_ready or aggregate.n_ready):
            return
        self._roster.let_wait(queue_depth(self.meters[_SIMULATE]))
        while (worker := self._roster.idle()) is not None and (work := self._next_work()) is not None:
            yield work, worker
        while (worker := self._roster.roomy()) is not None and (queued := self._next_to_queue()) is not None:
            yield queued, worker

    def order(
        self,
        work: Work,
        worker: str,
        attempt: AttemptId,
        job: JobId,
        epoch: int,
        *,
        may_have_begun: bool = False,
    ) -> c.SubmitChunk | c.SubmitAggregates:
        """Return the command that submits this work to a worker.

        ``may_have_begun``: some of it may have been under way in an attempt that was lost or given back.
        """
        if work.kind is _SIMULATE:
            chunk = Chunk(
                job=job,
                attempt=attempt,
                epoch=epoch,
                ranges=work.ranges.pairs,
                attempt_number=work.number,
                retry_on=self._retry_on if work.number <= self._max_retries else (),
                may_resume=work.number > 1 or epoch > 1 or may_have_begun,
                alone=work.suspect,
            )
            return c.SubmitChunk(chunk, worker)
        segments = self._ledger.segments_of(work.ranges)
        aggregates = AggregateChunk(
            job=job,
            attempt=attempt,
            epoch=epoch,
            params=work.ranges.pairs,
            segments=segments,
            alone=work.suspect,
        )
        return c.SubmitAggregates(aggregates, worker)

    def handed_over(self, receipt: Receipt | AggregateReceipt, now: float) -> None:
        """Measure what an attempt took beside its work, if it began at once."""
        attempt = self._roster.attempts.get(receipt.attempt)
        if attempt is not None and attempt.placed_at is not None and not (attempt.waits or attempt.stopping):
            seconds = now - attempt.placed_at - receipt.wall_seconds
            self.meters[attempt.work.kind].handed_over(seconds)

    def seconds_left(self, kind: Kind, n: int) -> float | None:
        """Return the expected seconds until ``n`` items are done, or None if none has been measured."""
        cost = self.meters[kind].seconds_per_item
        return None if cost is None else n * cost / min(self._roster.slots, max(n, 1))

    def _suspects(self) -> Iterator[tuple[Work, Worker]]:
        n = sum(len(backlog.suspects) for backlog in self.backlogs.values())
        for worker in self._roster.reserve(n):
            beside = self._roster.suspects_beside(worker.name)
            if any(attempt.work.apart for attempt in beside):
                continue
            # What is not needed any more is not placed; then it is the turn of the next.
            while not worker.load:
                taken = (b.take_suspect(beside=bool(beside)) for b in self.backlogs.values())
                work = next(filter(None, taken), None)
                if work is None:
                    break
                yield work, worker

    def _next_work(self) -> Work | None:
        return self._next_aggregates() or self._next_chunk()

    def _next_chunk(self) -> Work | None:
        backlog = self._simulate
        n = backlog.n_ready
        if not n:
            return None
        return backlog.take(self._pinned or chunk_size(self.meters[_SIMULATE], n, self._roster.slots))

    def _next_to_queue(self) -> Work | None:
        """Return work that may wait behind other work on a worker."""
        slots = self._roster.slots
        n = self._aggregate.n_ready
        if (
            n
            and queue_size(self.meters[_AGGREGATE], n, slots)
            and (work := self._next_aggregates()) is not None
        ):
            return work
        n = self._simulate.n_ready
        size = queue_size(self.meters[_SIMULATE], n, slots) if n else 0
        return self._simulate.take(self._pinned or size) if size else None

    def _next_aggregates(self) -> Work | None:
        backlog = self._aggregate
        n = backlog.n_ready
        if not n:
            return None
        meter = self.meters[_AGGREGATE]
        slots, cost = self._roster.slots, meter.seconds_per_item
        is_little = cost is None or n * cost < WORTH_SHARING_S
        if is_little and self._roster.n_live[_AGGREGATE] and self._ledger.n_open:
            return None  # as Nagle's algorithm: one at once, then what gathers in the meantime
        if cost is None:
            return backlog.take(max(1, min(AGGREGATES_BEFORE_MEASURED, n // (2 * slots))))
        if self._simulate.n_ready:  # then nobody is idle for want of aggregates, and they need not be shared
            return backlog.take(chunk_size(meter, 2 * n, 1))
        return backlog.take(chunk_size(meter, n, slots))
