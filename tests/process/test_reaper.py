"""The reaper starts processes, tells how they ended, and lets nothing outlive the worker or the runner."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelops.errors import ProcessError
from modelops.processes.reaper import Child, Reaper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
DEADLINE_S = 60.0

# Leaves behind a child, one in a session of its own, and one that double-forked and holds no descriptor.
FAMILY = """
import os, subprocess, sys, time
def write(name):
    with open(os.path.join(sys.argv[1], name + ".part"), "w") as f: f.write(str(os.getpid()))
    os.rename(os.path.join(sys.argv[1], name + ".part"), os.path.join(sys.argv[1], name))
if os.fork() == 0:
    write("child"); time.sleep(600)
if os.fork() == 0:
    os.setsid(); write("own_session"); time.sleep(600)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid(); os.closerange(0, 64); write("daemon"); time.sleep(600)
    os._exit(0)
while not {"child", "own_session", "daemon"} <= set(os.listdir(sys.argv[1])): time.sleep(0.01)
write("runner")
"""
NAMES = ("child", "own_session", "daemon", "runner")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def family(folder: Path) -> list[int]:
    wait_for(lambda: all((folder / name).exists() for name in NAMES), "the family is complete")
    return [int((folder / name).read_text()) for name in NAMES]


@pytest.fixture
def reaper() -> Iterator[Reaper]:
    reaper = Reaper()
    yield reaper
    reaper.close()


def spawn(reaper: Reaper, code: str, *args: str, stdout: int | None = None, cwd: Path = Path("/")) -> Child:
    null = os.open(os.devnull, os.O_RDWR)
    try:
        return reaper.spawn(
            [sys.executable, "-S", "-c", textwrap.dedent(code), *args],
            env={"ONLY": "this"},
            cwd=cwd,
            fds=[null, stdout if stdout is not None else null, 2],
        )
    finally:
        os.close(null)


@pytest.mark.parametrize(
    ("code", "returncode"),
    [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os._exit(7)", 7)]
    + [(f"import os; os.kill(os.getpid(), {n})", -n) for n in (9, 11, 15)],
)
def test_a_process_is_started_and_its_end_is_told(reaper: Reaper, code: str, returncode: int) -> None:
    child = spawn(reaper, code)
    assert child.exited.wait(DEADLINE_S)
    assert child.exit is not None
    assert child.exit.returncode == returncode
    assert child.exit.max_rss_bytes is not None
    assert child.exit.max_rss_bytes > 1_000_000


def test_a_program_that_is_not_there_is_an_error_that_names_it(reaper: Reaper) -> None:
    with pytest.raises(ProcessError, match="/no/such/python"):
        reaper.spawn(["/no/such/python"], env={}, cwd=Path("/"), fds=[0, 1, 2])
    assert spawn(reaper, "pass").exited.wait(DEADLINE_S)


def test_few_open_files_are_enough_and_too_few_are_said_with_the_command_that_allows_more(
    reaper: Reaper,
) -> None:
    held = len(list(Path(f"/proc/{reaper.pid}/fd").iterdir()))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(reaper.pid, resource.RLIMIT_NOFILE, (held + 10, hard))
    assert spawn(reaper, "pass").exited.wait(DEADLINE_S)
    resource.prlimit(
        reaper.pid, resource.RLIMIT_NOFILE, (held + 4, hard)
    )  # three are handed over, a pipe needs two
    with pytest.raises(ProcessError, match=r"Too many open files; a process may have .* 'ulimit -n 1024'"):
        spawn(reaper, "pass")


def test_a_process_gets_its_descriptors_its_folder_and_only_the_variables_it_was_given(
    reaper: Reaper, tmp_path: Path
) -> None:
    read, write = os.pipe()
    code = """
        import os, resource
        print(os.getcwd(), sorted(os.environ), os.getsid(0) == os.getpid(),
              open("/proc/self/oom_score_adj").read().strip(), resource.getrlimit(resource.RLIMIT_CORE),
              sorted(os.listdir("/proc/self/fd"), key=int))
    """
    child = spawn(reaper, code, stdout=write, cwd=tmp_path)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    assert child.exited.wait(DEADLINE_S)
    # Python itself adds LC_CTYPE to the environment of a process in the C locale; 3 is the listing itself.
    assert text.strip() == f"{tmp_path} ['LC_CTYPE', 'ONLY'] True 900 (0, 0) ['0', '1', '2', '3']"


def test_what_a_runner_leaves_behind_is_killed_when_it_ends(reaper: Reaper, tmp_path: Path) -> None:
    bystander = spawn(reaper, "import time; time.sleep(600)")
    child = spawn(reaper, FAMILY, str(tmp_path))
    pids = family(tmp_path)
    assert child.exited.wait(DEADLINE_S)
    for pid in pids:
        wait_for(lambda pid=pid: not alive(pid), "all gone")  # type: ignore[misc]  # bound by default
    assert alive(bystander.pid)


def test_killing_a_runner_kills_its_descendants_too(reaper: Reaper, tmp_path: Path) -> None:
    child = spawn(reaper, FAMILY + "time.sleep(600)", str(tmp_path))
    pids = family(tmp_path)
    assert all(map(alive, pids))
    reaper.kill(child)
    assert child.exited.wait(DEADLINE_S)
    assert child.exit is not None
    assert child.exit.returncode == -9
    for pid in pids:
        wait_for(lambda pid=pid: not alive(pid), "all gone")  # type: ignore[misc]


def test_a_stopped_process_that_ignores_signals_can_be_killed(reaper: Reaper, tmp_path: Path) -> None:
    ignore = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 15)]\n"
    child = spawn(reaper, ignore + FAMILY + "time.sleep(600)", str(tmp_path))
    family(tmp_path)
    os.kill(child.pid, signal.SIGSTOP)
    reaper.kill(child)
    assert child.exited.wait(DEADLINE_S)


WORKER = """
import os, sys, time
from pathlib import Path
from modelops.processes.reaper import Reaper
reaper = Reaper()
null = os.open(os.devnull, os.O_RDWR)
argv = [sys.executable, "-S", "-c", sys.argv[1] + "\\ntime.sleep(600)", sys.argv[2]]
reaper.spawn(argv, env={}, cwd=Path("/"), fds=[null] * 3)
if sys.argv[3] == "fork" and os.fork() == 0:  # somebody in the worker inherited its end of the socket
    Path(sys.argv[2], "bystander").write_text(str(os.getpid()))
    time.sleep(600)
