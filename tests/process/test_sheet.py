"""Outcomes that a runner writes to shared memory: none is lost, none is another's, however the process ends."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from tests.process.pool_bench import sets, spec_of

from modelops.processes import FloatOutcomes, Outcome, ProcessPool, RunnerSpec, StopSignal
from modelops.processes import sheet as sheets
from modelops.processes.sheet import SHEET_BYTES, Sheet
from modelops.states import ReplicateStatus as Status
from modelops_runner.shapes import Shape
from modelops_runner.sheet import Sheet as RunnersSheet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory without a name")
CODE = """
    import os, signal, time
    def quick(params, seed): return {"x": seed / 3, "y": -seed / 7}
    def mixed(params, seed):
        if seed % 100 == 50: raise ValueError(seed)
        if seed % 100 == 60: return {"n": seed}
        if seed % 100 == 70: return {"other": seed / 9}
        if seed % 100 == 80: time.sleep(0.006)
        return quick(params, seed)
    def dies(params, seed):
        if seed == 700: os.kill(os.getpid(), signal.SIGKILL)
        return quick(params, seed)
    def hangs(params, seed):
        if seed == 700: time.sleep(3600)
        return quick(params, seed)
    def wide(params, seed): return {f"x{i}": seed + i / 8 for i in range(4_000)}
"""


@pytest.fixture
def spec(tmp_path: Path) -> RunnerSpec:
    return spec_of(tmp_path / "bundle", CODE, replicate_timeout_s=None)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ProcessPool]:
    with ProcessPool(tmp_path / "pool", slots=1) as pool:
        yield pool


class Took:
    """Takes outcomes, and keeps what each replicate returned or how it ended, in the order in which they came."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.returned: dict[int, dict[str, float]] = {}
        self.ended: dict[int, Outcome] = {}

    def one(self, outcome: Outcome) -> None:
        self.order.append(outcome.index)
        self.ended[outcome.index] = outcome

    def many(self, batch: FloatOutcomes) -> None:
        n = len(batch.names)
        numbers = struct.unpack(f"<{n * len(batch.indices)}d", batch.values)
        self.order += batch.indices.tolist()
        assert (batch.seconds >= 0).all()
        assert (batch.cpu_seconds >= 0).all()
        for i, index in enumerate(batch.indices.tolist()):
            self.returned[index] = dict(zip(batch.names, numbers[i * n : (i + 1) * n], strict=True))


def run(pool: ProcessPool, spec: RunnerSpec, entry: str, n: int, stop: StopSignal | None = None) -> Took:
    took = Took()
    pool.run(spec, entry, sets(n), on_outcome=took.one, on_floats=took.many, stop=stop)
    return took


def quick(seed: int) -> dict[str, float]:
    return {"x": seed / 3, "y": -seed / 7}


def test_outcomes_that_take_turns_with_messages_are_in_order(pool: ProcessPool, spec: RunnerSpec) -> None:
    for _ in range(2):  # the second time in a process whose sheet was used before
        took = run(pool, spec, "m:mixed", 1_000)
        assert took.order == list(range(1_000))
        assert {k for k, x in took.ended.items() if x.status is Status.FAILED} == set(range(50, 1_000, 100))
        assert {k for k, x in took.ended.items() if x.status is Status.SUCCEEDED} == set(
            range(60, 1_000, 100)
        )
        for k, returned in took.returned.items():
            assert returned == ({"other": k / 9} if k % 100 == 70 else quick(k))
    assert pool.starts == 1


def test_what_was_written_before_a_death_counts_and_the_next_one_died(
    pool: ProcessPool, spec: RunnerSpec
) -> None:
    took = run(pool, spec, "m:dies", 800)
    assert took.order == list(range(800))
    assert {k: x.status for k, x in took.ended.items()} == {700: Status.CRASHED}
    assert took.returned == {k: quick(k) for k in range(800) if k != 700}


def test_what_was_written_before_one_that_hangs_is_seen(pool: ProcessPool, spec: RunnerSpec) -> None:
    stop = StopSignal()
    took = Took()

    def many(batch: FloatOutcomes) -> None:
        took.many(batch)
        if took.order[-1] == 699:
            stop.stop(hard=True)

    end = pool.run(spec, "m:hangs", sets(800), on_outcome=took.one, on_floats=many, stop=stop)
    assert took.order == list(range(700))
    assert end.unstarted == tuple(range(700, 800))


def test_more_than_the_sheet_holds_comes_whole(pool: ProcessPool, spec: RunnerSpec) -> None:
    n = 3 * SHEET_BYTES // (8 * 4_000)
    took = run(pool, spec, "m:wide", n)
    assert took.order == list(range(n))
    assert all(took.returned[k] == {f"x{i}": k + i / 8 for i in range(4_000)} for k in range(n))


def test_without_such_memory_outcomes_come_as_messages(
    pool: ProcessPool, spec: RunnerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets.Sheet, "new", lambda: None)
    took = run(pool, spec, "m:mixed", 200)
    assert took.order == list(range(200))
    assert took.returned[199] == quick(199)


def test_what_is_taken_is_what_was_put_and_nothing_is_written_over() -> None:
    ours = Sheet.new()
    assert ours is not None
    theirs = RunnersSheet(os.dup(ours.fd))
    shape, other = Shape(7, 20_000), Shape(8, 1)
    ours.begin()
    theirs.begin()
    values = {str(i): i / 3 for i in range(20_000)}
    capacity = 0
    while theirs.put(shape, capacity, 0.5, 0.25, values):
        capacity += 1
    assert capacity == ours.n_waiting == (SHEET_BYTES - 64) // (8 * 20_003)
    assert not theirs.put(other, 0, 0.0, 0.0, {"a": 1.0})
    put, taken = capacity, 0
    for n in (1, 3, capacity, 2, capacity):
        found = ours.waiting(20_000, n)
        assert found.indices.tolist() == list(range(taken, taken + n))
        assert (found.seconds == 0.5).all()
        assert (found.cpu_seconds == 0.25).all()
        assert found.values == struct.pack("<20000d", *values.values()) * n
        ours.take(n)
        taken += n
        while theirs.put(shape, put, 0.5, 0.25, values):
            put += 1
        assert put == taken + capacity
    assert ours.shape == 7
    ours.handed_over()
