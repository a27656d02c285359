"""What the machine decides, one rule at a time: events in, commands out."""

from __future__ import annotations

import ast
import random
import time
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pytest
from simulator import JOB, World
from simulator_scenario import Scenario

from modelops import driver
from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.blame import DEADLY_AT_LAST
from modelops.driver.chunking import Meter, chunk_size
from modelops.driver.machine import Machine
from modelops.driver.needs import Watched
from modelops.states import STORED, AggregateStatus, JobEvent, JobState, ReplicateStatus
from modelops.study.ids import attempt_id, part_id
from modelops.study.index_line import Block, IndexLine
from modelops.study.ranges import EMPTY, Ranges
from modelops.study.spec import JobSpec, RetryPolicy
from modelops.study.stopping import Until
from modelops.worker.messages import (
    NO_NUMBER,
    AggregateReceipt,
    AggregateRef,
    Chunk,
    ErrorExample,
    FailureCount,
    Receipt,
    SegmentRef,
)

SUCCEEDED, FAILED, CRASHED = ReplicateStatus.SUCCEEDED, ReplicateStatus.FAILED, ReplicateStatus.CRASHED
T = TypeVar("T")


def spec(n_params: int = 1, n_replicates: int = 1, **changes: object) -> JobSpec:
    line = IndexLine.of(n_params, n_replicates)
    fields = {"name": "j", "bundle": "b", "bundle_name": "b", "model": "m:f", "line": line, **changes}
    return JobSpec(**fields)  # type: ignore[arg-type]  # the changes are checked by the tests that make them


def only(commands: list[c.Command], kind: type[T]) -> list[T]:
    return [command for command in commands if isinstance(command, kind)]


def running(
    job: JobSpec, workers: int = 1, slots: int = 1, **known: list[SegmentRef]
) -> tuple[Machine, list[c.Command]]:
    """Return a machine whose environment is ready, and its first orders."""
    machine = Machine(job, JOB, **known)  # type: ignore[arg-type]
    machine.start(0.0)
    for i in range(workers):
        assert machine.handle(e.WorkerJoined(f"w{i}", slots), 0.0) == []
    return machine, machine.handle(e.EnvironmentReady(), 0.0)


def segment(chunk: Chunk, status: ReplicateStatus = SUCCEEDED) -> SegmentRef:
    n = len(Ranges(chunk.ranges))
    return SegmentRef(
        attempt=chunk.attempt,
        name="s",
        digest=chunk.attempt,
        n_bytes=1,
        ranges=chunk.ranges,
        counts={status: n},
    )


def receipt(
    chunk: Chunk, status: ReplicateStatus = SUCCEEDED, *, error: str = "E", seconds: float = 1.0
) -> Receipt:
    """Return the receipt of a chunk whose replicates all ended with this status, each after ``seconds``."""
    n = len(Ranges(chunk.ranges))
    example = ErrorExample(fingerprint=error, status=status, error_type="ValueError", message=error)
    return Receipt(
        job=JOB,
        attempt=chunk.attempt,
        worker="w0",
        host="h",
        segment=None if status in chunk.retry_on else segment(chunk, status),
        retry=((status, chunk.ranges),) if status in chunk.retry_on else (),
        failures=() if status is SUCCEEDED else (FailureCount(example=example, count=n),),
        model_seconds=n * seconds,
        wall_seconds=n * seconds,
    )


def finish_chunks(
    machine: Machine, commands: list[c.Command], status: ReplicateStatus = SUCCEEDED, error: str = "E"
) -> list[Chunk]:
    """Let every chunk end alike until nothing is submitted; return all chunks."""
    chunks = []
    while todo := only(commands, c.SubmitChunk):
        commands = []
        for command in todo:
            chunks.append(command.chunk)
            commands += machine.handle(e.ChunkDone(receipt(command.chunk, status, error=error)), 1.0)
            commands += machine.handle(e.Committed(command.chunk.attempt), 1.0)
    return chunks


def finalized(machine: Machine) -> c.Finish:
    (end,) = only(machine.handle(e.Finalized(), 9.0), c.Finish)
    assert machine.over
    return end


def test_a_job_goes_from_start_to_success() -> None:
    machine = Machine(spec(1, 1), JOB)
    assert machine.start(0.0) == [c.ChangeState(JobEvent.STARTED, JobState.PREPARING), c.PrepareEnvironment()]
    assert machine.start(0.0) == []
    assert machine.handle(e.WorkerJoined("w0", 1), 0.0) == []  # no environment, no chunk
    ready, submit = machine.handle(e.EnvironmentReady(), 0.0)
    assert ready == c.ChangeState(JobEvent.ENVIRONMENT_READY, JobState.RUNNING)
    assert isinstance(submit, c.SubmitChunk)
    assert (submit.worker, submit.chunk.attempt, submit.chunk.ranges) == ("w0", "0001-000001", ((0, 1),))
    commit = machine.handle(e.ChunkDone(receipt(submit.chunk)), 1.0)
    assert commit == [c.CommitSegment(segment(submit.chunk))]
    assert machine.counts()[SUCCEEDED] == 0  # nothing counts before it is committed
    assert machine.counts()[ReplicateStatus.RUNNING] == 1
    assert machine.handle(e.Committed(submit.chunk.attempt), 1.0) == [
        c.ChangeState(JobEvent.SETTLED, JobState.FINALIZING),
        c.Finalize(),
    ]
    assert machine.counts()[SUCCEEDED] == 1
    assert finalized(machine).state is JobState.SUCCEEDED


def test_an_environment_that_fails_ends_the_job_once_and_nothing_has_failed() -> None:
    machine = Machine(spec(20, 200), JOB)
    machine.start(0.0)
    commands = machine.handle(e.EnvironmentFailed("ResolutionError", "no such package"), 0.0)
    assert commands == [
        c.ChangeState(JobEvent.ENVIRONMENT_FAILED, JobState.FAILED, "ResolutionError: no such package"),
        c.Finish(JobState.FAILED, "ResolutionError: no such package"),
    ]
    counts = machine.counts()
    assert counts[ReplicateStatus.NOT_RUN] == 4_000
    assert sum(counts.values()) == 4_000


def test_without_a_worker_the_job_waits_and_a_worker_that_joins_continues_it() -> None:
    machine, commands = running(spec(1, 5), workers=0)
    assert only(commands, c.SubmitChunk) == []
    assert machine.eta(0.0) is None
    assert only(machine.handle(e.WorkerJoined("late", 1), 5.0), c.SubmitChunk)


def test_a_job_is_held_up_while_its_pools_have_no_worker_or_only_delayed_retries_are_left() -> None:
    machine, _ = running(spec(1, 4), workers=0)
    assert not machine.is_held_up, "the jobs behind it could not run either"
    machine, _ = running(spec(1, 4, pools=("eu",)), workers=0)
    assert machine.is_held_up
    machine.handle(e.WorkerJoined("w0", 1, pool="eu"), 5.0)
    assert not machine.is_held_up
    retry = RetryPolicy(max_retries=1, initial_delay=3600.0, on=frozenset({ReplicateStatus.CRASHED}))
    machine, commands = running(spec(1, 4, retry=retry, fail_fast=False))
    assert not machine.is_held_up
    finish_chunks(machine, commands, ReplicateStatus.CRASHED)
    assert machine.n_live == 0
    assert machine.is_held_up
    assert machine.sleeps_until is not None
    assert 3600.0 <= machine.sleeps_until < 3602.0
    machine.handle(e.TimerRang("retry"), 3602.0)
    assert not machine.is_held_up
    assert machine.sleeps_until is None


def test_a_job_sleeps_only_while_nothing_but_recorded_retries_can_come() -> None:
    retry = RetryPolicy(max_retries=1, initial_delay=3600.0)
    for changed, sleeps in (({}, True), ({"timeout_s": 9000.0}, False), ({"pools": ("eu",)}, False)):
        machine, commands = running(spec(1, 4, retry=retry, fail_fast=False, **changed))
        finish_chunks(machine, commands, ReplicateStatus.CRASHED)
        assert (machine.sleeps_until is not None) is sleeps, changed
    machine, commands = running(spec(1, 4, retry=retry, fail_fast=False))
    finish_chunks(machine, commands, ReplicateStatus.CRASHED)
    machine.handle(e.StoreLost("the database is away"), 2.0)
    assert machine.sleeps_until is None


def test_the_probe_is_32_replicates_from_all_over_the_line_and_stops_a_broken_model() -> None:
    machine, commands = running(spec(100, 100), workers=2)
    chunks = finish_chunks(machine, commands, FAILED)
    tried = [k for chunk in chunks for k in Ranges(chunk.ranges)]
    assert len(tried) == len(set(tried)) == 32
    gaps = {b - a for a, b in zip(sorted(tried), sorted(tried)[1:], strict=False)}
    assert (min(tried), max(tried)) == (0, 9_999)
    assert max(gaps) - min(gaps) <= 1
    assert finalized(machine).state is JobState.FAILED
    assert machine.reason == "all 32 replicates that were tried first failed alike: ValueError: E"
    assert (machine.counts()[FAILED], machine.counts()[ReplicateStatus.NOT_RUN]) == (32, 10_000 - 32)