Path(sys.argv[2], "reaper").write_text(str(reaper.pid))
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_nothing_outlives_a_worker_that_is_killed(tmp_path: Path, how: str) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER, FAMILY, str(tmp_path), how])
    bystander = 0
    try:
        pids = family(tmp_path)
        wait_for(
            lambda: (tmp_path / "reaper").exists() and (tmp_path / "reaper").read_text() != "", "started"
        )
        pids.append(int((tmp_path / "reaper").read_text()))
        if how == "fork":
            wait_for(lambda: (tmp_path / "bystander").exists(), "forked")
            bystander = int((tmp_path / "bystander").read_text())
    finally:
        worker.kill()
        worker.wait()
    for pid in pids:
        wait_for(lambda pid=pid: not alive(pid), f"{pid} gone")  # type: ignore[misc]
    if bystander:
        os.kill(bystander, signal.SIGKILL)


def test_when_the_reaper_itself_is_killed_its_runners_end_and_are_told_of(tmp_path: Path) -> None:
    reaper = Reaper()
    child = spawn(reaper, "import time; time.sleep(600)")
    os.kill(reaper.pid, signal.SIGKILL)
    assert child.exited.wait(DEADLINE_S)
    wait_for(lambda: not alive(child.pid), "the runner is gone")
    with pytest.raises(ProcessError, match="gone"):
        spawn(reaper, "pass")
    reaper.close()


def test_closing_leaves_no_process(tmp_path: Path) -> None:
    reaper = Reaper()
    spawn(reaper, FAMILY + "time.sleep(600)", str(tmp_path))
    pids = [*family(tmp_path), reaper.pid]
    reaper.close()
    assert not any(map(alive, pids))
