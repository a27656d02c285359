"""What is shown of a job where nobody looks at a terminal."""

from __future__ import annotations

import io
import json
import math
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from modelops.cli.job_views import show_status
from modelops.cli.tables import show_failures
from modelops.cli.up import _line
from modelops.client.progress import ProgressBar
from modelops.client.reported import reported_values
from modelops.client.served import Progress, Summary
from modelops.client.status import JobStatus, Reported
from modelops.cluster.status import PoolStatus, RoleStatus
from modelops.cluster.upkeep import UNSEEN
from modelops.states import JobState
from modelops_runner.reports import encoded


def test_on_a_pipe_a_line_stays_one_line_however_long() -> None:
    pipe = io.StringIO()
    text = "preparing the environment in " + "/a/long/folder" * 30
    with ProgressBar(Console(file=pipe)) as bar:
        bar.stage(text)
    assert pipe.getvalue() == text + "\n"


def status(state: str, succeeded: int, **more: Any) -> JobStatus:
    return JobStatus(JobState(state), {"succeeded": succeeded, "pending": 4 - succeeded}, {}, "", **more)


def lines_of(*seen: JobStatus) -> list[str]:
    """Return what is printed on a pipe when these are seen one after another."""
    pipe = io.StringIO()
    with ProgressBar(Console(file=pipe)) as bar:
        for one in seen:
            bar.seen(one)
    return pipe.getvalue().splitlines()


def test_a_server_that_is_away_is_said_once_and_so_is_its_return() -> None:
    since = datetime(2026, 1, 1, tzinfo=UTC)
    away = JobStatus(
        "unknown", {}, {}, "unknown since then", unknown_since=since, last_known=JobState.RUNNING
    )
    assert lines_of(status("running", 0), away, away, status("succeeded", 4)) == [
        "unknown since then; connecting again", "connected again", "succeeded: 4/4  4 succeeded",
    ]  # fmt: skip


def test_what_a_replicate_reports_of_itself_is_shown() -> None:
    reported = Reported(0, 2, 0.45, {"epoch": 9, "loss": 0.123456})
    assert "  parameter set 0, replicate 2: 45% epoch=9 loss=0.1235" in lines_of(
        status("running", 1, progress=(reported,))
    )


REPORTED: list[tuple[Any, Any]] = [
    (0.5, 0.5), (10**30, 10**30), (math.inf, math.inf), ((1, 2.5), [1, 2.5]), ({1: (2,)}, {"1": [2]}),
    (np.float32(0.5), 0.5), (np.float64(-math.inf), -math.inf), (np.int64(3), 3), (np.bool_(True), True),
    (np.array([1.0, math.inf]), [1.0, math.inf]), (np.str_("day"), "day"), ("\ud800", "?"), (b"x", "b'x'"),
    (np.longdouble(1.5), "1.5"), (1j, "1j"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "seen"), REPORTED, ids=[repr(given) for given, _ in REPORTED])
def test_what_a_model_reports_is_seen_as_numbers_and_text(given: Any, seen: Any) -> None:
    travelling = json.loads(encoded({"loss": given, "$odd": 1}))
    found = reported_values(travelling)
    assert found == {"loss": seen, "$odd": 1}
    assert type(found["loss"]) is type(seen)
    assert str(Reported(0, 2, 0.5, found)).encode()


def test_what_a_model_says_stays_in_its_line_and_leaves_the_terminal_alone() -> None:
    """Else it could wipe *failed* from the screen, and write what it likes there."""
    odd = "bad\x1b[2K\rjob: succeeded\u202e"
    assert str(Reported(0, 2, 0.5, {"a\n": odd})) == (
        r"parameter set 0, replicate 2: 50% a\n=bad\x1b[2K\rjob: succeeded\u202e"
    )
    assert show_status("job", JobStatus(JobState.FAILED, {}, {}, f"{odd}\n\tand more"))[0] == (
        "job: failed: bad\\x1b[2K\\rjob: succeeded\\u202e\n\tand more"
    )
    printed = io.StringIO()
    kind = {"count": 3, "status": "failed", "error_type": "ValueError", "message": odd}
    show_failures(Console(file=printed), cast("Any", None), [kind])
    assert printed.getvalue() == "\n3 x failed: ValueError: bad\\x1b[2K\\rjob: succeeded\\u202e\n"


@pytest.mark.parametrize("loss", [math.nan, np.float64(math.nan), np.float32(math.nan)])
def test_a_loss_that_is_no_number_any_more_is_seen(loss: Any) -> None:
    (shown,) = (
        Summary(
            job="job", state="running", progress=(Progress(0, 2, 0.45, json.loads(encoded({"loss": loss}))),)
        )
        .status()
        .progress
    )
    assert str(shown) == "parameter set 0, replicate 2: 45% loss=nan"


@pytest.mark.parametrize("value", [{"$new": 1}, {"$np": 1}, {"$npy": "!"}, {"$arrow": ["arrow.no", ""]}])
def test_what_a_later_version_reports_is_shown_as_it_came(value: Any) -> None:
    assert reported_values({"loss": value}) == {"loss": value}


def test_what_is_done_before_replicates_run_and_what_a_job_waits_for_are_shown() -> None:
    assert lines_of(
        status("preparing", 0, doing="installing 3 packages"),
        status("running", 0, waiting_for="the disk is full"),
    ) == ["installing 3 packages", "waiting: the disk is full"]


def test_a_job_that_has_ended_has_no_time_left() -> None:
    ended = JobStatus(JobState.FAILED, {"not_run": 2}, {}, "it cannot be installed", eta=0.0)
    assert lines_of(ended) == ["failed: 0/2  2 not_run"]


def test_a_process_whose_end_nobody_saw_is_told_of_in_a_sentence() -> None:
    role = RoleStatus("server", "running", 7, "", 2, UNSEEN, "")
    line = _line(role, PoolStatus(True, True, "", "", True, (role,)))
    assert line.endswith(
        "started 2 times, nobody saw how the last one ended: its keeper was started again meanwhile"
    )


def test_a_failure_that_was_stored_without_a_type_is_shown_without_one() -> None:
    pipe = io.StringIO()
    entry = {"count": 2, "status": "crashed", "error_type": "", "message": "signal 9 (Killed)"}
    show_failures(Console(file=pipe), cast("Any", None), [entry])
    assert pipe.getvalue().startswith("\n2 x crashed: signal 9 (Killed)\n")
