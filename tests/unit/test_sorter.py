"""Outcomes, and floats that come many at once, of a chunk of which a part was handed in and the rest given back."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import numpy as np

from modelops.processes import FloatOutcomes, Outcome, StopSignal
from modelops.states import ReplicateStatus
from modelops.store import Objects, read_segment
from modelops.study.ids import AttemptId, JobId
from modelops.worker.messages import Chunk
from modelops.worker.sorter import Sorter

JOB, ATTEMPT, PART = JobId("job_1"), AttemptId("0001-000001"), AttemptId("0001-000001-p1")


def floats(indices: list[int]) -> FloatOutcomes:
    n = len(indices)
    data = b"".join(struct.pack("<2d", index, -index) for index in indices)
    return FloatOutcomes(
        names=("a", "b"),
        indices=np.array(indices),
        values=data,
        seconds=np.full(n, 0.5),
        cpu_seconds=np.full(n, 0.25),
        started_at=np.array(indices) * 1.0,
    )


def held(objects: Objects, writer: Any) -> dict[int, dict[str, float]]:
    ref = writer.finish()
    segment = read_segment(objects, JOB, ref)
    return {index: segment.outputs_of(index) for index in segment.index.tolist()}


def test_floats_of_replicates_that_were_given_back_are_somebody_elses() -> None:
    objects = Objects.open("memory:///")
    runtime: Any = SimpleNamespace(objects=objects, address="w", host="h")
    desk: Any = SimpleNamespace(current=None, settled=[])
    context: Any = SimpleNamespace(spec=SimpleNamespace(until=None))
    chunk = Chunk(job=JOB, attempt=ATTEMPT, epoch=1, ranges=((0, 9),))
    sorter = Sorter(runtime, chunk, context, stop=StopSignal(), desk=desk)
    sorter.take_floats(floats([0, 1, 2]))
    cut = sorter.cut(PART)
    assert cut is not None
    handed_in, given_back = cut
    assert given_back.pairs == ((4, 9),)
    sorter.take_floats(floats([3, 4, 5]))  # 4 and 5 had ended before they were given back
    sorter.take_floats(floats([6]))
    assert held(objects, handed_in.writer) == {i: {"a": i, "b": -i} for i in range(3)}
    assert held(objects, sorter.tally.writer) == {3: {"a": 3, "b": -3}}
    assert (sorter.n_ended, sorter.tally.ended, sorter.tally.model_seconds, len(sorter.left())) == (
        1,
        [(3, 4)],
        0.5,
        0,
    )


class KeepsEach:
    """A desk of a model that keeps a checkpoint of every replicate."""

    def __init__(self) -> None:
        self.current: int | None = None
        self.settled: list[str] = []

    def ended(self, *, succeeded: bool) -> None:
        assert succeeded
        self.settled.append(str(self.current))


def test_a_part_takes_its_own_outcomes_and_checkpoints_along_and_none_of_those_that_end_later() -> None:
    objects, desk = Objects.open("memory:///"), KeepsEach()
    runtime: Any = SimpleNamespace(objects=objects, address="w", host="h")
    chunk = Chunk(job=JOB, attempt=ATTEMPT, epoch=1, ranges=((0, 6),))
    context: Any = SimpleNamespace(spec=SimpleNamespace(until=None))
    sorter = Sorter(runtime, chunk, context, stop=StopSignal(), desk=desk)  # type: ignore[arg-type]

    def ends(index: int) -> None:
        desk.current = index
        sorter.take(Outcome(index=index, status=ReplicateStatus.SUCCEEDED))

    for index in (0, 1):
        ends(index)
    cut = sorter.cut(PART)
    assert cut is not None
    handed_in, given_back = cut
    assert given_back.pairs == ((3, 6),)
    for index in (2, 3):  # of 3 the process had begun when it was given back
        ends(index)
    # Removed once the part is recorded: the outcome of 2 is not by then, and may be lost with its worker.
    assert handed_in.settled == ["0", "1"]
    assert [*held(objects, handed_in.writer)] == [0, 1]
    assert desk.settled == ["2"]
    assert [*held(objects, sorter.tally.writer)] == [2]
