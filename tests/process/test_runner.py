"""A real runner process, on every interpreter from 3.9 on that this machine has."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import polars as pl
import pyarrow as pa
import pytest

from modelops.rpc import (
    AggregateAdd,
    AggregateFinish,
    AggregateResult,
    AggregateStart,
    Answer,
    Asked,
    Cancel,
    Failure,
    Finished,
    FunctionCall,
    FunctionResult,
    Initialize,
    Initialized,
    Output,
    Peer,
    ProgressNote,
    ReplicateSet,
    ReplicatesRun,
    RestoreCheckpoint,
    RunResult,
    Shutdown,
    decode_output,
    spool_file,
)
from modelops_runner import values
from modelops_runner.frames import encode_frame
from modelops_runner.launch import runner_argv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.rpc.messages import Wire
    from modelops.rpc.peer import Message

DEADLINE_S = 120.0  # for what takes milliseconds; a slow machine is no failure
MARKER = "0123456789abcdef"


@cache
def interpreters() -> dict[str, str]:
    """Every CPython from 3.9 on that can be found, by version."""
    candidates = [Path(sys.executable)]
    candidates += sorted((Path.home() / ".pyenv" / "versions").glob("*/bin/python3"))
    for folder in os.get_exec_path():
        candidates += sorted(Path(folder).glob("python3*"))
    found: dict[str, str] = {}
    for path in candidates:
        if not re.fullmatch(r"python(3(\.\d+)?)?", path.name) or path.parent.name == "shims":
            continue
        try:
            code = "import sys; print('%d.%d' % sys.version_info[:2])"
            shown = subprocess.run(
                [path, "-I", "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        version = shown.stdout.strip()
        if tuple(map(int, version.split("."))) >= (3, 9):
            found.setdefault(version, str(path))
    return found


class Runner:
    """A runner process and a bundle, driven through the public door."""

    def __init__(
        self, folder: Path, files: dict[str, str], python: str = sys.executable, **options: Any
    ) -> None:
        self.paths = {name: folder / name for name in ("snapshot", "workdir", "tmpdir", "spool")}
        for path in self.paths.values():
            path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self.paths["snapshot"] / name).parent.mkdir(parents=True, exist_ok=True)
            (self.paths["snapshot"] / name).write_text(text)
        self.peer = Peer()
        self.notes: list[Message] = []
        self.perform: Callable[[Asked], str | None] = lambda _asked: None
        self.stderr = b""
        self.process = subprocess.Popen(
            runner_argv(python), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._drain = threading.Thread(target=self._read_stderr)
        self._drain.start()
        self.options = options

    def __enter__(self) -> Self:
        self.answer = self.ask(
            Initialize(
                bundle_digest="abc",
                snapshot=str(self.paths["snapshot"]),
                workdir=str(self.paths["workdir"]),
                tmpdir=str(self.paths["tmpdir"]),
                spool=str(self.paths["spool"]),
                marker=MARKER,
                **self.options,
            )
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> int:
        """Close the pipe and wait; return the exit code."""
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stderr
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            code = self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self._drain.join()
            self.process.stdout.close()
            self.process.stderr.close()
        return code

    def write(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def ask(self, request: Wire) -> Answer | Failure:
        request_id, data = self.peer.request(request)
        self.write(data)
        return self.wait(request_id)

    def wait(self, request_id: int | None = None) -> Answer | Failure:
        """Read until the answer; what comes before it is kept in `notes`."""
        while True:
            for message in self.read():
                if isinstance(message, Answer | Failure):
                    assert request_id in (None, message.id)
                    return message
                self.notes.append(message)
                if isinstance(message, Asked):
                    why_not = self.perform(message)
                    peer = self.peer
                    self.write(peer.done(message) if why_not is None else peer.not_done(message, why_not))

    def read(self) -> list[Message]:
        assert self.process.stdout
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            self.peer.eof()
            raise EOFError("the runner has closed its end")
        return self.peer.receive(data)

    def run(
        self, entry: str, n: int = 1, params: dict[str, Any] | None = None, **more: Any
    ) -> list[Finished]:
        """Run ``n`` replicates of one parameter set; return their outcomes."""
        answer = self.start(entry, n, params, **more)
        assert answer == Answer(answer.id, answer.request, RunResult(finished=n, stopped=False)), answer
        finished = [note for note in self.notes if isinstance(note, Finished)]
        assert [note.index for note in finished] == list(range(100, 100 + n))
        return finished

    def start(
        self, entry: str, n: int = 1, params: dict[str, Any] | None = None, **more: Any
    ) -> Answer | Failure:
        self.notes.clear()
        return self.ask(run_request(entry, n, params, **more))

    def outputs(self, finished: Finished | AggregateResult) -> Any:
        """Return what the model returned; files are checked by digest and removed, as a worker would."""
        out = {name: values.decode(kind, self.content(kind, data)) for name, kind, data in finished.outputs}
        return out if finished.returned == "dict" else out["value"]

    def content(self, kind: str, data: msgspec.Raw) -> bytes:
        file = spool_file(data)
        if file is None:
            return decode_output(kind, data)
        path = Path(file.path)
        assert path.parent == self.paths["spool"]
        content = path.read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
        path.unlink()
        return content

    def logs(self) -> dict[str, str]:
        """End the runner; return what it wrote to stderr, by replicate ("" before the first mark)."""
        self.end()
        parts = re.split(rb"\x1e%b:(-|\d+)\n" % MARKER.encode(), self.stderr)
        logs = {"": parts[0].decode()}
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            logs[name.decode()] = logs.get(name.decode(), "") + text.decode()
        return logs

    def _read_stderr(self) -> None:
        assert self.process.stderr
        while data := os.read(self.process.stderr.fileno(), 1 << 16):
            self.stderr += data


def run_request(entry: str, n: int = 1, params: dict[str, Any] | None = None, **more: Any) -> ReplicatesRun:
    one = ReplicateSet(
        params=msgspec.Raw(values.dumps(params or {}).encode()),
        param=4,
        index=100,
        replicate=10,
        seeds=tuple(range(n)),
        entropy_key="000102030405060708090a0b0c0d0e0f",
    )
    return ReplicatesRun(entry=entry, sets=(one,), **more)


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Callable[..., Runner]]:
    started: list[Runner] = []

    def start(files: dict[str, str] | str, **options: Any) -> Runner:
        files = {"m.py": files} if isinstance(files, str) else files
        started.append(Runner(tmp_path / str(len(started)), files, **options).__enter__())
        return started[-1]

    yield start
    for runner in started:
        runner.end()


EVERYWHERE = """
import os, sys, math
import helper
print("importing")
calls = 0
def model(params, seed, context):
    global calls
    calls += 1
    print("line of", seed)
    os.write(1, b"raw %d\\n" % seed)
    assert sys.stdin.read() == "" and os.read(0, 10) == b""
    params["list"].append(1)
    assert params["list"] == [1]
    open("new file", "w").write("x"); open("data/new", "w").write("x")
    open(os.path.join(os.environ["TMPDIR"], "t"), "w").close()
    os.environ["CHANGED"] = "1"
    found = {"cwd": os.getcwd(), "data": open("data/table.csv").read(), "TMPDIR": os.environ["TMPDIR"]}
    os.chdir("/"); os.umask(0o77)
    context.report(0.5, seen=calls)
    return {"x": params["x"], "seed": seed, "r": context.replicate, "p": context.param, "e": context.entropy,
            "t": (1, [2.5, None]), "nan": math.nan, "text": "\\ud800\\0\\U0001f3b2", "big": b"x" * 100_000,
            "wide": "y" * 70_000, "calls": calls, "h": helper.VALUE, **found}
