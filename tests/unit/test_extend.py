"""A finished job that gets more: only the new is run, and nothing shows that it came later."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_job import OK, SUMMARIZE, Outcome, StoredJob, model

from modelops.errors import ConflictError, ModelOpsError, NotFoundError, RequestError
from modelops.server.extend import extend_job, resume_job
from modelops.server.give_up import give_up
from modelops.states import FINAL_JOB_STATES, JobState, ReplicateStatus
from modelops.store import ChangedMeanwhileError
from modelops.store.contents import JobContents
from modelops.store.failures import failures_table
from modelops.store.parameters import Parameters
from modelops.store.segments import job_folder
from modelops.store.withdrawal import stale_aggregates
from modelops.study.canonical import canonical_json
from modelops.study.extension import extended_spec
from modelops.study.ids import AttemptId
from modelops.study.index_line import Block, IndexLine
from modelops.study.ranges import Ranges
from modelops.study.spec import JobSpec, decode_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SETS: list[dict[str, Any]] = [{"a": 1}, {"a": 2, "bad": True}, {"a": 0.5}]
MORE: list[dict[str, Any]] = [{"a": 3}, {"a": 4, "b": "text"}]


def extend(stored: StoredJob, **what: Any) -> None:
    if "parameters" in what:
        what["parameters"] = [canonical_json(each) for each in what["parameters"]]
    extend_job(stored.records, stored.objects, stored.job, "me", **what)


# The line


@settings(max_examples=200, deadline=None)
@given(
    n_params=st.integers(1, 5),
    n_replicates=st.integers(1, 5),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=5),
)
def test_extending_a_line_renumbers_nothing_and_gives_every_set_the_same(
    n_params: int, n_replicates: int, steps: list[tuple[int, int]]
) -> None:
    lines = [IndexLine.of(n_params, n_replicates)]
    n = n_replicates
    for gain, more in steps:
        n += gain
        lines.append(lines[-1].extended(replicates=n if gain else None, n_more_params=more))
    for before, after in pairwise(lines):
        assert [before.locate(k) for k in range(before.size)] == [after.locate(k) for k in range(before.size)]
    last = lines[-1]
    assert last.n_params == n_params + sum(more for _, more in steps)
    assert last.replicates() == [(0, last.n_params, n)]
    assert last.size == last.n_params * n
    assert sorted(last.locate(k) for k in range(last.size)) == [
        (p, r) for p in range(last.n_params) for r in range(n)
    ]


def test_the_line_of_the_page_is_what_extending_gives() -> None:
    line = IndexLine.of(3, 4).extended(replicates=6).extended(n_more_params=2)
    assert line.blocks == (Block(0, 0, 3, 0, 4), Block(12, 0, 3, 4, 2), Block(18, 3, 2, 0, 6))


def test_sets_that_have_enough_gain_nothing() -> None:
    line = IndexLine((Block(0, 0, 2, 0, 2), Block(4, 2, 1, 0, 5)))
    assert line.replicates() == [(0, 2, 2), (2, 3, 5)]
    assert line.extended(replicates=5).blocks[2:] == (Block(9, 0, 2, 2, 3),)
    assert line.extended(n_more_params=1).blocks[2:] == (Block(9, 3, 1, 0, 5),)
    with pytest.raises(
        ValueError, match=r"has 5 replicates already; 4 would be fewer. Say .* in all: 6 or more"
    ):
        line.extended(replicates=4)
    with pytest.raises(ValueError, match="more than one job can hold"):
        line.extended(replicates=2**53)


# The spec


def spec(**changes: Any) -> JobSpec:
    given: dict[str, Any] = {"line": IndexLine.of(2, 3), **changes}
    return JobSpec(name="t", bundle="1", bundle_name="b", model="m:f", **given)


@pytest.mark.parametrize(
    ("changes", "what", "says"),
    [
        ({}, {}, "nothing would be added"),
        ({}, {"replicates": 3}, "has 3 replicates already"),
        ({}, {"replicates": 2}, "2 would be fewer"),
        ({}, {"replicates": 0}, "replicates must be in"),
        ({}, {"replicates": 2**33}, "replicates must be in"),
        ({}, {"replicates": 4, "more_seeds": [1]}, "derive from the study's seed"),
        ({"seeds": (5, 6, 7)}, {"replicates": 5}, "give the seeds of the added replicates, 2 of them"),
        ({"seeds": (5, 6, 7)}, {"replicates": 5, "more_seeds": [1]}, "and 1 more were given"),
        ({"seeds": (5, 6, 7)}, {"replicates": 4, "more_seeds": [1, 2]}, "and 2 more were given"),
        ({"seeds": (5, 6, 7)}, {"more_seeds": [-1]}, r"seeds\[0\] must be an integer"),
        ({"seeds": (5, 6, 7)}, {"more_seeds": [1, True]}, r"seeds\[1\] must be an integer"),
    ],
)
def test_what_cannot_be_added_is_refused_with_a_sentence(
    changes: dict[str, Any], what: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        extended_spec(spec(**changes), **what)


def test_explicit_seeds_are_followed_by_more_of_them() -> None:
    extended = extended_spec(spec(seeds=(5, 6, 7)), more_seeds=[1, 2])
    assert extended.seeds == (5, 6, 7, 1, 2)
    assert extended.line.replicates() == [(0, 2, 5)]
    assert extended_spec(spec(seeds=(5, 6, 7)), n_more_params=1).seeds == (5, 6, 7)


# Jobs


@pytest.mark.parametrize(
    "steps",
    [
        [{"replicates": 11}],
        [{"parameters": MORE}],
        [{"replicates": 11, "parameters": MORE}],
        [{"parameters": MORE[:1]}, {"replicates": 9}, {"replicates": 11, "parameters": MORE[1:]}],
    ],
    ids=["replicates", "parameter sets", "both", "one after another"],
)
def test_an_extended_job_leaves_the_files_of_a_fresh_one_and_runs_only_what_is_new(
    tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    stored = StoredJob(tmp_path / "extended", SETS, 6)
    stored.run()
    for step in steps:
        before, ran = stored.spec.line.size, stored.n_ran
        extend(stored, **step)
        row = stored.records.job(stored.job)
        assert row.state is JobState.QUEUED
        assert decode_spec(row.spec) == stored.spec, "the row and the object that workers read are the same"
        stored.run(chunk=5)
        assert stored.n_ran - ran == stored.spec.line.size - before
    sets = SETS + [each for step in steps for each in step.get("parameters", [])]
    fresh = StoredJob(tmp_path / "fresh", sets, max([6, *(step.get("replicates", 6) for step in steps)]))
    fresh.run()
    assert stored.files() == fresh.files()
    assert stored.records.job(stored.job).run == 1 + len(steps)
    assert not stored.lacks_aggregates()


def test_explicit_seeds_go_on_and_the_files_are_those_of_a_fresh_job(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path / "extended", SETS, 3, seeds=(5, 1, 9))
    stored.run()
    extend(stored, seeds=[4, 4])
    stored.run()
    fresh = StoredJob(tmp_path / "fresh", SETS, 5, seeds=(5, 1, 9, 4, 4))
    fresh.run()
    assert stored.files() == fresh.files()


def test_aggregates_of_sets_that_gain_replicates_count_no_more_and_others_stay(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path, SETS, 4)
    stored.run()
    extend(stored, parameters=MORE[:1], replicates=6)
    assert not stored.records.aggregates(stored.job)
    said = [event for event in stored.records.events(stored.job) if event.kind == "segments_withdrawn"]
    assert [event.data["aggregates"] for event in said] == [3]
    assert [event.text for event in said] == [
        "aggregates of 3 parameter sets no longer count: extended by me: 12 more replicates, 1 new parameter set"
    ]
    stored.run()
    kept = stored.records.aggregates(stored.job)
    extend(stored, parameters=MORE[1:])
    assert stored.records.aggregates(stored.job) == kept


def test_a_stale_aggregate_gives_way_to_a_new_one_in_one_transaction(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path, SETS, 4)
    stored.run()
    epoch = stored.take()
    (old, *_) = stored.records.aggregates(stored.job)
    stored._number = 100
    current = msgspec.structs.replace(old, attempt=AttemptId("9-1"), digest="other")
    assert not stored.records.commit_aggregates(stored.job, epoch, current), "the first that is current wins"
    with stored.records._database.writing() as sql:
        sql.exec_driver_sql("UPDATE aggregates SET inputs = '[]' WHERE attempt = ?", (old.attempt,))
    assert stored.records.commit_aggregates(stored.job, epoch, current)
    assert old.attempt not in {ref.attempt for ref in stored.records.aggregates(stored.job)}


def test_an_extended_spec_that_names_other_parameters_has_a_format_of_its_own(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path, SETS, 2)
    stored.run()
    extend(stored, replicates=3)
    assert (stored.spec.format, stored.spec.parameters) == (1, "parameters.parquet")
    stored.run()
    extend(stored, parameters=MORE)
    assert stored.spec.format == 2
    assert stored.spec.parameters.startswith("parameters.3-")
    values = [s.values() for s in Parameters(stored.objects, stored.job, stored.spec.parameters).read(0, 9)]
    assert values == SETS + MORE
    assert len(Parameters(stored.objects, stored.job)) == len(SETS), "what was stored once stays as it was"


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (
            [{"a": 9}, {"a": 2, "bad": True}],
            "parameter set 1 of those to add is parameter set 1 of the job already",
        ),
        ([{"a": 9}, {"a": 9}], "parameter sets 0 and 1 are the same"),
        ([{"seed": 9}], "cannot have the name 'seed'"),
    ],
)
def test_a_parameter_set_that_cannot_be_added_is_refused(
    tmp_path: Path, parameters: list[dict[str, Any]], says: str
) -> None:
    stored = StoredJob(tmp_path, SETS, 2)
    stored.run()
    before = stored.records.job(stored.job), list(stored.objects.list(job_folder(stored.job)))
    with pytest.raises(RequestError, match=says):
        extend(stored, parameters=parameters)
    assert (stored.records.job(stored.job), list(stored.objects.list(job_folder(stored.job)))) == before


@pytest.mark.parametrize("text", [b'{"a": 1}', b'{"b":1,"a":2}', b"[1]", b"nonsense", b'{"a":1.50}'])
def test_a_parameter_set_that_is_not_canonical_is_refused(tmp_path: Path, text: bytes) -> None:
    stored = StoredJob(tmp_path, SETS, 2)
    stored.run()
    with pytest.raises(RequestError, match="parameter set"):
        extend_job(stored.records, stored.objects, stored.job, "me", parameters=[text])


def test_a_job_that_has_not_ended_is_neither_extended_nor_resumed(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path, SETS, 2)
    with pytest.raises(ChangedMeanwhileError, match="is queued: it can be extended once it has ended"):
        extend(stored, replicates=3)
    with pytest.raises(ChangedMeanwhileError, match="is queued: it can be resumed once it has ended"):
        resume_job(stored.records, stored.objects, stored.job, "me")


def test_of_many_who_extend_at_once_one_does_and_the_others_are_told(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path, SETS, 2)
    stored.run()
    errors: list[ModelOpsError] = []
    begin = threading.Barrier(6)

    def one(n: int) -> None:
        begin.wait()
        try:
            extend_job(stored.records, stored.objects, stored.job, "me", replicates=n)
        except ModelOpsError as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(3 + i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 5
    assert {type(error) for error in errors} == {ChangedMeanwhileError}
    assert stored.records.job(stored.job).run == 2
    stored.run()
    assert stored.records.job(stored.job).state is JobState.SUCCEEDED


# Resuming


def test_resuming_runs_only_what_is_missing(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path / "resumed", SETS, 6)
    stored.run(limit=8)
    assert (stored.records.job(stored.job).state, stored.n_ran) == (JobState.CANCELLED, 8)
    resume_job(stored.records, stored.objects, stored.job, "me")
    row = stored.records.job(stored.job)
    assert (row.run, row.reason) == (2, "resumed by me: 10 replicates without outcome")
    stored.run()
    assert stored.n_ran == 18
    fresh = StoredJob(tmp_path / "fresh", SETS, 6)
    fresh.run()
    assert stored.files() == fresh.files()
    with pytest.raises(RequestError, match="nothing is missing"):
        resume_job(stored.records, stored.objects, stored.job, "me")


def test_a_job_that_got_its_last_outcomes_while_it_was_cancelled_is_resumed_to_its_end(
    tmp_path: Path,
) -> None:
    stored = StoredJob(tmp_path / "cancelled", SETS, 6)
    stored.run(cancelled=True)
    assert (stored.records.job(stored.job).state, stored.n_ran) == (JobState.CANCELLED, 18)
    before = stored.files()
    row = resume_job(stored.records, stored.objects, stored.job, "me")
    assert row.reason == "resumed by me: its end"
    stored.run()
    assert (stored.records.job(stored.job).state, stored.n_ran) == (JobState.SUCCEEDED, 18)
    assert stored.files() == before
    with pytest.raises(ConflictError, match="nothing is missing"):
        resume_job(stored.records, stored.objects, stored.job, "me")


def test_a_job_whose_result_files_could_not_be_written_is_resumed_to_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredJob(tmp_path / "resumed", SETS, 6)

    def fails(_: JobContents) -> NoReturn:
        raise NotFoundError("parameters.parquet is gone")

    with monkeypatch.context() as broken:
        broken.setattr("stored_job.finalize", fails)
        with pytest.raises(NotFoundError):
            stored.run()
    assert give_up(stored.records, stored.job, stored.take(), "test") is JobState.PARTIAL
    row = resume_job(stored.records, stored.objects, stored.job, "me")
    assert row.reason == "resumed by me: its result files"
    stored.run()
    assert (stored.records.job(stored.job).state, stored.n_ran) == (JobState.SUCCEEDED, 18)
    fresh = StoredJob(tmp_path / "fresh", SETS, 6)
    fresh.run()
    assert stored.files() == fresh.files()
    with pytest.raises(ConflictError, match="nothing is missing"):
        resume_job(stored.records, stored.objects, stored.job, "me")


def test_result_files_of_an_earlier_run_are_none_of_a_run_that_could_not_write_its_own(
    tmp_path: Path,
) -> None:
    stored = StoredJob(tmp_path, SETS, 6)
    stored.run()
    assert len(stored.records.result_files(stored.job)) == 3
    extend_job(stored.records, stored.objects, stored.job, "me", replicates=7)
    assert stored.records.result_files(stored.job) == ()
    epoch = stored.take()
    while stored.records.job(stored.job).state not in FINAL_JOB_STATES:
        give_up(stored.records, stored.job, epoch, "test")
    assert stored.records.result_files(stored.job) == ()
    resume_job(stored.records, stored.objects, stored.job, "me")
    stored.run()
    assert len(stored.records.result_files(stored.job)) == 3


def test_a_new_run_forgets_time_used_who_cancelled_and_why_it_was_stalled(tmp_path: Path) -> None:
    stored = StoredJob(tmp_path, SETS, 2)
    stored.run(limit=3)
    with stored.records._database.writing() as sql:
        sql.exec_driver_sql("UPDATE jobs SET used_s = 5, cancel_by = 'x', stalled = 'y'")
    row = resume_job(stored.records, stored.objects, stored.job, "me")
    assert (row.used_s, row.cancel_by, row.stalled) == (0.0, None, "")
    assert stored.records.run_began(stored.job) == row.n_events


def test_failures_are_tried_again_only_when_asked_and_then_their_old_outcomes_count_no_more(
    tmp_path: Path,
) -> None:
    stored = StoredJob(tmp_path / "resumed", SETS, 12)

    def unlucky(params: Mapping[str, Any], seed: int) -> Outcome:
        return ReplicateStatus.FAILED if seed % 4 == 0 else model(params, seed)

    stored.model = unlucky
    stored.run()
    n_failed = stored.records.counts(stored.job)[ReplicateStatus.FAILED]
    ran = stored.n_ran
    with pytest.raises(
        RequestError, match=f"{n_failed} of them failed: .* resume {stored.job} --failed. tries"
    ):
        resume_job(stored.records, stored.objects, stored.job, "me")
    resume_job(stored.records, stored.objects, stored.job, "me", failed=True)
    assert stored.records.counts(stored.job) == {OK: 36 - n_failed}
    contents = JobContents.of(stored.objects, stored.records, stored.job)
    assert failures_table(contents).num_rows == 0
    (said,) = [e for e in stored.records.events(stored.job) if e.kind == "segments_withdrawn"]
    assert said.data["replicates"] == n_failed
    stored.model = model
    stored.run()
    assert stored.n_ran - ran == n_failed
    fresh = StoredJob(tmp_path / "fresh", SETS, 12)
    fresh.run()
    assert stored.files() == fresh.files()


# Aggregates that are stale


def test_what_is_stale_is_told_from_what_is_current() -> None:
    line = IndexLine((Block(0, 0, 2, 0, 2), Block(4, 0, 2, 2, 1)))
    segments = [("x", [(0, 3)]), ("y", [(3, 5)]), ("z", [(5, 6)])]

    def stale(inputs: str, params: tuple[int, int], without: str = "") -> bool:
        held = [each for each in segments if each[0] not in without]
        return bool(stale_aggregates(line, held, [(AttemptId("a"), [params], inputs)]))

    assert not stale("xy", (0, 1))
    assert not stale("xyz", (0, 2))
    assert stale("x", (0, 1)), "it lacks a segment"
    assert stale("xy", (0, 2)), "it lacks a segment of one of its sets"
    assert stale("xyz", (0, 1), without="y"), "a replicate has no outcome"
    assert stale("xyz", (0, 1), without="xyz")
    assert stale("xyz", (1, 2), without="z")
    assert not stale("xyz", (0, 1), without="z")


def test_a_set_without_replicates_has_nothing_to_be_stale_by() -> None:
    assert not stale_aggregates(IndexLine.of(1, 0), [], [(AttemptId("a"), [(0, 1)], [])])
    assert SUMMARIZE in spec(aggregates=(SUMMARIZE,)).aggregates
    assert Ranges() == IndexLine.of(1, 0).all()


def test_checkpoints_of_indices_that_the_job_has_only_from_now_on_are_none_of_its_own(tmp_path: Path) -> None:
    """They are of an extension after the backup from which the records come."""
    stored = StoredJob(tmp_path, SETS, 2)
    stored.run(limit=5, cancelled=True)
    folder = f"{job_folder(stored.job)}/checkpoints"
    for index in (5, 6):
        stored.objects.put_new(f"{folder}/{index}/0002-000001/1/state", b"then")
    extend(stored, parameters=MORE[:1])
    assert list(stored.objects.list(folder)) == [f"{folder}/5/0002-000001/1/state"]
