"""A pool keeps processes warm, lends each to one thread, feeds aggregates, and leaves nothing behind."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.process.pool_bench import spec_of

from modelops.errors import HandshakeError, ProcessError, ProcessExitedError, ProcessTimeoutError, RemoteError
from modelops.processes import (
    AggregateSet,
    AggregateTable,
    FileSlice,
    FloatOutcomes,
    Outcome,
    ProcessPool,
    ReplicateSet,
    Row,
    RunnerSpec,
    StopSignal,
)
from modelops.processes.aggregate import SPILL_BYTES
from modelops.processes.process import RunnerProcess
from modelops.states import ReplicateStatus as Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
DEADLINE_S = 60.0
CODE = """
    import os, threading, time
    def mixed(params, seed):
        if seed % 10 == 0: return {"n": seed}
        return {"x": seed / 3, "y": -0.0} if seed % 2 else {"\u00e9": seed / 3}
    def pid(params, seed): return {"pid": os.getpid()}
    def compiles(params, seed):
        folder = os.path.join(os.environ["NUMBA_CACHE_DIR"], "m")
        os.makedirs(folder, exist_ok=True)
        found = sorted(os.listdir(folder))
        open(os.path.join(folder, params["name"]), "w").close()
        if params.get("die"): os._exit(3)
        return {"found": found}
    def meet(params, seed):
        open(f"{params['dir']}/{os.getpid()}", "w").close()
        while len(os.listdir(params["dir"])) < 2: time.sleep(0.01)
        return {}
    def hang(params, seed):
        open(params["started"], "w").close()
        threading.Event().wait()
    def add(a, b): return {"sum": a + b, "tuple": (a, b)}
    def fails(): raise KeyError("no")
    def listed(replicates, params):
        return {"n": len(replicates), "ids": [r["id"] for r in replicates], "k": params["k"],
                "bytes": sum(len(r["data"]) for r in replicates)}
    def brief(params, seed):
        threading.Event().wait(0.001)
    class Counted:
        def start(self, params): return {"n": 0, "bytes": 0}
        def add(self, state, r): state["n"] += 1; state["bytes"] += len(r["data"])
        def finish(self, state): return state
    counted = Counted()
    def parent(params, seed): return {"pid": os.getppid()}
    def own_pid(replicates): return os.getpid()
    def seen(replicates, params):
        return {"k": params["k"], "ids": [r["id"] for r in replicates], "y": [r["y"] for r in replicates]}
    class Seen:
        def start(self, params): return {"k": params["k"], "ids": [], "y": []}
        def add(self, state, r): state["ids"].append(r["id"]); state["y"].append(r["y"])
        def finish(self, state): return state
    def up_to_five(replicates, params):
        if params["k"] < 5: return params["k"]
        if params["how"] == "raises": raise ValueError
        if params["how"] == "dies": os._exit(3)
        return {"odd": {1}}
    class Text(str): pass
    def various(replicates, params):
        k = params["k"]
        plain = {"a": k / 3, "b": k, "c": k % 2 == 0, "d": None}
        return (
            [plain] * 5 + [{**plain, "a": float("inf")}, {**plain, "b": 2**70}, {**plain, "b": "t"}, {"b": k}, {}, k]
            + [{"b": k, "a": 1.5}, {"a": k, "b": 1.5}, {Text("a"): k, "b": 2.5}, {"b": Text("t")}, {"c": [k]}]
        )[(k * 7 + k // 40) % 16 if k < 300 else k % 2]
    class Unfinished:
        def start(self, params): return 0
        def add(self, state, r): return state + 1
    def memory(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
    class Peaks:
        def start(self, params): return {"before": memory(), "bytes": 0}
        def add(self, state, r): return {**state, "bytes": state["bytes"] + len(r["data"])}
        def finish(self, state): return {**state, "grew": memory() - state["before"]}
    class Counts:
        def start(self, params): return 0
        def add(self, state, r): return state + 1
        def finish(self, state): return state
    class Breaks(Counts):
        def add(self, state, r):
            if state == 2: raise ValueError("the third")
            return state + 1
    class Dies(Counts):
        def add(self, state, r): return state + 1 if state < 2 else os._exit(9)
    def raises(replicates): raise ZeroDivisionError("here")
    def dies(replicates): print("last words", flush=True); os._exit(9)
    def slow(replicates): threading.Event().wait()
    def odd(replicates): return {"bad": {1}}
    def huge(replicates): return len([bytearray(os.urandom(1) * (4 << 20)) for _ in range(300)])
"""


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


@pytest.fixture
def spec(tmp_path: Path) -> RunnerSpec:
    return spec_of(tmp_path / "bundle", CODE)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ProcessPool]:
    with ProcessPool(tmp_path / "pool", slots=2) as pool:
        yield pool


def run(pool: ProcessPool, spec: RunnerSpec, entry: str, n: int = 2, **params: Any) -> list[Any]:
    outcomes: list[Outcome] = []
    one = ReplicateSet(
        params=msgspec.Raw(msgspec.json.encode(params)),
        param=0,
        index=0,
        replicate=0,
        seeds=tuple(range(n)),
        entropy_key="00" * 16,
    )
    pool.run(spec, entry, [one], on_outcome=outcomes.append)
    values = []
    for outcome in outcomes:
        assert outcome.status is Status.SUCCEEDED, outcome.error
        values.append({name: msgspec.json.decode(data) for name, _, data in outcome.outputs})  # type: ignore[arg-type]
    return values


# --- warm processes


def test_a_second_chunk_finds_the_process_of_the_first(pool: ProcessPool, spec: RunnerSpec) -> None:
    pids = {value["pid"] for _ in range(3) for value in run(pool, spec, "m:pid")}
    assert len(pids) == pool.starts == 1


def test_replicates_of_a_chunk_are_told_in_order_of_time_though_they_are_read_in_batches(
    pool: ProcessPool, spec: RunnerSpec
) -> None:
    one = ReplicateSet(
        params=msgspec.Raw(b"{}"), param=0, index=0, replicate=0, seeds=tuple(range(300)), entropy_key=""
    )
    outcomes: list[Outcome] = []
    pool.run(spec, "m:brief", [one], on_outcome=outcomes.append)
    spans = [(o.started_at, o.started_at + o.seconds) for o in outcomes]
    times = [t for span in spans for t in span]
    assert times == pytest.approx(sorted(times), abs=1e-5)


def test_what_a_runner_compiles_is_kept_for_the_next_one_and_out_of_the_snapshot(
    pool: ProcessPool, spec: RunnerSpec, tmp_path: Path
) -> None:
    spec = replace(spec, isolation="spawn", pycache=str(tmp_path / "pycache"))
    run(pool, spec, "m:pid")
    compiled = {path: path.stat().st_mtime_ns for path in (tmp_path / "pycache").rglob("*.pyc")}
    names = {path.name.partition(".")[0] for path in compiled}
    assert {"serve", "replicates", "values", "m"} <= names
    assert not list(Path(spec.snapshot).rglob("*.pyc"))
    run(pool, spec, "m:pid")
    assert {path: path.stat().st_mtime_ns for path in compiled} == compiled


def test_what_a_library_compiles_is_found_by_later_processes_but_not_what_a_dying_one_wrote(
    pool: ProcessPool, spec: RunnerSpec, tmp_path: Path
) -> None:
    spec = replace(spec, isolation="spawn", pycache=str(tmp_path / "pycache"))
    compile_ = "m:compiles"
    assert run(pool, spec, compile_, name="f.nbi")[0] == {"found": []}
    assert run(pool, spec, compile_, name="g.nbi")[0] == {"found": ["f.nbi"]}
    one = ReplicateSet(
        params=msgspec.Raw(b'{"name": "h.nbi", "die": true}'),
        param=0,
        index=0,
        replicate=0,
        seeds=(1,),
        entropy_key="",
    )
    outcomes: list[Outcome] = []
    pool.run(spec, compile_, [one], on_outcome=outcomes.append)
    assert outcomes[0].status is Status.CRASHED
    warm = replace(spec, isolation="warm")
    assert run(pool, warm, compile_, name="i.nbi")[0] == {"found": ["f.nbi", "g.nbi"]}
    pool.close()
    with ProcessPool(tmp_path / "other", slots=1) as other:
        assert run(other, spec, compile_, name="j.nbi")[0] == {"found": ["f.nbi", "g.nbi", "i.nbi"]}


@pytest.mark.parametrize("left", ["cut", "zeros"])
def test_what_was_compiled_and_is_damaged_since_is_compiled_anew_and_is_no_fault_of_the_bundle(
    pool: ProcessPool, spec: RunnerSpec, tmp_path: Path, left: str
) -> None:
    spec = replace(spec, isolation="spawn", pycache=str(tmp_path / "pycache"))
    run(pool, spec, "m:pid")
    whole = {path: path.read_bytes() for path in (tmp_path / "pycache").rglob("*.pyc")}
    assert {"serve", "m", "enum"} <= {path.name.partition(".")[0] for path in whole}
    for path, data in whole.items():
        half = len(data) // 2
        path.write_bytes(data[:half] + (bytes(len(data) - half) if left == "zeros" else b""))
    for _ in range(2):  # the first one that finds it removes it, the next one keeps it again
        assert len(run(pool, spec, "m:pid")) == 2
    assert {path: path.read_bytes() for path in whole} == whole


def test_processes_of_other_specs_are_not_shared_and_the_least_recently_used_goes_first(
    pool: ProcessPool, spec: RunnerSpec
) -> None:
    specs = [replace(spec, environment_key=key) for key in "abc"]
    first, second = (run(pool, one, "m:pid")[0]["pid"] for one in specs[:2])
    assert run(pool, specs[0], "m:pid")[0]["pid"] == first
    third = run(pool, specs[2], "m:pid")[0]["pid"]
    assert set(pool.pids()) == {first, third}
    assert not alive(second)


def test_two_threads_run_at_once_in_two_processes(
    pool: ProcessPool, spec: RunnerSpec, tmp_path: Path
) -> None:
    (tmp_path / "met").mkdir()
    threads = [
        threading.Thread(target=run, args=(pool, spec, "m:meet", 1), kwargs={"dir": str(tmp_path / "met")})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert len(pool.pids()) == 2


def test_idle_processes_are_ended(tmp_path: Path, spec: RunnerSpec) -> None:
    with ProcessPool(tmp_path / "pool", slots=2, idle_s=0.0) as pool:
        (pid,) = {value["pid"] for value in run(pool, spec, "m:pid")}
        pool.trim()
        assert not pool.pids()
        assert not alive(pid)


def test_many_parameter_sets_travel_in_several_requests(pool: ProcessPool, spec: RunnerSpec) -> None:
    sets = [
        ReplicateSet(
            params=msgspec.Raw(msgspec.json.encode({"text": "x" * 3_000_000})),
            param=i,
            index=2 * i,
            replicate=0,
            seeds=(1, 2),
            entropy_key="00" * 16,
        )
        for i in range(7)
    ]
    outcomes: list[Outcome] = []
    end = pool.run(spec, "m:pid", sets, on_outcome=outcomes.append)
    assert [o.index for o in outcomes] == list(range(14))
    assert not end.stopped


# --- handshake


def test_a_python_of_another_prefix_or_version_is_refused(
    pool: ProcessPool, spec: RunnerSpec, tmp_path: Path
) -> None:
    (tmp_path / "environment").mkdir()
    with pytest.raises(HandshakeError, match="not in the environment"):
        run(pool, replace(spec, environment_dir=str(tmp_path / "environment")), "m:pid")
    with pytest.raises(HandshakeError, match=r"made for 3\.1\.4"):
        run(pool, replace(spec, python_version="3.1.4"), "m:pid")
    assert not pool.pids()
    version = ".".join(map(str, sys.version_info[:3]))
    assert run(pool, replace(spec, environment_dir=sys.prefix, python_version=version), "m:pid")


def test_a_program_that_is_no_runner_is_a_process_that_exited(
    pool: ProcessPool, spec: RunnerSpec, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho this is no python >&2\nexit 7\n")
    program.chmod(0o755)
    with pytest.raises(ProcessExitedError, match=r"exit code 7\nthis is no python"):
        run(pool, replace(spec, python=str(program)), "m:pid")


def test_a_program_that_is_not_there_is_named(pool: ProcessPool, spec: RunnerSpec) -> None:
    with pytest.raises(ProcessError, match="/no/python"):
        run(pool, replace(spec, python="/no/python"), "m:pid")
    assert run(pool, spec, "m:pid")


def test_an_import_that_never_ends_is_given_up(tmp_path: Path, spec: RunnerSpec) -> None:
    Path(spec.snapshot, "stuck.py").write_text(
        "import threading\nprint('stuck', flush=True)\nthreading.Event().wait()"
    )
    with ProcessPool(tmp_path / "pool", slots=1, start_timeout_s=2.0) as pool:
        with pytest.raises(ProcessTimeoutError, match="within 2 s"):
            run(pool, spec, "stuck:model")
        assert not pool.pids()


def test_an_environment_is_locked_while_a_process_uses_it(pool: ProcessPool, spec: RunnerSpec) -> None:
    lock = Path(sys.prefix, ".in-use")
    run(pool, replace(spec, environment_dir=sys.prefix), "m:pid")
    with lock.open("r+") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pool.close()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- aggregates and calls


def rows(n: int, data: bytes) -> Iterator[Row]:
    for i in range(n):
        yield Row(3 * i, returned_dict=True, outputs=[("id", "json", b"%d" % i), ("data", "bytes", data)])


def aggregate(pool: ProcessPool, spec: RunnerSpec, entry: str, source: Iterator[Row], n: int) -> Any:
    return pool.aggregate(spec, entry, params=b'{"k":4}', param=0, n=n, rows=source)


@pytest.mark.parametrize(("n", "size"), [(0, 0), (5, 10), (300, 70_000), (3, 3_000_000)])
def test_an_aggregate_sees_all_rows_in_order(pool: ProcessPool, spec: RunnerSpec, n: int, size: int) -> None:
    outcome = aggregate(pool, spec, "m:listed", rows(n, b"x" * size), n)
    assert outcome.status is Status.SUCCEEDED, outcome.error
    got = {name: msgspec.json.decode(data) for name, _, data in outcome.outputs}
    assert got == {"n": n, "ids": list(range(n)), "k": 4, "bytes": n * size}
    again = aggregate(pool, spec, "m:counted", rows(n, b"x" * size), n)
    assert [data for _, _, data in again.outputs] == [b"%d" % n, b"%d" % (n * size)]
    assert pool.starts == 1


@pytest.mark.parametrize("local", [True, False], ids=["of a local pack", "read from elsewhere"])
def test_an_incremental_aggregate_of_large_outputs_holds_no_more_than_a_few_of_them(
    pool: ProcessPool, spec: RunnerSpec, tmp_path: Path, local: bool
) -> None:
    n, size, on_disk = 60, 5_000_000, [0]
    path = tmp_path / "pack"
    path.write_bytes(bytes(size))

    def source() -> Iterator[Row]:
        for i in range(n):
            on_disk.append(sum(file.stat().st_size for file in (tmp_path / "pool").glob("*/*/rows/*")))
            data = FileSlice(str(path), 0, size) if local else path.read_bytes()
            yield Row(i, returned_dict=True, outputs=[("data", "bytes", data)])

    tracemalloc.start()
    try:
        outcome = aggregate(pool, spec, "m:Peaks", source(), n)
        peak_here = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert outcome.status is Status.SUCCEEDED, outcome.error
    assert outcome.incremental
    got = {name: msgspec.json.decode(data) for name, _, data in outcome.outputs}
    assert got["bytes"] == n * size
    assert got["grew"] < 10 * size
    assert peak_here < 10 * size
    assert max(on_disk) < 3 * SPILL_BYTES
    assert (max(on_disk) > 0) != local


def test_an_aggregate_that_fails_at_large_outputs_says_so_and_nothing_of_them_is_left(
    pool: ProcessPool, spec: RunnerSpec, tmp_path: Path
) -> None:
    n_read = []

    def source() -> Iterator[Row]:
        for row in rows(20, bytes(SPILL_BYTES // 2)):
            n_read.append(1)
            yield row

    for entry, status, said in (
        ("m:Breaks", Status.FAILED, "the third"),
        ("m:Dies", Status.CRASHED, "exit code 9"),
        ("m:Counts", Status.SUCCEEDED, ""),
    ):
        n_read.clear()
        outcome = aggregate(pool, spec, entry, source(), 20)
        assert (outcome.status, outcome.error.message if outcome.error else "") == (status, said)
        assert (len(n_read) < 10) != (status is Status.SUCCEEDED)
        assert not list((tmp_path / "pool").glob("*/*/rows"))


def test_an_aggregate_that_looks_incremental_and_is_not_is_told_what_it_lacks(
    pool: ProcessPool, spec: RunnerSpec
) -> None:
    outcome = aggregate(pool, spec, "m:Unfinished", rows(2, b"x"), 2)
    assert outcome.status is Status.FAILED
    assert outcome.error is not None
    assert "Unfinished has no finish" in outcome.error.message


def test_an_aggregate_reads_values_from_a_pack(pool: ProcessPool, spec: RunnerSpec, tmp_path: Path) -> None:
    (tmp_path / "pack").write_bytes(b"abcdefgh" * 1000)
    place = FileSlice(str(tmp_path / "pack"), 8, 80)
    row = Row(0, returned_dict=True, outputs=[("id", "json", b"1"), ("data", "bytes", place)])
    outcome = aggregate(pool, spec, "m:listed", iter([row]), 1)
    assert ("bytes", "json", b"80") in outcome.outputs


@pytest.mark.parametrize(
    ("entry", "status", "message"),
    [
        ("m:raises", Status.FAILED, "here"),
        ("m:dies", Status.CRASHED, "exit code 9"),
        ("m:odd", Status.INVALID_OUTPUT, "set"),
        ("m:slow", Status.TIMED_OUT, "1 s"),
        ("m:missing", Status.FAILED, "missing"),
        ("m:huge", Status.OUT_OF_MEMORY, "limit 200.0 MiB"),
    ],
)
def test_what_goes_wrong_in_an_aggregate_is_its_outcome_and_the_next_one_works(
    pool: ProcessPool, spec: RunnerSpec, entry: str, status: Status, message: str
) -> None:
    limited = replace(spec, memory_bytes=200 << 20)
    aggregate(pool, limited, "m:counted", rows(2, b"x"), 2)
    timed = replace(limited, replicate_timeout_s=1.0) if entry == "m:slow" else limited
    outcome = aggregate(pool, timed, entry, rows(2, b"x"), 2)
    assert outcome.status is status
    assert outcome.error is not None
    assert message in outcome.error.message
    if entry == "m:dies":
        assert "last words" in outcome.error.stderr
    assert aggregate(pool, limited, "m:counted", rows(2, b"x"), 2).status is Status.SUCCEEDED


def test_a_row_source_that_fails_is_the_callers_error(pool: ProcessPool, spec: RunnerSpec) -> None:
    def broken() -> Iterator[Row]:
        yield from rows(1, b"x")
        raise OSError("the segment is gone")

    with pytest.raises(OSError, match="segment is gone"):
        aggregate(pool, spec, "m:listed", broken(), 2)
    assert aggregate(pool, spec, "m:listed", rows(1, b"x"), 1).status is Status.SUCCEEDED


def test_a_function_is_called_with_values_and_returns_one(pool: ProcessPool, spec: RunnerSpec) -> None:
    assert pool.call(spec, "m:add", (2, 3)) == {"sum": 5, "tuple": (2, 3)}
    assert pool.call(spec, "m:add", (b"x" * 99_999, b"y"))["sum"] == b"x" * 99_999 + b"y"
    with pytest.raises(RemoteError, match="KeyError: 'no'"):
        pool.call(spec, "m:fails")
    assert pool.starts == 1


# --- the end


def test_closing_ends_a_run_in_another_thread(tmp_path: Path, spec: RunnerSpec) -> None:
    pool = ProcessPool(tmp_path / "pool", slots=1)
    ends: list[tuple[int, ...]] = []

    def run_until_closed() -> None:
        one = ReplicateSet(
            params=msgspec.Raw(msgspec.json.encode({"started": str(tmp_path / "started")})),
            param=0,
            index=0,
            replicate=0,
            seeds=(1, 2),
            entropy_key="00" * 16,
        )
        ends.append(pool.run(spec, "m:hang", [one], on_outcome=lambda _: None).unstarted)

    thread = threading.Thread(target=run_until_closed)
    thread.start()
    wait_for((tmp_path / "started").exists, "the replicate runs")
    pids = pool.pids()
    pool.close()
    thread.join(DEADLINE_S)
    assert ends == [(0, 1)]
    assert not list((tmp_path / "pool").iterdir())
    assert not any(map(alive, pids))
    with pytest.raises(ProcessError, match="closed"):
        run(pool, spec, "m:pid")


def test_a_stop_before_the_start_starts_nothing(pool: ProcessPool, spec: RunnerSpec) -> None:
    stop = StopSignal()
    stop.stop()
    one = ReplicateSet(
        params=msgspec.Raw(b"{}"), param=0, index=5, replicate=0, seeds=(1, 2), entropy_key="00" * 16
    )
    assert pool.run(spec, "m:pid", [one], on_outcome=lambda _: None, stop=stop).unstarted == (5, 6)
    assert pool.starts == 0


@pytest.mark.parametrize("isolation", ["warm", "fork", "spawn"])
def test_who_is_asked_to_give_back_lets_one_replicate_end_and_begins_no_other(
    isolation: str, pool: ProcessPool, spec: RunnerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()
    notify = RunnerProcess.notify

    def telling(self: RunnerProcess, message: Any) -> None:
        notify(self, message)
        told.set()

    monkeypatch.setattr(RunnerProcess, "notify", telling)
    (Path(spec.snapshot) / "w.py").write_text(
        "import os, time\n"
        "def wait(params, seed):\n"
        "    open(f\"{params['dir']}/{seed}\", 'w').close()\n"
        "    while not os.path.exists(params['dir'] + '/go'): time.sleep(0.01)\n"
        "    return {}\n"
    )
    folder = tmp_path / "ran"
    folder.mkdir()
    one = ReplicateSet(
        params=msgspec.Raw(msgspec.json.encode({"dir": str(folder)})),
        param=0,
        index=0,
        replicate=0,
        seeds=(0, 1, 2),
        entropy_key="00" * 16,
    )
    stop, outcomes, ends = StopSignal(), list[Outcome](), list[Any]()
    stop.give_back()  # before anything has begun: one replicate is run all the same
    thread = threading.Thread(
        target=lambda: ends.append(
            pool.run(
                replace(spec, isolation=isolation), "w:wait", [one], on_outcome=outcomes.append, stop=stop
            )
        )
    )
    thread.start()
    wait_for((folder / "0").exists, "the first runs")
    assert told.wait(DEADLINE_S), "the runner was not told"
    (folder / "go").touch()
    thread.join(DEADLINE_S)
    assert [(x.index, x.status) for x in outcomes] == [(0, Status.SUCCEEDED)]
    assert ends[0].unstarted == (1, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["0", "go"]


def test_what_on_outcome_raises_reaches_the_caller_and_leaves_no_process(
    pool: ProcessPool, spec: RunnerSpec
) -> None:
    def full(_: Outcome) -> None:
        raise OSError("the disk is full")

    one = ReplicateSet(
        params=msgspec.Raw(b"{}"), param=0, index=0, replicate=0, seeds=(1,), entropy_key="00" * 16
    )
    with pytest.raises(OSError, match="disk is full"):
        pool.run(spec, "m:pid", [one], on_outcome=full)
    assert not pool.pids()


def test_when_the_reaper_is_killed_the_next_chunk_starts_anew(pool: ProcessPool, spec: RunnerSpec) -> None:
    run(pool, spec, "m:pid")
    (pid,) = pool.pids()
    os.kill(pool._reaper.pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid) and not pool._reaper.alive, "the runner went with it")
    assert run(pool, spec, "m:pid")


WORKER = """
import sys, threading
from pathlib import Path
import msgspec
from modelops.processes import ProcessPool, ReplicateSet, RunnerSpec
spec = msgspec.json.decode(sys.argv[1], type=RunnerSpec)
pool = ProcessPool(Path(sys.argv[2]), slots=1)
params = msgspec.Raw(msgspec.json.encode({"started": sys.argv[3]}))
one = ReplicateSet(params=params, param=0, index=0, replicate=0, seeds=(1,), entropy_key="00" * 16)
pool.run(spec, "family:hang", [one], on_outcome=print)
"""
FAMILY = """
import os, threading, time
def hang(params, seed):
    pids = [os.getpid()]
    for kind in ("child", "own_session", "daemon"):
        read, write = os.pipe()
        if os.fork() == 0:
            if kind != "child": os.setsid()
            if kind == "daemon" and os.fork(): os._exit(0)
            os.write(write, b"%d" % os.getpid())
            while True: time.sleep(600)
        pids.append(int(os.read(read, 99)))
    with open(params["started"] + ".part", "w") as f: f.write(" ".join(map(str, pids)))
    os.rename(params["started"] + ".part", params["started"])
    threading.Event().wait()
"""


def test_nothing_is_left_of_a_worker_that_is_killed_and_its_folder_is_cleaned_up(
    spec: RunnerSpec, tmp_path: Path
) -> None:
    Path(spec.snapshot, "family.py").write_text(FAMILY)
    limited = replace(spec, memory_bytes=1 << 30)
    argv = [
        sys.executable,
        "-c",
        WORKER,
        msgspec.json.encode(limited).decode(),
        str(tmp_path / "pool"),
        str(tmp_path / "started"),
    ]
    worker = subprocess.Popen(argv)
    try:
        wait_for((tmp_path / "started").exists, "the replicate hangs")
    finally:
        worker.kill()
        worker.wait()
    pids = [int(pid) for pid in (tmp_path / "started").read_text().split()]
    assert len(pids) == 4
    for pid in pids:
        wait_for(lambda pid=pid: not alive(pid), f"{pid} is gone")  # type: ignore[misc]
    (folder,) = (tmp_path / "pool").iterdir()
    with (folder / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # returns when the reaper has ended
    with ProcessPool(tmp_path / "pool", slots=1) as pool:
        assert not folder.exists()
        if pool._cgroups is not None:
            assert not list(pool._cgroups.path.glob(f"modelops-{worker.pid}-*"))


def test_floats_come_many_at_once_if_somebody_takes_them(pool: ProcessPool, spec: RunnerSpec) -> None:
    one = ReplicateSet(
        params=msgspec.Raw(b"{}"),
        param=0,
        index=7,
        replicate=0,
        seeds=tuple(range(60)),
        entropy_key="00" * 16,
    )
    outcomes: list[Outcome] = []
    floats: list[FloatOutcomes] = []
    end = pool.run(spec, "m:mixed", [one], on_outcome=outcomes.append, on_floats=floats.append)
    assert not end.unstarted
    assert [outcome.index - 7 for outcome in outcomes] == [s for s in range(60) if s % 10 == 0]
    assert sorted([i - 7 for batch in floats for i in batch.indices]) == [s for s in range(60) if s % 10]
    for batch in floats:
        n = len(batch.names)
        numbers = struct.unpack(f"<{n * len(batch.indices)}d", batch.values)
        for i, index in enumerate(batch.indices):
            s = index - 7
            expected = {"x": s / 3, "y": -0.0} if s % 2 else {"\u00e9": s / 3}
            assert dict(zip(batch.names, numbers[i * n : (i + 1) * n], strict=True)) == expected
        assert all(0 <= cpu < 60 for cpu in batch.cpu_seconds)
        assert batch.started_at.tolist() == sorted(batch.started_at)
    assert len(floats) <= 54


def aggregate_sets(n: int) -> list[AggregateSet]:
    return [
        AggregateSet(
            param=p,
            params=msgspec.Raw(b'{"k":%d}' % p),
            names=("id", "y"),
            floats=struct.pack("<4d", p, 0.5, p + 0.25, -0.0).hex(),
        )
        if p % 2
        else AggregateSet(
            param=p,
            params=msgspec.Raw(b'{"k":%d}' % p),
            rows=(
                (
                    7,
                    "dict",
                    (("id", "json", msgspec.Raw(b"%d" % p)), ("y", "f8", msgspec.Raw(b'"AAAAAAAA8D8="'))),
                ),
            ),
        )
        for p in range(n)
    ]


def test_many_aggregates_are_made_in_one_request(pool: ProcessPool, spec: RunnerSpec) -> None:
    for entry in ("m:seen", "m:Seen"):
        outcomes = pool.aggregates(spec, entry, aggregate_sets(40))
        assert [outcome.status for outcome in outcomes] == [Status.SUCCEEDED] * 40
        made = [{name: msgspec.json.decode(data) for name, _, data in one.outputs} for one in outcomes]  # type: ignore[arg-type]
        assert made == [
            {"k": p, "ids": [p, p + 0.25] if p % 2 else [p], "y": [0.5, -0.0] if p % 2 else [1.0]}
            for p in range(40)
        ]
    assert pool.starts == 1


@pytest.mark.parametrize("how", ["raises", "is odd", "dies"])
def test_aggregates_are_made_up_to_the_first_that_does_not_succeed(
    how: str, pool: ProcessPool, spec: RunnerSpec
) -> None:
    sets = [
        msgspec.structs.replace(one, params=msgspec.Raw(msgspec.json.encode({"k": one.param, "how": how})))
        for one in aggregate_sets(9)
    ]
    outcomes = pool.aggregates(spec, "m:up_to_five", sets)
    assert [outcome.outputs for outcome in outcomes] == [(("value", "json", b"%d" % p),) for p in range(5)]
    assert len(pool.aggregates(spec, "m:up_to_five", sets[:3])) == 3


def aggregate_table(n: int, **params: str) -> AggregateTable:
    counts = [p % 3 for p in range(n)]
    rows = [struct.pack("<2d", p + i / 4, -0.0) for p in range(n) for i in range(counts[p])]
    return AggregateTable(
        param=7,
        params=tuple(msgspec.Raw(msgspec.json.encode({"k": p, **params})) for p in range(n)),
        names=("id", "y"),
        counts=tuple(counts),
        floats=b"".join(rows).hex(),
    )


def test_aggregates_of_a_table_are_those_of_its_sets(pool: ProcessPool, spec: RunnerSpec) -> None:
    for entry in ("m:seen", "m:Seen"):
        made = pool.aggregate_table(spec, entry, aggregate_table(3_000)).rows()
        assert all(returned_dict for returned_dict, _ in made)
        assert [{name: msgspec.json.decode(data) for name, _, data in outputs} for _, outputs in made] == [  # type: ignore[arg-type]
            {"k": p, "ids": [p + i / 4 for i in range(p % 3)], "y": [-0.0] * (p % 3)} for p in range(3_000)
        ]
    assert pool.starts == 1


def test_aggregates_of_a_table_are_what_each_would_be_alone(pool: ProcessPool, spec: RunnerSpec) -> None:
    table = aggregate_table(600)
    rows = ((0, "dict", ()),)
    sets = [AggregateSet(param=p, params=params, rows=rows) for p, params in enumerate(table.params)]
    alone = [(one.returned_dict, one.outputs) for one in pool.aggregates(spec, "m:various", sets)]
    assert len(alone) == 600
    assert pool.aggregate_table(spec, "m:various", table).rows() == alone


@pytest.mark.parametrize("how", ["raises", "is odd", "dies"])
def test_aggregates_of_a_table_are_made_up_to_the_first_that_does_not_succeed(
    how: str, pool: ProcessPool, spec: RunnerSpec
) -> None:
    made = pool.aggregate_table(spec, "m:up_to_five", aggregate_table(9, how=how)).rows()
    assert made == [(False, (("value", "json", b"%d" % p),)) for p in range(len(made))]
    assert len(made) == 5 or (how == "dies" and len(made) < 5)
    assert len(pool.aggregate_table(spec, "m:up_to_five", aggregate_table(3, how=how))) == 3


def test_many_aggregates_do_not_run_where_replicates_are_forked_from(
    pool: ProcessPool, spec: RunnerSpec
) -> None:
    forks = replace(spec, isolation="fork")
    parents = {value["pid"] for value in run(pool, forks, "m:parent")}
    made = {one.outputs[0][2] for one in pool.aggregates(forks, "m:own_pid", aggregate_sets(3))}
    assert len(parents) == len(made) == 1
    assert made.isdisjoint(b"%d" % pid for pid in parents)