@pytest.mark.parametrize(
    "changes", [{"fail_fast": False}, {"line": IndexLine.of(1, 7)}], ids=["off", "small"]
)
def test_without_a_probe_a_broken_model_runs_to_the_end(changes: dict[str, object]) -> None:
    machine, commands = running(spec(10, 10, **changes))
    chunks = finish_chunks(machine, commands, FAILED)
    assert sum(len(Ranges(chunk.ranges)) for chunk in chunks) == machine.spec.line.size
    assert finalized(machine) == c.Finish(JobState.FAILED, "")


def test_a_job_without_a_reason_of_its_own_is_told_what_failed_most_often() -> None:
    machine, commands = running(spec(1, 7))
    finish_chunks(machine, commands, FAILED)
    (end,) = only(machine.handle(e.Finalized("7 of 7 replicates failed: E"), 9.0), c.Finish)
    assert end == c.Finish(JobState.FAILED, "7 of 7 replicates failed: E")
    machine, commands = running(spec(1, 7, max_failures=0))
    finish_chunks(machine, commands, FAILED)
    (end,) = only(machine.handle(e.Finalized("7 of 7 replicates failed: E"), 9.0), c.Finish)
    assert "more than max_failures = 0" in end.reason


def test_two_different_errors_or_one_success_let_the_job_go_on() -> None:
    for status, error in ((FAILED, "another"), (SUCCEEDED, "")):
        machine, commands = running(spec(10, 10), workers=2)
        first, second, *_ = only(commands, c.SubmitChunk)
        for command, ends, name in ((first, FAILED, "E"), (second, status, error)):
            machine.handle(e.ChunkDone(receipt(command.chunk, ends, error=name)), 1.0)
            machine.handle(e.Committed(command.chunk.attempt), 1.0)
        assert machine.state is JobState.RUNNING
        machine.handle(e.WorkerJoined("w9", 1), 1.0)
        assert machine._probe.passed


def test_the_probe_judges_first_attempts_also_when_they_will_be_retried() -> None:
    machine, commands = running(spec(10, 10, retry=RetryPolicy(max_retries=5)), workers=2)
    chunks = finish_chunks(machine, commands, CRASHED)
    assert sum(len(Ranges(chunk.ranges)) for chunk in chunks) == 32
    assert machine.state is JobState.FINALIZING
    assert "failed alike" in machine.reason


def test_other_slots_do_not_wait_long_for_a_slow_probe() -> None:
    machine, commands = running(spec(1, 100), workers=50)
    assert len(only(commands, c.SubmitChunk)) == 32
    assert only(machine.handle(e.WorkerJoined("w51", 1), 1.0), c.SubmitChunk) == []
    assert len(only(machine.handle(e.TimerRang("probe"), 5.0), c.SubmitChunk)) >= 19


def test_a_missing_import_is_one_error_of_the_job() -> None:
    machine, commands = running(spec(10, 10))
    (submit, *_) = only(commands, c.SubmitChunk)
    said = "No module named 'x', imported at seir.py:1; add x to the dependencies"
    nothing = Receipt(
        job=JOB,
        attempt=submit.chunk.attempt,
        worker="w0",
        host="h",
        unstarted=submit.chunk.ranges,
        missing_import=said,
    )
    commands = machine.handle(e.ChunkDone(nothing), 1.0)
    assert c.ChangeState(JobEvent.STOPPED_EARLY, JobState.FINALIZING, said) in commands
    for attempt in only(commands, c.StopAttempt):
        commands = machine.handle(e.AttemptLost(attempt.attempt, worker_died=False), 1.0)
    assert c.Finalize() in commands
    assert finalized(machine) == c.Finish(JobState.FAILED, said)
    assert machine.counts()[ReplicateStatus.NOT_RUN] == 100


def play(
    job: JobSpec, seconds: list[float], *, workers: int = 2, slots: int = 1, seed: int = 1, **faults: object
) -> World:
    scenario = Scenario(job, workers, slots, seconds, **faults)  # type: ignore[arg-type]
    world = World(scenario, seed)
    world.run()
    return world


def test_chunks_can_be_of_a_size_that_is_given() -> None:
    machine = Machine(spec(2, 10, fail_fast=False), JOB, replicates_per_chunk=7)
    machine.start(0.0)
    machine.handle(e.WorkerJoined("w", 9), 0.0)
    chunks = only(machine.handle(e.EnvironmentReady(), 0.0), c.SubmitChunk)
    assert [order.chunk.ranges for order in chunks] == [((0, 7),), ((7, 14),), ((14, 20),)]


def chunk_sizes(world: World) -> list[int]:
    return [len(Ranges(s.ranges)) for s in world.store.segments.values()]


def test_twenty_times_two_hundred_instant_replicates_take_few_chunks() -> None:
    world = play(spec(20, 200, aggregates=("m:a",)), [2e-6] * 4_000)
    assert world.finished == c.Finish(JobState.SUCCEEDED, "")
    assert len(world.store.segments) <= 10
    assert len(world.store.aggregates) <= 8
    assert world.settled_at < 0.5  # of which 0.2 s are the simulated environment


def test_aggregates_are_not_cut_to_be_shared_while_replicates_wait() -> None:
    world = play(spec(60_000, 1, aggregates=("m:a",)), [2e-5] * 60_000)
    assert len(world.store.aggregates) <= 4.5 * len(world.store.segments)


def test_a_slow_model_gets_chunks_of_one_in_order() -> None:
    world = play(spec(4, 10), [60.0] * 40)
    assert set(chunk_sizes(world)) == {1}
    assert world.settled_at <= 40 * 60 / 2 + 1


@pytest.mark.parametrize(("n_bytes", "size"), [(50_000_000, 1), (4 << 20, 8), (100, 249)])
def test_a_chunk_has_few_outputs_that_are_large(n_bytes: int, size: int) -> None:
    meter = Meter()
    assert meter.bytes_per_item == 0.0
    meter.record(100, 1.0, 100 * n_bytes)
    assert meter.bytes_per_item == n_bytes
    assert chunk_size(meter, 10_000, 2) == pytest.approx(size, abs=1)


def test_what_a_receipt_says_of_large_outputs_makes_the_next_chunks_smaller() -> None:
    machine, orders = running(spec(1, 400, fail_fast=False))
    (first,) = only(orders, c.SubmitChunk)
    large = msgspec.structs.replace(segment(first.chunk), pack="p", pack_bytes=50_000_000)
    done = msgspec.structs.replace(receipt(first.chunk, seconds=1e-6), segment=large)
    chunks = only(machine.handle(e.ChunkDone(done), 0.1), c.SubmitChunk)
    assert {len(Ranges(order.chunk.ranges)) for order in chunks} == {1}


def test_chunks_of_a_middling_model_are_a_few_seconds_and_small_at_the_end() -> None:
    world = play(spec(20, 1_000), [0.001] * 20_000)
    sizes = chunk_sizes(world)
    assert 1_000 <= max(sizes) <= 2_600
    assert world.settled_at <= 10 * 1.05 + 0.5


@pytest.mark.parametrize("mean", [0.002, 0.1, 2.0])
def test_the_tail_stays_short_when_durations_vary_by_a_factor_of_a_hundred(mean: float) -> None:
    rng = random.Random(5)
    seconds = [mean * rng.lognormvariate(-0.66, 1.15) for _ in range(4_000)]
    world = play(spec(20, 200), seconds)
    ideal = max(sum(seconds) / 2, max(seconds))
    assert world.settled_at <= 1.05 * ideal + 0.5


def test_a_million_parameter_sets_cost_ranges_not_replicates() -> None:
    job = spec(1_000_000, 1, aggregates=("m:a",))
    started = time.process_time()
    machine, commands = running(job, workers=2)
    n_events = 0
    while commands:
        todo, commands = commands, []
        for command in todo:
            n_events += 1
            if isinstance(command, c.SubmitChunk):
                commands += machine.handle(e.ChunkDone(receipt(command.chunk, seconds=5e-6)), 1.0)
            elif isinstance(command, c.SubmitAggregates):
                params = command.chunk.params
                n = len(Ranges(params))
                assert len(command.chunk.segments) <= 100
                stored = AggregateRef(
                    attempt=command.chunk.attempt,
                    name="",
                    digest="",
                    n_bytes=1,
                    params=params,
                    counts={"succeeded": n},
                    inputs=(),
                )
                done = AggregateReceipt(
                    job=JOB,
                    attempt=stored.attempt,
                    worker="w0",
                    host="h",
                    stored=stored,
                    wall_seconds=n * 1e-5,
                )
                commands += machine.handle(e.AggregateDone(done), 1.0)
            elif isinstance(command, c.CommitSegment):
                commands += machine.handle(e.Committed(command.segment.attempt), 1.0)
            elif isinstance(command, c.CommitAggregates):
                commands += machine.handle(e.Committed(command.stored.attempt), 1.0)
            elif isinstance(command, c.Finalize):
                commands += machine.handle(e.Finalized(), 1.0)
    assert machine.state is JobState.SUCCEEDED
    assert machine.aggregate_counts()[AggregateStatus.SUCCEEDED] == 1_000_000
    assert n_events < 1_000
    assert (
        time.process_time() - started < 5.0
    )  # it takes a hundredth of that; a loop over replicates takes more


