"""What a model does to its process, what the user sees, and that the next replicate knows nothing of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.process.pool_bench import Bench, value
from volumes import Volume, can_mount

from modelops.errors import ProcessExitedError, RemoteError, StartFailedError, StorageError
from modelops.processes import AggregateOutcome, ProcessPool, Row, SpooledFile, StopSignal
from modelops.processes.cgroup import find_home, make_cgroup
from modelops.processes.pool import STARTS
from modelops.processes.process import RunnerProcess
from modelops.states import ReplicateStatus as Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.rpc import Cancel

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
DEADLINE_S = 60.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ProcessPool(tmp_path / "pool", slots=2, stalled_after_s=1.0) as pool:
        yield Bench(pool, tmp_path)
    assert not list((tmp_path / "pool").iterdir())


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


MODEL = """
    import ctypes, os, signal, subprocess, sys, threading, time
    def model(params, seed):
        print("replicate", seed, "begins", flush=True)
        if seed == 1:
            {}
        return {{"seed": seed}}
"""
DEATHS = [
    ("sys.exit(3)", "exit code 3", 3),
    ("os._exit(3)", "exit code 3", 3),
    ("os.kill(os.getpid(), 9)", "signal 9 (Killed)", -9),
    ("os.kill(os.getpid(), 15)", "signal 15 (Terminated)", -15),
    ("ctypes.string_at(0)", "signal 11 (Segmentation fault)", -11),
    ("os.abort()", "signal 6 (Aborted)", -6),
    ("threading.Thread(target=lambda: os._exit(5)).start(); time.sleep(600)", "exit code 5", 5),
]


@pytest.mark.parametrize("isolation", ["warm", "spawn"])
@pytest.mark.parametrize(("code", "message", "exit_"), DEATHS, ids=[death[0] for death in DEATHS])
def test_a_death_is_one_replicates_crash_and_the_others_succeed(
    bench: Bench, code: str, message: str, exit_: int, isolation: str
) -> None:
    spec = bench.spec(MODEL.format(code), isolation=isolation)
    for _ in range(2):
        outcomes = bench.run(spec)
        assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.CRASHED, *[Status.SUCCEEDED] * 2]
        error = outcomes[1].error
        assert error is not None
        assert (error.message, error.exit) == (message, exit_)
        assert error.stderr.startswith("replicate 1 begins\n")
        assert "replicate 0" not in error.stderr
        assert value(outcomes[2]) == 2


def test_an_exception_keeps_type_message_place_and_what_was_printed(bench: Bench) -> None:
    spec = bench.spec(MODEL.format("raise ValueError('beta is ' + '\\U0001f600')"))
    outcomes = bench.run(spec)
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.FAILED, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert (error.type, error.message, error.file, error.exit) == (
        "ValueError",
        "beta is \U0001f600",
        "m.py",
        None,
    )
    assert error.line == 6
    assert 'File "m.py", line 6, in model' in error.traceback
    assert error.stderr == "replicate 1 begins\n"
    assert bench.pool.starts == 1
    again = bench.run(spec)[1].error
    assert again is not None
    assert again.fingerprint == error.fingerprint


SPAWN_FAMILY = """
            for kind in ("child", "own_session", "daemon"):
                if os.fork() == 0:
                    if kind != "child": os.setsid()
                    if kind == "daemon" and os.fork(): os._exit(0)
                    with open(params["dir"] + "/" + kind + ".part", "w") as f: f.write(str(os.getpid()))
                    os.rename(params["dir"] + "/" + kind + ".part", params["dir"] + "/" + kind)
                    while True: time.sleep(600)
            with open(params["dir"] + "/runner", "w") as f: f.write(str(os.getpid()))
            while len(os.listdir(params["dir"])) < 4: time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("isolation", "how"),
    [
        ("warm", "threading.Event().wait()"),
        ("warm", "[0 for _ in iter(int, 1)]"),
        ("fork", "threading.Event().wait()"),
    ],
)
def test_a_replicate_that_never_returns_is_timed_out_with_all_its_children(
    bench: Bench, tmp_path: Path, isolation: str, how: str
) -> None:
    (tmp_path / "pids").mkdir()
    code = "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]" + SPAWN_FAMILY + "            " + how
    spec = bench.spec(MODEL.format(code), replicate_timeout_s=1.5, isolation=isolation)
    before = time.monotonic()
    outcomes = bench.run(spec, dir=str(tmp_path / "pids"))
    took = time.monotonic() - before
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.TIMED_OUT, *[Status.SUCCEEDED] * 2]
    assert 1.4 < outcomes[1].seconds < took
    error = outcomes[1].error
    assert error is not None
    assert "1.5 s" in error.message
    assert error.stderr == "replicate 1 begins\n"
    for file in (tmp_path / "pids").iterdir():
        pid = int(file.read_text())
        wait_for(lambda pid=pid: not alive(pid), f"{file.name} is gone")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("pass", Status.SUCCEEDED),
        ("raise ValueError", Status.FAILED),
        ("os._exit(3)", Status.CRASHED),
        ("os.kill(os.getpid(), 9)", Status.CRASHED),
    ],
)
def test_what_a_fork_has_started_is_gone_when_the_next_replicate_begins(
    bench: Bench, tmp_path: Path, end: str, status: Status
) -> None:
    (tmp_path / "pids").mkdir()
    code = (
        MODEL.format(SPAWN_FAMILY.lstrip() + "            " + end)
        + """
    HELPER = subprocess.Popen(["sleep", "1000"])
    begin = model
    def model(params, seed):
        if seed < 2: return begin(params, seed)
        pids = {name: int(open(params["dir"] + "/" + name).read()) for name in os.listdir(params["dir"])}
        return {"alive": [name for name in pids if os.path.exists(f"/proc/{pids[name]}")], "helper": HELPER.pid}
    """
    )
    outcomes = bench.run(bench.spec(code, isolation="fork"), dir=str(tmp_path / "pids"))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, status, *[Status.SUCCEEDED] * 2]
    assert value(outcomes[2]) == []
    helper = msgspec.json.decode(bytes(outcomes[3].outputs[1][2]))  # type: ignore[arg-type]
    assert alive(helper), "what the bundle started when it was imported goes on"
    assert len(list((tmp_path / "pids").iterdir())) == 4


