"""Segments: what goes in comes out, whole or not at all."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from datetime import UTC, datetime
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelops.errors import IntegrityError, InternalError, RequestError
from modelops.states import OUTCOMES, AggregateStatus, ReplicateStatus
from modelops.store import (
    AggregateRow,
    AggregateWriter,
    AlreadyExistsError,
    Cells,
    Execution,
    FloatRows,
    Listed,
    Objects,
    PackSlice,
    SegmentWriter,
    SpooledFile,
    StoredError,
    read_aggregates,
    read_segment,
)
from modelops.store.segment_body import INLINE_LIMIT_BYTES
from modelops.store.segment_table import OutputsColumn, open_table
from modelops.study.ids import AttemptId, JobId
from modelops.study.ranges import Ranges
from modelops.worker.segment_cache import SegmentCache
from modelops_runner.values import encode

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.worker.messages import SegmentRef

JOB, ATTEMPT = JobId("job_1"), AttemptId("att_1")
OK = ReplicateStatus.SUCCEEDED
FOLDER = f"v1/jobs/{JOB}"


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects.open(tmp_path / "objects")


def encoded(outputs: dict[str, Any]) -> list[tuple[str, str, bytes]]:
    return [(name, *encode(value)) for name, value in outputs.items()]


def finished(writer: SegmentWriter) -> SegmentRef:
    ref = writer.finish()
    assert ref is not None
    return ref


rows_strategy = st.dictionaries(
    st.integers(0, 2**62),
    st.one_of(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
            st.one_of(st.none(), st.floats(), st.integers(), st.text(), st.binary(), st.lists(st.floats())),
            max_size=4,
        ),
        st.tuples(st.sampled_from(OUTCOMES[1:]), st.text(), st.text(), st.integers(-20, 200) | st.none()),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(rows=rows_strategy, random=st.randoms())
def test_a_segment_gives_back_what_was_added_in_any_order(rows: dict[int, Any], random: Any) -> None:
    stored: list[tuple[bytes, Objects, SegmentRef]] = []
    for _ in range(2):
        objects = Objects.open("memory:///")
        writer = SegmentWriter(objects, JOB, ATTEMPT)
        order = list(rows)
        random.shuffle(order)
        for index in order:
            match rows[index]:
                case dict() as outputs:
                    writer.add(index, OK, True, encoded(outputs))
                case _:
                    status, message, stderr, code = rows[index]
                    error = StoredError("E", message, "tb", stderr, "fp", code)
                    writer.add(index, status, True, [], error)
        ref = writer.finish()
        assert (ref is None) == (not rows)
        if ref is None:
            return
        stored.append((objects.get(f"{FOLDER}/{ref.name}"), objects, ref))
    data, objects, ref = stored[0]
    assert data == stored[1][0], "the bytes do not depend on the order"
    assert sha256(data).hexdigest() == ref.digest
    assert Ranges(ref.ranges) == Ranges.of(rows)
    segment = read_segment(objects, JOB, ref)
    assert list(segment.index) == sorted(rows)
    for index, row in rows.items():
        if isinstance(row, dict):
            assert repr(segment.outputs_of(index)) == repr(row)
            assert segment.error_of(index) is None
        else:
            status, message, stderr, code = row
            assert OUTCOMES[segment.status[segment.row_of(index)]] == status
            safe = [t.encode("utf-8", "backslashreplace").decode() for t in (message, stderr)]
            assert segment.error_of(index) == StoredError("E", safe[0], "tb", safe[1], "fp", code)
            with pytest.raises(KeyError):
                segment.outputs_of(index)
    found = {index: outputs for index, _, outputs in segment.rows()}
    assert found == {i: encoded(r) for i, r in sorted(rows.items()) if isinstance(r, dict)}


def test_rows_can_be_asked_for_by_index(objects: Objects) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    for i in range(10):
        writer.add(i * 2, OK if i != 3 else ReplicateStatus.FAILED, True, encoded({"x": i}) if i != 3 else [])
    segment = read_segment(objects, JOB, finished(writer))
    wanted = Ranges([(4, 9), (18, 99)])
    assert [(k, outputs) for k, _, outputs in segment.rows(wanted)] == [
        (4, encoded({"x": 2})),
        (8, encoded({"x": 4})),
        (18, encoded({"x": 9})),
    ]
    assert [k for k, _, _ in segment.rows(wanted, succeeded_only=False)] == [4, 6, 8, 18]
    with pytest.raises(KeyError):
        segment.row_of(5)


def test_a_value_that_is_no_dict_comes_back_alone(objects: Objects) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    writer.add(0, OK, False, encoded({"value": 1.5}))
    writer.add(1, OK, True, encoded({"value": 1.5}))
    writer.add(2, OK, True, [])
    segment = read_segment(objects, JOB, finished(writer))
    assert [segment.outputs_of(k) for k in range(3)] == [1.5, {"value": 1.5}, {}]
    assert segment.output_of(1, "value") == 1.5
    with pytest.raises(KeyError, match="no output 'x'; there are: value"):
        segment.output_of(1, "x")


def test_any_buffer_will_do_as_data(objects: Objects) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    raw: list[Any] = [msgspec.Raw(b"1"), bytearray(b"2"), memoryview(b"3"), b"4"]
    writer.add(0, OK, True, [(f"n{i}", "json", data) for i, data in enumerate(raw)])
    assert read_segment(objects, JOB, finished(writer)).outputs_of(0) == {"n0": 1, "n1": 2, "n2": 3, "n3": 4}


def spooled(path: Path, data: bytes) -> SpooledFile:
    path.write_bytes(data)
    return SpooledFile(path, len(data), sha256(data).hexdigest())


def test_large_outputs_go_into_the_pack_and_their_files_are_removed(objects: Objects, tmp_path: Path) -> None:
    big, bigger = b"b" * (INLINE_LIMIT_BYTES + 1), bytes(range(256)) * 9_000
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    writer.add(7, OK, True, [("small", "bytes", b"s"), ("file", "bytes", spooled(tmp_path / "f", bigger))])
    writer.add(3, OK, True, [("big", "bytes", big), ("limit", "bytes", b"l" * INLINE_LIMIT_BYTES)])
    ref = finished(writer)
    assert not (tmp_path / "f").exists()
    assert ref.pack == "packs/att_1.pack"
    assert objects.get(f"{FOLDER}/{ref.pack}") == big + bigger
    assert ref.pack_bytes == len(big + bigger)
    segment = read_segment(objects, JOB, ref)
    assert segment.outputs_of(7) == {"small": b"s", "file": bigger}
    assert segment.outputs_of(3) == {"big": big, "limit": b"l" * INLINE_LIMIT_BYTES}
    (_, _, outputs) = next(segment.rows(Ranges([(7, 8)])))
    piece = outputs[1][2]
    assert isinstance(piece, PackSlice)
    piece.copy_to(objects, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bigger


def test_a_spooled_file_that_was_changed_is_refused_and_nothing_is_stored(
    objects: Objects, tmp_path: Path
) -> None:
    file = spooled(tmp_path / "f", b"x" * 100_000)
    for damage in (b"y" * 100_000, b"x" * 99_999, b"x" * 100_001):
        file.path.write_bytes(damage)
        writer = SegmentWriter(objects, JOB, ATTEMPT)
        writer.add(0, OK, True, [("a", "bytes", file)])
        with pytest.raises(IntegrityError, match="not what the runner said"):
            writer.finish()
        assert list(objects.list("")) == []
    file.path.write_bytes(b"x" * 100_000)
    assert writer.finish() is not None, "the writer can be asked again"


@pytest.mark.parametrize("same_volume", [True, False])
def test_a_large_output_becomes_the_pack_itself_where_that_can_be(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_volume: bool
) -> None:
    link = os.link

    def linking(source: Path, target: Path) -> None:
        if source == file.path and not same_volume:
            raise OSError(errno.EXDEV, "another volume")
        link(source, target)

    data = bytes(range(256)) * 9_000
    file = spooled(tmp_path / "f", data)
    inode = file.path.stat().st_ino
    monkeypatch.setattr(os, "link", linking)
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    writer.add(7, OK, True, [("file", "bytes", file)])
    ref = finished(writer)
    pack = objects.local_path(f"{FOLDER}/{ref.pack}")
    assert pack is not None
    assert (pack.stat().st_ino == inode) is same_volume
    assert pack.read_bytes() == data
    assert not file.path.exists()


def test_finishing_again_after_a_lost_answer_gives_the_same_segment(objects: Objects, tmp_path: Path) -> None:
    def writer(folder: str, seconds: float) -> SegmentWriter:
        (tmp_path / folder).mkdir()
        w = SegmentWriter(objects, JOB, ATTEMPT)
        w.add(
            0,
            OK,
            True,
            [("a", "bytes", spooled(tmp_path / folder / "f", b"x" * 100_000))],
            None,
            Execution(1.0, seconds, 3.0),
        )
        return w

    first = finished(writer("a", 2.0))
    again = finished(writer("b", 7.0))
    assert msgspec.structs.replace(again, durations=first.durations) == first  # only how long it took differs
    other = SegmentWriter(objects, JOB, ATTEMPT)
    other.add(0, OK, True, [("a", "bytes", b"other" * 20_000)])
    with pytest.raises(AlreadyExistsError):  # of its pack; a segment's name says what is in it
        other.finish()


def test_two_outcomes_for_one_index_are_a_bug(objects: Objects) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    writer.add(5, OK, True, [])
    writer.add(5, ReplicateStatus.FAILED, True, [], StoredError("E", "m"))
    with pytest.raises(InternalError, match="two outcomes"):
        writer.finish()


def test_a_segment_cut_or_changed_at_any_byte_is_never_read() -> None:
    objects = Objects.open("memory:///")
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    for i in range(3):
        writer.add(i, OK, True, encoded({"x": i, "y": 0.5}))
    ref = finished(writer)
    name = f"{FOLDER}/{ref.name}"
    whole = objects.get(name)
    for n in range(len(whole)):
        objects.put(name, whole[:n])
        with pytest.raises(IntegrityError, match=r"segments/att_1\.\w+\.arrow is damaged"):
            read_segment(objects, JOB, ref)
    for n in range(0, len(whole), 7):
        objects.put(name, whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :])
        with pytest.raises(IntegrityError):
            read_segment(objects, JOB, ref)
    objects.put(name, whole)
    assert len(read_segment(objects, JOB, ref)) == 3


def test_a_pack_cut_or_changed_is_never_read(objects: Objects) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    writer.add(0, OK, True, [("a", "bytes", b"a" * 70_000), ("b", "bytes", b"b" * 70_000)])
    ref = finished(writer)
    whole = objects.get(f"{FOLDER}/{ref.pack}")
    segment = read_segment(objects, JOB, ref)
    for damaged in (whole[:-1], b"", whole[:10] + b"x" + whole[11:]):
        objects.put(f"{FOLDER}/{ref.pack}", damaged)
        with pytest.raises(IntegrityError, match="packs/att_1"):
            segment.outputs_of(0)


def test_no_way_to_read_a_large_output_gives_bytes_that_were_not_stored(
    objects: Objects, tmp_path: Path
) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    writer.add(0, OK, True, [("a", "bytes", b"a" * 70_000)])
    ref = finished(writer)
    whole = objects.get(f"{FOLDER}/{ref.pack}")
    _, ((_, _, large),) = read_segment(objects, JOB, ref).stored(0)
    assert isinstance(large, PackSlice)
    large.verify(objects)
    assert b"".join(large.pieces(objects)) == large.read(objects) == whole
    for damaged in (whole[:-1], whole[:-1] + b"x", bytes(len(whole))):
        objects.put(f"{FOLDER}/{ref.pack}", damaged)
        for read in (
            lambda: large.read(objects), lambda: large.verify(objects), lambda: list(large.pieces(objects)),
            lambda: large.copy_to(objects, tmp_path / "copy"),
        ):  # fmt: skip
            with pytest.raises(IntegrityError, match="packs/att_1"):
                read()
        assert not (tmp_path / "copy").exists()


def test_a_worker_that_has_read_a_segment_before_sees_only_what_counts_of_it_now(objects: Objects) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    for k in range(3):
        writer.add(k, OK, True, [])
    ref, cache = finished(writer), SegmentCache(objects)
    kept = msgspec.structs.replace(
        ref, ranges=((0, 1), (2, 3))
    )  # of 1 it is known since that it is not needed
    for which, held in ((ref, [0, 1, 2]), (kept, [0, 2]), (ref, [0, 1, 2])):
        assert cache.read(JOB, which).index.tolist() == held


def test_another_segment_under_the_same_name_is_refused(objects: Objects) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    writer.add(0, OK, True, [])
    ref = finished(writer)
    lying = msgspec.structs.replace(ref, ranges=((0, 2),))
    with pytest.raises(IntegrityError, match="does not hold the indices"):
        read_segment(objects, JOB, lying)


def test_a_newer_format_is_refused_with_a_sentence() -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"index": [1]}).replace_schema_metadata({"modelops.format": "4"})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(RequestError, match=r"newer ModelOps \(format 4.*upgrade modelops"):
        open_table(sink.getvalue().to_pybytes(), "x.arrow")


def test_the_file_has_the_columns_of_the_reference(objects: Objects) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT, worker="w", host="h", pid=5)
    writer.add(0, OK, True, [("a", "json", b"1")], None, Execution(1.7e9 + 0.25, 1.0, 0.5, 1024, 2))
    writer.add_execution_only(1, ReplicateStatus.CRASHED, Execution(1.7e9, 2.0, 1.5))
    ref = finished(writer)
    table = open_table(objects.get(f"{FOLDER}/{ref.name}"), "")
    assert {f.name: str(f.type) for f in table.schema} == {
        "index": "int64",
        "status": "uint8",
        "returned": "bool",
        "error": "struct<type: string, message: string, traceback: string, stderr: string, "
        "fingerprint: string, exit: int32>",
        "outputs": "list<item: struct<name: dictionary<values=string, indices=int32, ordered=0>, "
        "kind: dictionary<values=string, indices=int8, ordered=0>, data: large_binary, offset: int64, "
        "length: int64, digest: fixed_size_binary[32]>>",
    }
    assert table.schema.metadata == {
        b"modelops.format": b"1",
        b"modelops.job": b"job_1",
        b"modelops.attempt": b"att_1",
    }
    assert ref.execution == "executions/att_1.arrow"
    runs = open_table(objects.get(f"{FOLDER}/{ref.execution}"), "")
    assert runs.to_pylist() == [
        {
            "index": 0,
            "status": 0,
            "attempt_number": 2,
            "started_at": datetime.fromtimestamp(1.7e9 + 0.25, UTC),
            "seconds": 1.0,
            "cpu_seconds": 0.5,
            "max_rss_bytes": 1024,
        },
        {
            "index": 1,
            "status": 4,
            "attempt_number": 1,
            "started_at": datetime.fromtimestamp(1.7e9, UTC),
            "seconds": 2.0,
            "cpu_seconds": 1.5,
            "max_rss_bytes": None,
        },
    ]
    assert runs.schema.metadata[b"modelops.worker"] == b"w"
    assert table.validate(full=True) is None
    assert runs.validate(full=True) is None


def test_an_attempt_whose_replicates_all_go_again_stores_only_how_they_ran(objects: Objects) -> None:
    writer = SegmentWriter(objects, JOB, ATTEMPT)
    writer.add_execution_only(1, ReplicateStatus.CRASHED, Execution(1.7e9, 2.0, 1.5))
    assert writer.finish() is None
    assert list(objects.list("")) == [f"{FOLDER}/executions/att_1.arrow"]


def listed(made: list[tuple[bool, list[tuple[str, str, bytes]]]]) -> Listed:
    return Listed([returned for returned, _ in made], [outputs for _, outputs in made], [None] * len(made))


@pytest.mark.parametrize("targets", [("m:t",), ("m:t", "m:s")])
@pytest.mark.parametrize("long", [3, 70_000])
def test_values_that_came_as_cells_are_stored_as_outputs_that_were_listed(
    targets: tuple[str, ...], long: int, objects: Objects
) -> None:
    cells = [b"1" * (1 + k * k % 7) for k in range(39)] + [b"7" * long]
    rows = [[("a", "json", cells[2 * i]), ("b", "json", cells[2 * i + 1])] for i in range(20)]
    at_once, one_by_one = AggregateWriter(objects, JOB, ATTEMPT), AggregateWriter(objects, JOB, ATTEMPT)
    for target in targets:
        sizes = np.array(list(map(len, cells)), np.int64)
        at_once.add(AggregateRow(0, target, AggregateStatus.SKIPPED, 0, 1, "none"))
        at_once.add_succeeded(1, target, [1] * 20, [1] * 20, [Cells(20, ("a", "b"), b"".join(cells), sizes)])
        one_by_one.add(AggregateRow(0, target, AggregateStatus.SKIPPED, 0, 1, "none"))
        for i, outputs in enumerate(rows):
            one_by_one.add(AggregateRow(i + 1, target, AggregateStatus.SUCCEEDED, 1, 1, "", True, outputs))
    assert at_once.finish(["d"]) == one_by_one.finish(["d"])


def test_aggregates_of_many_sets_at_once_are_stored_as_one_by_one(objects: Objects) -> None:
    made = [(k % 2 == 0, encoded({"value" if k % 2 else "loss": k / 3})) for k in range(40)]
    at_once, one_by_one = AggregateWriter(objects, JOB, ATTEMPT), AggregateWriter(objects, JOB, ATTEMPT)
    for target in ("m:t", "m:s"):
        at_once.add_succeeded(20, target, range(20), range(1, 21), [listed(made[20:])])
        at_once.add_succeeded(0, target, range(20), range(1, 21), [listed(made[:5]), listed(made[5:20])])
        for k, (returned_dict, outputs) in enumerate(made):
            row = AggregateRow(
                k, target, AggregateStatus.SUCCEEDED, k % 20, k % 20 + 1, "", returned_dict, outputs
            )
            one_by_one.add(row)
    assert at_once.finish(["d"]) == one_by_one.finish(["d"])
    at_once.add_succeeded(3, "m:s", [1], [1], [listed(made[:1])])
    with pytest.raises(InternalError):
        at_once.finish(["d"])


def test_aggregates_come_back_as_they_were_added(objects: Objects) -> None:
    writer = AggregateWriter(objects, JOB, ATTEMPT)
    big = np.arange(20_000.0)
    writer.add(
        AggregateRow(5, "m:s", AggregateStatus.SUCCEEDED, 9, 10, outputs=encoded({"loss": 0.5, "bands": big}))
    )
    writer.add(AggregateRow(2, "m:s", AggregateStatus.SKIPPED, 1, 10, "too few"))
    writer.add(AggregateRow(2, "m:t", AggregateStatus.FAILED, 1, 10, error=StoredError("E", "m", "tb")))
    ref = writer.finish(["d1", "d2"])
    assert (ref.params, ref.inputs) == (((2, 3), (5, 6)), ("d1", "d2"))
    assert ref.counts == {"succeeded": 1, "skipped": 1, "failed": 1}
    table = read_aggregates(objects, JOB, ref)
    assert table.validate(full=True) is None
    rows = table.drop(["outputs", "error"]).to_pylist()
    assert [(r["param"], r["target"], r["status"], r["reason"]) for r in rows] == [
        (2, "m:s", 1, "too few"),
        (2, "m:t", 2, ""),
        (5, "m:s", 0, ""),
    ]
    outputs = OutputsColumn(table, f"{FOLDER}/{ref.pack}").rows()
    assert [len(o) for o in outputs] == [0, 0, 2]
    piece = outputs[2][1][2]
    assert isinstance(piece, PackSlice)
    assert piece.read(objects) == encode(big)[1]
    objects.put(f"{FOLDER}/{ref.name}", objects.get(f"{FOLDER}/{ref.name}")[:-1])
    with pytest.raises(IntegrityError):
        read_aggregates(objects, JOB, ref)


def test_a_worker_writes_and_reads_segments_without_importing_pandas(tmp_path: Path) -> None:
    code = """
