"""Parameter sets in one piece: whatever is cut from a table is what its sets, one by one, would give."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelops.processes.frames import first_frame
from modelops.processes.outcome import after, indices, listed, one_by_one, part
from modelops.rpc import ReplicateSet, ReplicateTable
from modelops.store import Objects
from modelops.store.parameters import Parameters, write_parameters
from modelops.study.canonical import canonical_json
from modelops.study.ids import JobId
from modelops.study.index_line import IndexLine
from modelops.study.ranges import Ranges
from modelops.worker.sets import replicate_set, replicate_sets
from modelops_runner.replicates import _each_set, _told

if TYPE_CHECKING:
    from collections.abc import Sequence

JOB = JobId("job_1")
PLACES = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: (min(pair), max(pair)))


def table(n_sets: int, each: int) -> ReplicateTable:
    return ReplicateTable(
        each=each,
        params=listed(b'{"x":%d}' % k for k in range(n_sets)),
        param=4,
        index=100,
        replicate=2,
        seeds=tuple(range(1000, 1000 + n_sets * each)),
        study_seed=7,
        param_ids="".join(f"{k:032x}" for k in range(n_sets)),
    )


def by_index(sets: Sequence[ReplicateSet]) -> dict[int, tuple[Any, ...]]:
    """Return what each replicate is told."""
    return {
        one.index + i: (bytes(one.params), one.param, one.replicate + i, seed, one.entropy_key)
        for one in sets
        for i, seed in enumerate(one.seeds)
    }


@settings(deadline=None)
@given(n_sets=st.integers(1, 6), each=st.integers(1, 5), places=PLACES)
def test_a_part_of_a_table_holds_these_replicates_and_no_others(
    n_sets: int, each: int, places: tuple[int, int]
) -> None:
    one = table(n_sets, each)
    lo, hi = (min(place, n_sets * each) for place in places)
    whole = by_index(one_by_one([one]))
    cut = part(one, lo, hi)
    assert indices(cut) == list(range(100 + lo, 100 + hi))
    assert by_index(one_by_one(cut)) == {k: whole[k] for k in range(100 + lo, 100 + hi)}
    assert indices(after([one], lo)) == list(range(100 + lo, 100 + n_sets * each))
    assert len(cut) <= 3


@settings(deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), max_size=4), limit=st.integers(1, 900)
)
def test_requests_of_bounded_size_cover_tables_in_order(shapes: list[tuple[int, int]], limit: int) -> None:
    left: Any = [table(*shape) for shape in shapes]
    wanted, got = indices(left), []
    while left:
        batch = first_frame(left, limit)
        assert len(indices(batch)) == 1 or sum(40 * len(one_by_one([one])) for one in batch) <= limit
        got += indices(batch)
        left = after(left, len(indices(batch)))
    assert got == wanted


@given(n_sets=st.integers(1, 6), each=st.integers(1, 5))
def test_the_runner_sees_in_a_table_the_sets_that_it_stands_for(n_sets: int, each: int) -> None:
    one = table(n_sets, each)
    expected = one_by_one([one])
    decoded = [msgspec.json.decode(msgspec.json.encode(x)) for x in (one, *expected)]
    told = [(x["params"], x["index"], x["seeds"]) for x in decoded[1:]]
    assert [x[:3] for x in _each_set(decoded[:1])] == told
    assert [x[:3] for x in _each_set(decoded[1:])] == told
    for (*_, of), alone in zip(_each_set(decoded[:1]), decoded[1:], strict=True):
        assert [_told(of, i) for i in range(each)] == [_told((alone, 0), i) for i in range(each)]
    assert _told((decoded[-1], 0), each - 1) == {
        "index": 100 + n_sets * each - 1,
        "param": 4 + n_sets - 1,
        "replicate": 2 + each - 1,
        "seed": 1000 + n_sets * each - 1,
        "entropy_key": expected[-1].entropy_key,
    }


@pytest.mark.parametrize("how", ["seeds of each", "common random numbers", "explicit seeds"])
def test_a_chunk_has_the_sets_that_each_of_its_parameter_sets_has_by_itself(how: str) -> None:
    objects = Objects.open("memory:///")
    canonicals = [canonical_json({"x": k / 3, "n": k}) for k in range(7)]
    write_parameters(objects, JOB, canonicals)
    parameters = Parameters(objects, JOB)
    line = IndexLine.of(5, 3).extended(replicates=4, n_more_params=2)
    spec: Any = msgspec.defstruct("Spec", ["line", "seeds", "common_random_numbers", "study_seed"])(
        line,
        (9, 8, 7, 2**40) if how.startswith("explicit") else None,
        how.startswith("common"),
        0 if how.startswith("explicit") else 11,
    )
    chunk = Ranges([(1, 2), (4, 13), (16, line.size)])
    found = by_index(one_by_one(replicate_sets(spec, parameters, chunk)))
    assert list(found) == list(chunk)
    for k in chunk:
        param, replicate = line.locate(k)
        row = parameters[param]
        alone = replicate_set(spec, param, row.param_id, row.canonical, index=k, replicate=replicate, n=1)
        assert found[k] == by_index([alone])[k]


@pytest.mark.parametrize("common", [True, False])
def test_a_chunk_costs_nothing_for_the_replicates_of_its_parameter_sets_that_are_not_in_it(
    common: bool,
) -> None:
    objects = Objects.open("memory:///")
    write_parameters(objects, JOB, [canonical_json({"x": k}) for k in range(2)])
    parameters = Parameters(objects, JOB)
    n = 4_000_000_000
    names = ["line", "seeds", "common_random_numbers", "study_seed"]
    spec: Any = msgspec.defstruct("Spec", names)(IndexLine.of(2, n), None, common, 11)
    chunk = Ranges([(n // 2, n // 2 + 3), (n - 2, n + 2), (2 * n - 3, 2 * n)])
    tracemalloc.start()
    try:
        found = by_index(one_by_one(replicate_sets(spec, parameters, chunk)))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert [(k, found[k][2]) for k in found] == [(k, k % n) for k in chunk]