"""


@pytest.mark.parametrize("version", interpreters())
def test_replicates_run_in_order_isolated_and_exact(version: str, bundle: Callable[..., Runner]) -> None:
    files = {"m.py": EVERYWHERE, "data/table.csv": "a,b\n", "src/helper.py": "VALUE = 7\n"}
    runner = bundle(files, python=interpreters()[version])
    assert isinstance(runner.answer, Answer)
    hello = runner.answer.result
    assert isinstance(hello, Initialized)
    assert hello.python.startswith(version + ".")
    assert (hello.protocol, hello.pid, hello.bundle_digest) == (1, runner.process.pid, "abc")
    finished = runner.run("m:model", 3, {"x": float("inf"), "list": []})
    for i, one in enumerate(finished):
        assert one.error is None, one.error.traceback
        assert one.seconds > 0
        out = runner.outputs(one)
        key = bytes(range(16))
        entropy = int.from_bytes(
            hashlib.blake2b((10 + i).to_bytes(8, "little"), key=key, digest_size=16).digest(), "little"
        )
        assert np.isnan(out.pop("nan"))
        assert out == {
            "x": float("inf"),
            "seed": i,
            "r": 10 + i,
            "p": 4,
            "e": entropy,
            "t": (1, [2.5, None]),
            "text": "\ud800\0🎲",
            "big": b"x" * 100_000,
            "wide": "y" * 70_000,
            "calls": i + 1,
            "h": 7,
            "cwd": str(runner.paths["workdir"]),
            "data": "a,b\n",
            "TMPDIR": str(runner.paths["tmpdir"]),
        }
    assert sorted(p.name for p in runner.paths["workdir"].iterdir()) == ["data", "m.py", "src"]
    assert list((runner.paths["workdir"] / "data").iterdir()) == [
        runner.paths["workdir"] / "data" / "table.csv"
    ]
    assert list(runner.paths["tmpdir"].iterdir()) == []
    assert list(runner.paths["spool"].iterdir()) == []
    snapshot = sorted(
        str(p.relative_to(runner.paths["snapshot"])) for p in runner.paths["snapshot"].rglob("*")
    )
    assert snapshot == ["data", "data/table.csv", "m.py", "src", "src/helper.py"]
    progress = [note for note in runner.notes if isinstance(note, ProgressNote)]
    assert [(p.index, p.fraction, bytes(p.values)) for p in progress] == [
        (100 + i, 0.5, b'{"seen":%d}' % (i + 1)) for i in range(3)
    ]
    assert isinstance(runner.ask(Shutdown()), Answer)
    logs = runner.logs()
    assert logs == {
        "": "importing\n",
        **{str(100 + i): f"line of {i}\nraw {i}\n" for i in range(3)},
        "-": "",
    }
    assert runner.process.returncode == 0


FAILURES = """
import sys
class Broken(Exception):
    def __str__(self): raise RuntimeError("no words")
def inner(): raise ValueError("wrong beta")
def raises(p, s): inner()
def chained(p, s):
    try: inner()
    except ValueError as e: raise KeyError("outer") from e
def broken(p, s): raise Broken()
def interrupted(p, s): raise KeyboardInterrupt
def memory(p, s): raise MemoryError
def deep(p, s): return deep(p, s)
def lazy(p, s): import no_such_module_x
def lazy_caught(p, s):
    try: import no_such_module_x.sub
    except ImportError: raise ImportError("please install x")
def library(p, s):
    import json; return json.loads("{")