import sys
from modelops.store import *
from modelops.states import ReplicateStatus as R
objects = Objects.open(sys.argv[1])
writer = SegmentWriter(objects, "job_1", "att_1")
outputs = [("a", "json", b"1"), ("b", "bytes", b"x" * 70000)]
writer.add(0, R.SUCCEEDED, True, outputs, None, Execution(1.0, 1.0, 1.0))
writer.add(2, R.FAILED, True, [], StoredError("E", "m"))
list(read_segment(objects, "job_1", writer.finish()).rows())
sys.exit("pandas" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=9),
    others=st.dictionaries(st.integers(0, 8), st.floats() | st.integers(), max_size=3),
    random=st.randoms(),
)
def test_floats_as_one_buffer_come_back_like_floats_one_by_one(
    values: list[tuple[float, float]], others: dict[int, Any], random: Any
) -> None:
    objects = Objects.open("memory:///")
    writer = SegmentWriter(objects, JOB, ATTEMPT, host="h")
    parts: list[Any] = [([i], [pair]) for i, pair in enumerate(values)]
    if random.random() < 0.5:
        parts = [(list(range(len(values))), values)]
    parts += [(len(values) + i, other) for i, other in others.items()]
    random.shuffle(parts)
    for index, what in parts:
        if isinstance(index, int):
            writer.add(index, OK, True, encoded({"c": what}), None, Execution(1.0, 2.0, 3.0, None, 2))
        else:
            n, data = len(index), struct.pack(f"<{2 * len(index)}d", *chain.from_iterable(what))
            writer.add_floats(FloatRows(("b", "a"), index, data, [1.5] * n, [2.5] * n, [3.5] * n, 4096, 2))
    ref = finished(writer)
    segment = read_segment(objects, JOB, ref)
    assert len(writer) == len(segment) == len(values) + len(others)
    for i, pair in enumerate(values):
        found = segment.outputs_of(i)
        assert list(found) == ["b", "a"]
        assert struct.pack("<2d", *found.values()) == struct.pack("<2d", *pair)
    assert {i: repr(segment.outputs_of(len(values) + i)["c"]) for i in others} == {
        i: repr(other) for i, other in others.items()
    }
    executions = open_table(objects.get(f"{FOLDER}/{ref.execution}"), "x").to_pylist()
    assert sorted(
        (e["index"], e["seconds"], e["cpu_seconds"], e["max_rss_bytes"]) for e in executions
    ) == sorted(
        [(i, 2.5, 3.5, 4096) for i in range(len(values))]
        + [(len(values) + i, 2.0, 3.0, None) for i in others],
        key=lambda row: row[0],
    )