@pytest.mark.parametrize("isolation", ["warm", "fork", "spawn"])
def test_a_timeout_of_weeks_is_longer_than_poll_can_wait_and_does_no_harm(
    bench: Bench, isolation: str
) -> None:
    code = "import time\ndef model(params, seed): time.sleep(params['s']); return {'seed': seed}"
    spec = bench.spec(code, replicate_timeout_s=60 * 86_400.0, isolation=isolation)
    assert [o.status for o in bench.run(spec, s=0.3)] == [Status.SUCCEEDED] * 4


def test_the_import_does_not_count_as_the_first_replicates_time(bench: Bench) -> None:
    spec = bench.spec(
        "import time; time.sleep(1.5)\ndef model(params, seed): return {}", replicate_timeout_s=1.0
    )
    assert [o.status for o in bench.run(spec)] == [Status.SUCCEEDED] * 4


def test_an_import_in_a_warm_process_does_not_count_either(bench: Bench) -> None:
    spec = bench.spec("def model(params, seed): return {}", replicate_timeout_s=1.0)
    (bench.bundle / "slow.py").write_text("import time; time.sleep(1.5)\ndef model(params, seed): return {}")
    bench.run(spec)
    assert [o.status for o in bench.run(spec, entry="slow:model")] == [Status.SUCCEEDED] * 4
    assert bench.pool.starts == 1


GREEDY = "hog = [bytearray(os.urandom(1) * (4 << 20)) for _ in range(300)]; print(len(hog))"
GREEDY_CHILD = (
    """subprocess.run([sys.executable, "-c", "x = [b'x' * (4 << 20 | i) for i in range(300)]"], check=True)"""
)


@pytest.mark.parametrize("code", [GREEDY, GREEDY_CHILD], ids=["itself", "its child"])
def test_too_much_memory_is_said_by_the_kernel_with_limit_and_peak(bench: Bench, code: str) -> None:
    if bench.pool._cgroups is None:
        pytest.skip("no memory cgroup can be made on this machine")
    spec = bench.spec(MODEL.format(code), memory_bytes=200 << 20)
    outcomes = bench.run(spec)
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.OUT_OF_MEMORY, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert error.message == "limit 200.0 MiB, peak 200.0 MiB"
    bench.pool.close()
    assert not list(bench.pool._cgroups.path.glob(f"modelops-{os.getpid()}-*"))


@pytest.mark.parametrize("code", [GREEDY, GREEDY_CHILD], ids=["itself", "its child"])
def test_too_much_memory_is_seen_by_the_watch_where_there_is_no_cgroup(tmp_path: Path, code: str) -> None:
    with ProcessPool(tmp_path / "pool", slots=1, cgroups=None) as pool:
        bench = Bench(pool, tmp_path)
        outcomes = bench.run(bench.spec(MODEL.format(code + "; time.sleep(600)"), memory_bytes=200 << 20))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.OUT_OF_MEMORY, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    found = re.fullmatch(r"limit 200.0 MiB, peak (\d+)\.\d MiB", error.message)
    assert found is not None
    assert 200 <= int(found[1]) < 1200