def test_a_replicate_that_takes_its_worker_down_is_found_and_the_others_succeed() -> None:
    world = play(
        spec(10, 30, aggregates=("m:a",), fail_fast=False),
        [0.001] * 300,
        workers=3,
        slots=2,
        poison=frozenset({123}),
    )
    assert world.outcomes[123] is CRASHED
    assert sum(status is SUCCEEDED for status in world.outcomes.values()) == 299
    assert world.finished == c.Finish(JobState.PARTIAL, "")
    assert world.n_workers_made - 3 <= 8  # workers that died


def test_three_deaths_alone_condemn_and_say_so() -> None:
    machine, commands = running(spec(1, 1), workers=0)
    for n in range(4):  # at the first death nobody knows whether it was alone
        (submit,) = only(machine.handle(e.WorkerJoined(f"n{n}", 1), 1.0), c.SubmitChunk)
        assert submit.chunk.attempt_number == 1  # a lost attempt costs no retry
        assert submit.chunk.alone == (n > 0)
        if submit.chunk.alone:
            assert machine.handle(e.AttemptBegun(submit.chunk.attempt), 1.0) == []
        assert machine.n_lost_with_worker == n
        assert not only(commands, c.CommitSynthetic)
        commands = machine.handle(e.WorkerLeft(f"n{n}", died=True), 1.0)
    (synthetic,) = only(commands, c.CommitSynthetic)
    assert (synthetic.indices, synthetic.status) == (Ranges([(0, 1)]), CRASHED)
    assert synthetic.error.message == "took its worker down 3 times"
    machine.handle(e.Committed(synthetic.attempt), 1.0)
    assert finalized(machine).state is JobState.FAILED
    assert machine.counts()[CRASHED] == 1


@pytest.mark.parametrize("culprit", range(4))
def test_of_suspects_that_die_with_their_pod_the_one_is_found_that_takes_it_down(culprit: int) -> None:
    workers = [f"tls://10.0.0.1:{port}" for port in range(4)]
    machine, _ = running(spec(1, 4, fail_fast=False), workers=0)
    held: dict[str, Chunk] = {}
    condemned: list[Ranges] = []

    def tell(event: e.Event, at: float) -> None:
        for command in machine.handle(event, at):
            if isinstance(command, c.SubmitChunk):
                held[command.worker] = command.chunk
            elif isinstance(command, c.CommitSynthetic):
                condemned.append(command.indices)
                tell(e.Committed(command.attempt), at)

    for pod in range(20):
        at = 100.0 * pod
        for worker in workers:
            tell(e.WorkerJoined(worker, 1), at)
        while held and all(chunk.ranges[0][0] != culprit for chunk in held.values()):
            chunk = held.pop(next(iter(held)))
            tell(e.AttemptBegun(chunk.attempt), at)
            tell(e.ChunkDone(receipt(chunk)), at)
            tell(e.Committed(chunk.attempt), at)
        if not held:
            break
        for chunk in held.values():  # all others take longer than the pod lives
            tell(e.AttemptBegun(chunk.attempt), at)
        for n, worker in enumerate(workers):
            held.pop(worker, None)
            tell(e.WorkerLeft(worker, died=True), at + 5.0 + n / 10)
    assert condemned == [Ranges([(culprit, culprit + 1)])]
    assert {status: n for status, n in machine.counts().items() if n} == {SUCCEEDED: 3, CRASHED: 1}


def test_deaths_of_one_that_keeps_checkpoints_condemn_only_if_there_are_very_many() -> None:
    machine, commands = running(spec(1, 1), workers=0)
    for n in range(1 + DEADLY_AT_LAST):  # at the first nobody knows whether it was alone
        assert not only(commands, c.CommitSynthetic)
        (submit,) = only(machine.handle(e.WorkerJoined(f"n{n}", 1), 1.0), c.SubmitChunk)
        assert submit.chunk.may_resume == submit.chunk.alone == (n > 0)
        if submit.chunk.alone:
            machine.handle(e.AttemptBegun(submit.chunk.attempt), 1.0)
        machine.handle(e.Checkpointed(0), 1.0)
        commands = machine.handle(e.WorkerLeft(f"n{n}", died=True), 1.0)
    (synthetic,) = only(commands, c.CommitSynthetic)
    assert synthetic.error.message == f"took its worker down {DEADLY_AT_LAST} times"


def test_deaths_since_the_last_checkpoint_condemn() -> None:
    machine, commands = running(spec(1, 1), workers=0)
    for n in range(5):
        assert not only(commands, c.CommitSynthetic)
        (submit,) = only(machine.handle(e.WorkerJoined(f"n{n}", 1), 1.0), c.SubmitChunk)
        if submit.chunk.alone:
            machine.handle(e.AttemptBegun(submit.chunk.attempt), 1.0)
        if n == 2:
            machine.handle(e.Checkpointed(0), 1.0)
        commands = machine.handle(e.WorkerLeft(f"n{n}", died=True), 1.0)
    (synthetic,) = only(commands, c.CommitSynthetic)
    assert synthetic.error.message == "took its worker down 4 times"  # and once, perhaps not alone


def test_only_what_may_have_begun_before_is_looked_for_in_storage() -> None:
    policy = RetryPolicy(max_retries=2, initial_delay=0, on=frozenset({CRASHED}))
    machine, commands = running(spec(1, 4, retry=policy), workers=1)
    first = only(commands, c.SubmitChunk)
    assert not any(one.chunk.may_resume for one in first)
    machine.handle(e.WorkerLeft("w0", died=False), 1.0)
    again = only(machine.handle(e.WorkerJoined("w1", 1), 1.0), c.SubmitChunk)
    assert again
    assert all(one.chunk.may_resume for one in again)
    second = Machine(spec(1, 4), JOB, epoch=2)
    second.start(0.0)
    second.handle(e.WorkerJoined("w0", 1), 0.0)
    taken_over = only(second.handle(e.EnvironmentReady(), 0.0), c.SubmitChunk)
    assert taken_over
    assert all(one.chunk.may_resume for one in taken_over)


def test_what_had_not_begun_when_its_worker_died_is_not_blamed() -> None:
    """Other jobs use the worker, too, and what this one has submitted may be waiting behind theirs."""
    machine, _ = running(spec(1, 1), workers=0)
    for n in range(20):
        assert only(machine.handle(e.WorkerJoined(f"n{n}", 1), 1.0), c.SubmitChunk)
        assert not only(machine.handle(e.WorkerLeft(f"n{n}", died=True), 1.0), c.CommitSynthetic)


def test_a_worker_that_is_drained_condemns_nobody() -> None:
    machine, _ = running(spec(1, 1), workers=0)
    for n in range(10):
        assert only(machine.handle(e.WorkerJoined(f"n{n}", 1), 1.0), c.SubmitChunk)
        machine.handle(e.WorkerLeft(f"n{n}", died=False), 1.0)
    assert machine.state is JobState.RUNNING


def test_an_aggregate_that_takes_its_worker_down_is_failed() -> None:
    world = play(spec(3, 4, aggregates=("m:a", "m:b")), [0.01] * 12, poison_params=frozenset({1}))
    assert world.finished == c.Finish(JobState.PARTIAL, "")
    assert world.machine.aggregate_counts()[AggregateStatus.FAILED] == 2
    assert world.machine.aggregate_counts()[AggregateStatus.SUCCEEDED] == 4


def test_attempts_are_one_and_the_retries_and_the_last_stores_every_outcome() -> None:
    policy = RetryPolicy(max_retries=2, initial_delay=30, backoff=2, on=frozenset({CRASHED}))
    machine, commands = running(spec(1, 1, retry=policy))
    now = 0.0
    for number, delay in ((1, 30.0), (2, 60.0)):
        (submit,) = only(commands, c.SubmitChunk)
        assert (submit.chunk.attempt_number, submit.chunk.retry_on) == (number, (CRASHED,))
        commands = machine.handle(e.ChunkDone(receipt(submit.chunk, CRASHED)), now)
        # No worker is held meanwhile, and the next driver would know.
        assert commands == [
            c.RecordRetry(Ranges([(0, 1)]), number + 1),
            c.SetTimer("retry", now + delay),
        ]
        assert machine.counts()[ReplicateStatus.PENDING] == 1
        now += delay
        commands = machine.handle(e.TimerRang("retry"), now)
    (last,) = only(commands, c.SubmitChunk)
    assert (last.chunk.attempt_number, last.chunk.retry_on) == (3, ())
    machine.handle(e.ChunkDone(receipt(last.chunk, CRASHED)), now)
    machine.handle(e.Committed(last.chunk.attempt), now)
    assert machine.counts()[CRASHED] == 1


def test_what_a_worker_gives_back_untouched_and_unasked_waits_a_moment() -> None:
    machine, commands = running(spec(1, 1))
    for n in range(3):
        (submit,) = only(commands, c.SubmitChunk)
        back = Receipt(job=JOB, attempt=submit.chunk.attempt, worker="w0", host="h", unstarted=((0, 1),))
        commands = machine.handle(e.ChunkDone(back), 10.0 * n)
        assert commands == [c.SetTimer("retry", 10.0 * n + 1.0)]  # otherwise both would be at it without end
        commands = machine.handle(e.TimerRang("retry"), 10.0 * n + 1.0)
        assert only(commands, c.SubmitChunk)[0].chunk.attempt_number == 1