def generator(p, s): raise GeneratorExit
def fine(p, s): return s
"""


@pytest.mark.parametrize("version", interpreters())
def test_what_a_model_raises_is_described_and_the_next_one_runs(
    version: str, bundle: Callable[..., Runner]
) -> None:
    runner = bundle(FAILURES, python=interpreters()[version])

    def error(entry: str) -> Any:
        (one,) = runner.run(f"m:{entry}")
        assert one.status == "failed"
        assert runner.outputs(runner.run("m:fine")[0]) == 0
        return one.error

    raised = error("raises")
    assert (raised.type, raised.message, raised.file, raised.line) == ("ValueError", "wrong beta", "m.py", 5)
    assert raised.traceback.startswith(
        'Traceback (most recent call last):\n  File "m.py", line 6, in raises\n'
    )
    assert raised.missing_module is None
    chained = error("chained").traceback
    assert (
        chained.index("ValueError: wrong beta")
        < chained.index("direct cause")
        < chained.index("KeyError: 'outer'")
    )
    assert str(runner.paths["snapshot"]) not in chained
    assert (error("broken").type, "RuntimeError" in error("broken").message) == ("m.Broken", True)
    assert error("interrupted").type == "KeyboardInterrupt"
    assert error("memory").type == "MemoryError"
    assert error("deep").type == "RecursionError"
    assert error("generator").type == "GeneratorExit"
    assert error("lazy").missing_module == "no_such_module_x"
    assert error("lazy").message == "No module named 'no_such_module_x'"
    assert error("lazy_caught").missing_module == "no_such_module_x"
    library = error("library")
    assert (library.type, library.file, library.line) == ("json.decoder.JSONDecodeError", "m.py", 19)


@pytest.mark.parametrize(
    ("code", "returncode"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit('bye')", 1),
        ("import os; os._exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import ctypes; ctypes.string_at(0)", -11),
    ],
)
def test_a_dying_model_takes_its_runner_along_but_not_what_was_finished(
    code: str, returncode: int, bundle: Callable[..., Runner]
) -> None:
    runner = bundle(
        f"def model(p, s):\n    print('last words', s)\n    if s == 2:\n        {code}\n    return s\n"
    )
    with pytest.raises(EOFError):
        runner.start("m:model", 5)
    assert [note.index for note in runner.notes if isinstance(note, Finished)] == [100, 101]
    logs = runner.logs()
    assert logs["102"].startswith("last words 2\n")
    assert "103" not in logs
    assert runner.process.returncode == returncode
    if "bye" in code:
        assert "bye" in logs["102"]


RETURNS = {
    "empty": ("{}", {}),
    "none": ("None", None),
    "nothing": ("''", ""),
    "number": ("np.float32(0.1)", np.float32(0.1)),
    "array": (
        "{'a': np.arange(6, dtype='>i2').reshape(2, 3).T}",
        {"a": np.arange(6, dtype=">i2").reshape(2, 3).T},
    ),
    "large array": ("{'a': np.ones(50_000)}", {"a": np.ones(50_000)}),
    "frame": (
        "pd.DataFrame({'x': [1.0, 2.0]}, index=pd.date_range('2020', periods=2, freq='D', tz='UTC'))",
        pd.DataFrame({"x": [1.0, 2.0]}, index=pd.date_range("2020", periods=2, freq="D", tz="UTC")),
    ),
    "polars": ("{'t': pl.DataFrame({'x': range(50_000)})}", {"t": pl.DataFrame({"x": range(50_000)})}),
    "arrow": ("{'t': pa.table({'x': [1, None]})}", {"t": pa.table({"x": [1, None]})}),
    "empty table": ("pd.DataFrame()", pd.DataFrame()),
}


@pytest.mark.parametrize("name", RETURNS)
def test_values_of_the_scientific_libraries_come_back(name: str, bundle: Callable[..., Runner]) -> None:
    code, expected = RETURNS[name]
    imports = [
        f"import {m} as {a}"
        for m, a in (("numpy", "np"), ("pandas", "pd"), ("polars", "pl"), ("pyarrow", "pa"))
    ]
    used = [line for line in imports if f"{line.split()[-1]}." in code]
    runner = bundle("\n".join([*used, "def model(p, s):", f"    return {code}", ""]))
    (one,) = runner.run("m:model")
    assert one.error is None, one.error.message
    back = runner.outputs(one)
    assert values.encode(back) == values.encode(expected)


INVALID = """
import threading
def bad_set(p, s): return {"bands": [0, {"x": {1}}]}
def lock(p, s): return {"l": threading.Lock()}
def function(p, s): return lambda: 0
def key(p, s): return {1: 2}
def after(p, s): return {"ok": 1}
"""


@pytest.mark.parametrize("version", interpreters())
def test_an_output_that_cannot_cross_is_named_by_key_and_type(
    version: str, bundle: Callable[..., Runner]
) -> None:
    runner = bundle(INVALID, python=interpreters()[version])
    for entry, words in {
        "bad_set": ["bands[1].x", "a set"],
        "lock": ["l: ", "lock"],
        "function": ["a function"],
        "key": ["int", "1"],
    }.items():
        (one,) = runner.run(f"m:{entry}")
        assert one.status == "invalid_output"
        assert one.error
        assert one.error.type == "InvalidOutput"
        for word in words:
            assert word in one.error.message
        assert runner.outputs(runner.run("m:after")[0]) == {"ok": 1}


def test_200_mb_of_bytes_go_to_one_file_without_a_copy_in_memory(bundle: Callable[..., Runner]) -> None:
    code = """
        import resource
        DATA = bytes(200_000_000)
        def model(p, s): return {"big": DATA}
        def peak(p, s): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    """
    runner = bundle("\n".join(line[8:] for line in code.splitlines()))
    before = runner.outputs(runner.run("m:peak")[0])
    (one,) = runner.run("m:model")
    assert runner.outputs(one) == {"big": bytes(200_000_000)}
    after = runner.outputs(runner.run("m:peak")[0])
    assert (after - before) / 1024 < 50


def test_many_large_outputs_of_one_replicate_fit_its_frame(bundle: Callable[..., Runner]) -> None:
    runner = bundle("def model(p, s): return {f'k{i}': bytes([i % 256]) * 60_000 for i in range(2_000)}\n")
    (one,) = runner.run("m:model")
    assert runner.outputs(one) == {f"k{i}": bytes([i % 256]) * 60_000 for i in range(2_000)}


@pytest.mark.parametrize("version", interpreters())
def test_an_import_that_fails_is_one_error_and_no_replicate_runs(
    version: str, bundle: Callable[..., Runner]
) -> None:
    runner = bundle(
        {"m.py": "import no_such_module_y\n", "n.py": "x = 1\n", "bad.py": "def f(:\n"},
        python=interpreters()[version],
    )
    expected = {
        "m:model": ("ModuleNotFoundError", "No module named 'no_such_module_y'", "no_such_module_y", "m.py"),
        "absent:model": ("EntryPointError", "no module 'absent'", None, ""),
        "n:model": ("EntryPointError", "has no 'model'", None, ""),
        "nonsense": ("EntryPointError", "module:function", None, ""),
        "bad:f": ("SyntaxError", "", None, "bad.py"),
    }
    for entry, (kind, message, missing, file) in expected.items():
        failure = runner.start(entry, 3)
        assert isinstance(failure, Failure)
        assert failure.raised
        assert runner.notes == []
        assert failure.raised.type.rpartition(".")[2] == kind
        assert message in failure.raised.message
        assert failure.raised.missing_module == missing
        if file:
            assert failure.raised.file == file


def test_preload_answers_for_the_import(bundle: Callable[..., Runner]) -> None:
    good = bundle("print('once')\ndef model(p, s): return 1\n", preload=("m:model",))
    assert isinstance(good.answer, Answer)
    good.run("m:model", 2)
    assert good.logs()[""] == "once\n"
    bad = bundle("import no_such_module_z\n", preload=("m:model",))
    assert isinstance(bad.answer, Failure)
    assert bad.answer.raised
    assert bad.answer.raised.missing_module == "no_such_module_z"


def test_what_importing_sets_up_stays_and_what_a_replicate_does_is_undone(
    bundle: Callable[..., Runner],
) -> None:
    code = """
        import os, shutil, signal, sys, tempfile
        os.environ["AT_IMPORT"] = "yes"
        HOME = tempfile.mkdtemp()
        open(os.path.join(HOME, "config"), "w").close()
        os.mkdir("out")
        def model(p, s):
            seen = (os.environ.get("AT_IMPORT"), os.environ.get("LATER"), sorted(os.listdir(".")),
                    os.listdir(HOME), os.listdir("out"), sys.stdout is sys.__stdout__,
                    signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
            os.environ["LATER"] = "1"; del os.environ["AT_IMPORT"]
            sys.stdout = open(os.devnull, "w")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if s % 2:
                shutil.rmtree(os.getcwd())
            else:
                os.rename("m.py", "gone.py"); os.symlink("/", "out/root")
                os.makedirs("deep/er"); os.chmod("deep", 0)
            return seen
    """
    runner = bundle("\n".join(line[8:] for line in code.splitlines()))
    finished = runner.run("m:model", 6)
    for one in finished:
        assert one.error is None, one.error.traceback
        assert runner.outputs(one) == ("yes", None, ["m.py", "out"], ["config"], [], True, True)


def test_a_child_that_a_model_forks_cannot_speak_for_it(bundle: Callable[..., Runner]) -> None:
    code = """
        import os, multiprocessing
        def forks(p, s):
            pid = os.fork()
            if pid == 0:
                return "from the child"
            return os.waitpid(pid, 0)[1]
        def forks_and_raises(p, s):
            pid = os.fork()
            if pid == 0:
                raise ValueError("in the child")
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        def square(x): return x * x
        def pool(p, s):
            with multiprocessing.get_context(p["how"]).Pool(2) as pool:
                return pool.map(square, range(5))
    """
    runner = bundle("\n".join(line[8:] for line in code.splitlines()))
    assert runner.outputs(runner.run("m:forks")[0]) == 0
    assert runner.outputs(runner.run("m:forks_and_raises")[0]) == 1
    for how in ("fork", "spawn"):
        assert runner.outputs(runner.run("m:pool", params={"how": how})[0]) == [0, 1, 4, 9, 16]
    assert sorted(p.name for p in runner.paths["snapshot"].iterdir()) == ["m.py"]


def test_c_printf_and_children_that_echo_are_attributed(bundle: Callable[..., Runner]) -> None:
    code = """
        import ctypes, os, subprocess, sys
        libc = ctypes.CDLL(None)
        def model(p, s):
            sys.stdout.write("python ")
            sys.stdout.flush()
            libc.printf(b"c %d\\n", s)
            libc.printf(b"no newline %d|", s)
            libc.fflush(None)
            subprocess.run(["echo", "child", str(s)], check=True)
    """
    runner = bundle("\n".join(line[8:] for line in code.splitlines()))
    runner.run("m:model", 3)
    logs = runner.logs()
    assert [logs[str(100 + i)] for i in range(3)] == [
        f"python c {i}\nno newline {i}|child {i}\n" for i in range(3)
    ]


def test_a_model_gets_the_context_only_if_it_asks(bundle: Callable[..., Runner]) -> None:
    code = """
        import functools
        def two(p, s): return "two"
        def own_third(p, s, steps=5): return steps
        def named(p, s, context=None): return context.seed
        def third(p, s, c): return c.seed
        class Model:
            def __call__(self, p, s, context): return context.seed
        instance = Model()
        partial = functools.partial(lambda k, p, s, c: c.seed, 1)
        def wrap(f):
            @functools.wraps(f)
            def inner(*args): return f(*args)
            return inner
        wrapped = wrap(third)
        wrapped_two = wrap(two)
        class Space:
            class Inner:
                @staticmethod
                def f(p, s): return "dotted"
    """
    runner = bundle("\n".join(line[8:] for line in code.splitlines()))
    expected = {
        "two": "two",
        "own_third": 5,
        "named": 0,
        "third": 0,
        "instance": 0,
        "partial": 0,
        "wrapped": 0,
    }
    for entry, value in {**expected, "wrapped_two": "two", "Space.Inner.f": "dotted"}.items():
        assert runner.outputs(runner.run(f"m:{entry}")[0]) == value


CHECKPOINTING = """
import os
def model(p, s, context):
    path = os.path.join(context.checkpoint_dir, "state")
    before = open(path).read() if os.path.exists(path) else ""
    open(path, "w").write("first")
    context.checkpoint()
    open(path, "w").write("second")
    try:
        context.checkpoint()
    except ValueError as e:
        return [before, str(e)]
"""


@pytest.mark.parametrize("isolation", ["warm", "fork"])
def test_a_model_waits_until_its_checkpoint_is_restored_and_until_it_is_kept(
    tmp_path: Path, bundle: Callable[..., Runner], isolation: str
) -> None:
    runner, root, asked = (
        bundle(CHECKPOINTING, isolation=isolation),
        tmp_path / "root",
        list[tuple[str, int, str]](),
    )

    def perform(wish: Asked) -> str | None:
        state = root / str(wish.request.index) / "state"
        asked.append((wish.request.METHOD, wish.request.index, state.read_text() if state.exists() else ""))
        if isinstance(wish.request, RestoreCheckpoint):
            state.parent.mkdir(parents=True)
            state.write_text(f"of {wish.request.index}")
        return "no room" if len(asked) % 3 == 0 else None

    runner.perform = perform
    outputs = [runner.outputs(one) for one in runner.run("m:model", 2, checkpoint_root=str(root))]
    assert outputs == [["of 100", "no room"], ["of 101", "no room"]]
    assert asked == [
        (method, index, there)
        for index in (100, 101)
        for method, there in (
            ("context/restore", ""),
            ("context/checkpoint", "first"),
            ("context/checkpoint", "second"),
        )
    ]


def test_without_a_root_nobody_is_asked_and_the_folder_is_empty_each_time(
    bundle: Callable[..., Runner],
) -> None:
    runner = bundle(CHECKPOINTING + "    return before")
    assert [runner.outputs(one) for one in runner.run("m:model", 2)] == ["", ""]
    assert not [note for note in runner.notes if isinstance(note, Asked)]


def test_a_cancellation_stops_between_two_replicates(bundle: Callable[..., Runner]) -> None:
    code = """
        import os, time
        def model(p, s):
            while s == 3 and not os.path.exists(p["go"]):
                time.sleep(0.005)
            return s
    """
    runner = bundle("\n".join(line[8:] for line in code.splitlines()))
    go = runner.paths["spool"] / "go"
    request_id, data = runner.peer.request(run_request("m:model", 1_000, {"go": str(go)}))
    runner.write(data)
    while sum(isinstance(note, Finished) for note in runner.notes) < 3:
        runner.notes += runner.read()
    runner.write(runner.peer.notify(Cancel(id=request_id)))
    go.touch()
    answer = runner.wait(request_id)
    assert isinstance(answer, Answer)
    assert answer.result in (RunResult(finished=3, stopped=True), RunResult(finished=4, stopped=True))
    assert len(runner.run("m:model", 2, {"go": str(go)})) == 2


def test_outcomes_are_sent_at_once(bundle: Callable[..., Runner]) -> None:
    code = """
        import os, time
        def model(p, s):
            while not os.path.exists(p["go"] + str(s)):
                time.sleep(0.005)
    """
    runner = bundle("\n".join(line[8:] for line in code.splitlines()))
    go = str(runner.paths["spool"] / "go")
    _, data = runner.peer.request(run_request("m:model", 3, {"go": go}))
    runner.write(data)
    for i in range(3):
        Path(go + str(i)).touch()
        note, *rest = runner.read()
        assert isinstance(note, Finished)
        assert not rest or i == 2  # the next replicate waits for us; behind the last one comes the answer
    if not rest:
        rest = runner.read()
    assert [type(message) for message in rest] == [Answer]


# --- fork isolation


FORKS = """
import os, signal, subprocess, sys, time, ctypes, threading
calls = 0
def model(p, s, context):
    global calls
    calls += 1
    print("in", s)
    context.report(0.5)
    open("left behind", "w").close()
    if s == 1: sys.exit(3)
    if s == 2: ctypes.string_at(0)
    if s == 3: raise ValueError("three")
    if s == 4: return {"bad": {1}}
    if s == 5:
        pid = os.fork()
        if pid == 0: return "from a child of the child"
        os.waitpid(pid, 0)
    return {"calls": calls, "big": b"x" * 100_000, "files": sorted(os.listdir("."))}
def hangs(p, s):
    if s == 1:
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        open(p["pid"], "w").write(str(child.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: time.sleep(1)
    return s
"""


@pytest.mark.parametrize("version", interpreters())
def test_a_fork_per_replicate_keeps_state_and_crashes_apart(
    version: str, bundle: Callable[..., Runner]
) -> None:
    runner = bundle(FORKS, python=interpreters()[version], isolation="fork", preload=("m:model",))
    assert isinstance(runner.answer, Answer)
    assert isinstance(runner.answer.result, Initialized)
    assert "fork" in runner.answer.result.capabilities.isolation
    finished = runner.run("m:model", 7)
    good = {"calls": 1, "big": b"x" * 100_000, "files": ["left behind", "m.py"]}
    assert [(one.status, one.exit) for one in finished] == [
        ("succeeded", None),
        ("crashed", 3),
        ("crashed", -11),
        ("failed", None),
        ("invalid_output", None),
        ("succeeded", None),
        ("succeeded", None),
    ]
    assert [runner.outputs(finished[i]) for i in (0, 5, 6)] == [good] * 3
    assert finished[3].error
    assert finished[3].error.message == "three"
    progress = [note.index for note in runner.notes if isinstance(note, ProgressNote)]
    assert progress == list(range(100, 107))
    logs = runner.logs()
    for i in range(7):
        assert logs[str(100 + i)].startswith(f"in {i}\n")


def test_a_fork_that_hangs_is_killed_with_what_it_started(
    tmp_path: Path, bundle: Callable[..., Runner]
) -> None:
    runner = bundle(FORKS, isolation="fork", preload=("m:hangs",))
    path = tmp_path / "pid"
    finished = runner.run("m:hangs", 3, {"pid": str(path)}, replicate_timeout_s=2.0)
    assert [one.status for one in finished] == ["succeeded", "timed_out", "succeeded"]
    assert finished[1].exit == -9
    assert eventually(lambda: is_gone(int(path.read_text())))


def is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")  # a zombie is dead; whoever inherited it will reap it
    return not stat.exists() or ") Z " in stat.read_text()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_process_with_threads_says_why_it_does_not_fork(bundle: Callable[..., Runner]) -> None:
    code = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n" + FORKS
    runner = bundle(code, isolation="fork", preload=("m:model",))
    assert isinstance(runner.answer, Answer)
    assert isinstance(runner.answer.result, Initialized)
    capabilities = runner.answer.result.capabilities
    assert "fork" not in capabilities.isolation
    assert "1 other thread runs" in str(capabilities.fork_refused)
    refused = runner.start("m:model")
    assert isinstance(refused, Failure)
    assert refused.code == -32003
    assert "use 'spawn'" in refused.message


# --- aggregates and functions


AGGREGATES = """
def mean(replicates): return {"mean": sum(r["x"] for r in replicates) / len(replicates)}
def with_params(replicates, params, target_data=None): return [len(replicates), params, target_data]
class Count:
    def start(self, params): return {"n": 0, "beta": params["beta"]}
    def add(self, state, replicate): state["n"] += 1
    def finish(self, state): return state
class Sum:
    def start(self, params): return 0.0
    def add(self, state, replicate): return state + replicate["x"]
    def finish(self, state): return state
total = Sum()
def fails(replicates): raise ValueError("no mean")
def bad(replicates): return {"a": {1}}
def double(x, y=1): return {"doubled": x * 2 * y}
"""


def aggregate(
    runner: Runner, entry: str, rows: list[list[Output]], returned: str = "dict", **more: Any
) -> Answer | Failure:
    beta = msgspec.Raw(b'{"beta":0.3}')
    started = runner.ask(AggregateStart(id=7, entry=entry, params=beta, param=0, n=len(rows), **more))
    if isinstance(started, Failure):
        return started
    for index, row in enumerate(rows):
        runner.write(runner.peer.notify(AggregateAdd(id=7, rows=((index, returned, tuple(row)),))))
    return runner.ask(AggregateFinish(id=7))


@pytest.mark.parametrize("version", interpreters())
def test_aggregates_see_the_replicates_as_they_were(version: str, bundle: Callable[..., Runner]) -> None:
    runner = bundle(AGGREGATES, python=interpreters()[version])
    rows: list[list[Output]] = [[("x", "json", msgspec.Raw(b"%d.5" % i))] for i in range(4)]

    def result(entry: str, **more: Any) -> Any:
        answer = aggregate(runner, entry, rows, **more)
        assert isinstance(answer, Answer), answer
        assert isinstance(answer.result, AggregateResult)
        return runner.outputs(answer.result)

    assert result("m:mean") == {"mean": 2.0}
    target = msgspec.Raw(b'{"$tuple":[1]}')
    assert result("m:with_params", target_data=target) == [4, {"beta": 0.3}, (1,)]
    assert result("m:Count") == {"n": 4, "beta": 0.3}
    assert result("m:total") == 8.0
    failed = aggregate(runner, "m:fails", rows)
    assert isinstance(failed, Failure)
    assert failed.raised
    assert (failed.raised.type, failed.raised.file) == ("ValueError", "m.py")
    bad = aggregate(runner, "m:bad", rows)
    assert isinstance(bad, Failure)
    assert bad.raised
    assert bad.raised.invalid_output
    assert "a: " in bad.raised.message
    assert isinstance(aggregate(runner, "m:absent", rows), Failure)
    assert result("m:mean") == {"mean": 2.0}


def test_an_aggregate_reads_large_values_out_of_a_pack(tmp_path: Path, bundle: Callable[..., Runner]) -> None:
    code = "def size(replicates): return [(len(r['b']), r['b'][:1], r['a'].sum()) for r in replicates]\n"
    runner = bundle(code)
    array = values.encode(np.ones(1_000))[1]
    pack = tmp_path / "attempt.pack"
    pack.write_bytes(b"skip" + b"q" * 100 + array)

    def at(offset: int, length: int) -> msgspec.Raw:
        return msgspec.Raw(
            json.dumps({"$file": str(pack), "bytes": length, "sha256": "", "offset": offset}).encode()
        )

    rows: list[list[Output]] = [[("b", "bytes", at(4, 100)), ("a", "npy", at(104, len(array)))]] * 2
    answer = aggregate(runner, "m:size", rows)
    assert isinstance(answer, Answer), answer
    assert isinstance(answer.result, AggregateResult)
    assert runner.outputs(answer.result) == [(100, b"q", np.float64(1_000.0))] * 2


def test_a_function_of_the_bundle_can_be_called(bundle: Callable[..., Runner]) -> None:
    runner = bundle(AGGREGATES)
    args = (("bytes", msgspec.Raw(b'"AAE="')), ("json", msgspec.Raw(b"2")))
    answer = runner.ask(FunctionCall(entry="m:double", args=args, cwd="/"))
    assert isinstance(answer, Answer)
    assert isinstance(answer.result, FunctionResult)
    kind, data = answer.result.value
    assert values.decode(kind, decode_output(kind, data)) == {"doubled": b"\0\1" * 4}
    assert isinstance(runner.ask(FunctionCall(entry="m:fails", args=(("json", msgspec.Raw(b"1")),))), Failure)


# --- the wire convention


WIRE = """
import os, json
def wire(entrypoint, params, seed):
    assert os.path.exists("wire.py")
    other = {"entry": str(entrypoint), "seed": seed, **params}
    return {"table": b"raw", "text": "caf\\u00e9", "other": other}
def execute(entrypoint, params, seed):
    return {"from": "manifest"}
def bad(entrypoint, params, seed):
    return {"x": {1}}
def target(sim_returns, target_data=None):
    sizes = [r["outputs"]["table"]["size"] for r in sim_returns]
    return {"loss": float(sum(sizes)), "diagnostics": sim_returns}
"""


@pytest.mark.parametrize("version", interpreters())
def test_the_wire_convention_runs_unmodified(version: str, bundle: Callable[..., Runner]) -> None:
    runner = bundle({"wire.py": WIRE, "__init__.py": ""}, python=interpreters()[version])
    (one,) = runner.run("pkg.mod/scenario", params={"beta": 0.5}, wire=True)
    assert one.error is None, one.error.traceback
    out = runner.outputs(one)
    assert (out["table"], out["text"]) == (b"raw", "café".encode())
    assert json.loads(out["other"]) == {"entry": "pkg.mod/scenario", "seed": 0, "beta": 0.5}
    rows = [list(one.outputs)] * 2
    answer = aggregate(runner, "wire:target", rows, wire=True)
    assert isinstance(answer, Answer), answer
    assert isinstance(answer.result, AggregateResult)
    result = runner.outputs(answer.result)
    assert result["loss"] == 6.0
    checksum = hashlib.blake2b(b"raw", digest_size=32).hexdigest()
    artifact = result["diagnostics"][0]["outputs"]["table"]
    assert artifact == {"size": 3, "checksum": checksum, "inline": "cmF3"}


def test_the_wire_function_is_looked_for_in_order(tmp_path: Path, bundle: Callable[..., Runner]) -> None:
    for spec in ("wire:execute", "lib/other.py:execute"):
        manifest = json.dumps({"wire": spec})
        runner = bundle({"wire.py": WIRE, "lib/other.py": WIRE, ".modelops/manifest.json": manifest})
        (one,) = runner.run("a.b:c", wire=True)
        assert runner.outputs(one) == {"from": b"manifest"}
    info = "bundle-1.0.dist-info"
    files = {
        "wire.py": WIRE,
        ".modelops/manifest.json": manifest,
        "installed.py": "def f(entrypoint, params, seed): return {'from': 'group'}\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: bundle\nVersion: 1.0\n",
        f"{info}/entry_points.txt": "[modelops.wire]\nexecute = installed:f\n",
    }
    (one,) = (runner := bundle(files)).run("a.b:c", wire=True)
    assert runner.outputs(one) == {"from": b"group"}
    (one,) = (runner := bundle({"wire.py": WIRE.replace("def bad", "def wire")})).run("a:b", wire=True)
    assert one.status == "invalid_output"
    assert one.error
    assert "x: " in one.error.message
    nothing = bundle("x = 1\n").start("a:b", wire=True)
    assert isinstance(nothing, Failure)
    assert "no wire function" in nothing.message


TARGETS = """
def wire(entrypoint, params, seed): return {}
def one(sim_returns): return {"loss": 1}
def two(returns, data): return {"loss": 2.0, "diagnostics": data}
def any_number(*args): return {"loss": float(len(args))}
def named(sim_returns, **options): return {"loss": 3.0, "diagnostics": options}
def keyword_only(sim_returns, *, verbose=False): return {"loss": 4.0}
class Target:
    def __call__(self, sim_returns, target_data): return {"loss": float("nan")}
instance = Target()
def nothing(sim_returns, target_data): return None
def no_loss(sim_returns, target_data): return {"diagnostics": 1}
def text(sim_returns, target_data): return {"loss": "12"}
def flag(sim_returns, target_data): return {"loss": True}
"""


def test_a_target_gets_the_arguments_that_it_has_room_for(bundle: Callable[..., Runner]) -> None:
    runner = bundle({"wire.py": TARGETS})
    losses = {"one": 1, "two": 2.0, "any_number": 2.0, "named": 3.0, "keyword_only": 4.0}
    for name, loss in losses.items():
        answer = aggregate(runner, f"wire:{name}", [[]], wire=True, target_data=msgspec.Raw(b'{"x": 1}'))
        assert isinstance(answer, Answer), answer
        assert isinstance(answer.result, AggregateResult)
        result = runner.outputs(answer.result)
        assert result["loss"] == loss
        if name == "two":
            assert result["diagnostics"] == {"x": 1}
    assert isinstance(aggregate(runner, "wire:instance", [[]], wire=True), Answer)  # NaN is a number


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nothing", "'loss', not a NoneType"),
        ("no_loss", "not a dict without it: ['diagnostics']"),
        ("text", "loss: it is a number, not a str"),
        ("flag", "loss: it is a number, not a bool"),
    ],
)
def test_a_target_that_returns_no_loss_is_no_success(
    target: str, says: str, bundle: Callable[..., Runner]
) -> None:
    failed = aggregate(bundle({"wire.py": TARGETS}), f"wire:{target}", [[]], wire=True)
    assert isinstance(failed, Failure)
    assert failed.raised
    assert failed.raised.invalid_output
    assert says in failed.raised.message


# --- the protocol itself


def raw(runner: Runner, **message: Any) -> None:
    runner.write(encode_frame(json.dumps({"jsonrpc": "2.0", **message}).encode()))


def raw_answer(runner: Runner) -> dict[str, Any]:
    assert runner.process.stdout
    header = runner.process.stdout.readline()
    assert runner.process.stdout.readline() == b"\r\n"
    answer: dict[str, Any] = json.loads(runner.process.stdout.read(int(header.split(b":")[1])))
    return answer


def test_wrong_requests_are_answered_with_the_codes_of_json_rpc(tmp_path: Path) -> None:
    runner = Runner(tmp_path, {"m.py": "def f(p, s): return 1\n"})
    paths = {name: str(path) for name, path in runner.paths.items()}
    hello = {"protocol": 1, "bundle_digest": "", "isolation": "warm", "marker": "", **paths}
    conversation: list[tuple[dict[str, Any], int | None]] = [
        ({"id": 1, "method": "replicates/run", "params": {}}, -32002),
        ({"id": 2, "method": "initialize", "params": {**hello, "protocol": 2}}, -32003),
        ({"id": 3, "method": "initialize", "params": {**hello, "isolation": "magic"}}, -32003),
        ({"id": 4, "method": "initialize", "params": {**hello, "workdir": "/no/such/folder"}}, -32003),
        ({"id": 5, "method": "initialize", "params": {"protocol": 1}}, -32602),
        ({"id": 6, "method": "initialize", "params": [1]}, -32602),
        ({"id": 7, "method": "initialize", "params": hello}, None),
        ({"id": 8, "method": "initialize", "params": hello}, -32003),
        ({"id": 9, "method": "nonsense"}, -32601),
        ({"id": "text", "method": "replicates/run", "params": {"entry": 1}}, -32602),
        (
            {"id": 11, "method": "replicates/run", "params": {"entry": "m:f", "sets": [{"params": {}}]}},
            -32602,
        ),
        ({"id": 12, "method": "aggregate/finish", "params": {"id": 5}}, -32602),
        ({"id": 13}, -32600),
        ({"id": 14, "method": 5}, -32600),
        ({"id": 15, "method": "shutdown"}, None),
    ]
    try:
        for message, code in conversation:
            raw(runner, method2="ignored", **message)
            answer = raw_answer(runner)
            assert answer["id"] == message["id"], message
            assert answer.get("error", {}).get("code") == code, (message, answer)
        assert runner.process.wait(DEADLINE_S) == 0
    finally:
        runner.end()


def test_a_body_that_is_no_json_is_answered_and_the_next_one_served(tmp_path: Path) -> None:
    runner = Runner(tmp_path, {})
    try:
        for body in (b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b'"x"', b'{"jsonrpc":"2.0","id":{}}'):
            runner.write(encode_frame(body))
            assert raw_answer(runner)["error"]["code"] in (-32700, -32600)
        raw(runner, id=1, method="nonsense")
        assert raw_answer(runner)["error"]["code"] == -32002
    finally:
        assert runner.end() == 0


BROKEN_STREAMS = {
    "garbage": b"\x00\x01garbage" * 5_000,
    "garbage with an end": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no number": b"Content-Length: ten\r\n\r\n{}",
    "negative": b"Content-Length: -5\r\n\r\n{}",
    "two lengths": b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "huge header": b"X-Filler: " + b"a" * 1_000_000,
    "huge body": b"Content-Length: 9999999999\r\n\r\n",
    "length too short": encode_frame(b'{"jsonrpc":"2.0","id":1,"method":"x"}').replace(b"37", b"30")
    + b"\r\n\r\n",
    "truncated body": encode_frame(b'{"jsonrpc":"2.0"}')[:-1],
    "truncated header": b"Content-Le",
}


@pytest.mark.parametrize("name", BROKEN_STREAMS)
def test_a_broken_stream_ends_the_runner_with_a_clear_word(name: str, tmp_path: Path) -> None:
    runner = Runner(tmp_path, {})
    with suppress(BrokenPipeError):  # it has seen enough already
        runner.write(BROKEN_STREAMS[name])
    assert runner.end() == 65
    assert b"the parent broke the protocol: " in runner.stderr


@pytest.mark.parametrize("seed", range(6))
def test_fuzzed_frames_never_hang_crash_or_swell_the_runner(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    runner = Runner(tmp_path, {})
    good = encode_frame(b'{"jsonrpc":"2.0","id":1,"method":"nonsense"}')
    pieces = [
        good,
        good[:-7],
        b"\r\n\r\n",
        b"Content-Length: ",
        b"7",
        b"\xff" * 50,
        b"{}",
        bytes(200),
        b'[{"id":',
    ]
    peak = 0
    closed = False
    answers: list[bytes] = []
    reader = threading.Thread(target=lambda: answers.extend(iter(lambda: os.read(out, 1 << 16), b"")))
    assert runner.process.stdout
    out = runner.process.stdout.fileno()
    reader.start()
    for _ in range(2_000):
        picks = rng.integers(0, len(pieces), size=3)
        data = good if rng.random() < 0.995 else b"".join(pieces[i] for i in picks)
        try:
            runner.write(data)
        except BrokenPipeError:
            closed = True
            break
        status = Path(f"/proc/{runner.process.pid}/status")
        if status.exists():
            found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
            peak = max(peak, int(found[1]) if found else 0)
    assert runner.process.stdin
    try:
        runner.process.stdin.close()
    except BrokenPipeError:
        closed = True
    code = runner.process.wait(DEADLINE_S)
    reader.join()
    runner.end()
    assert code in (0, 65)
    assert not closed or code == 65
    assert (code == 65) == (b"the parent broke the protocol: " in runner.stderr), runner.stderr
    assert b"Traceback" not in runner.stderr
    assert peak < 100_000  # KiB
    assert b"-32002" in b"".join(answers)


def test_the_end_of_the_pipe_ends_an_idle_and_a_running_runner(bundle: Callable[..., Runner]) -> None:
    runner = bundle("def model(p, s): return s\n")
    assert runner.end() == 0
    runner = bundle("def model(p, s): return s\n")
    _, data = runner.peer.request(run_request("m:model", 1_000_000))
    runner.write(data)
    runner.read()
    assert runner.process.stdin
    assert runner.process.stdout
    runner.process.stdin.close()
    while os.read(runner.process.stdout.fileno(), 1 << 16):
        pass
    assert runner.process.wait(DEADLINE_S) == 0


def test_nothing_of_ours_can_be_imported_by_a_bundle(bundle: Callable[..., Runner]) -> None:
    code = """
        import sys, importlib.util
        import frames
        def model(p, s):
            ours = [n for n in ("values", "modelops", "channel") if importlib.util.find_spec(n)]
            return [frames.MINE, sys.path[0], ours, any("modelops_runner" in p for p in sys.path),
                    sys.argv, sorted(vars(sys.modules["__main__"]))]
    """
    files = {"m.py": "\n".join(line[8:] for line in code.splitlines()), "frames.py": "MINE = True\n"}
    others = [python for python in interpreters().values() if python != sys.executable]
    runner = bundle(files, python=others[0] if others else sys.executable)
    mine, first, found, leaked, argv, main = runner.outputs(runner.run("m:model")[0])
    assert mine
    assert first == str(runner.paths["snapshot"])
    assert others == [] or found == []
    assert not leaked
    assert argv == ["modelops_runner"]
    assert "main" not in main
    assert "package" not in main


NODE = """
const rpc = require("vscode-jsonrpc/node");
const { spawn } = require("child_process");
const [argv, hello, run] = JSON.parse(process.argv[2]);
const child = spawn(argv[0], argv.slice(1), { stdio: ["pipe", "pipe", "ignore"] });
const ended = new Promise((tell) => child.on("exit", tell));  // it may end before its last answer is read
const connection = rpc.createMessageConnection(
  new rpc.StreamMessageReader(child.stdout), new rpc.StreamMessageWriter(child.stdin));
const seen = [];
connection.onNotification("replicate/finished", (p) => seen.push(p));
connection.listen();
(async () => {
  const early = await connection.sendRequest("replicates/run", run).catch((e) => e.code);
  const info = await connection.sendRequest("initialize", hello);
  const result = await connection.sendRequest("replicates/run", run);
  const unknown = await connection.sendRequest("no/such").catch((e) => e.code);
  await connection.sendRequest("shutdown");
  console.log(JSON.stringify({ early, info, result, unknown, seen, code: await ended }));
})();
"""


def check_foreign_conversation(said: dict[str, Any]) -> None:
    assert said["early"] == -32002
    assert said["info"]["protocol"] == 1
    assert said["result"] == {"finished": 3, "stopped": False}
    assert said["unknown"] == -32601
    assert [note["index"] for note in said["seen"]] == [0, 1, 2]
    assert [note["outputs"][0] for note in said["seen"]] == [["x", "json", s * 1.5] for s in (5, 6, 7)]


def foreign_requests(runner_files: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    paths = {name: runner_files / name for name in ("snapshot", "workdir", "tmpdir", "spool")}
    for path in paths.values():
        path.mkdir(parents=True)
    (paths["snapshot"] / "m.py").write_text("def f(p, s): return {'x': p['x'] * s, 'b': bytes(9)}\n")
    hello = {
        "protocol": 1,
        "bundle_digest": "d",
        "isolation": "warm",
        "marker": "",
        **{k: str(v) for k, v in paths.items()},
    }
    one = {
        "params": {"x": 1.5},
        "param": 0,
        "index": 0,
        "replicate": 0,
        "seeds": [5, 6, 7],
        "entropy_key": "",
    }
    return hello, {"entry": "m:f", "wire": False, "sets": [one], "checkpoint_root": None}


def test_the_client_of_vscode_talks_to_a_runner(tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip(
            "node and npm are not installed; test_the_client_of_python_lsp_talks_to_a_runner covers the rest"
        )
    install = [npm, "install", "--no-audit", "--no-fund", "--silent", "vscode-jsonrpc@8"]
    subprocess.run(install, cwd=tmp_path, check=True, timeout=DEADLINE_S)
    (tmp_path / "client.js").write_text(NODE)
    hello, run = foreign_requests(tmp_path / "runner")
    arguments = json.dumps([runner_argv(sys.executable), hello, run])
    said = subprocess.run(
        [node, "client.js", arguments], cwd=tmp_path, check=True, timeout=DEADLINE_S, stdout=subprocess.PIPE
    )
    conversation = json.loads(said.stdout)
    check_foreign_conversation(conversation)
    assert conversation["code"] == 0


def test_the_client_of_python_lsp_talks_to_a_runner(tmp_path: Path) -> None:
    endpoints = import_module("pylsp_jsonrpc.endpoint")  # it has no types
    exceptions = import_module("pylsp_jsonrpc.exceptions")
    streams = import_module("pylsp_jsonrpc.streams")

    hello, run = foreign_requests(tmp_path)
    process = subprocess.Popen(runner_argv(sys.executable), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    seen: list[dict[str, Any]] = []
    writer = streams.JsonRpcStreamWriter(process.stdin)
    endpoint = endpoints.Endpoint({"replicate/finished": seen.append}, writer.write)
    reader = streams.JsonRpcStreamReader(process.stdout)
    listener = threading.Thread(target=reader.listen, args=(endpoint.consume,))
    listener.start()

    def ask(method: str, params: Any = None) -> Any:
        try:
            return endpoint.request(method, params).result(DEADLINE_S)
        except exceptions.JsonRpcException as e:
            return e.code

    said = {
        "early": ask("replicates/run", run),
        "info": ask("initialize", hello),
        "result": ask("replicates/run", run),
    }
    said["unknown"] = ask("no/such")
    assert ask("shutdown") is None
    assert process.wait(DEADLINE_S) == 0
    listener.join()
    endpoint.shutdown()
    assert process.stdin
    assert process.stdout
    process.stdin.close()
    process.stdout.close()
    check_foreign_conversation({**said, "seen": seen})


def test_a_start_costs_little(bundle: Callable[..., Runner]) -> None:
    """No number here: a clock is no test. What must not be imported at the start is."""
    runner = bundle("import sys\nMODULES = sorted(sys.modules)\ndef model(p, s): return MODULES\n")
    modules = set(runner.outputs(runner.run("m:model")[0]))
    assert not modules & {
        "asyncio",
        "inspect",
        "typing_extensions",
        "numpy",
        "multiprocessing",
        "_hashlib",
        "ssl",
    }