WORKER_IN_A_CONTAINER = """
import os, sys
from pathlib import Path
from tests.process.pool_bench import Bench
from modelops.processes import ProcessPool

Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
with ProcessPool(Path(sys.argv[2], "pool"), slots=1) as pool:
    bench = Bench(pool, Path(sys.argv[2]))
    for outcome in bench.run(bench.spec(sys.argv[3], isolation=sys.argv[4])):
        print(outcome.status, outcome.error.message if outcome.error else "")
"""


@pytest.mark.parametrize("isolation", ["warm", "fork", "spawn"])
def test_too_much_memory_for_the_workers_container_is_said_by_the_kernel_too(
    tmp_path: Path, isolation: str
) -> None:
    """As in a pod, where nobody can make a cgroup, for a study without a limit of memory."""
    home = find_home()
    if home is None:
        pytest.skip("no memory cgroup can be made on this machine")
    container = make_cgroup(home, limit_bytes=300 << 20)
    model = textwrap.dedent(MODEL).format(GREEDY)
    try:
        worker = subprocess.run(
            [sys.executable, "-c", WORKER_IN_A_CONTAINER, container.path, tmp_path, model, isolation],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        assert container.remove(timeout_s=DEADLINE_S)
    said = worker.stdout.splitlines()
    assert [line.split()[0] for line in said] == ["succeeded", "out_of_memory", "succeeded", "succeeded"]
    limit = re.escape("limit 300.0 MiB of all that runs in the worker's container or machine, peak ")
    assert re.fullmatch(f"out_of_memory {limit}[0-9.]+ MiB( of its own)?", said[1])


def test_a_kill_that_was_not_for_memory_is_no_out_of_memory(bench: Bench) -> None:
    spec = bench.spec(MODEL.format("os.kill(os.getpid(), 9)"), memory_bytes=1 << 30)
    assert bench.run(spec)[1].status is Status.CRASHED


PRINTS = [
    "print('x' * 99)",
    "os.write(1, b'x' * 99 + b'\\n')",
    "ctypes.CDLL(None).printf(b'%s\\n', b'x' * 99)",
    "subprocess.run(['echo', 'x' * 99], check=True)",
    "subprocess.run(['echo', 'x' * 99], check=True, stdout=sys.stderr)",
]


@pytest.mark.parametrize("code", PRINTS)
def test_what_is_printed_breaks_nothing_and_is_logged_with_its_replicate(bench: Bench, code: str) -> None:
    imported = f"import ctypes, os, subprocess, sys\n{code}\n"
    (bench.bundle / "talks.py").write_text(imported)
    spec = bench.spec("import talks\n" + textwrap.dedent(MODEL).format(code))
    assert [o.status for o in bench.run(spec)] == [Status.SUCCEEDED] * 4
    line = b"x" * 99 + b"\n"
    assert bench.printed.pop(None) == line
    assert bench.printed == {i: b"replicate %d begins\n" % i + (line if i == 1 else b"") for i in range(4)}


@pytest.mark.parametrize("code", PRINTS[:4])
def test_ten_megabytes_of_output_are_all_in_the_log(bench: Bench, code: str) -> None:
    code = code.replace("* 99", "* 99999")
    spec = bench.spec(MODEL.format(f"for _ in range(100): {code}"))
    assert [o.status for o in bench.run(spec)] == [Status.SUCCEEDED] * 4
    assert bench.printed[1] == b"replicate 1 begins\n" + 100 * (b"x" * 99999 + b"\n")
    assert bench.printed[2] == b"replicate 2 begins\n"


def test_a_gigabyte_on_stderr_stays_bounded_and_keeps_its_tail(bench: Bench) -> None:
    code = """
    import os
    def model(params, seed):
        block = b"y" * 65535 + b"\\n"
        if seed == 1:
            for _ in range(1 << 14): os.write(2, block)
            os.write(2, b"the end\\n")
            raise ValueError("now")
        return {}
    """
    outcomes = bench.run(bench.spec(code))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.FAILED, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert error.stderr.endswith("y\nthe end\n")
    assert len(error.stderr) == 16 * 1024
    assert len(bench.printed[1]) < 17 << 20
    assert b"bytes left out" in bench.printed[1]
    assert bench.printed[1].endswith(b"y\nthe end\n")
    assert sum(file.stat().st_size for file in bench.pool.logs.iterdir()) < 17 << 20


def test_stdin_is_at_its_end(bench: Bench) -> None:
    spec = bench.spec("import sys\ndef model(params, seed): return {'read': sys.stdin.read()}")
    assert [value(o) for o in bench.run(spec)] == [""] * 4


def test_folders_variables_and_directory_are_as_they_were_for_the_next_replicate(bench: Bench) -> None:
    code = """
    import os, tempfile
    def model(params, seed):
        folders = [sorted(os.listdir(".")), os.listdir(os.environ["TMPDIR"])]
        seen = [*folders, os.environ.get("SEEN"), os.getcwd()]
        open("left", "w").close(); tempfile.mkdtemp(); os.environ["SEEN"] = "yes"
        os.chdir("/")
        return {"seen": seen}
    """
    seen = [value(o) for o in bench.run(bench.spec(code))]
    assert seen == [seen[0]] * 4
    assert seen[0][:3] == [["m.py"], [], None]
    assert sorted(file.name for file in bench.bundle.iterdir()) == ["m.py"]


def test_a_stopped_runner_is_noticed_by_its_deadline(bench: Bench) -> None:
    spec = bench.spec(MODEL.format("os.kill(os.getpid(), signal.SIGSTOP)"), replicate_timeout_s=0.5)
    outcomes = bench.run(spec)
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.TIMED_OUT, *[Status.SUCCEEDED] * 2]