def test_a_timer_that_rings_early_is_set_again() -> None:
    machine, commands = running(spec(1, 1, retry=RetryPolicy(max_retries=1)))
    (submit,) = only(commands, c.SubmitChunk)
    machine.handle(e.ChunkDone(receipt(submit.chunk, CRASHED)), 0.0)
    assert machine.handle(e.TimerRang("retry"), 29.9) == [c.SetTimer("retry", 30.0)]


def test_cancel_stops_every_attempt_keeps_what_is_finished_and_then_ends() -> None:
    machine, commands = running(spec(1, 4), workers=2)
    first, second = only(commands, c.SubmitChunk)[:2]
    commands = machine.handle(e.CancelAsked("ctrl-c"), 1.0)
    assert commands[0] == c.ChangeState(JobEvent.CANCEL_ASKED, JobState.CANCELLING, "cancelled by ctrl-c")
    assert {s.attempt for s in only(commands, c.StopAttempt)} == {first.chunk.attempt, second.chunk.attempt}
    assert only(machine.handle(e.ChunkDone(receipt(first.chunk)), 1.0), c.CommitSegment)
    assert machine.handle(e.Committed(first.chunk.attempt), 1.0) == []
    given_back = Receipt(
        job=JOB, attempt=second.chunk.attempt, worker="w1", host="h", unstarted=second.chunk.ranges
    )
    assert machine.handle(e.ChunkDone(given_back), 1.0) == [c.Finalize()]
    assert finalized(machine) == c.Finish(JobState.CANCELLED, "cancelled by ctrl-c")
    counts = machine.counts()  # in the words of the stored results
    assert (counts[SUCCEEDED], counts[ReplicateStatus.CANCELLED], counts[ReplicateStatus.NOT_RUN]) == (
        1,
        3,
        0,
    )


def test_a_second_cancel_waits_for_nobody() -> None:
    machine, _ = running(spec(1, 4), workers=2)
    machine.handle(e.CancelAsked(), 1.0)
    assert machine.handle(e.CancelAsked(), 1.1) == [c.Finalize()]


def test_cancel_before_the_environment_is_ready_runs_nothing() -> None:
    machine = Machine(spec(1, 4), JOB)
    machine.start(0.0)
    machine.handle(e.WorkerJoined("w0", 1), 0.0)
    assert machine.handle(e.CancelAsked(), 0.1)[-1] == c.Finalize()
    assert machine.handle(e.EnvironmentReady(), 0.2) == []
    assert finalized(machine).state is JobState.CANCELLED


def test_a_job_that_has_all_its_outcomes_when_its_time_is_over_gives_no_reason() -> None:
    machine, commands = running(spec(1, 1, timeout_s=100.0))
    (submit,) = only(commands, c.SubmitChunk)
    machine.handle(e.TimerRang("timeout"), 100.0)
    machine.handle(e.ChunkDone(receipt(submit.chunk)), 100.1)
    machine.handle(e.Committed(submit.chunk.attempt), 100.2)
    commands = machine.handle(e.Finalized(), 100.3)
    assert only(commands, c.Finish) == [c.Finish(JobState.SUCCEEDED, "")]
    assert only(commands, c.ChangeState) == [c.ChangeState(JobEvent.ALL_SUCCEEDED, JobState.SUCCEEDED)]


def test_the_timeout_stops_the_job_and_the_rest_is_not_run() -> None:
    machine = Machine(spec(1, 4, timeout_s=100.0), JOB)
    assert c.SetTimer("timeout", 107.0) in machine.start(7.0)
    machine.handle(e.WorkerJoined("w0", 1), 7.0)
    (submit, *_) = only(machine.handle(e.EnvironmentReady(), 8.0), c.SubmitChunk)
    commands = machine.handle(e.TimerRang("timeout"), 107.0)
    assert c.StopAttempt(submit.chunk.attempt, "w0") in commands
    for stop in only(commands, c.StopAttempt):
        commands = machine.handle(e.AttemptLost(stop.attempt, worker_died=False), 108.0)
    assert c.Finalize() in commands
    assert finalized(machine) == c.Finish(
        JobState.FAILED, "timeout of 100 s: 'modelops jobs resume' runs the rest"
    )
    assert machine.counts()[ReplicateStatus.NOT_RUN] == 4


def test_max_failures_is_a_limit_of_the_users_own() -> None:
    machine, commands = running(spec(1, 50, max_failures=3, fail_fast=False))
    chunks = finish_chunks(machine, commands, FAILED)
    assert sum(len(Ranges(chunk.ranges)) for chunk in chunks) < 50
    assert "more than max_failures = 3" in machine.reason


def test_a_job_that_has_outcomes_keeps_them_when_its_environment_fails_later() -> None:
    stored = committed(attempt_id(1, 1), ((0, 4),), SUCCEEDED)
    machine = Machine(spec(1, 50), JOB, epoch=2, segments=[stored])
    machine.start(0.0)
    commands = machine.handle(e.EnvironmentFailed("NotFoundError", "the stored bundle is gone"), 0.0)
    assert c.Finalize() in commands
    assert finalized(machine) == c.Finish(JobState.PARTIAL, "NotFoundError: the stored bundle is gone")
    assert machine.counts()[ReplicateStatus.NOT_RUN] == 46


@pytest.mark.parametrize("limit", [3, 4])
def test_a_new_driver_starts_nothing_if_the_limit_was_passed_before_it_came(limit: int) -> None:
    failed = committed(attempt_id(1, 1), ((0, 4),), FAILED)
    job = spec(1, 50, max_failures=limit, fail_fast=False)
    machine = Machine(job, JOB, epoch=2, state=JobState.RUNNING, segments=[failed])
    commands = [*machine.start(0.0), *machine.handle(e.WorkerJoined("w0", 1), 0.0)]
    commands += machine.handle(e.EnvironmentReady(), 1.0)
    if limit == 3:
        assert "4 replicates failed, more than max_failures = 3" in machine.reason
        assert (only(commands, c.SubmitChunk), c.Finalize() in commands) == ([], True)
    else:
        assert (bool(only(commands, c.SubmitChunk)), machine.reason) == (True, "")


def test_max_failures_counts_the_failures_of_each_run_anew() -> None:
    failed = committed(attempt_id(1, 1), ((0, 4),), FAILED)
    job = spec(1, 50, max_failures=3, fail_fast=False)
    machine = Machine(job, JOB, epoch=2, segments=[failed], after_epoch=1)
    commands = [*machine.start(0.0), *machine.handle(e.WorkerJoined("w0", 1), 0.0)]
    commands += machine.handle(e.EnvironmentReady(), 1.0)
    assert len(finish_chunks(machine, commands, FAILED)) < 46
    assert "replicates of this run failed, more than max_failures = 3" in machine.reason
    assert machine.counts()[FAILED] >= 8


def test_max_failures_does_not_keep_a_repair_from_what_was_there_before() -> None:
    failed = committed(attempt_id(1, 1), ((0, 4),), FAILED)
    job = spec(1, 50, max_failures=3, fail_fast=False)
    left = Ranges([(20, 50)])
    machine = Machine(job, JOB, epoch=2, segments=[failed], leave=left)
    commands = [*machine.start(0.0), *machine.handle(e.WorkerJoined("w0", 1), 0.0)]
    commands += machine.handle(e.EnvironmentReady(), 1.0)
    finish_chunks(machine, commands, FAILED)
    assert (machine.counts()[FAILED], machine.reason) == (20, "")


def test_a_fault_of_the_machinery_is_tried_again_three_times_then_stops_the_job() -> None:
    machine, commands = running(spec(1, 1))
    for delay in (1.0, 4.0, 16.0):
        (submit,) = only(commands, c.SubmitChunk)
        commands = machine.handle(
            e.ChunkErred(submit.chunk.attempt, "StorageError", "disk full", final=False), 0.0
        )
        assert c.SetTimer("retry", delay) in commands
        commands = machine.handle(e.TimerRang("retry"), delay)
    (submit,) = only(commands, c.SubmitChunk)
    commands = machine.handle(
        e.ChunkErred(submit.chunk.attempt, "StorageError", "disk full", final=False), 99.0
    )
    assert c.ChangeState(JobEvent.STOPPED_EARLY, JobState.FINALIZING, "StorageError: disk full") in commands
    assert finalized(machine) == c.Finish(JobState.FAILED, "StorageError: disk full")


def unfit(command: c.SubmitChunk, *, final: bool = False) -> e.ChunkErred:
    return e.ChunkErred(command.chunk.attempt, "IndexUnreachableError", "on pod-1: away", final, unfit=True)


