"""Results: the same rows whatever became of the work on the way, and honest ones before its end."""

from __future__ import annotations

import io
import itertools
import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelops.errors import IntegrityError
from modelops.server.ahead import BEFORE_END_S, Ahead
from modelops.states import OUTCOMES, AggregateStatus, JobEvent, ReplicateStatus
from modelops.store import (
    AggregateRow,
    AggregateWriter,
    Execution,
    Objects,
    Records,
    SegmentWriter,
    StoredError,
    columns,
    failures,
    gather,
    parameter_view,
    replicate_rows,
    view_writer,
)
from modelops.store.aggregate_failures import SUMMARY_SCHEMA as AGGREGATE_FAILURES_SCHEMA
from modelops.store.aggregate_failures import aggregate_failures
from modelops.store.contents import JobContents
from modelops.store.failures import FAILURES_SCHEMA, failure_summary, failures_table
from modelops.store.most_frequent import most_frequent_failure
from modelops.store.order import ResultOrder, Rows, places
from modelops.store.parameters import Parameters, write_parameters
from modelops.store.results import (
    aggregates_table,
    attempts_table,
    finalize,
    replicates_table,
    stream_result_file,
    stream_table,
)
from modelops.store.segments import FloatRows, store_not_needed
from modelops.study.canonical import canonical_json, param_id
from modelops.study.ids import JobId, attempt_id, new_job_id
from modelops.study.index_line import Block, IndexLine
from modelops.study.ranges import Ranges
from modelops.study.seeds import seed_key, seed_of
from modelops.study.spec import JobSpec
from modelops_runner.values import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from modelops.worker.messages import AggregateRef, SegmentRef

OK = ReplicateStatus.SUCCEEDED
ATTEMPTS = (attempt_id(1, n) for n in itertools.count(1))
Outcome = dict[str, Any] | ReplicateStatus
Model = "Callable[[int, int], Outcome]"


def spec_of(line: IndexLine, **changes: Any) -> JobSpec:
    return JobSpec(
        name="t", bundle="sha256:1", bundle_name="b", model="m:f", line=line, study_seed=7, **changes
    )


class Job:
    """A job whose segments are written here, as workers would."""

    def __init__(
        self, spec: JobSpec, sets: Sequence[Mapping[str, Any]], objects: Objects | None = None
    ) -> None:
        self.objects = objects or Objects.open("memory:///")
        self.job, self.spec = new_job_id(), spec
        self.segments: list[SegmentRef] = []
        self.aggregates: list[AggregateRef] = []
        write_parameters(self.objects, self.job, map(canonical_json, sets))

    def run(
        self, indices: Iterable[int], model: Callable[[int, int], Outcome], *, number: int = 1
    ) -> SegmentRef:
        writer = SegmentWriter(self.objects, self.job, next(ATTEMPTS), worker="w", host="h", pid=1)
        for k in indices:
            outcome = model(*self.spec.line.locate(k))
            execution = Execution(1.7e9 + k, 0.5, 0.25, 1000, number)
            if isinstance(outcome, dict):
                outputs = [(name, *encode(v)) for name, v in outcome.items()]
                writer.add(k, OK, True, outputs, None, execution)
            else:
                error = StoredError("ValueError", f"bad {k}", "tb", "err", f"fp-{outcome}", None)
                writer.add(k, outcome, True, [], error, execution)
        ref = writer.finish()
        assert ref is not None
        self.segments.append(ref)
        return ref

    def contents(self, **changes: Any) -> JobContents:
        return JobContents(self.objects, self.job, self.spec, self.segments, self.aggregates, **changes)

    def files(self) -> dict[str, bytes]:
        finalize(self.contents(rest=ReplicateStatus.NOT_RUN))
        folder = f"v1/jobs/{self.job}/results"
        return {n.rpartition("/")[2]: self.objects.get(n) for n in self.objects.list(folder)}


SETS = [{"beta": 0.1 * i, "n": i, "kind": "a"} for i in range(1, 6)]


def model(param: int, replicate: int) -> Outcome:
    if (param, replicate) in ((1, 2), (3, 0)):
        return ReplicateStatus.FAILED
    out: dict[str, Any] = {"z": float(param), "a": replicate, "curve": [1.0, 2.0], "arr": np.arange(3.0)}
    if param == 4:
        out["late"] = "x"
        out["mixed"] = 1 if replicate else 1.5
    return out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), group=st.sampled_from([1, 4, 7, 100]), wide=st.booleans())
def test_the_files_do_not_depend_on_chunks_order_or_attempts(seed: int, group: int, wide: bool) -> None:
    rng = random.Random(seed)
    files = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (replicate_rows, view_writer):
            patch.setattr(module, "ROW_GROUP", group)
        if wide:
            patch.setattr(view_writer, "FEWEST_ROWS", 1)
            patch.setattr(view_writer, "CELLS", 8)  # 4 outputs: two rows
        patch.setattr(gather, "CACHE_BYTES", rng.choice([0, 1 << 20]))
        for shuffled in (False, True):
            job = Job(spec_of(IndexLine.of(5, 6)), SETS)
            indices = list(range(30))
            if shuffled:
                rng.shuffle(indices)
            while indices:
                n = rng.randint(1, 12)
                job.run(indices[:n], model)
                indices = indices[n:]
            rng.shuffle(job.segments)
            files.append(job.files())
    assert files[0]["replicates.parquet"] == files[1]["replicates.parquet"]
    assert files[0]["aggregates.parquet"] == files[1]["aggregates.parquet"]
    table = pq.read_table(io.BytesIO(files[0]["replicates.parquet"]))
    assert table.num_rows == 30
    assert table.column_names[-3:] == ["z", "a", "late"]


