"""A fresh fork for every replicate: what one leaves behind, breaks or takes costs that one, and no new start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.process.pool_bench import Bench, value

from modelops.processes import ProcessPool, Row
from modelops.states import ReplicateStatus as Status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ProcessPool(tmp_path / "pool", slots=1) as pool:
        yield Bench(pool, tmp_path)


LEAKS = """
    import ctypes, os, random, sys
    import numpy as np
    LIBC = ctypes.CDLL(None)
    LIBC.srand(1)
    LIBC.getenv.restype = ctypes.c_char_p
    MADE, UNSEEDED = [], np.random.default_rng()
    TEXT, BYTES = open(__file__), open(__file__, "rb", buffering=0)
    def model(params, seed):
        seen = {
            "globals": len(MADE), "static of C": LIBC.rand(), "generator": float(UNSEEDED.random()),
            "numpy's global generator": float(np.random.random()), "folder": os.getcwd(),
            "variable": os.environ.get("LEFT"), "variable of C": repr(LIBC.getenv(b"LEFT")),
            "line": TEXT.readline(), "bytes": BYTES.read(9).hex(), "blocking": os.get_blocking(BYTES.fileno()),
            "open files": len(os.listdir("/proc/self/fd")), "recursion": sys.getrecursionlimit(),
        }
        MADE.append(seed)
        os.environ["LEFT"] = "1"
        os.chdir("/")
        os.open("/dev/null", os.O_RDONLY)
        os.set_blocking(BYTES.fileno(), False)
        sys.setrecursionlimit(seed + 2_000)
        return seen