def test_a_stopped_runner_is_noticed_without_a_deadline_too(bench: Bench) -> None:
    spec = bench.spec(MODEL.format("os.kill(os.getpid(), signal.SIGSTOP)"), replicate_timeout_s=None)
    outcomes = bench.run(spec)
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.CRASHED, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert "stopped (SIGSTOP)" in error.message


def test_a_stopped_fork_is_noticed_without_a_deadline_too(bench: Bench) -> None:
    code = MODEL.format("os.kill(os.getpid(), signal.SIGSTOP)")
    spec = bench.spec(code, replicate_timeout_s=None, isolation="fork")
    outcomes = bench.run(spec)
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.CRASHED, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert "stopped (SIGSTOP)" in error.message
    assert error.stderr == "replicate 1 begins\n"
    assert bench.pool.starts == 1


def test_a_fork_that_reports_all_the_time_is_timed_out_by_the_runner(bench: Bench) -> None:
    code = """
    def model(params, seed, context):
        while seed == 1: context.report(0.5)
        return {}
    """
    outcomes = bench.run(bench.spec(code, replicate_timeout_s=1.0, isolation="fork"))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.TIMED_OUT, *[Status.SUCCEEDED] * 2]
    assert bench.pool.starts == 1


def test_a_death_is_seen_though_somebody_else_holds_the_pipe_of_the_fork(bench: Bench) -> None:
    """`fork` of the C library runs none of our handlers, which close the pipe in a child of the model."""
    code = MODEL.format("ctypes.PyDLL(None).fork() or time.sleep(1000); os._exit(3)")
    outcomes = bench.run(bench.spec(code, replicate_timeout_s=None, isolation="fork"))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.CRASHED, *[Status.SUCCEEDED] * 2]


def test_a_fork_that_has_finished_and_cannot_end_is_not_the_next_replicates_time(bench: Bench) -> None:
    """A thread that reads a file of C's holds its lock, so what C has not written cannot be flushed at the end."""
    code = MODEL.format("""
            libc, (ours, _) = ctypes.CDLL(None), os.pipe()
            libc.fdopen.restype = ctypes.c_void_p
            file = ctypes.c_void_p(libc.fdopen(ours, b"r"))
            threading.Thread(target=libc.getc, args=[file], daemon=True).start()
            while libc.ftrylockfile(file) == 0: libc.funlockfile(file); time.sleep(0.001)
            """)
    spec = bench.spec(code, replicate_timeout_s=20.0, isolation="fork")
    assert [o.status for o in bench.run(spec)] == [Status.SUCCEEDED] * 4
    assert bench.pool.starts == 1


def test_a_bundle_that_ignores_sigchld_is_forked_all_the_same(bench: Bench) -> None:
    code = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n" + textwrap.dedent(
        MODEL.format("os._exit(3)")
    )
    outcomes = bench.run(bench.spec(code, isolation="fork"))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.CRASHED, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert error.message == "exit code 3"


def test_an_aggregate_of_tables_leaves_a_process_that_can_be_forked(bench: Bench) -> None:
    code = """
    import numpy as np, pandas as pd
    def model(params, seed):
        return {"t": pd.DataFrame({str(i): np.arange(100_000.0) + seed for i in range(8)})}
    def total(replicates):
        return {"sum": sum(float(r["t"].iloc[0].sum()) for r in replicates)}
    """
    spec = bench.spec(code, isolation="fork")
    outcomes = bench.run(spec)
    assert bench.pool.not_forked(spec) is None, "else this test would show nothing"
    rows = [Row(o.index, returned_dict=True, outputs=o.outputs) for o in outcomes]
    total = bench.pool.aggregate(spec, "m:total", params=b"{}", param=0, n=4, rows=iter(rows))
    assert (total.status, total.outputs) == (Status.SUCCEEDED, (("sum", "json", b"48.0"),))
    again = bench.run(spec)
    assert [o.status for o in again] == [Status.SUCCEEDED] * 4
    assert bench.pool.not_forked(spec) is None
    assert bench.pool.starts == 2, "one for the forks, one for aggregates"
    for outcome in (*outcomes, *again):
        for _, _, data in outcome.outputs:
            assert not isinstance(data, bytes)
            Path(data.path).unlink(missing_ok=True)