def test_a_worker_that_cannot_prepare_the_environment_gets_no_work_for_a_while_and_others_do_it() -> None:
    machine, commands = running(spec(1, 4), workers=2)
    at_first = {submit.worker: submit for submit in only(commands, c.SubmitChunk)}
    commands = machine.handle(unfit(at_first["w1"]), 1.0)
    assert only(commands, c.Note) == [
        c.Note("worker_unfit", "w1 gets no work of this job for now: IndexUnreachableError: on pod-1: away")
    ]
    assert c.SetTimer("unfit", 31.0) in commands
    commands += machine.handle(e.ChunkDone(receipt(at_first["w0"].chunk)), 2.0)
    assert {submit.worker for submit in only(commands, c.SubmitChunk)} == {"w0"}
    commands = machine.handle(e.TimerRang("unfit"), 31.0)
    (again,) = (s for s in only(commands, c.SubmitChunk) if s.worker == "w1")
    commands = machine.handle(unfit(again), 32.0)
    assert c.SetTimer("unfit", 92.0) in commands, "the next try is later"
    assert only(commands, c.Note) == [], "it was said already"
    machine.handle(e.TimerRang("unfit"), 92.0)
    assert machine.counts()[ReplicateStatus.NOT_RUN] == 0
    assert machine.state is JobState.RUNNING


def test_what_fails_together_on_a_worker_that_cannot_puts_it_aside_once() -> None:
    machine, commands = running(spec(1, 2), slots=2)
    first, second = only(commands, c.SubmitChunk)
    assert c.SetTimer("unfit", 31.0) in machine.handle(unfit(first), 1.0)
    assert machine.handle(unfit(second), 1.0) == []
    assert len(only(machine.handle(e.TimerRang("unfit"), 31.0), c.SubmitChunk)) == 2


def test_that_no_worker_can_stops_a_job_only_if_trying_again_has_no_hope() -> None:
    machine, commands = running(spec(1, 1))
    for at in (1.0, 50.0, 200.0, 500.0, 1200.0, 2000.0):
        (submit,) = only(commands, c.SubmitChunk)
        machine.handle(unfit(submit), at)
        assert machine.state is JobState.RUNNING
        commands = machine.handle(e.TimerRang("unfit"), at + 700.0)
    (submit,) = only(commands, c.SubmitChunk)
    machine.handle(unfit(submit, final=True), 3000.0)
    assert finalized(machine) == c.Finish(JobState.FAILED, "IndexUnreachableError: on pod-1: away")


def test_a_late_receipt_is_committed_and_its_double_is_stopped() -> None:
    machine, commands = running(spec(1, 1), workers=2)
    (lost,) = only(commands, c.SubmitChunk)
    (double,) = only(machine.handle(e.AttemptLost(lost.chunk.attempt, worker_died=False), 1.0), c.SubmitChunk)
    assert only(machine.handle(e.ChunkDone(receipt(lost.chunk)), 2.0), c.CommitSegment)
    commands = machine.handle(e.Committed(lost.chunk.attempt), 2.0)
    assert c.StopAttempt(double.chunk.attempt, double.worker) in commands
    assert machine.handle(e.ChunkDone(receipt(double.chunk)), 3.0) == []
    assert machine.handle(e.ChunkDone(receipt(lost.chunk)), 3.0) == []
    assert finalized(machine).state is JobState.SUCCEEDED
    assert machine.counts()[SUCCEEDED] == 1


def test_what_the_store_refuses_runs_again_but_not_for_ever() -> None:
    machine, commands = running(spec(1, 1))
    now = 0.0
    for n in range(4):
        (submit,) = only(commands, c.SubmitChunk)
        machine.handle(e.ChunkDone(receipt(submit.chunk)), now)
        machine.handle(e.Committed(submit.chunk.attempt, accepted=False), now)
        now += 4.0**n
        commands = machine.handle(e.TimerRang("retry"), now)
    assert machine.state is JobState.FINALIZING
    assert "refused" in machine.reason


def test_while_the_store_is_away_nothing_is_written_or_submitted_and_then_it_is_asked_again() -> None:
    machine, commands = running(spec(1, 4), workers=2)
    first, second = only(commands, c.SubmitChunk)
    (commit,) = only(machine.handle(e.ChunkDone(receipt(first.chunk)), 1.0), c.CommitSegment)
    assert machine.handle(e.StoreLost("database"), 1.0) == []
    assert machine.handle(e.ChunkDone(receipt(second.chunk)), 2.0) == []
    commands = machine.handle(e.StoreBack(), 3.0)
    assert only(commands, c.CommitSegment) == [commit, c.CommitSegment(segment(second.chunk))]
    assert only(commands, c.Note) == [
        c.Note("store_lost", "database"),
        c.Note("store_back", "it answers again, after 2 s"),
    ]
    assert len(only(commands, c.SubmitChunk)) == 1


def test_result_files_that_were_not_written_as_the_store_went_away_are_ordered_again() -> None:
    machine, commands = running(spec(1, 1))
    (submit,) = only(commands, c.SubmitChunk)
    machine.handle(e.ChunkDone(receipt(submit.chunk)), 1.0)
    assert c.Finalize() in machine.handle(e.Committed(submit.chunk.attempt), 1.0)
    assert machine.handle(e.StoreLost("database"), 2.0) == []
    assert c.Finalize() in machine.handle(e.StoreBack(), 3.0)
    assert finalized(machine).state is JobState.SUCCEEDED


def test_a_worker_that_was_cut_off_is_asked_what_it_holds_when_it_is_back_and_its_attempts_go_on() -> None:
    machine, commands = running(spec(1, 3), workers=2)
    first, second = only(commands, c.SubmitChunk)
    for name in ("w0", "w1"):  # the scheduler is away
        machine.handle(e.WorkerLeft(name, died=False), 1.0)
    assert machine.running == EMPTY
    for name in ("w0", "w1"):
        commands = machine.handle(e.WorkerJoined(name, 1), 2.0)
        assert only(commands, c.AskForAttempts) == [c.AskForAttempts(name)]
        assert not only(commands, c.SubmitChunk)
    found = e.Found(first.chunk.attempt, Ranges(first.chunk.ranges))
    assert not only(machine.handle(e.AttemptsFound("w0", (found,)), 2.0), c.SubmitChunk)
    (again,) = only(machine.handle(e.AttemptsFound("w1", ()), 2.0), c.SubmitChunk)  # it had lost its own
    assert (again.chunk.ranges, again.worker) == (second.chunk.ranges, "w1")
    (commit,) = only(machine.handle(e.ChunkDone(receipt(first.chunk)), 3.0), c.CommitSegment)
    assert commit.segment.attempt == first.chunk.attempt
    assert not machine.handle(e.ChunkDone(receipt(first.chunk)), 3.0)


def test_a_driver_without_its_lease_orders_nothing() -> None:
    machine, commands = running(spec(1, 3))
    (submit, *_) = only(commands, c.SubmitChunk)
    assert machine.handle(e.LeaseLost(), 1.0) == []
    assert machine.handle(e.ChunkDone(receipt(submit.chunk)), 1.0) == []
    assert machine.handle(e.CancelAsked(), 1.0) == []


def committed(
    attempt: str, ranges: tuple[tuple[int, int], ...], status: ReplicateStatus = SUCCEEDED
) -> SegmentRef:
    return segment(Chunk(job=JOB, attempt=attempt, epoch=1, ranges=ranges), status)  # type: ignore[arg-type]


def test_what_is_committed_is_not_run_again_and_a_settled_job_only_finalizes() -> None:
    machine, commands = running(spec(2, 10), segments=[committed("0001-000001", ((0, 7), (9, 20)))])
    chunks = finish_chunks(machine, commands)
    assert Ranges(pair for chunk in chunks for pair in chunk.ranges) == Ranges([(7, 9)])
    assert machine.counts()[SUCCEEDED] == 20
    machine, commands = running(spec(2, 10), segments=[committed("0001-000001", ((0, 20),))])
    assert only(commands, c.SubmitChunk) == []
    assert c.Finalize() in commands


def test_an_aggregate_is_kept_unless_its_parameter_set_was_extended() -> None:
    line = IndexLine((Block(0, 0, 2, 0, 2), Block(4, 1, 1, 2, 1)))  # one more replicate of parameter set 1
    old = committed("0001-000001", ((0, 4),))
    kept, stale = (
        AggregateRef(
            attempt=name,  # type: ignore[arg-type]
            name="",
            digest="",
            n_bytes=1,
            params=((p, p + 1),),
            counts={"succeeded": 1},
            inputs=(old.digest,),
        )
        for p, name in ((0, "0001-000002"), (1, "0001-000003"))
    )
    machine = Machine(
        spec(line=line, aggregates=("m:a",)), JOB, epoch=2, segments=[old], aggregates=[kept, stale]
    )
    machine.start(0.0)
    machine.handle(e.WorkerJoined("w0", 1), 0.0)
    (submit,) = only(machine.handle(e.EnvironmentReady(), 0.0), c.SubmitChunk)
    assert (submit.chunk.attempt, submit.chunk.ranges) == ("0002-000001", ((4, 5),))
    machine.handle(e.ChunkDone(receipt(submit.chunk)), 1.0)
    (again,) = only(machine.handle(e.Committed(submit.chunk.attempt), 1.0), c.SubmitAggregates)
    assert again.chunk.params == ((1, 2),)
    assert [s.attempt for s in again.chunk.segments] == ["0001-000001", "0002-000001"]


