"""Run a chunk: outcomes as they come go into a segment; what is to be tried again does not."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final

from modelops.errors import RemoteError, SetAsideError, StorageError
from modelops.study.ranges import Ranges
from modelops.worker.job_log import JobLog
from modelops.worker.messages import Chunk, Receipt
from modelops.worker.parts import Parts
from modelops.worker.sorter import Sorter
from modelops.worker.storage_wait import FIRST_WAIT_S, LONGEST_WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.worker.attempts import Attempt
    from modelops.worker.job_context import JobContext
    from modelops.worker.runtime import WorkerRuntime

WORTH_STEPPING_ASIDE_S: Final = (
    0.05  # after less, storing it is not worth a thread of its own, if it is little
)


def simulate_chunk(
    runtime: WorkerRuntime, chunk: Chunk, attempt: Attempt, *, step_aside: Callable[[], None] = lambda: None
) -> Receipt:
    """Run the replicates of a chunk and store its segment; the receipt says what became of each index.

    While storage is away, what is finished stays here; if the attempt is stopped meanwhile, all is given back.
    ``step_aside`` is called when the replicates have ended: the next chunk may begin while this one is stored.
    """
    if not runtime.attempts.enter(attempt):
        return _untouched(runtime, attempt)
    runtime.say_begun(attempt)
    try:
        with runtime.using(chunk, attempt) as context:
            return _simulate(runtime, context, chunk, attempt, step_aside)
    except StorageError:
        if not attempt.stop.stopped:
            raise
        return _untouched(runtime, attempt)


def _simulate(
    runtime: WorkerRuntime,
    context: JobContext,
    chunk: Chunk,
    attempt: Attempt,
    step_aside: Callable[[], None],
) -> Receipt:
    desk = runtime.desk(chunk, attempt)
    sorter = Sorter(runtime, chunk, context, stop=attempt.stop, desk=desk)
    with JobLog(runtime.objects, chunk.job, chunk.attempt) as job_log, contextlib.closing(desk):
        parts = Parts(runtime, chunk, attempt, sorter, job_log, context)
        began = time.perf_counter()
        with runtime.parts.watching(parts):
            try:
                _run(runtime, context, sorter, attempt, job_log)
            except RemoteError as error:
                if not error.missing_module or not runtime.still_has_files(context):
                    raise
                sorter.note_missing(error.missing_module, error.traceback)
            wall_seconds = time.perf_counter() - began
        if sorter.set_aside is not None:
            raise SetAsideError(sorter.set_aside)
        runtime.look_at_bundle(context, chunk.attempt, attempt)
        takes_time = wall_seconds >= WORTH_STEPPING_ASIDE_S or sorter.tally.has_files
        if takes_time and not attempt.alone:
            runtime.attempts.step_aside(attempt)
            step_aside()
        unstarted = sorter.indices - Ranges(sorter.tally.ended) | parts.lost
        runtime.when_storage_allows(job_log.store, attempt)
    runtime.settled.remember(chunk.job, chunk.attempt, desk.settled)
    tally = sorter.tally
    return tally.receipt(
        runtime,
        chunk,
        parts=attempt.parts,
        segment=runtime.when_storage_allows(tally.writer.finish, attempt),
        unstarted=unstarted.pairs,
        wall_seconds=wall_seconds,
        missing_import=sorter.missing_import,
        notes=(
            *filter(None, [runtime.pool.not_forked(context.runner)]),
            *runtime.take_notes(chunk.job),
            *desk.notes,
        ),
    )


def _run(
    runtime: WorkerRuntime,
    context: JobContext,
    sorter: Sorter,
    attempt: Attempt,
    job_log: JobLog,
) -> None:
    """Run the replicates. Some have no outcome afterwards if a stop came, or if this machine's volume is full.

    If not even the first one has, for lack of room for its outputs, it is run again as soon as there is some.
    """
    wait_s = FIRST_WAIT_S
    while True:
        sets = runtime.when_storage_allows(lambda: context.sets(sorter.left()), attempt)
        try:
            runtime.pool.run(
                context.runner,
                context.spec.model,
                sets,
                on_outcome=sorter.take,
                on_floats=sorter.take_floats,
                stop=attempt.stop,
                log=job_log.write,
                desk=sorter.desk,
            )
        except StorageError as error:
            if sorter.n_ended:  # storing them may be what makes room
                return
            runtime.when_there_is_room(attempt, error, wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        else:
            return


def _untouched(runtime: WorkerRuntime, attempt: Attempt) -> Receipt:
    """Return the receipt of an attempt that has outcomes of nothing, but for what it handed in before."""
    return Receipt(
        job=attempt.job,
        attempt=attempt.attempt,
        worker=runtime.address,
        host=runtime.host,
        parts=attempt.parts,
        unstarted=attempt.ranges,
    )