"""


def test_a_replicate_sees_nothing_of_what_the_one_before_has_changed(bench: Bench) -> None:
    outcomes = bench.run(bench.spec(LEAKS, isolation="fork"))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED] * 4
    assert {name for name, _, _ in outcomes[0].outputs} >= {"static of C", "line", "bytes", "generator"}
    assert all(o.outputs == outcomes[0].outputs for o in outcomes)
    assert bench.pool.starts == 1


FILES = """
    import mmap, os, shutil, sqlite3
    from pathlib import Path
    Path("overwritten").write_text("import")
    Path("appended").write_text("import")
    Path("mapped").write_bytes(bytes(4096))
    Path("replaced").write_text("import")
    Path("removed").write_text("import")
    Path("folder").write_text("import")
    Path("locked").write_text("import")
    Path("below").mkdir()
    Path("below", "removed").write_text("import")
    Path("elsewhere").symlink_to(os.path.dirname(os.path.abspath(__file__)))
    LOG = open("appended", "a")
    TABLE = sqlite3.connect("table.db")
    TABLE.execute("create table made (seed)")
    TABLE.commit()
    def model(params, seed):
        here = sorted(path for path in Path().rglob("*") if path.name != "table.db")
        seen = {
            "rows": TABLE.execute("select count(*) from made").fetchone()[0],
            "files": {str(path): path.read_bytes().hex() for path in here if path.is_file()},
            "modes": [path.stat().st_mode for path in here],
            "link": Path("elsewhere").is_symlink() and Path("elsewhere").is_dir(),
        }
        Path("overwritten").write_text(str(seed))
        LOG.write(str(seed)); LOG.flush()
        with open("mapped", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped: mapped[0] = 1
        Path("new").write_text(str(seed)); os.replace("new", "replaced")
        Path("removed").unlink(); shutil.rmtree("below"); Path("elsewhere").unlink()
        Path("folder").unlink(); Path("folder", "within").mkdir(parents=True)
        Path("locked").write_text(str(seed)); os.chmod("locked", 0)
        TABLE.execute("insert into made values (?)", [seed]); TABLE.commit()
        return seen
"""


def test_files_that_the_import_made_are_as_it_left_them_for_every_replicate(bench: Bench) -> None:
    outcomes = bench.run(bench.spec(FILES, isolation="fork"))
    assert [o.status for o in outcomes] == [Status.SUCCEEDED] * 4
    assert value(outcomes[0]) == 0
    assert outcomes[0].outputs[-1] == ("link", "json", b"true")
    assert all(o.outputs == outcomes[0].outputs for o in outcomes)
    assert bench.pool.starts == 1


MAPPED = """
    import mmap
    with open("mapped", "wb") as file: file.write(bytes(4096))
    def model(params, seed):
        with open("mapped", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            first, mapped[0] = mapped[0], 1
        return {"first": first}
"""


def test_a_file_alone_that_is_written_through_mapped_memory_is_put_back(bench: Bench) -> None:
    outcomes = bench.run(bench.spec(MAPPED, isolation="fork"))
    assert [value(o) for o in outcomes] == [0] * 4


ENDS = """
    import ctypes, os, signal, sys, threading
    import numpy, pandas
    def model(params, seed):
        if seed == 1: ctypes.string_at(0)
        if seed == 2: sys.exit(3)
        if seed == 3: os._exit(4)
        if seed == 4: os.abort()
        if seed == 5: hog = [bytearray(os.urandom(1) * (4 << 20)) for _ in range(300)]; threading.Event().wait()
        if seed == 6: threading.Event().wait()
        if seed == 7: os.killpg(0, signal.SIGTERM)
        return {"parent": os.getppid()}
"""


@pytest.mark.parametrize("who", ["kernel", "watch"])
def test_a_crash_an_exit_a_hang_and_too_much_memory_cost_one_replicate_each(tmp_path: Path, who: str) -> None:
    limited = {} if who == "kernel" else {"cgroups": None}
    with ProcessPool(tmp_path / "pool", slots=1, **limited) as pool:  # type: ignore[arg-type]
        if who == "kernel" and pool._cgroups is None:
            pytest.skip("no memory cgroup can be made on this machine")
        bench = Bench(pool, tmp_path)
        spec = bench.spec(ENDS, isolation="fork", memory_bytes=300 << 20, replicate_timeout_s=5.0)
        outcomes = bench.run(spec, n=9)
        assert [o.status for o in outcomes] == [
            Status.SUCCEEDED, *[Status.CRASHED] * 4, Status.OUT_OF_MEMORY, Status.TIMED_OUT, Status.CRASHED,
            Status.SUCCEEDED,
        ]  # fmt: skip
        assert len({value(outcomes[i]) for i in (0, 8)}) == 1, "one parent forked them all"
        assert (pool.starts, pool.not_forked(spec)) == (1, None)
    error = outcomes[5].error
    assert error is not None
    assert error.message.startswith("limit 300.0 MiB, peak 3")


POLARS = """
    import pandas, polars as pl
    def mean(values): return pl.DataFrame({{"x": values}}).lazy().select(pl.col("x").mean()).collect().item()
    {}
    def model(params, seed): return {{"mean": mean([float(seed), seed + 1.0])}}
"""


def test_polars_used_at_import_is_not_forked_and_the_reason_names_its_threads(bench: Bench) -> None:
    spec = bench.spec(POLARS.format("mean([1.0])"), isolation="fork")
    assert [value(o) for o in bench.run(spec, n=2)] == [0.5, 1.5]
    assert bench.pool.starts == 3, "one that could not be forked, and one for each replicate"
    reason = bench.pool.not_forked(spec)
    assert reason is not None
    assert "polars-0" in reason
    assert reason.endswith("; spawn is used instead")


def test_polars_that_is_only_imported_is_forked_and_so_are_allocators_threads(bench: Bench) -> None:
    spec = bench.spec(POLARS.format(""), isolation="fork")
    assert [value(o) for o in bench.run(spec)] == [0.5, 1.5, 2.5, 3.5]
    assert (bench.pool.starts, bench.pool.not_forked(spec)) == (1, None)


THREAD_OF_C = """
    import ctypes, os, time
    LIBC, THREAD, OWN = ctypes.CDLL(None), ctypes.c_ulong(), os.getpid()
    LIBC.pthread_create(ctypes.byref(THREAD), None, ctypes.cast(LIBC.pause, ctypes.c_void_p), None)
    def model(params, seed):
        if seed == 2 and os.getpid() != OWN: {}
        return {{"seed": seed}}
"""


def test_a_fork_that_waits_for_a_thread_it_lacks_is_run_again_in_a_new_process(bench: Bench) -> None:
    spec = bench.spec(THREAD_OF_C.format("LIBC.pause()"), isolation="fork", replicate_timeout_s=2.0)
    outcomes = bench.run(spec)
    assert [value(o) for o in outcomes] == [0, 1, 2, 3]
    assert bench.pool.starts == 3, "what the forks had finished stands"
    reason = bench.pool.not_forked(spec)
    assert reason is not None
    assert "a fork did nothing for 1 s" in reason


def test_a_fork_that_works_or_waits_for_a_child_is_no_hung_one(bench: Bench) -> None:
    code = THREAD_OF_C.format("__import__('subprocess').run(['sleep', '1.5']); [0 for _ in iter(int, 1)]")
    spec = bench.spec(code, isolation="fork", replicate_timeout_s=2.5)
    assert [o.status for o in bench.run(spec)] == [
        Status.SUCCEEDED, Status.SUCCEEDED, Status.TIMED_OUT, Status.SUCCEEDED,
    ]  # fmt: skip
    assert (bench.pool.starts, bench.pool.not_forked(spec)) == (1, None)


def test_a_replicate_sees_nothing_of_an_aggregate_either(bench: Bench) -> None:
    code = """
    import threading
    MADE = []
    def model(params, seed): return len(MADE)
    def total(replicates):
        MADE.append(1)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return len(MADE)
    """
    spec = bench.spec(code, isolation="fork")
    for n_aggregates in (1, 2):
        outcomes = bench.run(spec)
        assert [value(o) for o in outcomes] == [0, 0, 0, 0]
        rows = [Row(o.index, returned_dict=False, outputs=o.outputs) for o in outcomes]
        total = bench.pool.aggregate(spec, "m:total", params=b"{}", param=0, n=4, rows=iter(rows))
        assert total.outputs == (("value", "json", b"%d" % n_aggregates),)
    assert (bench.pool.starts, bench.pool.not_forked(spec)) == (2, None)