@pytest.mark.parametrize("isolation", ["warm", "fork"])
def test_many_outputs_of_text_that_fill_more_than_a_frame_come_back(bench: Bench, isolation: str) -> None:
    code = "def model(params, seed): return {f'k{i}': str(i) + chr(0) * 1900 for i in range(6_000)}"
    (outcome,) = bench.run(bench.spec(code, isolation=isolation), n=1)
    assert outcome.status is Status.SUCCEEDED
    assert [name for name, _, _ in outcome.outputs] == [f"k{i}" for i in range(6_000)]
    for i, (_, kind, data) in enumerate(outcome.outputs):
        content = data if isinstance(data, bytes) else Path(data.path).read_bytes()
        assert (kind, msgspec.json.decode(content)) == ("json", str(i) + "\0" * 1900)
        if not isinstance(data, bytes):
            Path(data.path).unlink()


@pytest.mark.parametrize("isolation", ["warm", "fork"])
def test_outputs_that_no_frame_can_name_are_invalid_and_the_process_goes_on(
    bench: Bench, isolation: str
) -> None:
    code = "def model(params, seed): return {('n' * 70_000_000 if seed == 1 else 'x'): 1.5}"
    outcomes = bench.run(bench.spec(code, isolation=isolation))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.INVALID_OUTPUT, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert "return them as one dict, list or array" in error.message
    assert bench.pool.starts == 1


def test_large_outputs_beside_one_that_cannot_cross_are_not_left_on_the_disk(bench: Bench) -> None:
    code = """
    import os
    def model(params, seed):
        folder = params["pool"]
        files = [f for at, _, files in os.walk(folder) for f in files if f.endswith(".out")]
        return {"n": len(files), "large": bytes(1_000_000), **({"bad": {1}} if seed < 3 else {})}
    """
    outcomes = bench.run(bench.spec(code), pool=str(bench.pool.folder))
    assert [o.status for o in outcomes] == [*[Status.INVALID_OUTPUT] * 3, Status.SUCCEEDED]
    assert value(outcomes[3]) == 0
    spooled = outcomes[3].outputs[1][2]
    assert not isinstance(spooled, bytes)
    Path(spooled.path).unlink()


def test_an_import_that_is_not_there_is_one_error_with_its_name(bench: Bench) -> None:
    with pytest.raises(RemoteError, match="No module named 'no_such_thing'") as caught:
        bench.run(bench.spec("import no_such_thing\ndef model(params, seed): pass"))
    assert caught.value.missing_module == "no_such_thing"
    assert (caught.value.file, caught.value.line) == ("m.py", 1)
    assert [o.status for o in bench.run(bench.spec("def model(params, seed): return {}"))] == [
        Status.SUCCEEDED
    ] * 4


def test_an_import_that_fails_later_names_the_module_in_its_failure(bench: Bench) -> None:
    outcomes = bench.run(bench.spec(MODEL.format("import no_such_thing")))
    assert outcomes[1].status is Status.FAILED
    error = outcomes[1].error
    assert error is not None
    assert error.missing_module == "no_such_thing"


@pytest.mark.parametrize(
    ("code", "exit_", "final"),
    [("os._exit(4)", 4, True), ("os.abort()", -signal.SIGABRT, True), ("os.kill(os.getpid(), 9)", -9, False)],
)
def test_deaths_at_import_are_the_chunks_error_which_is_final_if_nobody_killed(
    bench: Bench, code: str, exit_: int, final: bool
) -> None:
    with pytest.raises(ProcessExitedError, match="last words") as caught:
        bench.run(bench.spec(f"import os\nprint('last words', flush=True)\n{code}"))
    assert caught.value.returncode == exit_
    assert isinstance(caught.value, StartFailedError) is final
    assert bench.pool.starts == STARTS
    assert not bench.pool.pids()


def test_an_import_that_needs_more_than_the_limit_is_final_and_says_so(tmp_path: Path) -> None:
    code = "import time\nx = b'x' * (300 << 20)\ntime.sleep(600)\ndef model(params, seed): return {}"
    with ProcessPool(tmp_path / "pool", slots=1, cgroups=None) as pool:
        bench = Bench(pool, tmp_path)
        with pytest.raises(StartFailedError) as caught:
            bench.run(bench.spec(code, memory_bytes=100 << 20))
    assert "out of memory: limit 100.0 MiB" in str(caught.value)
    assert "give its replicates more `memory`" in str(caught.value)


