"""Jobs of a real server, by the command: submitted, watched, stopped, begun again, copied, while the server dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from tests.acceptance.conftest import COMMAND, Said, command, end_pool

import modelops as mo
from modelops.errors import RequestError, ServerUnreachableError
from modelops.home import Home
from modelops.store import Records
from modelops.study.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEADLINE_S = 120.0
MODEL = """
import time
from pathlib import Path

def simulate(params, seed):
    print("seed", seed)
    if "gate" in params and seed >= 4:
        deadline = time.monotonic() + 300
        while not Path(params["gate"]).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    if seed == 3:
        raise ValueError("three")
    return {"x": seed * params["a"]}

def summarize(replicates):
    return {"n": len(replicates)}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Home]:
    """Give the tests of this file one home, and so one server."""
    root = tmp_path_factory.mktemp("served")
    (root / "cache").symlink_to(shared_cache)
    home = Home.at(root)
    yield home
    end_pool(home)


@pytest.fixture
def modelops(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    monkeypatch.setenv("MODELOPS_HOME", str(home.data))
    return command(home, tmp_path)


@pytest.fixture
def bundle(write_bundle: Callable[..., Path]) -> Path:
    return write_bundle(MODEL, table='model = "model:simulate"\naggregate = "model:summarize"')


@pytest.fixture
def submit(home: Home, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., mo.Job]:
    """Return a function that submits the bundle with these seeds and parameters from this process."""
    monkeypatch.setenv("MODELOPS_HOME", str(home.data))

    def go(*seeds: int, **params: Any) -> mo.Job:
        return mo.submit(mo.Study(bundle=bundle, seeds=seeds, parameters=[{"a": 1, **params}]))

    return go


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Return a file for which replicates with seed 4 and above wait."""
    path = tmp_path / "gate"
    yield path
    path.touch()


class Started:
    """A command that goes on in the background."""

    def __init__(self, home: Home, folder: Path, *words: str | Path) -> None:
        self.seen = self.printed = ""
        self.process = subprocess.Popen(
            [COMMAND, *map(str, words)], cwd=folder, env={**os.environ, "MODELOPS_HOME": str(home.data)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
        )  # fmt: skip

    def until(self, words: str) -> None:
        """Read stderr until these words were said."""
        assert self.process.stderr is not None
        self.seen = self._read(self.process.stderr, self.seen, words)

    def until_printed(self, words: str) -> None:
        """Read stdout until these words were said."""
        assert self.process.stdout is not None
        self.printed = self._read(self.process.stdout, self.printed, words)

    @staticmethod
    def _read(pipe: IO[bytes], seen: str, words: str) -> str:
        deadline = time.monotonic() + DEADLINE_S
        while words not in seen:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(pipe.fileno(), 65_536) if ready else b""
            assert data, f"{words!r} was not said: {seen}"
            seen += data.decode()
        return seen

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> Said:
        out, err = self.process.communicate(timeout=DEADLINE_S)
        return Said(self.process.returncode, self.printed + out.decode(), self.seen + err.decode())


@pytest.fixture
def start(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Started]]:
    monkeypatch.setenv("MODELOPS_HOME", str(home.data))
    started: list[Started] = []

    def go(*words: str | Path) -> Started:
        started.append(Started(home, tmp_path, *words))
        return started[-1]

    yield go
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.communicate()


def until(job: mo.Job, seen: Callable[[mo.JobStatus], bool]) -> mo.JobStatus:
    """Look at a job until this is seen."""
    deadline, status = time.monotonic() + DEADLINE_S, job.status()
    while not seen(status):
        assert time.monotonic() < deadline, status
        status = job.source.wait_for_change(job.id, status, 5.0)
    return status


def some_succeeded(status: mo.JobStatus) -> bool:
    return status.counts.get("succeeded", 0) > 0


def test_a_submitted_job_is_watched_shown_copied_and_extended(
    modelops: Callable[..., Said], bundle: Path, tmp_path: Path
) -> None:
    said = modelops("submit", bundle, "-p", "a=1,2", "-n", "20")
    assert said.code == 0, said.err
    job = said.out.strip()
    watched = modelops("jobs", "watch", job)
    assert (watched.code, "40/40" in watched.err) == (0, True), watched.err
    shown = modelops("jobs", "show", job[-10:], "--json").json
    assert (shown["job"], shown["state"], shown["counts"]) == (job, "succeeded", {"succeeded": 40})
    assert shown["aggregates"] == {"succeeded": 2}
    assert job in modelops("jobs", "list", "--state", "succeeded").out
    nowhere = modelops("jobs", "sync", job, "")
    assert (nowhere.code, "write . for the current one" in nowhere.err) == (2, True), nowhere.err
    with pytest.raises(RequestError, match="names no folder"):
        mo.Job(job).sync("")
    mo.Job(job).sync(tmp_path / "to")
    own = modelops("jobs", "sync", job, mo.Job(job).home.objects, "--json")
    assert (own.code, own.json["error"], "keeps its objects" in own.err) == (2, "RequestError", True), own.err
    misspelt = modelops("jobs", "extend", job, "-p", "aa=3")
    assert (misspelt.code, "which is no parameter of the job's first set" in misspelt.err) == (2, True)
    extended = modelops("jobs", "extend", job, "-n", "25", "-p", "a=3", "--wait", "--json")
    assert (extended.code, extended.json["counts"]) == (0, {"succeeded": 75}), extended.err
    copied = modelops("jobs", "sync", job, "to", "--json").json
    assert (copied["final"], copied["unchanged"] > 0) == (True, True)
    table = pq.read_table(tmp_path / "to" / "results" / "replicates.parquet")
    assert (table.num_rows, sorted(set(table["a"].to_pylist()))) == (75, [1, 2, 3])
    refused = modelops("jobs", "resume", job)
    assert (refused.code, "nothing is missing" in refused.err) == (2, True)
    gone = modelops("jobs", "cancel", job)
    assert (gone.code, "nothing to cancel" in gone.err) == (2, True)


def test_a_failure_comes_with_the_command_that_runs_it_again(
    modelops: Callable[..., Said], submit: Callable[..., mo.Job]
) -> None:
    job = submit(1, 2, 3)
    assert modelops("jobs", "watch", job.id, "--quiet").code == 3
    failed = modelops("jobs", "failures", job.id)
    assert "raise ValueError" in failed.out
    assert "1 x failed: ValueError: three" in failed.out
    command_line = failed.out.rpartition("run it again: modelops ")[2]
    again = modelops(*command_line.split(), "--json")
    assert again.json["replicates"][0]["error"]["message"] == "three"
    assert modelops("jobs", "logs", job.id, "--param", "0", "--replicate", "2").out == "seed 3\n"
    assert modelops("jobs", "logs", job.id, "--param", "nonsense").code == 2


def test_a_job_whose_bundle_changed_since_goes_on_with_the_one_it_had(
    modelops: Callable[..., Said], bundle: Path
) -> None:
    job = mo.submit(mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=2))
    job.wait(DEADLINE_S)
    (bundle / "model.py").write_text("def simulate(params, seed):\n    raise KeyError('another model')\n")
    said = modelops("jobs", "extend", job.id, "-n", "4", "--wait", "--json")
    assert (said.code, said.json["counts"]) == (0, {"succeeded": 4}), said.err
    assert "has changed since this job was submitted" in said.err
    assert "submit it as a new job" in said.err


def test_another_process_holds_the_same_job(submit: Callable[..., mo.Job]) -> None:
    job = submit(1, 2, a=7)
    code = f"import modelops as mo; job = mo.Client().job({job.id!r}); job.wait(); print(job.output(0, 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "{'x': 14}\n"), done.stderr


def test_a_cancelled_job_keeps_what_is_finished_and_resumes_only_the_rest(
    modelops: Callable[..., Said], submit: Callable[..., mo.Job], gate: Path, tmp_path: Path
) -> None:
    job = submit(0, 1, 2, 4, 5, 6, gate=str(gate))
    until(job, some_succeeded)
    during = modelops("jobs", "sync", job.id, "to", "--json").json
    assert during["final"] is False
    assert any(name.startswith("segments/") for name in during["copied"])
    assert not (tmp_path / "to" / "results").exists()
    said = modelops("jobs", "cancel", job.id, "--wait", "--json")
    assert (said.code, said.json["state"]) == (0, "cancelled"), said.err
    n = said.json["counts"]["succeeded"]
    assert said.json["counts"] == {"succeeded": n, "cancelled": 6 - n}
    assert modelops("jobs", "watch", job.id, "--quiet").code == 4
    before = job.attempts().to_pylist()
    gate.touch()
    resumed = modelops("jobs", "resume", job.id, "--wait", "--json")
    assert (resumed.code, resumed.json["counts"]) == (0, {"succeeded": 6}), resumed.err
    after = job.attempts().to_pylist()
    assert [row for row in after if row in before] == before
    done = [row["replicate"] for row in after if row["status"] == "succeeded"]
    assert sorted(done) == [0, 1, 2, 3, 4, 5]  # each was finished once
    assert job.sync(tmp_path / "to").final
    rows = pq.read_table(tmp_path / "to" / "results" / "replicates.parquet")
    assert rows["x"].to_pylist() == [0, 1, 2, 4, 5, 6]


def test_watching_goes_on_when_the_server_was_killed(
    home: Home, submit: Callable[..., mo.Job], start: Callable[..., Started], gate: Path
) -> None:
    job = submit(0, 1, 2, 4, 5, gate=str(gate))
    watching = start("jobs", "watch", job.id)
    watching.until("succeeded")
    server = json.loads((home.run / "server.json").read_text())["pid"]
    os.kill(server, signal.SIGKILL)
    gate.touch()
    said = watching.end()
    assert said.code == 0, said.err
    assert "5/5" in said.err
    assert "failed" not in said.err


def test_limits_of_time_go_on_when_the_server_was_killed(
    home: Home, submit: Callable[..., mo.Job], bundle: Path, gate: Path
) -> None:
    waits: dict[str, Any] = {"bundle": bundle, "parameters": [{"a": 1, "gate": str(gate)}]}
    brief = mo.submit(mo.Study(**waits, seeds=[4], replicate_timeout="10s"))
    long = mo.submit(mo.Study(**waits, seeds=[5], timeout="1h"))

    def used_s() -> float:
        with contextlib.closing(Records.open(home.database_url)) as records:
            return records.job(JobId(long.id)).used_s

    def becomes_more_than(before: float) -> float:
        deadline = time.monotonic() + DEADLINE_S
        while (now := used_s()) <= before:
            assert time.monotonic() < deadline, now
            threading.Event().wait(0.2)
        return now

    until(long, lambda status: status.counts.get("running") == 1)
    used = becomes_more_than(0.0)
    os.kill(json.loads((home.run / "server.json").read_text())["pid"], signal.SIGKILL)
    assert becomes_more_than(used) < 3600
    assert brief.wait(DEADLINE_S).counts == {"timed_out": 1}
    assert brief.failures()["attempts"].to_pylist() == [1]
    kinds = [event.kind for event in long.events()]
    assert kinds.count("lease_taken") == 2
    gate.touch()
    assert long.wait(DEADLINE_S).counts == {"succeeded": 1}
    assert long.attempts().num_rows == 1


def test_ctrl_c_ends_the_watching_and_not_the_job(
    submit: Callable[..., mo.Job], start: Callable[..., Started], gate: Path
) -> None:
    job = submit(0, 1, 2, 4, 5, gate=str(gate))
    watching = start("jobs", "watch", job.id)
    watching.until("succeeded")
    watching.press_ctrl_c()
    said = watching.end()
    assert (said.code, "goes on" in said.err) == (4, True), said.err
    assert job.status().state == "running"
    gate.touch()
    assert job.wait(DEADLINE_S).state == "succeeded"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_cancels_a_run_keeps_what_is_finished_and_ends_with_4(
    presses: int, start: Callable[..., Started], bundle: Path, gate: Path, tmp_path: Path
) -> None:
    running = start("run", bundle, "-p", "a=1", "-p", f"gate={gate}", "--seeds", "0,1,2,4,5,6", "--json")
    running.until("succeeded")
    running.press_ctrl_c()
    if presses == 2:
        running.until("stopping")
        running.press_ctrl_c()
    said = running.end()
    assert said.code == 4, said.err
    assert "Traceback" not in said.err
    assert said.json["state"] in (("cancelled",) if presses == 1 else ("cancelled", "cancelling"))
    job = mo.Client().job(said.json["job"])
    assert job.wait(DEADLINE_S).state == "cancelled"  # the server lives, and says so
    n = job.status().counts["succeeded"]
    assert n > 0
    if presses == 1:
        rows = pq.read_table(tmp_path / "results" / "mymodel" / "replicates.parquet")
        assert rows["status"].to_pylist().count("succeeded") == n


def test_a_run_that_is_killed_goes_on(start: Callable[..., Started], bundle: Path, gate: Path) -> None:
    running = start("run", bundle, "-p", "a=1", "-p", f"gate={gate}", "--seeds", "0,1,2,4,5")
    running.until("succeeded")
    os.killpg(running.process.pid, signal.SIGKILL)
    (job,) = mo.Client().jobs(["running"])
    gate.touch()
    assert job.wait(DEADLINE_S).counts == {"succeeded": 5}


def test_when_the_pool_is_down_a_state_is_unknown_and_the_job_goes_on_with_the_next(
    modelops: Callable[..., Said], submit: Callable[..., mo.Job], start: Callable[..., Started], gate: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    job = submit(0, 1, 2, 4, 5, gate=str(gate))
    until(job, some_succeeded)
    logs = start("jobs", "logs", "-f", job.id)
    copying = start("jobs", "sync", "-f", job.id, "copy")
    logs.until_printed("seed 0")
    deadline = time.monotonic() + DEADLINE_S
    while not (tmp_path / "copy" / "modelops-sync.json").exists():
        assert time.monotonic() < deadline, copying.end()
        threading.Event().wait(0.1)
    assert "unfinished: " + job.id in modelops("down").out
    said = modelops("jobs", "show", job.id, "--json")
    assert (said.code, said.json["state"], said.json["last_known"]) == (5, "unknown", "running"), said.err
    assert job.status().state == "unknown"
    assert job.status().last_known == "running"
    with pytest.raises(ServerUnreachableError, match="modelops up"):
        job.results()
    for following in (logs, copying):
        following.until("connecting again")
    gate.touch()
    assert modelops("up").code == 0
    assert job.wait(DEADLINE_S).state == "succeeded"  # the same object, another server
    assert sorted(job.results()["x"].to_pylist()) == [0, 1, 2, 4, 5]
    printed, copied = logs.end(), copying.end()
    assert (printed.code, copied.code) == (0, 0), printed.err + copied.err
    assert set(re.findall(r"seed (\d)", printed.out)) == set("01245")  # an attempt that was lost printed, too
    assert (tmp_path / "copy" / "results" / "replicates.parquet").exists()
