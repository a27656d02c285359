"""What a driver makes of what workers say, and what it tells them: without any cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.hands import Adopted, Hands, Heard
from modelops.study.ids import AttemptId, JobId, attempt_id, part_id
from modelops.study.ranges import Ranges
from modelops.worker.messages import Chunk, HeldAttempt, Receipt, TaskError

JOB = JobId("job_1")
ONE, TWO, THREE = (attempt_id(1, n) for n in (1, 2, 3))


def held(attempt: AttemptId, **how: Any) -> HeldAttempt:
    return HeldAttempt(
        job=JOB, attempt=attempt, epoch=1, ranges=((0, 2),), attempt_number=2, state="running", started_at=0.0, **how
    )  # fmt: skip


def receipt(attempt: AttemptId) -> Receipt:
    return Receipt(job=JOB, attempt=attempt, worker="w", host="h")


class Client:
    """A connection that notes what is submitted, and over which no news comes."""

    def __init__(self) -> None:
        self.client = self
        self.loop = SimpleNamespace(add_callback=lambda *_: None)
        self.chunks: list[Chunk] = []

    def submit(self, _task: Any, chunk: Chunk, **_: Any) -> object:
        self.chunks.append(chunk)
        return object()

    def cancel(self, _futures: Any, *, force: bool) -> None:
        assert force


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def hands(client: Client) -> Hands:
    hands = Hands(JOB, ("study.json", ""), 2, client, lambda _news: None)  # type: ignore[arg-type]
    hands.take_in(e.WorkerJoined("w", 1))
    return hands


def submit(hands: Hands, attempt: AttemptId) -> None:
    chunk = Chunk(job=JOB, attempt=attempt, epoch=2, ranges=((0, 2),))
    hands.simulate(c.SubmitChunk(chunk, "w"))


@pytest.mark.parametrize("error_type", ["IntegrityError", "NotFoundError", "BundleError"])
def test_damage_that_an_earlier_driver_met_is_no_error_of_this_one(hands: Hands, error_type: str) -> None:
    error = TaskError(error_type=error_type, message="study.json is damaged", final=True)
    events = hands.take_in(Heard("w", (held(ONE, error=error), held(TWO)), asked=True))
    found, *more = events
    assert isinstance(found, e.AttemptsFound)
    if error_type == "BundleError":
        assert [f.attempt for f in found.attempts] == [ONE, TWO]
        assert [type(event) for event in more] == [e.ChunkErred]
        return
    assert ([f.attempt for f in found.attempts], more) == ([TWO], [])
    assert hands.attempts() == {TWO: "w"}


def test_an_attempt_that_was_adopted_is_lost_when_its_worker_has_it_no_more(hands: Hands) -> None:
    (found,) = hands.take_in(Heard("w", (held(ONE), held(TWO)), asked=True))
    assert found == e.AttemptsFound(
        "w", (e.Found(ONE, Ranges([(0, 2)]), 2), e.Found(TWO, Ranges([(0, 2)]), 2))
    )
    assert hands.attempts() == {ONE: "w", TWO: "w"}
    assert hands.take_in(Heard("w", (held(ONE), held(TWO)))) == []
    done = hands.take_in(Heard("w", (held(ONE, receipt=receipt(ONE)),), is_table=False))
    assert done == [e.ChunkDone(receipt(ONE))]
    assert hands.take_in(Heard("w", ())) == [e.AttemptLost(TWO, worker_died=False)]
    assert hands.attempts() == {}


def test_what_dask_dropped_is_adopted_from_the_worker_that_runs_it_and_lost_with_that(hands: Hands) -> None:
    submit(hands, ONE)
    assert hands.take_in(Adopted(ONE, "w")) == []
    assert hands.take_in(Heard("w", ())) == [e.AttemptLost(ONE, worker_died=False)]
    submit(hands, TWO)
    assert hands.take_in(e.WorkerLeft("w", died=False)) == [e.WorkerLeft("w", died=False)]
    assert hands.take_in(Adopted(TWO, "w")) == []  # that its worker left says it all
    assert hands.attempts() == {}


@pytest.mark.parametrize(("final", "unfit"), [(False, False), (True, False), (True, True), (False, True)])
def test_an_error_keeps_whether_there_is_hope_and_whether_it_is_the_workers_fault(
    hands: Hands, final: bool, unfit: bool
) -> None:
    submit(hands, ONE)
    error = TaskError(error_type="X", message="why", final=final, unfit=unfit)
    told = hands.take_in(Heard("w", (held(ONE, error=error),), is_table=False))
    assert told == [e.ChunkErred(ONE, "X", "why", final=final, unfit=unfit)]


def test_what_is_recorded_is_acknowledged_once_with_the_next_chunk_for_that_worker(
    hands: Hands, client: Client
) -> None:
    submit(hands, ONE)
    hands.take_in(e.ChunkDone(receipt(ONE)))
    submit(hands, TWO)  # nothing is recorded yet
    hands.acknowledge()
    submit(hands, THREE)
    submit(hands, attempt_id(1, 4))
    assert [chunk.acknowledged for chunk in client.chunks] == [(), (), (ONE,), ()]


def test_of_a_part_that_is_recorded_the_worker_need_not_keep_the_receipt_while_the_rest_goes_on(
    hands: Hands, client: Client
) -> None:
    submit(hands, ONE)
    part = msgspec.structs.replace(receipt(part_id(ONE)), part_of=ONE)
    told = hands.take_in(Heard("w", (held(part.attempt, receipt=part),), is_table=False))
    assert told == [e.ChunkDone(part)]
    assert hands.attempts() == {ONE: "w"}
    hands.acknowledge()
    submit(hands, TWO)
    assert [chunk.acknowledged for chunk in client.chunks] == [(), (part.attempt,)]