def test_a_process_that_dies_at_import_once_is_replaced_without_a_word(bench: Bench, tmp_path: Path) -> None:
    here = tmp_path / "here"
    code = f"""
        import os
        if not os.path.exists({str(here)!r}):
            open({str(here)!r}, "w").close()
            os._exit(4)

        def model(params, seed): return {{}}
    """
    assert [o.status for o in bench.run(bench.spec(code))] == [Status.SUCCEEDED] * 4
    assert bench.pool.starts == 2


def test_a_process_that_died_while_idle_is_replaced_without_a_word(bench: Bench) -> None:
    spec = bench.spec("def model(params, seed): return {}")
    bench.run(spec)
    (pid,) = bench.pool.pids()
    os.kill(pid, signal.SIGKILL)
    assert [o.status for o in bench.run(spec)] == [Status.SUCCEEDED] * 4
    assert bench.pool.starts == 2


@pytest.mark.parametrize("code", ["return {}", "return ''", "return None", "return []"])
def test_empty_outputs_are_a_success(bench: Bench, code: str) -> None:
    outcomes = bench.run(bench.spec(f"def model(params, seed): {code}"))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED] * 4
    assert [o.returned_dict for o in outcomes] == [code == "return {}"] * 4


@pytest.mark.parametrize(
    ("code", "name"), [("{1, 2}", "set"), ("threading.Lock()", "lock"), ("lambda: 1", "function")]
)
def test_what_cannot_cross_is_invalid_output_with_key_and_type(bench: Bench, code: str, name: str) -> None:
    outcomes = bench.run(bench.spec(MODEL.format(f"return {{'good': 1, 'bad': {code}}}")))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.INVALID_OUTPUT, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert "bad" in error.message
    assert name in error.message


def test_no_secret_of_the_worker_reaches_a_bundle(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("MODELOPS_TOKEN", "hush")
    monkeypatch.setenv("PYTHONPATH", "/hush")
    spec = bench.spec(
        "import os\ndef model(params, seed): return {'env': dict(os.environ)}",
        env=(("MY_OPTION", "7"),),
        threads=3,
    )
    env = value(bench.run(spec, n=1)[0])
    assert "hush" not in repr(env)
    assert env["MY_OPTION"] == "7"
    assert env["OMP_NUM_THREADS"] == env["POLARS_MAX_THREADS"] == "3"


def test_the_order_of_sets_is_the_same_in_every_process(bench: Bench) -> None:
    spec = bench.spec(
        "def model(params, seed): return {'order': list({'a', 'b', 'c', 'd', 'e', 'f'})}", isolation="spawn"
    )
    orders = [value(o) for o in bench.run(spec, n=5)]
    assert orders == [orders[0]] * 5


def test_large_outputs_arrive_as_files_that_outlive_the_process(bench: Bench) -> None:
    spec = bench.spec("def model(params, seed): return {'big': bytes([seed]) * 200_000_000}")
    outcomes = bench.run(spec, n=2)
    bench.pool.close()
    for outcome in outcomes:
        data = outcome.outputs[0][2]
        assert not isinstance(data, bytes)
        path = Path(data.path)
        assert path.stat().st_size == data.bytes == 200_000_000
        assert path.read_bytes()[:1] == bytes([outcome.index])
    shutil.rmtree(bench.pool.folder)


def test_files_of_a_replicate_that_did_not_finish_are_removed(bench: Bench) -> None:
    code = (
        "open(os.path.join(os.path.dirname(os.environ['TMPDIR']), 'spool', 'half'), 'w').close(); os._exit(1)"
    )
    assert bench.run(bench.spec(MODEL.format(code)))[1].status is Status.CRASHED
    assert not list(bench.pool.folder.glob("*/spool/half"))


@pytest.mark.parametrize("isolation", ["fork", "warm"])
def test_large_outputs_of_a_replicate_that_dies_while_it_hands_them_over_are_removed(
    bench: Bench, isolation: str
) -> None:
    code = """
    import os
    class Dies(dict):
        def items(self):
            yield "first", bytes(1_000_000)
            yield "second", bytes(2_000_000)
            os._exit(3)
    def model(params, seed): return Dies() if seed == 1 else {"only": bytes(100_000 + seed)}
    """
    outcomes = bench.run(bench.spec(code, isolation=isolation))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.CRASHED, *[Status.SUCCEEDED] * 2]
    sizes = [path.stat().st_size for path in bench.pool.folder.glob("*/spool/*")]
    assert sorted(sizes) == [100_000, 100_002, 100_003]
    bench.pool.close()
    shutil.rmtree(bench.pool.folder)


