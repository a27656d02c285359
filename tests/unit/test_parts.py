"""A part of a chunk that cannot be stored: whoever runs the chunk hears of it, unless it is being stopped."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from modelops.errors import IntegrityError, StorageError
from modelops.study.ids import AttemptId, JobId
from modelops.study.ranges import Ranges
from modelops.worker.attempts import Attempt
from modelops.worker.messages import Chunk
from modelops.worker.parts import HAND_IN_AFTER_S, Parts

JOB, ATTEMPT = JobId("job_1"), AttemptId("0001-000001")


def parts(error: Exception, attempt: Attempt) -> Parts:
    """Return those of a chunk of six, of which two have ended; to store these ends in an error."""

    def finish() -> None:
        raise error

    tally = SimpleNamespace(attempt="0001-000001-p1", ended=[(0, 2)], writer=SimpleNamespace(finish=finish))
    runtime: Any = SimpleNamespace(
        when_storage_allows=lambda act, _attempt: act(),
        announce=lambda _topic, _message: None,
        look_at_bundle=lambda _context, _said_as, _attempt: None,
    )
    sorter: Any = SimpleNamespace(cut=lambda _part: (tally, Ranges([(3, 6)])))
    log: Any = SimpleNamespace(split=lambda _part, _ended: SimpleNamespace(store=lambda: None))
    chunk = Chunk(job=JOB, attempt=ATTEMPT, epoch=1, ranges=((0, 6),))
    context: Any = None
    return Parts(runtime, chunk, attempt, sorter, log, context)


@pytest.mark.parametrize("error", [IntegrityError("a file was changed"), StorageError("full")])
def test_what_kept_a_part_from_being_stored_is_raised_where_its_chunk_ends(error: Exception) -> None:
    attempt = Attempt(JOB, ATTEMPT, 1, ((0, 6),))
    of_chunk = parts(error, attempt)
    of_chunk.look(time.monotonic() + HAND_IN_AFTER_S)
    assert attempt.parts == ()
    with pytest.raises(type(error), match=str(error)):
        of_chunk.close()


def test_a_part_that_a_stop_has_kept_from_being_stored_is_given_back() -> None:
    attempt = Attempt(JOB, ATTEMPT, 1, ((0, 6),))
    of_chunk = parts(StorageError("full"), attempt)
    cut = of_chunk._sorter.cut

    def and_then_it_is_stopped(part: AttemptId) -> Any:
        attempt.stop.stop()
        return cut(part)

    of_chunk._sorter.cut = and_then_it_is_stopped  # type: ignore[method-assign]
    of_chunk.look(time.monotonic() + HAND_IN_AFTER_S)
    of_chunk.close()
    assert of_chunk.lost == Ranges([(0, 2), (3, 6)])