def taken_over(job: JobSpec, **known: object) -> Machine:
    """Return the machine of a second driver, with one worker that has not answered yet."""
    machine = Machine(job, JOB, epoch=2, state=JobState.RUNNING, adopt=True, **known)  # type: ignore[arg-type]
    assert machine.start(0.0) == [c.PrepareEnvironment()]
    assert c.AskForAttempts("w0") in machine.handle(e.WorkerJoined("w0", 2), 0.0)
    assert machine.handle(e.EnvironmentReady(), 0.0) == []  # nothing is submitted before it has answered
    return machine


def test_a_new_driver_adopts_what_a_worker_runs_and_submits_only_the_rest() -> None:
    machine = taken_over(spec(1, 2))
    found = e.Found(attempt_id(1, 7), Ranges([(0, 1)]))
    (submit,) = machine.handle(e.AttemptsFound("w0", (found,)), 1.0)
    assert isinstance(submit, c.SubmitChunk)
    assert (submit.chunk.attempt, submit.chunk.ranges) == ("0002-000001", ((1, 2),))
    old = Chunk(job=JOB, attempt=found.attempt, epoch=1, ranges=((0, 1),))
    assert only(machine.handle(e.ChunkDone(receipt(old)), 2.0), c.CommitSegment)


def test_a_new_driver_stops_what_an_earlier_run_began_and_runs_that_anew() -> None:
    machine = taken_over(spec(1, 1), after_epoch=1)
    found = e.Found(attempt_id(1, 7), Ranges([(0, 1)]))
    stop, submit = machine.handle(e.AttemptsFound("w0", (found,)), 1.0)
    assert stop == c.StopAttempt(found.attempt, "w0")
    assert isinstance(submit, c.SubmitChunk)
    assert submit.chunk.ranges == ((0, 1),)
    old = Chunk(job=JOB, attempt=found.attempt, epoch=1, ranges=((0, 1),))
    assert machine.handle(e.ChunkDone(receipt(old)), 2.0) == [], (
        "what it finished all the same counts for nothing"
    )


def test_a_new_driver_runs_again_what_was_withdrawn_though_a_worker_keeps_its_receipt() -> None:
    """It says that damaged bytes are stored, and would make them count once more."""
    attempt = attempt_id(1, 7)
    machine = taken_over(spec(1, 1), withdrawn=frozenset({attempt}))
    commands = machine.handle(e.AttemptsFound("w0", (e.Found(attempt, Ranges([(0, 1)])),)), 1.0)
    (submit,) = only(commands, c.SubmitChunk)
    assert submit.chunk.ranges == ((0, 1),)
    kept = Chunk(job=JOB, attempt=attempt, epoch=1, ranges=((0, 1),))
    assert machine.handle(e.ChunkDone(receipt(kept)), 2.0) == []


def test_a_new_driver_stops_what_has_its_outcome_and_waits_five_seconds_for_an_answer() -> None:
    machine = taken_over(spec(1, 2), segments=[committed("0001-000001", ((0, 1),))])
    assert only(machine.handle(e.TimerRang("roll_call"), 5.0), c.SubmitChunk)
    found = e.Found(attempt_id(1, 7), Ranges([(0, 1)]))
    assert machine.handle(e.AttemptsFound("w0", (found,)), 6.0) == [c.StopAttempt(found.attempt, "w0")]


def test_what_a_worker_tells_of_too_late_goes_on_and_counts_if_it_ends_first() -> None:
    machine = taken_over(spec(1, 1))
    (again,) = only(machine.handle(e.TimerRang("roll_call"), 5.0), c.SubmitChunk)
    found = e.Found(attempt_id(1, 7), Ranges([(0, 1)]))  # it may have run for hours
    assert machine.handle(e.AttemptsFound("w0", (found,)), 6.0) == []
    old = Chunk(job=JOB, attempt=found.attempt, epoch=1, ranges=((0, 1),))
    assert only(machine.handle(e.ChunkDone(receipt(old)), 7.0), c.CommitSegment)
    commands = machine.handle(e.Committed(found.attempt), 7.0)
    assert only(commands, c.StopAttempt) == [c.StopAttempt(again.chunk.attempt, "w0")]
    assert machine.counts()[SUCCEEDED] == 1


def watched(ref: SegmentRef, *numbers: float | str) -> SegmentRef:
    """Return a segment with the numbers that ``until`` goes by, or what is said where there is none."""
    codes = bytes(NO_NUMBER if isinstance(x, str) else STORED.index(SUCCEEDED) for x in numbers)
    values = np.array([np.nan if isinstance(x, str) else x for x in numbers])
    said = zip(Ranges(ref.ranges), numbers, strict=True)
    texts = tuple((x, ((k, k + 1),)) for k, x in said if isinstance(x, str))
    return msgspec.structs.replace(ref, watched=Watched(codes, values).encode(), no_numbers=texts)


def test_a_job_whose_rule_meets_no_number_names_the_first_replicate_once_it_is_certain() -> None:
    job = spec(3, 4, until=Until(half_width=9.0, of="x", level=0.8, min=2, max=4), fail_fast=False)
    machine, first = running(job, workers=6)
    chunks = {Ranges(s.chunk.ranges).pairs: s.chunk for s in only(first, c.SubmitChunk)}
    assert list(chunks) == [((k, k + 1),) for k in (0, 1, 4, 5, 8, 9)]

    def ends(k: int, number: float | str) -> list[c.Command]:
        chunk = chunks[(k, k + 1),]
        done = receipt(chunk)
        assert done.segment is not None
        machine.handle(e.ChunkDone(msgspec.structs.replace(done, segment=watched(done.segment, number))), 1.0)
        return machine.handle(e.Committed(chunk.attempt), 1.0)

    assert not only(ends(9, "is late"), c.ChangeState)  # 8 comes first, and may have none either
    assert not only(ends(5, "is later"), c.ChangeState)
    assert not only(ends(4, 1.0), c.ChangeState)  # what comes first in its set; set 0 is not decided
    assert not only(ends(1, 1.0), c.ChangeState)
    changes = only(ends(0, 1.0), c.ChangeState)
    assert [(change.event, change.state) for change in changes] == [
        (JobEvent.STOPPED_EARLY, JobState.FINALIZING)
    ]
    assert changes[0].reason.startswith(
        "until goes by 'x', and replicate 1 of parameter set 1 is later. Return a number as 'x'"
    )


def test_a_job_whose_rule_meets_no_number_makes_the_aggregates_of_what_was_decided_and_then_ends() -> None:
    until = Until(half_width=9.0, of="x", level=0.8, min=2, max=4)
    machine, first = running(spec(2, 4, until=until, aggregates=("m:a",), fail_fast=False), workers=4)
    chunks = {s.chunk.ranges[0][0]: s.chunk for s in only(first, c.SubmitChunk)}
    commands: list[c.Command] = []
    numbers: dict[int, float | str] = {4: "has none", 0: 1.0, 1: 1.0}
    for k, number in numbers.items():
        done = receipt(chunks[k])
        assert done.segment is not None
        of = msgspec.structs.replace(done, segment=watched(done.segment, number))
        machine.handle(e.ChunkDone(of), 1.0)
        commands += machine.handle(e.Committed(chunks[k].attempt), 1.0)
    (dropped,) = only(commands, c.CommitNotNeeded)
    not_needed = committed(dropped.attempt, ((2, 4),), ReplicateStatus.NOT_NEEDED)
    commands += machine.handle(e.Committed(dropped.attempt, segment=not_needed), 1.0)
    (order,) = only(commands, c.SubmitAggregates)
    assert order.chunk.params == ((0, 1),)
    assert not only(commands, c.ChangeState)
    attempt = order.chunk.attempt
    stored = AggregateRef(
        attempt=attempt, name="", digest="", n_bytes=1, params=((0, 1),), counts={"succeeded": 1}, inputs=()
    )
    made = AggregateReceipt(job=JOB, attempt=attempt, worker="w0", host="h", stored=stored)
    assert not only(machine.handle(e.AggregateDone(made), 1.0), c.ChangeState)
    (change,) = only(machine.handle(e.Committed(attempt), 1.0), c.ChangeState)
    assert change.event is JobEvent.STOPPED_EARLY
    assert change.reason.startswith("until goes by 'x', and replicate 0 of parameter set 1 has none")


def test_a_new_driver_stops_what_it_has_run_itself_when_its_parameter_set_needs_no_more() -> None:
    job = spec(2, 5, until=Until(half_width=1.0, of="x", level=0.8, min=2, max=5))
    machine = taken_over(job, segments=[watched(committed("0001-000001", ((0, 2),)), 0.0, 1.0)])
    submit, _ = only(machine.handle(e.TimerRang("roll_call"), 5.0), c.SubmitChunk)
    assert submit.chunk.ranges == ((2, 3),)
    done = receipt(submit.chunk)
    assert done.segment is not None
    machine.handle(e.ChunkDone(msgspec.structs.replace(done, segment=watched(done.segment, 0.5))), 6.0)
    (dropped,) = only(machine.handle(e.Committed(submit.chunk.attempt), 6.0), c.CommitNotNeeded)
    assert dropped.indices == Ranges([(3, 5)])
    not_needed = committed(dropped.attempt, ((3, 5),), ReplicateStatus.NOT_NEEDED)
    machine.handle(e.Committed(dropped.attempt, segment=not_needed), 6.0)
    found = e.Found(attempt_id(1, 7), Ranges([(2, 3)]))  # its worker answers late, and had it all the time
    assert machine.handle(e.AttemptsFound("w0", (found,)), 6.0) == [c.StopAttempt(found.attempt, "w0")]