def test_a_hard_stop_gives_back_the_running_replicate_and_the_rest(bench: Bench, tmp_path: Path) -> None:
    started = tmp_path / "started"
    spec = bench.spec(MODEL.format("open(params['started'], 'w').close(); threading.Event().wait()"))
    stop = StopSignal()

    def stop_when_started() -> None:
        wait_for(started.exists, "the replicate runs")
        stop.stop(hard=True)

    thread = threading.Thread(target=stop_when_started)
    thread.start()
    outcomes = bench.run(spec, stop=stop, started=str(started))
    thread.join()
    assert [o.index for o in outcomes] == [0]
    assert not bench.pool.pids()


def test_a_soft_stop_lets_the_running_replicate_finish_and_keeps_the_process(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    wait = "[time.sleep(0.01) for _ in iter(lambda: os.path.exists(params['go']), True)]"
    spec = bench.spec(MODEL.format("open(params['started'], 'w').close(); " + wait))
    stop = StopSignal(grace_s=DEADLINE_S)

    def stop_when_started() -> None:
        wait_for(started.exists, "the replicate runs")
        stop.stop()

    notify = RunnerProcess.notify

    def notify_and_go(process: RunnerProcess, note: Cancel) -> None:
        notify(process, note)
        go.touch()

    monkeypatch.setattr(RunnerProcess, "notify", notify_and_go)
    thread = threading.Thread(target=stop_when_started)
    thread.start()
    outcomes = bench.run(spec, stop=stop, started=str(started), go=str(go))
    thread.join()
    assert len(outcomes) == 2
    assert len(bench.pool.pids()) == 1


def test_a_soft_stop_kills_after_its_grace(bench: Bench, tmp_path: Path) -> None:
    started = tmp_path / "started"
    spec = bench.spec(MODEL.format("open(params['started'], 'w').close(); threading.Event().wait()"))
    stop = StopSignal(grace_s=0.2)

    def stop_when_started() -> None:
        wait_for(started.exists, "the replicate runs")
        stop.stop()

    thread = threading.Thread(target=stop_when_started)
    thread.start()
    outcomes = bench.run(spec, stop=stop, started=str(started))
    thread.join()
    assert [o.index for o in outcomes] == [0]


TAMPERING = {  # what one replicate does to the process; it succeeds, and so do those after it
    "closes sys.stdout": "sys.stdout.close(); sys.stderr.close()",
    "detaches sys.stdout": "sys.stdout.detach()",
    "closes 0, 1 and 2": "os.close(0); os.close(1); os.close(2)",
    "makes stderr non-blocking": "os.set_blocking(2, False); fill()",
    "leaves an alarm": "signal.setitimer(signal.ITIMER_REAL, 0.5)",
    "leaves a handler": "signal.signal(signal.SIGALRM, lambda *_: 1 / 0); signal.setitimer(0, 0.5)",
    "forgets where modules are": "sys.path.clear(); os.mkdir('left')",
}


@pytest.mark.parametrize("code", TAMPERING.values(), ids=TAMPERING)
def test_what_a_replicate_does_to_its_process_is_not_the_next_ones_failure(bench: Bench, code: str) -> None:
    model = (
        textwrap.dedent(MODEL)
        .format(code)
        .replace("    return", "    if seed > 1: time.sleep(0.3)\n    return")
    )
    fill = """
def fill():
    try:
        while True: os.write(2, b"x" * 4095 + b"\\n")
    except BlockingIOError: pass
"""
    outcomes = bench.run(bench.spec(model + fill))
    assert [(o.status, o.error) for o in outcomes] == [(Status.SUCCEEDED, None)] * 4
    assert [value(o) for o in outcomes] == list(range(4))
    assert bench.printed[2] == b"replicate 2 begins\n"


def test_an_error_that_cannot_be_put_into_words_is_still_that_error(bench: Bench) -> None:
    code = """
    class Odd(Exception):
        def __str__(self): raise SystemExit(7)
    Odd.__qualname__ = "O" * 100_000
    def model(params, seed):
        if seed == 1: raise Odd
        return {}
    """
    outcomes = bench.run(bench.spec(code))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.FAILED, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert error.type.startswith("m.OOO")
    assert len(error.type) < 1_000
    assert error.message == "<str() of the exception raised SystemExit>"
    assert error.line == 6


@pytest.mark.parametrize("error_type", ["ValueError", "OSError"])
def test_code_of_a_value_that_raises_while_it_is_taken_is_a_failure_in_the_bundle(
    bench: Bench, error_type: str
) -> None:
    code = f"""
    class Lazy(dict):
        def items(self): raise {error_type}("not now")
    def model(params, seed): return Lazy() if seed == 1 else {{}}
    """
    outcomes = bench.run(bench.spec(code))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED, Status.FAILED, *[Status.SUCCEEDED] * 2]
    error = outcomes[1].error
    assert error is not None
    assert (error.type, error.message, error.file, error.line) == (error_type, "not now", "m.py", 3)


