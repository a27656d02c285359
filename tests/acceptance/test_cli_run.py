"""``modelops run`` as a modeler uses it: files, tables, exit codes, and Ctrl-C as a terminal sends it."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from tests.acceptance.conftest import COMMAND
from tests.conftest import descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.acceptance.conftest import Said

    from modelops.home import Home

    Modelops = Callable[..., Said]

BOTH = 'model = "model:simulate"\naggregate = "model:summarize"'
SUMMARY = """
def summarize(replicates):
    return {"loss": abs(sum(r["x"] for r in replicates) / len(replicates) - 50), "n": len(replicates)}
"""
GOOD = (
    "def simulate(params, seed):\n    return {'x': params['a'] * (seed % 3), 'a2': params['a'] ** 2}\n"
    + SUMMARY
)
HALF = (
    "def simulate(params, seed):\n    if seed % 2:\n        raise ValueError('odd')\n    return {'x': seed}\n"
    + SUMMARY
)
BAD = "def simulate(params, seed):\n    raise ValueError('always')\n" + SUMMARY
SLOW = """
import time
def simulate(params, seed):
    if seed >= 4:
        time.sleep(600)
    open({note!r}, "a").write("ended ")
    return {{"x": seed}}
def summarize(replicates):
    return {{"mean": sum(r["x"] for r in replicates) / len(replicates)}}
