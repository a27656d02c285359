"""The index line: locate and index are inverse, extending renumbers nothing, the page's vectors hold."""

from __future__ import annotations

import pytest
from doc_tables import rows_below
from hypothesis import given
from hypothesis import strategies as st

from modelops.driver.coverage import Coverage, SegmentMap
from modelops.study.ids import AttemptId
from modelops.study.index_line import Block, IndexLine, Place
from modelops.study.ranges import Ranges
from modelops.worker.messages import SegmentRef


@st.composite
def lines(draw: st.DrawFn) -> IndexLine:
    """Lines grown as users grow jobs: more replicates of what is there, or new parameter sets."""
    n_params, n_replicates = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    blocks = [Block(0, 0, n_params, 0, n_replicates)]
    for _ in range(draw(st.integers(0, 3))):
        more = draw(st.integers(0, 3))
        if draw(st.booleans()):
            blocks.append(Block(blocks[-1].end, 0, n_params, n_replicates, more))
            n_replicates += more
        else:
            blocks.append(Block(blocks[-1].end, n_params, more, 0, n_replicates))
            n_params += more
    return IndexLine(tuple(blocks))


@given(lines())
def test_every_index_has_one_place_and_every_place_one_index(line: IndexLine) -> None:
    places = [line.locate(k) for k in line.all()]
    assert len(set(places)) == line.size
    assert [line.index(p, r) for p, r in places] == list(range(line.size))
    for outside in (-1, line.size):
        with pytest.raises(IndexError):
            line.locate(outside)
    with pytest.raises(IndexError):
        line.index(line.n_params, 0)


@given(lines())
def test_extending_a_line_keeps_every_index(line: IndexLine) -> None:
    longer = IndexLine((*line.blocks, Block(line.size, line.n_params, 2, 0, 3)))
    assert longer.size == line.size + 6
    assert [longer.locate(k) for k in line.all()] == [line.locate(k) for k in line.all()]


@given(lines(), st.integers(0, 9), st.integers(0, 9))
def test_indices_of_parameter_sets_and_parameter_sets_of_indices_agree(
    line: IndexLine, lo: int, hi: int
) -> None:
    indices = line.of_params(lo, hi)
    assert set(indices) == {k for k in line.all() if lo <= line.locate(k).param < hi}
    assert set(line.params_of(indices)) == {line.locate(k).param for k in indices}
    if lo < line.n_params:
        assert line.of_param(lo) == line.of_params(lo, lo + 1)


@given(lines())
def test_results_are_ordered_by_parameter_set_and_replicate(line: IndexLine) -> None:
    runs = line.ordered(0, line.n_params)
    rows = [(Place(p, r + i), k + i) for p, r, k, n in runs for i in range(n)]
    assert [place for place, _ in rows] == sorted(place for place, _ in rows)
    assert all(line.locate(k) == place for place, k in rows)
    assert len(rows) == line.size


def test_blocks_that_leave_a_gap_or_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="does not begin at 6"):
        IndexLine((Block(0, 0, 2, 0, 3), Block(7, 2, 1, 0, 3)))
    with pytest.raises(ValueError, match="two indices"):
        IndexLine((Block(0, 0, 2, 0, 3), Block(6, 1, 1, 2, 1)))


def test_the_vectors_of_the_reference_page_hold() -> None:
    line = IndexLine(tuple(Block(*map(int, row)) for row in rows_below("index-line.md", "| base |")))
    for k, p, r in (map(int, row) for row in rows_below("index-line.md", "| index |")):
        assert line.locate(k) == (p, r)
        assert line.index(p, r) == k


@given(lines(), st.randoms(use_true_random=False), st.integers(1, 7))
def test_coverage_tells_each_parameter_set_once_when_its_last_index_is_covered(
    line: IndexLine, random: object, step: int
) -> None:
    order = list(line.all())
    random.shuffle(order)  # type: ignore[attr-defined]  # hypothesis does not export its type
    coverage, covered, told = Coverage(line), set[int](), set[int]()
    for at in range(0, len(order), step):
        part = Ranges.of(order[at : at + step])
        settled = set(coverage.add(part))
        covered |= set(part)
        assert settled.isdisjoint(told)
        told |= settled
        complete = {p for p in range(line.n_params) if len(ks := line.of_param(p)) and set(ks) <= covered}
        assert told == complete
        assert coverage.lacks(line.all()) == line.all() - Ranges.of(covered)
    assert len(coverage) == line.size


@given(st.lists(st.sets(st.integers(0, 30), min_size=1), max_size=6), st.sets(st.integers(0, 30)))
def test_a_segment_map_finds_exactly_the_segments_that_hold_an_index(
    parts: list[set[int]], asked: set[int]
) -> None:
    segments, taken, held = SegmentMap(), set[int](), {}
    for n, part in enumerate(parts):
        if mine := part - taken:
            taken |= mine
            name = AttemptId(f"0001-{n:06d}")
            held[name] = mine
            segments.add(
                SegmentRef(
                    attempt=name, name="", digest="", n_bytes=0, ranges=Ranges.of(mine).pairs, counts={}
                )
            )
    found = [s.attempt for s in segments.over(Ranges.of(asked))]
    assert len(found) == len(set(found))
    assert set(found) == {name for name, mine in held.items() if mine & asked}