@pytest.mark.parametrize("isolation", ["warm", "fork"])
def test_a_spool_that_cannot_be_written_is_named_and_is_no_fault_of_a_replicate(
    tmp_path: Path, isolation: str
) -> None:
    if not can_mount(tmp_path):
        pytest.skip("nothing can be mounted here")
    code = """
    def model(params, seed): return {"x": bytes(1_000_000)}
    """
    with Volume(tmp_path / "small", "800k") as volume, ProcessPool(volume.path / "pool", slots=1) as pool:
        bench = Bench(pool, tmp_path)
        with pytest.raises(StorageError, match=r"could not be written to .*/spool: No space left .*; free"):
            bench.run(bench.spec(code, isolation=isolation))


@pytest.mark.parametrize(
    ("limit", "to", "said"),
    [("FSIZE", "200_000", "File too large"), ("NOFILE", "0", "Too many open files")],
)
@pytest.mark.parametrize("isolation", ["warm", "fork", "spawn"])
def test_a_limit_that_a_model_sets_costs_its_own_large_output_and_no_waiting_for_space(
    bench: Bench, isolation: str, limit: str, to: str, said: str
) -> None:
    code = f"""
    import hashlib, resource
    def model(params, seed):
        if seed == 3:
            _, highest = resource.getrlimit(resource.RLIMIT_{limit})
            resource.setrlimit(resource.RLIMIT_{limit}, ({to}, highest))
        return {{"x": bytes(1_000_000) if seed == 3 else b""}}
    """
    outcomes = bench.run(bench.spec(code, isolation=isolation))
    assert [o.status for o in outcomes] == [*[Status.SUCCEEDED] * 3, Status.INVALID_OUTPUT]
    error = outcomes[3].error
    assert error is not None
    assert error.message.startswith(f"x: it could not be written to a file: {said}; a limit of the process")


@pytest.mark.parametrize("isolation", ["warm", "fork", "spawn"])
def test_a_model_that_removes_the_folder_above_its_own_still_hands_over_a_large_output(
    bench: Bench, isolation: str
) -> None:
    code = """
    import os, shutil
    def model(params, seed):
        if seed == 3:
            shutil.rmtree(os.path.dirname(os.getcwd()), ignore_errors=True)
        return {"x": bytes(1_000_000) if seed == 3 else b""}
    """
    outcomes = bench.run(bench.spec(code, isolation=isolation))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED] * 4
    data = outcomes[3].outputs[0][2]
    assert isinstance(data, SpooledFile)
    assert Path(data.path).stat().st_size == data.bytes >= 1_000_000
    Path(data.path).unlink()


def test_of_processes_that_have_ended_nothing_is_left_once_their_outputs_were_fetched(bench: Bench) -> None:
    spec = bench.spec("""
        def model(params, seed):
            return {"x": bytes(1_000_000)}
        """, isolation="spawn")  # fmt: skip
    for _ in range(2):
        outcomes = bench.run(spec)
        large = [data for o in outcomes for _, _, data in o.outputs if isinstance(data, SpooledFile)]
        files = [Path(data.path) for data in large]
        assert len(files) == len(outcomes)
        folders = {file.parent.parent.name for file in files}
        there = {path.name for path in bench.pool.folder.glob("p*")}
        assert folders <= there
        assert len(there) <= len(folders) + 1, (
            "those of the run before are gone, but for a process that waits"
        )
        for file in files:
            file.unlink()


def test_memory_that_a_child_took_is_said_of_the_aggregate_and_of_no_later_one(bench: Bench) -> None:
    if bench.pool._cgroups is None:
        pytest.skip("no memory cgroup can be made on this machine")
    code = """
    import subprocess, sys
    GREEDY = [sys.executable, "-c", "x = [b'x' * (4 << 20 | i) for i in range(300)]"]
    def model(params, seed):
        subprocess.run(GREEDY, check=bool(seed))
    def total(replicates):
        subprocess.run(GREEDY, check=True)
    def other(replicates):
        raise ValueError("mine")
    """
    spec = bench.spec(code, memory_bytes=200 << 20)

    def aggregate(entry: str) -> AggregateOutcome:
        return bench.pool.aggregate(spec, entry, params=b"{}", param=0, n=0, rows=iter(()))

    assert [o.status for o in bench.run(spec, n=1)] == [Status.SUCCEEDED]
    outcomes = [aggregate(entry) for entry in ("m:other", "m:total", "m:other")]
    assert [o.status for o in outcomes] == [Status.FAILED, Status.OUT_OF_MEMORY, Status.FAILED]
    errors = [o.error for o in outcomes if o.error is not None]
    assert [e.message for e in errors] == ["mine", "limit 200.0 MiB, peak 200.0 MiB", "mine"]
    assert "CalledProcessError" in errors[1].traceback
    assert bench.pool.starts == 1