"""
DEADLINE_S = 120.0


def test_a_run_writes_files_shows_the_best_sets_and_ends_with_0(
    modelops: Modelops, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = write_bundle(GOOD, table=BOTH)
    said = modelops("run", bundle, "-p", "a=1,50", "--seeds", "0,1,2", "-w", "1", "--out", "found")
    assert said.code == 0, said.err
    assert "best parameter sets" in said.out
    rows = [
        [cell.strip() for cell in line.split("│")] for line in said.out.splitlines() if line.startswith("│")
    ]
    assert [row[2] for row in rows] == ["50", "1"]  # by loss, best first
    assert "6/6" in said.err
    assert "\r" not in said.err
    table = pq.read_table(tmp_path / "here" / "found" / "replicates.parquet")
    assert table["x"].to_pylist() == [0, 1, 2, 0, 50, 100]
    assert {p.name for p in (tmp_path / "here" / "found").iterdir()} >= {
        "replicates.parquet", "aggregates.parquet", "attempts.parquet",
    }  # fmt: skip


def test_as_json_only_json_is_on_stdout(modelops: Modelops, write_bundle: Callable[..., Path]) -> None:
    bundle = write_bundle(HALF, table=BOTH)
    said = modelops("run", bundle, "--seeds", "2,3,4", "-w", "1", "--json", "--min-success", "2", "--quiet")
    assert said.code == 3, said.err
    answer = said.json
    assert answer["state"] == "partial"
    assert answer["counts"] == {"succeeded": 2, "failed": 1}
    (failure,) = answer["failures"]
    assert (failure["error_type"], failure["message"], failure["count"]) == ("ValueError", "odd", 1)
    assert answer["best"][0]["n"] == 2
    assert re.fullmatch("[0-9a-f]{32}", answer["best"][0]["param_id"])
    assert said.err == ""
    # The command that the summary gives runs that very replicate: the same seed, the same failure.
    words = failure["command"].split()
    assert words[0] == "modelops"
    again = modelops(*words[1:], "--json")
    assert again.code == 1, again.err
    (row,) = again.json["replicates"]
    assert (row["seed"], row["status"], row["error"]["message"]) == (3, "failed", "odd")


def test_a_job_in_which_nothing_succeeds_ends_with_1_and_shows_the_error_once(
    modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    said = modelops("run", write_bundle(BAD, table=BOTH), "-n", "3", "-w", "1")
    assert said.code == 1, said.err
    assert said.out.count("raise ValueError") == 1
    assert "run it again: modelops bundle run --job" in said.out


def test_a_partial_job_says_which_aggregate_failed_where_and_what_to_add(
    modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    source = GOOD.replace("def summarize(replicates):\n", "def summarize(replicates):\n    import sklearn\n")
    bundle = write_bundle(source, table=BOTH)
    line = "model.py:" + str(source[: source.index("import sklearn")].count("\n") + 1)
    said = modelops("run", bundle, "-p", "a=1,2", "-n", "2", "-w", "1", "--quiet")
    assert said.code == 3, said.err
    (head,) = (x for x in said.out.splitlines() if "aggregate failed" in x)
    assert head.startswith("2 x aggregate failed: model:summarize, parameter set 0: ModuleNotFoundError: ")
    assert line in head
    assert 'add "scikit-learn" to dependencies under [project] in pyproject.toml' in head
    assert said.out.count('File "model.py"') == 1
    said = modelops("run", bundle, "-p", "a=1,2", "-n", "2", "-w", "1", "--json")
    (kind,) = said.json["aggregate_failures"]
    assert (kind["count"], kind["aggregate"], kind["status"]) == (2, "model:summarize", "failed")
    said = modelops("bundle", "check", bundle, "-p", "a=1")
    assert said.code == 1
    assert '-> add "scikit-learn" to dependencies' in said.out


def test_a_long_reason_is_not_folded_where_there_is_no_terminal(
    modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    long = "word " * 100 + "end"
    said = modelops(
        "run", write_bundle(f"def simulate(params, seed):\n    raise ValueError({long!r})\n"), "-n", "9"
    )
    assert said.code == 1
    (head, *_) = (x for x in said.out.splitlines() if x.startswith("job "))
    assert head.endswith(long)
    assert "9 failed" in head


def test_a_study_file_is_run_as_it_says(
    modelops: Modelops, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = write_bundle(GOOD, table=BOTH)
    study = tmp_path / "here" / "study.toml"
    study.write_text(f'bundle = "{bundle}"\nname = "mine"\nseeds = [1, 2]\n[parameters]\na = [1, 2]\n')
    said = modelops("run", "study.toml", "-w", "1", "--json", "-p", "a=5")
    assert said.code == 0, said.err
    assert said.json["counts"] == {"succeeded": 2}
    assert pq.read_table(tmp_path / "here" / "results" / "mine" / "replicates.parquet")["a"].to_pylist() == [
        5,
        5,
    ]


@pytest.fixture
def start(
    home: Home, write_bundle: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Return a function that starts a command in a process group of its own, as a shell does.

    It is given a bundle of whose replicates four end and the others hang.
    """
    bundle = write_bundle(SLOW.format(note=str(tmp_path / "ended")), table=BOTH)
    processes = []

    def go(*command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [COMMAND, *command, bundle, "--seeds", "0,1,2,3,4,5,6,7"], cwd=tmp_path, process_group=0,
            env={**os.environ, "MODELOPS_HOME": str(home.data)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        return process

    yield go
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until(process: subprocess.Popen[bytes], words: bytes, name: str = "stderr") -> bytes:
    """Read stderr (by default) until these words were seen."""
    stream = getattr(process, name)
    deadline, seen = time.monotonic() + DEADLINE_S, b""
    while words not in seen:
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        data = os.read(stream.fileno(), 65_536) if ready else b""
        assert data, f"{words!r} was not said: {seen.decode()}"
        seen += data
    return seen


def gone(pids: set[int]) -> set[int]:
    """Wait until these processes have ended; return those that have not."""
    deadline = time.monotonic() + DEADLINE_S
    left = pids
    while left and time.monotonic() < deadline:
        left = {p for p in left if Path(f"/proc/{p}").exists() and _state(p) != "Z"}
        time.sleep(0.05)
    return left


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_keeps_what_is_finished_ends_with_4_and_leaves_no_process(
    presses: int, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    started = start("run", "-w", "2", "--json")
    seen = read_until(started, b"4 succeeded")  # some in a chunk whose next replicate hangs
    pids = descendants(started.pid)
    assert len(pids) >= 4  # two workers with a runner each, at least
    os.killpg(started.pid, signal.SIGINT)
    if presses == 2:
        read_until(started, b"stopping")
        os.killpg(started.pid, signal.SIGINT)
    out, err = started.communicate(timeout=DEADLINE_S)
    err = seen + err
    assert started.returncode == 4, err.decode()
    assert b"Traceback" not in err, err.decode()
    assert gone(pids) == set()
    answer = json.loads(out)
    assert answer["state"] == "cancelled"
    assert answer["counts"]["succeeded"] == 4
    table = pq.read_table(tmp_path / "results" / "mymodel" / "replicates.parquet")
    assert [x for x in table["x"].to_pylist() if x is not None] == [0, 1, 2, 3]


def test_ctrl_c_ends_a_local_run_with_4_and_leaves_no_process(
    start: Callable[..., subprocess.Popen[bytes]],
) -> None:
    started = start("bundle", "run")
    read_until(started, b"seed 3", "stdout")
    pids = descendants(started.pid)
    assert len(pids) >= 2  # the reaper and the runner
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=DEADLINE_S)
    assert started.returncode == 4
    assert err.decode().strip() == "stopped"
    assert gone(pids) == set()
