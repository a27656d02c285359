"""Range sets, immutable and mutable, against Python's own sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.driver.range_sets import RangeQueue, RangeSet
from modelops.study.ranges import EMPTY, Ranges

pairs = st.lists(st.tuples(st.integers(-5, 40), st.integers(-5, 40)), max_size=8)


def as_set(given_pairs: list[tuple[int, int]]) -> set[int]:
    return {k for lo, hi in given_pairs for k in range(lo, hi)}


@given(pairs)
def test_ranges_hold_what_a_set_holds_sorted_disjoint_and_never_touching(some: list[tuple[int, int]]) -> None:
    ranges, expected = Ranges(some), as_set(some)
    assert list(ranges) == sorted(expected)
    assert len(ranges) == len(expected)
    assert bool(ranges) == bool(expected)
    assert all(lo < hi for lo, hi in ranges.pairs)
    assert all(a[1] < b[0] for a, b in zip(ranges.pairs, ranges.pairs[1:], strict=False))
    assert all((k in ranges) == (k in expected) for k in range(-6, 42))
    assert ranges == Ranges.of(expected)
    assert hash(ranges) == hash(Ranges.of(expected))


@given(pairs, pairs)
def test_union_intersection_and_difference_are_those_of_sets(
    a: list[tuple[int, int]], b: list[tuple[int, int]]
) -> None:
    x, y = Ranges(a), Ranges(b)
    assert x | y == Ranges.of(as_set(a) | as_set(b))
    assert x & y == Ranges.of(as_set(a) & as_set(b))
    assert x - y == Ranges.of(as_set(a) - as_set(b))
    assert x.isdisjoint(y) == as_set(a).isdisjoint(as_set(b))


@given(pairs, st.integers(0, 60))
def test_take_splits_off_the_smallest(some: list[tuple[int, int]], n: int) -> None:
    head, rest = Ranges(some).take(n)
    ordered = sorted(as_set(some))
    assert list(head) == ordered[:n]
    assert list(rest) == ordered[n:]


@given(pairs)
def test_at_indexes_the_sorted_set(some: list[tuple[int, int]]) -> None:
    ranges, ordered = Ranges(some), sorted(as_set(some))
    assert [ranges.at(i) for i in range(len(ordered))] == ordered
    for outside in (-1, len(ordered)):
        with pytest.raises(IndexError):
            ranges.at(outside)


def test_a_hundred_million_integers_cost_one_range() -> None:
    line = Ranges([(0, 10**8)])
    head, rest = line.take(10**7)
    assert (len(head), len(rest), rest.at(0)) == (10**7, 9 * 10**7, 10**7)
    assert EMPTY | line is line


@given(
    st.lists(st.tuples(st.sampled_from(["add", "take", "withdraw"]), pairs, st.integers(0, 20)), max_size=12)
)
def test_a_queue_hands_out_its_smallest_integers_first(
    steps: list[tuple[str, list[tuple[int, int]], int]],
) -> None:
    queue, model = RangeQueue(), set[int]()
    for what, some, n in steps:
        if what == "add":
            new = as_set(some) - model
            queue.add(Ranges.of(new))
            model |= new
        elif what == "take":
            taken = queue.take(n)
            assert list(taken) == sorted(model)[:n]
            model -= set(taken)
        else:
            queue.withdraw(Ranges(some))
            model -= as_set(some)
        assert len(queue) == len(model)
        if model:
            assert queue.first == min(model)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=15), pairs)
def test_a_range_set_knows_its_size_the_range_around_an_addition_and_what_it_lacks(
    additions: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    grown, model = RangeSet(), set[int]()
    for lo, n in additions:
        model |= set(range(lo, lo + n))
        whole = grown.add(lo, lo + n)
        assert whole == next(p for p in Ranges.of(model).pairs if p[0] <= lo < p[1])
        assert len(grown) == len(model)
    assert grown.snapshot() == Ranges.of(model)
    assert grown.lacks(Ranges(asked)) == Ranges.of(as_set(asked) - model)
