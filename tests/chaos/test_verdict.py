"""What is untrue is found: the checks of the soak, shown answers and records that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from journal import Line
from killer import Flight, Killer, Strike
from plans import Plan
from pool import Live, Pool
from soak import says_what_is_away
from verdict import RESULT_FILES, Commit, Ended, what_is_wrong, what_was_said_wrongly, wrong_attempts
from watchers import Watch

from modelops.client.status import JobStatus
from modelops.errors import (
    ClusterError,
    IntegrityError,
    InternalError,
    NotFoundError,
    ServerUnreachableError,
    StorageError,
)
from modelops.states import JobState

PLAN = Plan("tiny", 0.1, 1, 1)
COUNTS = {"succeeded": 1}
DIGESTS = dict.fromkeys(RESULT_FILES, "x")
WATCH = Watch(
    1, killed=False, exit_code=0, told="running: 0/1\nsucceeded: 1/1  1 succeeded\n",
    shown=json.dumps({"state": "succeeded", "counts": COUNTS}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "may_be"),
    [
        (ServerUnreachableError("the server", "none runs", ""), True),
        (ServerUnreachableError("the server", "the database does not answer", "", answers=True), True),
        (ServerUnreachableError("the server", "segments/a is gone", "", answers=True), False),
        (StorageError("the database postgresql://x does not answer"), True),
        (StorageError("the database x is damaged"), False),
        (ClusterError("the server of this home did not answer within 60 s"), True),
        (sa.exc.OperationalError("SELECT 1", {}, Exception("refused")), True),
        (NotFoundError("there is no job job_1"), False),
        (IntegrityError("segments/a is damaged"), False),
        (InternalError("500"), False),
    ],
)
def test_only_that_a_part_is_away_passes(error: Exception, may_be: bool) -> None:
    assert says_what_is_away(error) is may_be


@pytest.mark.parametrize(
    ("second", "untrue"),
    [
        ({"succeeded": 3, "running": 1}, []),
        ({"succeeded": 1, "running": 3}, ["first 2 succeeded, then 1"]),
        ({"succeeded": 2}, ["not as many in all"]),
    ],
)
def test_counts_that_fall_back_are_found(second: dict[str, int], untrue: list[str]) -> None:
    pool, one = object.__new__(Pool), Live("job", PLAN)
    pool._moved_at = pool._driven_at = 0.0
    for counts in ({"succeeded": 2, "running": 2}, second):
        pool.heard(one, JobStatus(JobState.RUNNING, counts, {}, ""), 1.0)
    assert len(one.untrue) == len(untrue)
    assert all(words in said for words, said in zip(untrue, one.untrue, strict=True))


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, ""),
        ({"killed": True, "exit_code": -9, "shown": ""}, ""),
        ({"exit_code": 5, "shown": "", "told": "the server cannot be reached"}, ""),
        ({"exit_code": 5, "shown": "", "told": "running: 0/1\nthe server cannot be reached"}, "ended with 5"),
        ({"exit_code": 1}, "ended with 1"),
        ({"exit_code": -9}, "ended with -9"),
        ({"exit_code": None}, "watched on"),
        ({"told": "failed: 0/1\n"}, "said failed"),
        ({"told": "running: 2/3  2 succeeded\nrunning: 1/3  1 succeeded\n"}, "first that 2"),
        ({"shown": json.dumps({"state": "partial", "counts": COUNTS})}, "ended with partial"),
        ({"exit_code": 1, "told": "Traceback (most recent call last)"}, "a traceback"),
    ],
)
def test_a_client_that_says_what_is_not_so_is_found(changed: dict[str, Any], found: str) -> None:
    wrong = list(replace(WATCH, **changed).what_is_wrong("succeeded", COUNTS))
    assert found in " ".join(wrong)
    assert bool(wrong) == bool(found)


@pytest.mark.parametrize(
    ("tries", "found"),
    [
        ([("a", 1, "succeeded")], ""),
        ([("b", 1, "crashed"), ("a", 2, "succeeded")], ""),
        ([("b", 1, "succeeded"), ("a", 1, "succeeded")], ""),  # a worker that was thought lost came back
        ([("b", 1, "crashed"), ("a", 3, "succeeded")], "numbers [1, 3]"),
        ([("a", 2, "succeeded")], "numbers [2]"),
        ([("a", 1, "failed")], "its attempt was"),
        ([("b", 1, "succeeded")], "its attempt was"),
        ([("b", 1, "succeeded"), ("a", 2, "succeeded")], "was retried"),
    ],
)
def test_attempts_that_contradict_the_outcomes_are_found(
    tries: list[tuple[str, int, str]], found: str
) -> None:
    wrong = list(wrong_attempts(_ended(tries)))
    assert found in " ".join(wrong)
    assert bool(wrong) == bool(found)


def test_what_the_reconciler_finds_damaged_is_found() -> None:
    ended = replace(_ended([]), mismatches=("nobody_runs: 3 replicates", "segment_damaged: segments/a"))
    assert ["segment_damaged" in wrong for wrong in what_was_said_wrongly(ended, [WATCH])] == [True]


def line(what: str, at: float) -> Line:
    return Line(what, (0, 0), 7, at)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, ""),
        ({"digests": {**DIGESTS, "aggregates.parquet": "y"}}, "aggregates.parquet differs"),
        ({"state": "partial"}, "ended partial"),
        ({"counts": {"failed": 1}}, "{'failed': 1}"),
        ({"job": "another"}, "only 0 kills hit its work"),
        (
            {"journal": [line("begin", -1.0), line("end", -0.5), line("begin", 0.5)]},
            "was begun 0.500 s after",
        ),
        ({"journal": [line("begin", -1.0), line("begin", -0.5), line("end", 0.5)]}, ""),  # a double that lost
    ],
)
def test_a_job_that_is_not_as_the_undisturbed_one_is_found(changed: dict[str, Any], found: str) -> None:
    flight = Flight("job", (0, 0), 7, PLAN, 1.0)
    ways = [("server", "SIGKILL"), ("postgres", "SIGKILL"), ("worker", "SIGKILL"), ("server", "SIGSTOP")]
    killer = Killer(
        1, 1.0, object.__new__(Pool), [Strike(0.0, kind, 7, how, (flight,)) for kind, how in ways]
    )
    calm = replace(_ended([("a", 1, "succeeded")]), digests=DIGESTS)
    wrong = list(what_is_wrong(replace(calm, **changed), calm, killer))
    assert found in " ".join(wrong)
    assert bool(wrong) == bool(found)


def test_kills_that_hit_nothing_and_stops_and_deaths_of_clients_do_not_count() -> None:
    flight = Flight("job", (0, 0), 7, PLAN, 1.0)
    strikes = [
        Strike(0.0, "client", 7, "SIGKILL", (flight,)),
        Strike(0.0, "worker", 7, "SIGSTOP", (flight,)),
        Strike(0.0, "worker", 7, "SIGKILL", ()),
    ]
    killer = Killer(1, 1.0, object.__new__(Pool), strikes)
    calm = replace(_ended([("a", 1, "succeeded")]), digests=DIGESTS)
    (wrong,) = what_is_wrong(calm, calm, killer)
    assert "only 0 kills" in wrong


def _ended(tries: list[tuple[str, int, str]]) -> Ended:
    at = {"param": 0, "replicate": 0}
    return Ended(
        "job", PLAN, "succeeded", COUNTS, digests={}, rows=[{**at, "status": "succeeded"}], journal=(),
        attempts=[{**at, "attempt": a, "attempt_number": n, "status": s} for a, n, s in tries],
        commits=[Commit(0.0, "a", 0, 1)],
    )  # fmt: skip