def test_a_new_driver_knows_how_often_a_replicate_has_failed_and_how_long_the_job_has_taken() -> None:
    job = spec(1, 1, retry=RetryPolicy(max_retries=1), timeout_s=100.0)
    retried = [(Ranges([(0, 1)]), 2, 15.0)]  # half of its delay has passed
    machine = Machine(job, JOB, epoch=2, state=JobState.RUNNING, retried=retried, used_s=40.0)
    assert c.SetTimer("timeout", 67.0) in machine.start(7.0)
    assert c.SetTimer("retry", 22.0) in machine.handle(e.WorkerJoined("w0", 1), 7.0)
    assert machine.handle(e.EnvironmentReady(), 7.0) == []
    (submit,) = only(machine.handle(e.TimerRang("retry"), 22.0), c.SubmitChunk)
    assert (submit.chunk.attempt_number, submit.chunk.retry_on) == (2, ())


def test_a_new_driver_waits_before_a_retry_as_the_policy_says_of_just_that_retry() -> None:
    policy = RetryPolicy(max_retries=3, initial_delay=30.0, backoff=2.0)
    retried = [(Ranges([(0, 1)]), 2, 0.0), (Ranges([(1, 2)]), 4, 60.0)]  # half of its 120 s have passed
    machine = Machine(spec(1, 2, retry=policy), JOB, epoch=2, state=JobState.RUNNING, retried=retried)
    machine.start(0.0)
    machine.handle(e.WorkerJoined("w0", 2), 0.0)
    machine.handle(e.EnvironmentReady(), 0.0)
    due = []
    for at in (29.0, 30.0, 59.0, 60.0):
        for submit in only(machine.handle(e.TimerRang("retry"), at), c.SubmitChunk):
            due.append((at, submit.chunk.ranges, submit.chunk.attempt_number))
    assert due == [(30.0, ((0, 1),), 2), (60.0, ((1, 2),), 4)]


def test_what_a_second_attempt_says_is_no_matter_of_the_probe() -> None:
    policy = RetryPolicy(max_retries=2, initial_delay=0.0)
    machine, commands = running(spec(1, 8, retry=policy))
    n_first = 0
    while submits := only(commands, c.SubmitChunk):
        (submit,) = submits
        is_first = submit.chunk.attempt_number == 1
        n_first += is_first * len(Ranges(submit.chunk.ranges))
        ended = receipt(submit.chunk, CRASHED, error="E" if is_first else "another", seconds=60.0)
        commands = machine.handle(e.ChunkDone(ended), 1.0)
        for commit in only(commands, c.CommitSegment):
            commands += machine.handle(e.Committed(commit.segment.attempt), 1.0)
        commands += machine.handle(e.TimerRang("retry"), 1.0)
    assert n_first == 8
    assert "failed alike: ValueError: E" in machine.reason


@pytest.mark.parametrize("state", [JobState.FINALIZING, JobState.CANCELLING])
def test_a_new_driver_of_a_job_that_was_stopping_only_finalizes(state: JobState) -> None:
    machine = Machine(spec(1, 2), JOB, epoch=2, state=state, reason="enough", adopt=True)
    assert machine.start(0.0) == [c.Finalize()]
    assert finalized(machine).reason == "enough"


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("aggregates", [(), ("m:a",)])
def test_the_smallest_jobs_end(shape: tuple[int, int], aggregates: tuple[str, ...]) -> None:
    world = play(spec(*shape, aggregates=aggregates), [0.1] * (shape[0] * shape[1]))
    assert world.finished == c.Finish(JobState.SUCCEEDED, "")
    assert len(world.store.aggregated) == (shape[0] if aggregates else 0)


def test_an_empty_job_succeeds_at_once() -> None:
    machine, commands = running(spec(line=IndexLine(()), aggregates=("m:a",)))
    assert c.Finalize() in commands
    assert machine.progress == 1.0
    assert finalized(machine).state is JobState.SUCCEEDED


def test_eta_is_what_is_left_over_the_slots() -> None:
    machine, commands = running(spec(1, 7), workers=2)
    assert machine.eta(0.0) is None  # nothing is measured yet
    submit = only(commands, c.SubmitChunk)[0]
    machine.handle(e.ChunkDone(receipt(submit.chunk, seconds=10.0)), 10.0)
    machine.handle(e.Committed(submit.chunk.attempt), 10.0)
    eta = machine.eta(10.0)
    assert eta is not None
    assert abs(eta - 30.0) < 0.1
    assert machine.progress == pytest.approx(1 / 7)


PURE = [
    "backlog",
    "blame",
    "chunking",
    "commands",
    "course",
    "coverage",
    "dispatch",
    "events",
    "fitness",
    "intake",
    "ledger",
    "losses",
    "machine",
    "needs",
    "outbox",
    "places",
    "plan",
    "pools",
    "probe",
    "range_sets",
    "recall",
    "roll_call",
    "roster",
    "shown",
]


@pytest.mark.parametrize("module", PURE)
def test_the_machine_imports_nothing_that_touches_the_outside_world(module: str) -> None:
    source = (Path(driver.__path__[0]) / f"{module}.py").read_text()
    allowed = {
        "__future__",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "heapq",
        "itertools",
        "math",
        "msgspec",
        "numpy",
        "typing",
    }
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            inside = name.startswith(
                (
                    "modelops.study",
                    "modelops.driver",
                    "modelops.states",
                    "modelops.errors",
                    "modelops.worker.messages",
                )
            )
            assert inside or name.split(".")[0] in allowed, f"{module} imports {name}"
            assert name != "modelops.driver.loop"


@pytest.mark.parametrize("cancelled", [False, True])
def test_results_that_were_voided_count_no_more_and_the_job_says_why(cancelled: bool) -> None:
    machine, commands = running(spec(1, 3))
    finish_chunks(machine, commands)
    if cancelled:
        machine.handle(e.CancelAsked("Ctrl-C"), 2.0)
    assert machine.counts()[SUCCEEDED] == 3

    commands = machine.handle(e.ResultsVoided("the bundle was changed"), 3.0)

    (end,) = only(commands, c.Finish)
    assert end == c.Finish(JobState.CANCELLED if cancelled else JobState.FAILED, "the bundle was changed")
    assert machine.over
    assert machine.counts()[SUCCEEDED] == 0
    assert machine.counts()[ReplicateStatus.CANCELLED if cancelled else ReplicateStatus.NOT_RUN] == 3


@pytest.mark.parametrize("aggregates", [(), ("m:summarize",)])
def test_a_repaired_run_runs_what_was_damaged_and_leaves_the_rest(aggregates: tuple[str, ...]) -> None:
    job = spec(3, 4, aggregates=aggregates)
    kept = SegmentRef(
        attempt=attempt_id(1, 1),
        name="s",
        digest="d",
        n_bytes=1,
        ranges=((0, 2), (4, 6)),
        counts={SUCCEEDED: 4},
    )
    machine = Machine(job, JOB, epoch=2, segments=[kept], leave=Ranges([(6, 12)]))
    commands = machine.start(0.0)
    machine.handle(e.WorkerJoined("w0", 1), 0.0)
    commands = machine.handle(e.EnvironmentReady(), 0.0)
    ran = Ranges()
    while not only(commands, c.Finalize):
        (order,) = [x for x in commands if isinstance(x, c.SubmitChunk | c.SubmitAggregates)]
        if isinstance(order, c.SubmitChunk):
            ran |= Ranges(order.chunk.ranges)
            commands = machine.handle(e.ChunkDone(receipt(order.chunk)), 1.0)
            commands += machine.handle(e.Committed(order.chunk.attempt), 1.0)
        else:
            assert order.chunk.params == ((0, 1),), "only this set has settled"
            stored = AggregateRef(
                attempt=order.chunk.attempt, name="a", digest="d", n_bytes=1, params=order.chunk.params,
                counts={"succeeded": 1}, inputs=(),
            )  # fmt: skip
            done = AggregateReceipt(
                job=JOB, attempt=order.chunk.attempt, worker="w0", host="h", stored=stored
            )
            commands = machine.handle(e.AggregateDone(done), 1.0)
            commands += machine.handle(e.Committed(order.chunk.attempt), 1.0)
    assert ran == Ranges([(2, 4)])
    assert finalized(machine).state is JobState.PARTIAL
    assert machine.counts()[ReplicateStatus.NOT_RUN] == 6