def test_an_extended_job_and_a_fresh_one_give_the_same_file() -> None:
    # 3 sets x 4, then 2 replicates more of each, then 2 sets more
    extended = IndexLine((Block(0, 0, 3, 0, 4), Block(12, 0, 3, 4, 2), Block(18, 3, 2, 0, 6)))
    a, b = Job(spec_of(extended), SETS), Job(spec_of(IndexLine.of(5, 6)), SETS)
    for lo in range(0, 30, 7):
        a.run(range(lo, min(lo + 7, 30)), model)
    b.run(range(30), model)
    assert a.files()["replicates.parquet"] == b.files()["replicates.parquet"]
    assert replicates_table(a.contents()).equals(replicates_table(b.contents()))


def test_rows_say_what_the_study_asked_and_what_the_model_answered() -> None:
    job = Job(spec_of(IndexLine.of(5, 6)), SETS)
    job.run(range(30), model)
    table = replicates_table(job.contents())
    assert table.column_names == [
        "param",
        "param_id",
        "replicate",
        "seed",
        "status",
        "beta",
        "kind",
        "n",
        "z",
        "a",
        "late",
    ]
    assert json.loads(table.schema.metadata[b"modelops.left_out"]) == {
        "curve": "lists",
        "arr": "arrays",
        "mixed": "mixed: float64, int64",
    }
    for row in table.to_pylist():
        p, r = row["param"], row["replicate"]
        pid = param_id(canonical_json(SETS[p]))
        assert row["param_id"] == pid
        assert row["seed"] == seed_of(seed_key(7, pid), r)
        assert {k: row[k] for k in ("beta", "n", "kind")} == SETS[p]
        answer = model(p, r)
        if isinstance(answer, dict):
            assert (row["status"], row["z"], row["a"], row["late"]) == (
                "succeeded",
                float(p),
                r,
                answer.get("late"),
            )
        else:
            assert (row["status"], row["z"], row["a"]) == (str(answer), None, None)
    read = pq.read_table(io.BytesIO(job.files()["replicates.parquet"]))
    assert read.equals(table)
    assert read.schema.metadata == table.schema.metadata


def test_a_column_that_turns_out_mixed_in_the_last_row_is_left_out_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(view_writer, "ROW_GROUP", 4)
    job = Job(spec_of(IndexLine.of(1, 20)), SETS[:1])
    job.run(range(20), lambda _, r: {"x": 1.0 if r < 19 else 1, "y": r, **({"new": True} if r == 19 else {})})
    table = replicates_table(job.contents())
    assert table.column_names[-2:] == ["y", "new"]
    assert json.loads(table.schema.metadata[b"modelops.left_out"]) == {"x": "mixed: float64, int64"}
    assert table["y"].to_pylist() == list(range(20))
    assert table["new"].to_pylist() == [None] * 19 + [True]
    assert pq.read_table(io.BytesIO(job.files()["replicates.parquet"])).equals(table)


def test_the_order_of_columns_is_that_of_the_first_row_that_succeeded_then_of_names() -> None:
    def answer(_: int, r: int) -> Outcome:
        match r:
            case 0:
                return ReplicateStatus.CRASHED
            case 1:
                return {"c": 1, "a": 2}
            case _:
                return {"d": 1, "b": 1, "a": 1, "c": 1}

    job = Job(spec_of(IndexLine.of(1, 3)), SETS[:1])
    for k in (2, 0, 1):
        job.run([k], answer)
    assert replicates_table(job.contents()).column_names[-4:] == ["c", "a", "b", "d"]


def test_names_that_are_taken_are_moved_and_stay_apart() -> None:
    job = Job(spec_of(IndexLine.of(1, 2)), [{"beta": 1, "output.seed": 2}])
    job.run(range(2), lambda p, r: {"seed": 5, "beta": 0.5, "status": "fine", "x": 1})
    table = replicates_table(job.contents())
    assert table.column_names[5:] == [
        "beta",
        "output.seed",
        "output.output.seed",
        "output.beta",
        "output.status",
        "x",
    ]
    assert table["output.output.seed"].to_pylist() == [5, 5]


def test_parameters_are_typed_when_all_sets_agree_and_canonical_json_otherwise() -> None:
    sets: list[dict[str, Any]] = [
        {"f": 1.0, "i": 1, "t": "a", "b": True, "mixed": 1, "list": [1, 2.0], "big": 2**70, "some": 5},
        {"f": float("nan"), "i": -1, "t": "é", "b": False, "mixed": 1.0, "list": None, "big": 1},
    ]
    job = Job(spec_of(IndexLine.of(2, 1)), sets)
    table = replicates_table(job.contents())
    assert {f.name: str(f.type) for f in list(table.schema)[5:]} == {
        "b": "bool",
        "big": "large_string",
        "f": "double",
        "i": "int64",
        "list": "large_string",
        "mixed": "large_string",
        "some": "int64",
        "t": "large_string",
    }
    assert table["mixed"].to_pylist() == ["1", "1.0"]
    assert table["list"].to_pylist() == ["[1,2.0]", "null"]
    assert table["big"].to_pylist() == [str(2**70), "1"]
    assert table["some"].to_pylist() == [5, None]
    assert str(table["f"].to_pylist()) == "[1.0, nan]"


def test_seeds_are_those_that_were_given() -> None:
    job = Job(spec_of(IndexLine.of(2, 3), seeds=(11, 977, 2**63 - 1)), SETS[:2])
    assert replicates_table(job.contents())["seed"].to_pylist() == [11, 977, 2**63 - 1] * 2


def test_common_random_numbers_give_every_parameter_set_the_same_seeds() -> None:
    job = Job(spec_of(IndexLine.of(2, 3), common_random_numbers=True), SETS[:2])
    seeds = replicates_table(job.contents())["seed"].to_pylist()
    assert seeds[:3] == seeds[3:] == [seed_of(seed_key(7, None), r) for r in range(3)]


