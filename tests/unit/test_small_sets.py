"""Many small parameter sets, read at once, are what they are when read one by one."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelops.processes import AggregateTable
from modelops.states import ReplicateStatus
from modelops.store import FloatRows, Objects, SegmentWriter, StoredError
from modelops.store.parameters import Parameters, write_parameters
from modelops.study.canonical import canonical_json
from modelops.study.ids import AttemptId, JobId
from modelops.study.index_line import Block, IndexLine
from modelops.worker.replicates import ReplicateReader
from modelops.worker.segment_cache import SegmentCache
from modelops.worker.small_sets import SmallSets
from modelops_runner.spool import read_output
from modelops_runner.values import decode, encode

JOB = JobId("job_1")
LINE = IndexLine((Block(0, 0, 4, 0, 3), Block(12, 1, 3, 3, 2)))  # sets 1 and 2 got more, and so did set 3
FLOATS, MIXED, FAILED = range(3)


def value_of(index: int, kind: int) -> dict[str, Any]:
    floats = {"a": index / 3, "b": -0.0}
    return floats if kind == FLOATS else {**floats, "n": index, "raw": b"\x00" * (index % 3)}


def store(objects: Objects, number: int, outcomes: dict[int, int]) -> Any:
    writer = SegmentWriter(objects, JOB, AttemptId(f"att_{number}"))
    for index, kind in outcomes.items():
        value = value_of(index, kind)
        if kind == FLOATS:
            data = struct.pack("<2d", *value.values())
            writer.add_floats(FloatRows(tuple(value), [index], data, [0.0], [0.0], [0.0]))
        elif kind == MIXED:
            outputs = [(name, *encode(v)) for name, v in value.items()]
            writer.add(index, ReplicateStatus.SUCCEEDED, True, outputs)
        else:
            writer.add(index, ReplicateStatus.FAILED, False, [], StoredError("E", "m"))
    return writer.finish()


@settings(max_examples=40, deadline=None)
@example([FAILED, *[FLOATS] * 17], [0, *[1] * 17], (0, 1))
@given(
    kinds=st.lists(st.sampled_from([FLOATS, FLOATS, FLOATS, MIXED, FAILED]), min_size=18, max_size=18)
    | st.lists(st.sampled_from([FLOATS, FAILED]), min_size=18, max_size=18),
    of_segment=st.lists(st.integers(0, 2), min_size=18, max_size=18),
    bounds=st.tuples(st.integers(0, 3), st.integers(1, 4)),
)
def test_sets_read_at_once_hold_what_each_holds(
    kinds: list[int], of_segment: list[int], bounds: tuple[int, int]
) -> None:
    objects = Objects.open("memory:///")
    write_parameters(objects, JOB, (canonical_json({"x": p}) for p in range(4)))
    parts = [{i: kinds[i] for i in range(18) if of_segment[i] == number} for number in range(3)]
    refs = [store(objects, number, part) for number, part in enumerate(parts) if part]
    reader = ReplicateReader(objects, SegmentCache(objects), JOB, refs, LINE)
    small = SmallSets(reader, Parameters(objects, JOB))
    lo, hi = min(bounds[0], bounds[1] - 1), bounds[1]
    found = small.read(lo, hi)
    assert [one.param for one in found] == list(range(lo, hi))
    assert small.n_replicates(lo, hi) == sum(one.n_replicates for one in found)
    for one in found:
        assert one.n_replicates == len(LINE.of_param(one.param))
        assert one.n_succeeded == reader.count(one.param, ReplicateStatus.SUCCEEDED)
        assert one.data is not None
        assert msgspec.json.decode(one.data.params) == {"x": one.param}
        assert replicates_of(one.data) == [
            {name: decode(kind, data) for name, kind, data in row.outputs if isinstance(data, bytes)}
            for row in reader.rows(one.param)
        ]
    table = small.table(lo, hi)
    if table is None:
        read = {of_segment[i] for one in found for i in LINE.of_param(one.param)}
        assert MIXED in kinds or not any(kinds[i] == FLOATS for i in range(18) if of_segment[i] in read)
        return
    assert table.n_replicates == [one.n_replicates for one in found]
    assert table.n_succeeded == list(table.data.counts) == [one.n_succeeded for one in found]
    assert table.data.param == lo
    assert [msgspec.json.decode(params) for params in table.data.params] == [{"x": p} for p in range(lo, hi)]
    assert replicates_of(table.data) == [row for one in found for row in replicates_of(one.data)]


def replicates_of(data: Any) -> list[dict[str, Any]]:
    if isinstance(data, AggregateTable) or data.rows is msgspec.UNSET:
        numbers = np.frombuffer(bytes.fromhex(data.floats), "<f8").reshape(-1, len(data.names))
        return [dict(zip(data.names, row, strict=True)) for row in numbers.tolist()]
    return [
        {name: read_output(kind, msgspec.json.decode(raw)) for name, kind, raw in outputs}
        for _, _, outputs in data.rows
    ]


def test_a_set_with_outputs_in_a_pack_or_very_many_bytes_is_not_small() -> None:
    objects = Objects.open("memory:///")
    write_parameters(objects, JOB, (canonical_json({"x": p}) for p in range(3)))
    writer = SegmentWriter(objects, JOB, AttemptId("att_1"))
    for index, sizes in enumerate([[100_000], [10], [60_000] * 20]):
        outputs = [(f"o{i}", "bytes", bytes(n)) for i, n in enumerate(sizes)]
        writer.add(index, ReplicateStatus.SUCCEEDED, True, outputs)
    ref = writer.finish()
    assert ref is not None
    reader = ReplicateReader(objects, SegmentCache(objects), JOB, [ref], IndexLine.of(3, 1))
    small = SmallSets(reader, Parameters(objects, JOB))
    assert [one.data is None for one in small.read(0, 3)] == [True, False, True]
    assert [one.n_succeeded for one in small.read(0, 3)] == [1, 1, 1]