def test_what_workers_aggregate_is_told_and_how_long_the_longest_chunks_took() -> None:
    machine, commands = running(spec(2, 1, aggregates=("m:a",)))
    assert machine.n_aggregating == 0
    seconds = iter((3.0, 2.0))
    orders: list[c.SubmitAggregates] = []
    while todo := only(commands, c.SubmitChunk):
        commands = []
        for command in todo:
            done = receipt(command.chunk, seconds=next(seconds))
            commands += machine.handle(e.ChunkDone(done), 4.0)
            commands += machine.handle(e.Committed(command.chunk.attempt), 4.0)
        orders += only(commands, c.SubmitAggregates)
    assert machine.running == EMPTY
    for order in orders:
        n = len(Ranges(order.chunk.params))
        assert machine.n_aggregating == n
        stored = AggregateRef(
            attempt=order.chunk.attempt, name="a", digest="d", n_bytes=1, params=order.chunk.params,
            counts={"succeeded": n}, inputs=(),
        )  # fmt: skip
        made = AggregateReceipt(
            job=JOB, attempt=stored.attempt, worker="w0", host="h", stored=stored, wall_seconds=7.0
        )
        orders += only(machine.handle(e.AggregateDone(made), 11.0), c.SubmitAggregates)
        orders += only(machine.handle(e.Committed(stored.attempt), 11.0), c.SubmitAggregates)
    assert machine.n_aggregating == 0
    longest = machine.longest_s
    assert longest == (3.0, 7.0)


def two_workers_of_which_one_is_done(seconds: float) -> tuple[Machine, Chunk, list[c.Command]]:
    """Return the chunk of three replicates that the other one has, and what is ordered then."""
    machine = Machine(spec(1, 6), JOB, replicates_per_chunk=3)
    machine.start(0.0)
    machine.handle(e.EnvironmentReady(), 0.0)
    first, second = (
        only(machine.handle(e.WorkerJoined(worker, 1), 0.0), c.SubmitChunk)[0].chunk
        for worker in ("w0", "w1")
    )
    return machine, second, machine.handle(e.ChunkDone(receipt(first, seconds=seconds)), 3 * seconds)


def test_an_idle_worker_gets_what_has_not_begun_of_the_chunk_of_another() -> None:
    machine, second, orders = two_workers_of_which_one_is_done(1.0)
    assert only(orders, c.RecallAttempt) == [c.RecallAttempt(second.attempt, "w1")]
    assert machine.handle(e.AttemptBegun(second.attempt), 3.0) == []
    finished, runs, unstarted = ((k, k + 1) for k in range(3, 6))
    part = msgspec.structs.replace(
        receipt(second),
        attempt=part_id(second.attempt),
        part_of=second.attempt,
        segment=segment(msgspec.structs.replace(second, ranges=(finished,))),
        unstarted=(unstarted,),
    )
    (given,) = only(machine.handle(e.ChunkDone(part), 3.3), c.SubmitChunk)
    assert (given.worker, given.chunk.ranges) == ("w0", (unstarted,))
    assert machine.running == Ranges([runs, unstarted])


def test_what_is_done_before_it_could_be_elsewhere_is_not_asked_for() -> None:
    assert not only(two_workers_of_which_one_is_done(0.01)[2], c.RecallAttempt)


def test_what_waits_behind_a_chunk_of_this_job_is_recalled_as_soon_as_a_worker_is_idle() -> None:
    machine, commands = running(spec(1, 400, fail_fast=False), workers=2)
    taken: dict[str, list[Chunk]] = {"w0": [], "w1": []}
    recalled: list[c.RecallAttempt] = []
    now = 0.0
    while not recalled:  # only the first worker ever finishes anything
        for command in only(commands, c.SubmitChunk):
            taken[command.worker].append(command.chunk)
        chunk = taken["w0"].pop(0)
        now += 0.3
        commands = machine.handle(e.ChunkDone(receipt(chunk, seconds=0.3)), now)
        commands += machine.handle(e.Committed(chunk.attempt), now)
        recalled = only(commands, c.RecallAttempt)
    assert {order.attempt for order in recalled} <= {chunk.attempt for chunk in taken["w1"]}
    (back,) = only(machine.handle(e.AttemptRecalled(recalled[0].attempt), now), c.SubmitChunk)
    assert back.worker == "w0"


def test_the_story_tells_once_of_replicates_whose_workers_went_away_together() -> None:
    machine, commands = running(spec(1, 3), workers=2)
    assert len(only(commands, c.SubmitChunk)) == 2
    commands = machine.handle(e.WorkerLeft("w0", died=False), 1.0)
    assert c.SetTimer("attempts_lost", 2.0) in commands
    commands += machine.handle(e.WorkerLeft("w1", died=False), 1.1)
    assert not only(commands, c.Note)
    (note,) = only(machine.handle(e.TimerRang("attempts_lost"), 2.0), c.Note)
    assert note.kind == "attempts_lost"
    assert note.text.startswith(
        "2 attempts at 2 replicates lost, as 2 workers or the scheduler went away: w0, w1;"
    )
    assert not only(machine.handle(e.TimerRang("attempts_lost"), 3.0), c.Note)


def test_a_replicate_that_is_lost_by_one_worker_after_the_other_is_told_as_one() -> None:
    machine, commands = running(spec(1, 1), workers=3)
    for n in range(
        3
    ):  # as when the scheduler ends: it is sent to the next one before that is known to be away
        (submit,) = only(commands, c.SubmitChunk)
        assert submit.worker == f"w{n}"
        commands = machine.handle(e.WorkerLeft(f"w{n}", died=False), 1.0)
    (note,) = only(machine.handle(e.TimerRang("attempts_lost"), 2.0), c.Note)
    assert note.text.startswith("3 attempts at 1 replicate lost, as 3 workers or the scheduler went away")


def test_what_was_lost_is_told_before_the_job_ends() -> None:
    machine, commands = running(spec(1, 1), workers=2)
    (lost,) = only(commands, c.SubmitChunk)
    (again,) = only(machine.handle(e.AttemptLost(lost.chunk.attempt, worker_died=False), 1.0), c.SubmitChunk)
    machine.handle(e.ChunkDone(receipt(again.chunk)), 1.1)
    (note,) = only(machine.handle(e.Committed(again.chunk.attempt), 1.2), c.Note)
    assert (note.kind, note.text[:28]) == ("attempts_lost", "1 attempt at 1 replicate los")


@pytest.mark.parametrize("n_held", [0, 2])
def test_a_driver_that_takes_a_running_job_over_tells_what_workers_still_hold_of_it(n_held: int) -> None:
    machine = Machine(spec(1, 3), JOB, epoch=2, state=JobState.RUNNING, adopt=True)
    commands = machine.start(0.0)
    commands += machine.handle(e.EnvironmentReady(), 0.0)
    commands += machine.handle(e.WorkerJoined("w0", 4), 0.0)
    (timer,) = [t for t in only(commands, c.SetTimer) if t.name == "taken_over"]
    found = tuple(e.Found(attempt_id(1, k + 1), Ranges([(k, k + 1)])) for k in range(n_held))
    commands = machine.handle(e.AttemptsFound("w0", found), 1.0)
    assert len(only(commands, c.SubmitChunk)) == 3 - n_held
    (note,) = only(machine.handle(e.TimerRang("taken_over"), timer.at), c.Note)
    held = "workers hold 2 replicates" if n_held else "no worker holds a replicate"
    assert note.text.startswith(f"{held} that an earlier driver had begun; whatever")


def test_receipts_of_what_is_recorded_or_held_twice_are_not_told_as_replicates_that_workers_hold() -> None:
    segments = [committed("0001-000001", ((0, 2),))]
    machine = Machine(spec(1, 5), JOB, epoch=2, state=JobState.RUNNING, adopt=True, segments=segments)
    machine.start(0.0)
    machine.handle(e.EnvironmentReady(), 0.0)
    commands = [c for n in range(2) for c in machine.handle(e.WorkerJoined(f"w{n}", 1), 0.0)]
    (timer, *_) = [t for t in only(commands, c.SetTimer) if t.name == "taken_over"]
    recorded, runs = e.Found(attempt_id(1, 1), Ranges([(0, 2)])), Ranges([(2, 4)])
    machine.handle(e.AttemptsFound("w0", (recorded, e.Found(attempt_id(1, 2), runs))), 1.0)
    machine.handle(e.AttemptsFound("w1", (e.Found(attempt_id(1, 3), runs),)), 1.0)
    (note,) = only(machine.handle(e.TimerRang("taken_over"), timer.at), c.Note)
    assert note.text.startswith("workers hold 2 replicates that an earlier driver had begun; whatever")


def test_what_is_behind_a_chunk_of_the_same_job_on_its_worker_is_pending_until_it_begins() -> None:
    machine, commands = running(spec(1, 100_000, fail_fast=False))
    now = 0.0
    submits = only(commands, c.SubmitChunk)
    while len(submits) == 1:
        now += 0.1
        (done,) = submits
        commands = machine.handle(e.ChunkDone(receipt(done.chunk, seconds=1e-3)), now)
        commands += machine.handle(e.Committed(done.chunk.attempt), now)
        submits = only(commands, c.SubmitChunk)
    first, second = (Ranges(s.chunk.ranges) for s in submits)
    assert (machine.counts()[ReplicateStatus.RUNNING], machine.running) == (len(first), first)
    machine.handle(e.AttemptBegun(submits[1].chunk.attempt), now)  # its worker knows better
    assert machine.counts()[ReplicateStatus.RUNNING] == len(first) + len(second)
    machine.handle(e.WorkerLeft("w0", died=False), now)
    assert machine.counts()[ReplicateStatus.RUNNING] == 0
    assert machine._roster.n_standing == 0