def test_during_a_job_the_rest_is_pending_or_running_and_after_it_not_run_or_cancelled() -> None:
    job = Job(spec_of(IndexLine.of(1, 6)), SETS[:1])
    job.run([1, 4], lambda p, r: {"x": r})
    for rest in (ReplicateStatus.PENDING, ReplicateStatus.NOT_RUN, ReplicateStatus.CANCELLED):
        table = replicates_table(job.contents(rest=rest))
        assert table["status"].to_pylist() == [rest, "succeeded", rest, rest, "succeeded", rest]
        assert table["x"].to_pylist() == [None, 1, None, None, 4, None]
    table = replicates_table(job.contents(running=Ranges([(2, 4)])))
    assert table["status"].to_pylist() == [
        "pending",
        "succeeded",
        "running",
        "running",
        "succeeded",
        "pending",
    ]


def test_contents_follow_the_records(tmp_path: Path) -> None:
    records = Records.open(f"sqlite:///{tmp_path}/m.db")
    job = Job(spec_of(IndexLine.of(1, 3)), SETS[:1])
    records.create_job(job.job, msgspec.json.encode(job.spec))
    epoch = records.take_lease(job.job, "me")
    records.commit_segment(job.job, epoch, job.run([1], lambda p, r: {"x": r}))

    def statuses() -> list[str]:
        contents = JobContents.of(job.objects, records, job.job)
        return [str(word) for word in replicates_table(contents)["status"].to_pylist()]

    assert statuses() == ["pending", "succeeded", "pending"]
    for event in (JobEvent.STARTED, JobEvent.ENVIRONMENT_READY, JobEvent.SETTLED):
        records.change_state(job.job, event, who="me")
    assert statuses() == ["not_run", "succeeded", "not_run"]
    records.change_state(job.job, JobEvent.CANCEL_ASKED, who="me")
    assert statuses() == ["cancelled", "succeeded", "cancelled"]
    records.close()


def test_a_job_without_any_segment_has_all_its_rows() -> None:
    job = Job(spec_of(IndexLine.of(2, 2)), SETS[:2])
    assert (
        replicates_table(job.contents(rest=ReplicateStatus.NOT_RUN))["status"].to_pylist() == ["not_run"] * 4
    )
    assert sorted(job.files()) == ["aggregates.parquet", "attempts.parquet", "replicates.parquet"]


def test_finalizing_a_damaged_job_is_refused_and_leaves_the_old_file() -> None:
    job = Job(spec_of(IndexLine.of(1, 2)), SETS[:1])
    ref = job.run(range(2), lambda p, r: {"x": r})
    before = job.files()
    job.objects.put(f"v1/jobs/{job.job}/{ref.name}", b"damaged")
    with pytest.raises(IntegrityError, match="is damaged"):
        job.files()
    path = f"v1/jobs/{job.job}/results/replicates.parquet"
    assert job.objects.get(path) == before["replicates.parquet"]


def test_progress_reaches_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_writer, "ROW_GROUP", 4)
    job = Job(spec_of(IndexLine.of(1, 10)), SETS[:1])
    job.run(range(10), lambda p, r: {"x": r})
    seen: list[tuple[int, int]] = []
    finalize(job.contents(), progress=lambda done, of: seen.append((done, of)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_row_groups_have_65536_rows_and_large_arrays_do_not_fill_memory() -> None:
    n = 70_000
    job = Job(spec_of(IndexLine.of(1, n)), SETS[:1])
    job.run(range(n), lambda p, r: {"x": r / 2})
    file = pq.ParquetFile(io.BytesIO(job.files()["replicates.parquet"]))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [65_536, n - 65_536]
    assert file.read(columns=["x"])["x"].to_pylist() == [r / 2 for r in range(n)]


def test_wide_rows_make_small_groups_and_the_first_that_succeeded_says_how_wide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(view_writer, "CELLS", 1 << 16)

    def answer(_: int, r: int) -> Outcome:
        if r < 3:
            return ReplicateStatus.FAILED
        return {f"o{i}": r / (i + 1) for i in range(30 if r == 3 else 2)}

    def rows_of(n: int, sizes: tuple[int, ...]) -> list[int]:
        job = Job(spec_of(IndexLine.of(1, n)), SETS[:1])
        at = 0
        for size in sizes:
            job.run(range(at, min(n, at + size)), answer)
            at += size
        file = pq.ParquetFile(io.BytesIO(job.files()["replicates.parquet"]))
        assert file.read(columns=["o1"])["o1"].to_pylist() == [None] * 3 + [r / 2 for r in range(3, n)]
        return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    assert rows_of(5_000, (5_000,)) == [2_048, 2_048, 904]  # 2 ** 16 // 30 is 2,184
    assert rows_of(5_000, (2, 1, 700, 5_000)) == [2_048, 2_048, 904]
    assert rows_of(256, (256,)) == [256]


def test_long_texts_make_small_groups_and_what_is_no_column_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_writer, "CELLS", 1 << 16)

    def rows_with(value: Any) -> list[int]:
        job = Job(spec_of(IndexLine.of(1, 1_000)), SETS[:1])
        job.run(range(1_000), lambda _p, r: {"x": r, "y": value})
        file = pq.ParquetFile(io.BytesIO(job.files()["replicates.parquet"]))
        return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    assert rows_with("short") == rows_with([0.5] * 4_000) == rows_with(np.arange(4_000)) == [1_000]
    assert rows_with("t" * 32 * 200) == [256, 256, 256, 232]  # 2 ** 16 // 202 is 324


@pytest.mark.parametrize(
    ("n_outputs", "rows"),
    [(0, 65_536), (16, 65_536), (17, 32_768), (50, 16_384), (500, 2_048), (10**6, 256)],
)
def test_how_many_rows_a_group_has(n_outputs: int, rows: int) -> None:
    assert view_writer.rows_at_once(10**6, lambda: n_outputs) == rows


# Failures


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), at_once=st.sampled_from([1, 3, 7, 2_048]))
def test_failures_are_the_same_however_few_rows_and_segments_are_held_at_a_time(
    seed: int, at_once: int
) -> None:
    rng = random.Random(seed)
    extended = IndexLine((Block(0, 0, 3, 0, 4), Block(12, 0, 3, 4, 2), Block(18, 3, 2, 0, 6)))
    kinds: list[Outcome] = [{"x": 1.0}, ReplicateStatus.FAILED, ReplicateStatus.CRASHED]
    outcomes = {k: rng.choice(kinds) for k in range(30)}
    by_place: dict[tuple[int, int], int] = {extended.locate(k): k for k in range(30)}
    job, indices = Job(spec_of(extended), SETS), list(range(30))
    rng.shuffle(indices)
    ran = indices[: rng.randint(0, 30)]
    for lo in range(0, len(ran), 5):
        job.run(ran[lo : lo + 5], lambda p, r: outcomes[by_place[p, r]])
    contents = job.contents(rest=rng.choice([ReplicateStatus.PENDING, ReplicateStatus.CANCELLED]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failures, "ROWS_AT_ONCE", at_once)
        patch.setattr(gather, "CACHE_BYTES", rng.choice([0, 1 << 20]))
        table = failures_table(contents)
        with io.BytesIO() as file:
            stream_table(contents, "failures", file)
            streamed = pa.ipc.open_stream(file.getvalue()).read_all()
    assert streamed.equals(table)
    assert streamed.schema.metadata == table.schema.metadata
    expected: list[tuple[int, int, str, str | None]] = []
    for (p, r), k in sorted(by_place.items()):
        if k in ran and not isinstance(outcomes[k], dict):
            expected.append((p, r, str(outcomes[k]), f"bad {k}"))
        elif k not in ran and contents.rest != ReplicateStatus.PENDING:
            expected.append((p, r, "cancelled", None))
    rows = table.to_pylist()
    assert [(row["param"], row["replicate"], row["status"], row["message"]) for row in rows] == expected
    assert all((row["attempts"] == 1) is (row["message"] is not None) for row in rows)


def test_failures_tell_what_happened_and_the_others_are_left_out() -> None:
    job = Job(spec_of(IndexLine.of(5, 6)), SETS)
    job.run([k for k in range(30) if k % 2], model, number=3)
    job.run([k for k in range(30) if k % 2 == 0 and k < 20], model)
    failures = failures_table(job.contents())
    assert failures.schema == FAILURES_SCHEMA
    rows = failures.to_pylist()
    assert [(r["param"], r["replicate"], r["attempts"]) for r in rows] == [(1, 2, 1), (3, 0, 1)]
    pid = param_id(canonical_json(SETS[1]))
    assert rows[0] == {
        "param": 1,
        "param_id": pid,
        "replicate": 2,
        "seed": seed_of(seed_key(7, pid), 2),
        "status": "failed",
        "error_type": "ValueError",
        "message": "bad 8",
        "traceback": "tb",
        "stderr": "err",
        "attempts": 1,
        "fingerprint": "fp-failed",
    }
    ended = failures_table(job.contents(rest=ReplicateStatus.NOT_RUN)).to_pylist()
    assert [(r["param"], r["replicate"], r["status"]) for r in ended] == [
        (1, 2, "failed"),
        (3, 0, "failed"),
        (3, 2, "not_run"),
        (3, 4, "not_run"),
        (4, 0, "not_run"),
        (4, 2, "not_run"),
        (4, 4, "not_run"),
    ]
    assert {r["error_type"] for r in ended[2:]} == {None}


def test_attempts_of_a_failure_are_counted() -> None:
    job = Job(spec_of(IndexLine.of(1, 3)), SETS[:1])
    job.run([0, 2], lambda p, r: ReplicateStatus.CRASHED, number=4)
    writer = SegmentWriter(job.objects, job.job, next(ATTEMPTS))
    writer.add(
        1, ReplicateStatus.CRASHED, True, [], StoredError("WorkerDied", "took its worker down 3 times")
    )
    ref = writer.finish()
    assert ref is not None
    job.segments.append(ref)
    assert failures_table(job.contents())["attempts"].to_pylist() == [4, None, 4]


def test_without_failures_the_table_is_empty_with_the_same_columns() -> None:
    job = Job(spec_of(IndexLine.of(1, 2)), SETS[:1])
    job.run(range(2), lambda p, r: {})
    failures = failures_table(job.contents(rest=ReplicateStatus.NOT_RUN))
    assert (failures.num_rows, failures.schema) == (0, FAILURES_SCHEMA)
    assert failure_summary(failures).num_rows == 0


def test_the_summary_groups_by_fingerprint_with_a_full_example_and_a_command() -> None:
    kinds = [ReplicateStatus.FAILED, ReplicateStatus.CRASHED, ReplicateStatus.FAILED]
    job = Job(spec_of(IndexLine.of(1, 5)), SETS[:1])
    job.run(range(3), lambda p, r: kinds[r])
    failures = failures_table(job.contents(rest=ReplicateStatus.NOT_RUN))
    summary = failure_summary(
        failures, lambda e: f"modelops bundle run b --seed-of {job.job}:{e['param']}:{e['replicate']}"
    )
    rows = summary.to_pylist()
    assert [(r["fingerprint"], r["count"], r["message"], r["command"]) for r in rows] == [
        ("fp-failed", 2, "bad 0", f"modelops bundle run b --seed-of {job.job}:0:0"),
        ("fp-crashed", 1, "bad 1", f"modelops bundle run b --seed-of {job.job}:0:1"),
    ]


# Attempts, outputs


def test_attempts_are_execution_data_of_every_try() -> None:
    job = Job(spec_of(IndexLine.of(1, 2)), SETS[:1])
    writer = SegmentWriter(job.objects, job.job, next(ATTEMPTS), worker="w1", host="h1", pid=9)
    writer.add_execution_only(1, ReplicateStatus.CRASHED, Execution(1.7e9, 2.0, 1.0))
    assert writer.finish() is None
    job.run([0, 1], lambda p, r: {"x": 1}, number=2)
    rows = attempts_table(job.contents()).to_pylist()
    assert [(r["replicate"], r["attempt_number"], r["status"], r["worker"], r["pid"]) for r in rows] == [
        (1, 1, "crashed", "w1", 9),
        (0, 2, "succeeded", "w", 1),
        (1, 2, "succeeded", "w", 1),
    ]
    assert pq.read_table(io.BytesIO(job.files()["attempts.parquet"])).to_pylist() == rows
    results = pq.read_table(io.BytesIO(job.files()["replicates.parquet"]))
    assert not {"seconds", "worker", "host", "attempt", "started_at"} & set(results.column_names)


def test_outputs_come_back_as_the_model_returned_them() -> None:
    job = Job(spec_of(IndexLine.of(5, 6)), SETS)
    job.run(range(24), model)
    contents = job.contents()
    assert repr(contents.output(0, 1)) == repr(model(0, 1))
    assert contents.output(param_id(canonical_json(SETS[2])), 3, "a") == 3
    with pytest.raises(KeyError, match="replicate 2 of parameter set 1 is failed"):
        contents.output(1, 2)
    with pytest.raises(KeyError, match="is pending"):
        contents.output(4, 0)
    with pytest.raises(KeyError, match="is running"):
        replace(contents, running=Ranges([(24, 25)])).output(4, 0)
    with pytest.raises(KeyError, match="no replicate 6"):
        contents.output(0, 6)
    with pytest.raises(KeyError, match="no output 'nope'"):
        contents.output(0, 1, "nope")


# Aggregates


def with_aggregates(
    targets: tuple[str, ...], rows: Sequence[AggregateRow], splits: int, seed: int = 0
) -> Job:
    job = Job(spec_of(IndexLine.of(5, 6), aggregates=targets), SETS)
    by_param: dict[int, list[AggregateRow]] = {}
    for row in rows:
        by_param.setdefault(row.param, []).append(row)
    params = list(by_param)
    random.Random(seed).shuffle(params)
    for i in range(splits):
        if mine := params[i::splits]:
            writer = AggregateWriter(job.objects, job.job, next(ATTEMPTS))
            for p in mine:
                for row in by_param[p]:
                    writer.add(row)
            job.aggregates.append(writer.finish([]))
    return job


def good(param: int, target: str, **outputs: Any) -> AggregateRow:
    encoded = [(name, *encode(v)) for name, v in outputs.items()]
    return AggregateRow(param, target, AggregateStatus.SUCCEEDED, 6, 6, outputs=encoded)


def test_one_aggregate_gives_its_outputs_plain_names_and_one_row_per_parameter_set() -> None:
    rows = [
        good(0, "m:s", loss=0.5, bands=np.arange(3.0), reason="text"),
        AggregateRow(1, "m:s", AggregateStatus.SKIPPED, 2, 6, "2 of 6 succeeded, 6 are needed"),
        AggregateRow(2, "m:s", AggregateStatus.FAILED, 6, 6, error=StoredError("ValueError", "no data")),
        good(4, "m:s", loss=1.5, extra=1, reason="more"),
    ]
    tables = [
        aggregates_table(with_aggregates(("m:s",), rows, n, n).contents(rest=ReplicateStatus.NOT_RUN))
        for n in (1, 2, 4)
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    table = tables[0]
    assert table.column_names == [
        "param", "param_id", "beta", "kind", "n", "status", "n_succeeded", "n_replicates", "reason",
        "loss", "output.reason", "extra",
    ]  # fmt: skip
    found = table.select(["status", "n_succeeded", "n_replicates", "reason", "loss", "extra"]).to_pylist()
    assert [tuple(r.values()) for r in found] == [
        ("succeeded", 6, 6, None, 0.5, None),
        ("skipped", 2, 6, "2 of 6 succeeded, 6 are needed", None, None),
        ("failed", 6, 6, "ValueError: no data", None, None),
        ("not_run", None, 6, None, None, None),
        ("succeeded", 6, 6, None, 1.5, 1),
    ]
    assert json.loads(table.schema.metadata[b"modelops.left_out"]) == {"bands": "arrays"}


def test_several_aggregates_are_told_apart_by_their_functions_names() -> None:
    rows = [
        *(good(p, "m:z_loss", loss=float(p), n=p) for p in range(5)),
        *(good(p, "other:fit", loss=p) for p in range(4)),
        AggregateRow(4, "other:fit", AggregateStatus.FAILED, 6, 6, error=StoredError("E", "no")),
    ]
    job = with_aggregates(("m:z_loss", "other:fit"), rows, 2)
    table = aggregates_table(job.contents(rest=ReplicateStatus.NOT_RUN))
    assert table.column_names[-3:] == ["z_loss.loss", "z_loss.n", "fit.loss"]
    assert table["fit.loss"].to_pylist() == [0, 1, 2, 3, None]
    assert table["z_loss.loss"].to_pylist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert table["status"].to_pylist() == ["succeeded"] * 4 + ["failed"]
    assert table["reason"].to_pylist() == [None] * 4 + ["fit: E: no"]
    same = with_aggregates(("a:f", "b:f"), [good(0, "a:f", x=1), good(0, "b:f", x=2)], 1)
    assert aggregates_table(same.contents(rest=ReplicateStatus.NOT_RUN)).column_names[-2:] == [
        "a:f.x",
        "b:f.x",
    ]


def test_aggregates_that_failed_alike_are_one_kind_and_those_made_again_since_are_none() -> None:
    def bad(param: int, place: str) -> AggregateRow:
        error = StoredError("E", f"no {param}", traceback=f"tb {param}", stderr="words", fingerprint=place)
        return AggregateRow(param, "m:s", AggregateStatus.FAILED, 6, 6, f"E: no {param}", error=error)

    rows = [
        *(bad(p, "m.py:3") for p in (1, 2, 4)),
        AggregateRow(0, "m:s", AggregateStatus.SKIPPED, 2, 6, "2 of 6 succeeded"),
        bad(3, "m.py:7"),
    ]
    for splits in (1, 2, 5):
        job = with_aggregates(("m:s",), rows, splits, splits)
        writer = AggregateWriter(job.objects, job.job, next(ATTEMPTS))
        writer.add(good(1, "m:s", loss=1))  # a later run of the job made this one
        job.aggregates.append(writer.finish([]))
        found = aggregate_failures(job.contents()).to_pylist()
        assert [(k["count"], k["status"], k["param"], k["reason"], k["traceback"]) for k in found] == [
            (2, "failed", 2, "E: no 2", "tb 2"),
            (1, "skipped", 0, "2 of 6 succeeded", None),
            (1, "failed", 3, "E: no 3", "tb 3"),
        ]
        assert {k["aggregate"] for k in found} == {"m:s"}


def test_a_job_whose_aggregates_all_succeeded_has_no_aggregate_failures() -> None:
    job = with_aggregates(("m:s",), [good(p, "m:s", x=1) for p in range(5)], 2)
    table = aggregate_failures(job.contents())
    assert (table.num_rows, table.schema) == (0, AGGREGATE_FAILURES_SCHEMA)


def test_a_job_without_aggregates_has_an_empty_table_of_them() -> None:
    job = Job(spec_of(IndexLine.of(5, 6)), SETS)
    table = aggregates_table(job.contents())
    assert (table.num_rows, table.column_names[:2]) == (0, ["param", "param_id"])


# Order and parameters


def as_tuples(rows: Rows) -> list[tuple[int, int, int]]:
    return list(zip(rows.param.tolist(), rows.replicate.tolist(), rows.index.tolist(), strict=True))


blocks_strategy = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(grown=blocks_strategy, cuts=st.lists(st.integers(0, 60), max_size=3))
def test_result_order_is_the_sorted_line(grown: list[tuple[int, int]], cuts: list[int]) -> None:
    blocks, n_params, n_replicates, at = [], 2, 3, 6
    blocks.append(Block(0, 0, 2, 0, 3))
    for more_params, more_replicates in grown:
        blocks.append(Block(at, 0, n_params, n_replicates, more_replicates))
        at = blocks[-1].end
        n_replicates += more_replicates
        blocks.append(Block(at, n_params, more_params, 0, n_replicates))
        at = blocks[-1].end
        n_params += more_params
    line = IndexLine(tuple(blocks))
    expected = sorted((*line.locate(k), k) for k in range(line.size))
    order = ResultOrder(line)
    assert order.size == line.size
    edges = sorted({0, line.size, *(min(c, line.size) for c in cuts)})
    got = [row for lo, hi in itertools.pairwise(edges) for row in as_tuples(order.rows(lo, hi))]
    assert got == expected
    found = places(line, np.arange(line.size))
    assert list(zip(found.param.tolist(), found.replicate.tolist(), strict=True)) == [
        tuple(line.locate(k)) for k in range(line.size)
    ]


def test_a_table_is_read_from_a_result_file_that_lies_in_remote_storage() -> None:
    job = Job(spec_of(IndexLine.of(3, 4)), SETS[:3])
    job.run(range(12), lambda param, replicate: {"x": param + replicate / 4})
    (written, *_) = finalize(job.contents())
    made, found = io.BytesIO(), io.BytesIO()
    stream_table(job.contents(), "replicates", made)
    stream_result_file(job.objects, job.job, written, found)
    made.seek(0)
    found.seek(0)
    expected, table = (pa.ipc.open_stream(file).read_all() for file in (made, found))
    assert table.equals(expected, check_metadata=True)
    assert table.num_rows == 12


def test_parameters_are_read_by_range_whatever_the_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelops.store import parameters as module

    monkeypatch.setattr(module, "ROW_GROUP", 3)
    objects, job = Objects.open("memory:///"), JobId("job_1")
    sets = [{"i": i, "x": float("inf"), "s": "é"} for i in range(10)]
    assert write_parameters(objects, job, map(canonical_json, sets)) == 10
    stored = Parameters(objects, job)
    assert len(stored) == 10
    assert [s.values() for s in stored.read(2, 8)] == sets[2:8]
    assert [s.param for s in stored.read(2, 8)] == list(range(2, 8))
    assert stored[9].values() == sets[9]
    assert stored.param_of(stored[7].param_id) == 7
    with pytest.raises(KeyError):
        stored.param_of("0" * 32)
    with pytest.raises(IndexError):
        stored[10]


def test_statuses_of_a_segment_are_positions_in_the_table_of_outcomes() -> None:
    assert [str(s) for s in OUTCOMES] == [
        "succeeded",
        "failed",
        "timed_out",
        "out_of_memory",
        "crashed",
        "invalid_output",
    ]


# The reason of a job that did not succeed


TRACEBACK = """Traceback (most recent call last):
  File "model.py", line 3, in simulate
    return helper(params)
  File "lib/helper.py", line 12, in helper
    np.linalg.inv(params)
  File "/envs/1/lib/python3.12/site-packages/numpy/linalg.py", line 609, in inv
    raise LinAlgError
"""


def failing(job: Job, kinds: Mapping[int, tuple[str, str]]) -> None:
    """Commit replicates that failed, each with its message and fingerprint, in two segments."""
    for half in (0, 1):
        writer = SegmentWriter(job.objects, job.job, next(ATTEMPTS))
        for k, (message, mark) in kinds.items():
            if k % 2 == half:
                error = StoredError("LinAlgError", message, TRACEBACK, "", mark)
                writer.add(k, ReplicateStatus.FAILED, True, [], error)
        ref = writer.finish()
        assert ref is not None
        job.segments.append(ref)


def test_the_most_frequent_failure_is_named_with_its_first_example_and_its_line_of_the_bundle() -> None:
    job = Job(spec_of(IndexLine.of(1, 8)), SETS[:1])
    failing(job, {k: (f"singular\nat {k}", "often" if k > 2 else "seldom") for k in range(1, 8)})
    said = "7 of 8 replicates failed: 5 times LinAlgError: singular at 3 (lib/helper.py:12)"
    assert most_frequent_failure(job.contents()) == said
    each = Job(spec_of(IndexLine.of(1, 8)), SETS[:1])
    failing(each, {0: ("singular", "first"), 1: ("singular", "second")})
    said = "2 of 8 replicates failed: once LinAlgError: singular (lib/helper.py:12)"
    assert most_frequent_failure(each.contents()) == said
    alike = Job(spec_of(IndexLine.of(1, 8)), SETS[:1])
    failing(alike, dict.fromkeys(range(8), ("", "mark")))
    said = "8 of 8 replicates failed: LinAlgError (lib/helper.py:12)"
    assert most_frequent_failure(alike.contents()) == said


def test_replicates_that_were_not_needed_are_none_of_which_some_failed() -> None:
    job = Job(spec_of(IndexLine.of(1, 8)), SETS[:1])
    failing(job, dict.fromkeys((0, 1), ("singular", "mark")))
    job.segments.append(store_not_needed(job.objects, job.job, next(ATTEMPTS), Ranges([(5, 8)])))
    said = "2 of 5 replicates failed: LinAlgError: singular (lib/helper.py:12)"
    assert most_frequent_failure(job.contents()) == said


def test_where_no_replicate_failed_the_most_frequent_failure_is_of_aggregates_or_none() -> None:
    error = StoredError("ValueError", "no data", 'x\n  File "m.py", line 7, in s\n', fingerprint="f")
    rows = [
        *(good(p, "m:s", loss=1) for p in range(3)),
        *(
            AggregateRow(p, "m:s", AggregateStatus.FAILED, 6, 6, "ValueError: no data", error=error)
            for p in (3, 4)
        ),
    ]
    job = with_aggregates(("m:s",), rows, 2)
    assert most_frequent_failure(job.contents()) == "2 of 5 aggregates failed: ValueError: no data (m.py:7)"
    job.aggregates.clear()
    assert most_frequent_failure(job.contents()) == ""


@settings(deadline=None)
@given(data=st.data())
def test_the_rows_of_indices_are_those_that_show_them(data: st.DataObject) -> None:
    line = IndexLine.of(3, 2).extended(replicates=5).extended(n_more_params=2).extended(replicates=6)
    order = ResultOrder(line)
    chosen = Ranges.of(data.draw(st.sets(st.integers(0, line.size - 1))))
    found = order.numbers_of(chosen)
    shown = order.at(np.array(list(found), np.int64))
    assert sorted(shown.index.tolist()) == list(chosen)
    every = order.rows(0, line.size)
    pairs = zip(every.param.tolist(), every.index.tolist(), strict=True)
    assert shown.param.tolist() == [param for param, index in pairs if index in chosen]


def test_very_many_replicates_that_did_not_run_have_no_rows_but_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = IndexLine.of(3, 4).extended(replicates=7)
    job = Job(spec_of(line), SETS[:3])
    job.run([1, 2, 5, 13, 14, 20], model)
    contents = job.contents(rest=ReplicateStatus.CANCELLED)
    every, failures = replicates_table(contents), failures_table(contents)
    assert every.num_rows == line.size
    assert b"modelops.no_rows" not in every.schema.metadata

    monkeypatch.setattr("modelops.store.contents.MAX_ROWS_NOT_RUN", 14)
    running = Ranges([(7, 9)])
    few = replicates_table(replace(contents, running=running))
    ran = pa.compute.not_equal(every["status"], "cancelled")
    assert few.equals(every.filter(ran))
    assert json.loads(few.schema.metadata[b"modelops.no_rows"]) == {"running": 2, "cancelled": 13}
    few_failures = failures_table(replace(contents))
    assert few_failures.equals(failures.filter(pa.compute.not_equal(failures["status"], "cancelled")))
    assert json.loads(few_failures.schema.metadata[b"modelops.no_rows"]) == {"cancelled": 15}

    monkeypatch.setattr("modelops.store.contents.MAX_ROWS_NOT_RUN", 15)
    assert replicates_table(replace(contents)).equals(every)


def test_what_a_cancelled_job_of_any_size_has_is_written_in_the_time_that_its_outcomes_take() -> None:
    n = 4_000_000_000
    job = Job(spec_of(IndexLine.of(2, n)), SETS[:2])
    job.run([0, 5, n - 1, n, 2 * n - 1], model)
    contents = job.contents(rest=ReplicateStatus.CANCELLED)
    finalize(contents)
    written = io.BytesIO(job.objects.get(f"v1/jobs/{job.job}/results/replicates.parquet"))
    table = pq.read_table(written)
    rows = list(zip(table["param"].to_pylist(), table["replicate"].to_pylist(), strict=True))
    assert rows == [(0, 0), (0, 5), (0, n - 1), (1, 0), (1, n - 1)]
    assert json.loads(table.schema.metadata[b"modelops.no_rows"]) == {"cancelled": 2 * n - 5}
    assert failures_table(contents).num_rows == 0


FLOATS = st.lists(
    st.tuples(st.sampled_from([("a", "b"), ("b", "a"), ("c",), ()]), st.booleans()), min_size=12, max_size=12
)


@settings(max_examples=25, deadline=None)
@given(made=FLOATS, seed=st.integers(0, 2**32))
def test_floats_that_are_stored_as_their_bits_give_the_table_that_their_texts_give(
    made: list[tuple[tuple[str, ...], bool]], seed: int
) -> None:
    """``made``: for each index the names of its outputs (none: it failed), and whether a segment begins with it."""
    rng, tables = random.Random(seed), []
    numbers = {
        (k, name): rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300) for k in range(12) for name in "abc"
    }
    parts: list[list[int]] = [[0]]
    for k in range(1, 12):
        if made[k][1] or made[k][0] != made[k - 1][0]:
            parts.append([])
        parts[-1].append(k)
    rng.shuffle(parts)
    for as_bits in (True, False):
        job = Job(spec_of(IndexLine.of(4, 3)), SETS[:4])
        for indices in parts:
            writer = SegmentWriter(job.objects, job.job, next(ATTEMPTS))
            names = made[indices[0]][0]
            if not names:
                for k in indices:
                    writer.add(k, ReplicateStatus.FAILED, True, [], StoredError("E", "", "", "", "f", None))
            elif as_bits:
                times, bits = (
                    [0.0] * len(indices),
                    np.array([[numbers[k, n] for n in names] for k in indices]),
                )
                writer.add_floats(
                    FloatRows(names, indices, bits.astype("<f8").tobytes(), times, times, times)
                )
            else:
                for k in indices:
                    writer.add(k, OK, True, [(n, *encode(numbers[k, n])) for n in names])
            ref = writer.finish()
            assert ref is not None
            job.segments.append(ref)
        tables.append(replicates_table(job.contents()))
    assert tables[0].equals(tables[1])
    assert tables[0].schema.metadata == tables[1].schema.metadata


PLAIN = st.one_of(
    st.floats(), st.integers(-(2**70), 2**70), st.booleans(), st.none(), st.sampled_from(["", "a", '"}{"'])
)
NAMES = st.sampled_from(["a", "b", "é", "a,", "}{", "[", 'q"', ":"])


@given(
    sets=st.lists(NAMES, min_size=1, max_size=3, unique=True).flatmap(
        lambda names: (
            st.lists(st.dictionaries(st.sampled_from(names), PLAIN), min_size=1, max_size=5)
            | st.lists(
                st.fixed_dictionaries(dict.fromkeys(names, st.floats() | st.integers())),
                min_size=1,
                max_size=5,
            )
        )
    )
)
def test_parameters_that_are_read_as_one_list_have_the_values_that_they_have_one_by_one(
    sets: list[dict[str, Any]],
) -> None:
    texts = columns.binary([canonical_json(one) for one in sets])
    found = parameter_view._values_of_flat(texts)
    is_flat = (
        all(one.keys() == sets[0].keys() for one in sets)
        and not any(
            isinstance(v, str) or v in (np.inf, -np.inf) or v != v for one in sets for v in one.values()
        )
        and sets[0]
        and not set('}{["') & set("".join(sets[0]))
    )
    assert (found is not None) == bool(is_flat)
    if found is not None:
        rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        assert [canonical_json(row) for row in rows] == [canonical_json(one) for one in sets]


@pytest.mark.parametrize(
    "changes", [{}, {"common_random_numbers": True}, {"seeds": (5, 6), "study_seed": 0}], ids=str
)
def test_files_made_with_what_was_made_ahead_are_the_same(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("parameters", "parameter_view"):
        monkeypatch.setattr(f"modelops.store.{module}.ROW_GROUP", 2)
    monkeypatch.setattr("modelops.server.ahead.ROW_GROUP", 2)
    spec = msgspec.structs.replace(spec_of(IndexLine.of(5, 2)), **changes)
    job = Job(spec, SETS)
    job.run(range(10), model)
    ahead = Ahead(job.objects, job.job, spec)
    for left_s in (None, BEFORE_END_S + 1, BEFORE_END_S, BEFORE_END_S):
        ahead.consider(left_s)
    view = ahead.view()
    assert view is not None
    assert ahead.view() is None
    assert replicates_table(job.contents(made_view=view)).equals(replicates_table(job.contents()))


def test_what_few_sets_need_is_made_at_once_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(spec_of(IndexLine.of(5, 2)), SETS)
    job.run(range(10), model)
    few = Ahead(job.objects, job.job, job.spec)
    few.begin_with_few()
    few.begin_with_few()
    few.consider(0.0)
    view = few.view()
    assert view is not None
    assert few.view() is None
    assert replicates_table(job.contents(made_view=view)).equals(replicates_table(job.contents()))
    for limit, most in (("FEW", 4), ("FEW_BYTES", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(f"modelops.server.ahead.{limit}", most)
            more = Ahead(job.objects, job.job, job.spec)
            more.begin_with_few()
            assert more.view() is None


def test_nothing_is_made_ahead_for_a_job_of_few_sets_nor_of_lost_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(spec_of(IndexLine.of(5, 2)), SETS)
    few = Ahead(job.objects, job.job, job.spec)
    few.consider(0.0)
    assert few.view() is None
    monkeypatch.setattr("modelops.server.ahead.ROW_GROUP", 2)
    job.objects.delete(f"v1/jobs/{job.job}/parameters.parquet")
    lost = Ahead(job.objects, job.job, job.spec)
    lost.consider(0.0)
    assert lost.view() is None
