"""The runner: answer requests from the pipe, one after another, until the parent is done or gone."""

from __future__ import annotations

import os
import sys
from time import perf_counter, process_time

from modelops_runner import aggregates, stdio, values
from modelops_runner.aggregate_tables import AggregateTable
from modelops_runner.channel import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    NOT_INITIALIZED,
    REFUSED,
    Channel,
    RpcError,
)
from modelops_runner.entrypoints import resolve
from modelops_runner.frames import FrameError
from modelops_runner.privileges import obey_modes
from modelops_runner.replicates import Replicates
from modelops_runner.spool import Spool, read_output
from modelops_runner.values import to_json
from modelops_runner.workspace import Workspace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

PROTOCOL = 1
EXIT_BROKEN_FRAMES = 65  # EX_DATAERR
_MISSING = object()


def main() -> None:
    """Run until the parent says ``shutdown`` or closes the pipe. Never returns."""
    pipes = stdio.take_over()
    _tidy_interpreter()
    code = 0
    try:
        Server(Channel(pipes.requests, pipes.messages), pipes.marks).serve()
    except FrameError as e:
        sys.stderr.write(f"modelops_runner: the parent broke the protocol: {e}\n")
        code = EXIT_BROKEN_FRAMES
    except BrokenPipeError:  # the parent is gone, and with it whoever could be told
        code = 1
    stdio.flush()
    os._exit(code)  # at once: threads and exit handlers that the bundle left behind have no say


def _tidy_interpreter() -> None:
    """Make `sys` and ``__main__`` look as in any program, for libraries and for `multiprocessing`."""
    import faulthandler

    sys.argv = ["modelops_runner"]
    for name in ("os", "package", "main"):
        vars(sys.modules["__main__"]).pop(name, None)
    sys.dont_write_bytecode = False  # -B is for children; ours is kept out of the snapshot by its loader
    faulthandler.enable(2, all_threads=False)


class Server:
    """Knows the methods; one method runs at a time."""

    def __init__(self, channel: Channel, marks: int) -> None:
        self._channel, self._marks = channel, marks
        self._replicates: Replicates | None = None
        self._isolation = "warm"
        self._aggregates: dict[object, aggregates.Aggregate] = {}
        self._broken_aggregates: dict[object, RpcError] = {}
        self._methods: dict[str, Callable[[object, dict[str, Any]], str]] = {
            "replicates/run": self._run,
            "aggregate/start": self._aggregate_start,
            "aggregate/add": self._aggregate_add,
            "aggregate/finish": self._aggregate_finish,
            "aggregates/run": self._aggregates_run,
            "function/call": self._call,
        }

    def serve(self) -> None:
        """Answer requests until ``shutdown`` or the end of the stream."""
        while True:
            message = self._channel.receive()
            if message is None:
                return
            method, identifier, params = message["method"], message.get("id"), message.get("params")
            try:
                if not isinstance(params, dict):
                    if params:
                        raise RpcError(INVALID_PARAMS, "params are an object, by name")
                    params = {}
                if method == "shutdown":
                    if "id" in message:
                        self._channel.answer(identifier, "null")
                    return
                result = self._method(method)(identifier, params)
            except RpcError as e:
                if "id" in message:
                    self._channel.fail(identifier, e)
                elif method == "aggregate/add":
                    self._broken_aggregates[params.get("id") if isinstance(params, dict) else None] = e
            else:
                if "id" in message:
                    self._channel.answer(identifier, result)

    def _method(self, name: str) -> Callable[[object, dict[str, Any]], str]:
        if self._replicates is None:
            if name == "initialize":
                return self._initialize
            raise RpcError(NOT_INITIALIZED, f"{name!r} before 'initialize'")
        if name == "initialize":
            raise RpcError(REFUSED, "this runner is initialized already")
        if name not in self._methods:
            raise RpcError(METHOD_NOT_FOUND, f"this runner knows no method {name!r}")
        return self._methods[name]

    # --- initialize

    def _initialize(self, _: object, params: dict[str, Any]) -> str:
        protocol = need(params, "protocol", int)
        if protocol != PROTOCOL:
            raise RpcError(REFUSED, f"this runner speaks protocol {PROTOCOL}, not {protocol}")
        isolation = need(params, "isolation", str, "warm")
        if isolation not in CAPABILITIES["isolation"]:  # type: ignore[operator]
            raise RpcError(
                REFUSED, f"this runner offers isolation {CAPABILITIES['isolation']}, not {isolation!r}"
            )
        snapshot, workdir, tmpdir, spool = (
            need(params, k, str) for k in ("snapshot", "workdir", "tmpdir", "spool")
        )
        for folder in (snapshot, workdir, tmpdir, spool):
            if not os.path.isdir(folder) or not os.path.isabs(folder):
                raise RpcError(REFUSED, f"{folder!r} is no absolute path of a folder")
        os.environ["TMPDIR"] = tmpdir
        obey_modes([snapshot, sys.prefix, sys.base_prefix], [workdir, tmpdir, spool])
        workspace = Workspace(workdir, tmpdir, snapshot)
        _put_on_path(snapshot)
        self._replicates = Replicates(
            self._channel,
            workspace,
            Spool(spool, need(params, "inline_limit", int, 65_536)),
            snapshot=snapshot,
            marks=self._marks,
            marker=need(params, "marker", str, ""),
            sheet=need(params, "sheet", int) if "sheet" in params else None,
        )
        for entry in need(params, "preload", list, []):
            self._replicates.model(entry, wire=need(params, "wire", bool, False))
        self._isolation = isolation
        capabilities = dict(CAPABILITIES)
        reason = self._replicates.fork_hazard() if isolation == "fork" else None
        if reason is not None:
            capabilities.update(isolation=["warm", "spawn"], fork_refused=reason)
        return to_json(
            {
                "protocol": PROTOCOL,
                "pid": os.getpid(),
                "python": ".".join(map(str, sys.version_info[:3])),
                "implementation": sys.implementation.name,
                "executable": sys.executable,
                "prefix": sys.prefix,
                "platform": sys.platform,
                "bundle_digest": need(params, "bundle_digest", str, ""),
                "capabilities": capabilities,
            }
        )

    # --- replicates, functions, aggregates

    def _run(self, identifier: object, params: dict[str, Any]) -> str:
        replicates = self._ready()
        listed, tables = need(params, "sets", list), need(params, "tables", list, [])
        sets = [*listed, *tables]
        for one in sets:
            if not isinstance(one, dict):
                raise RpcError(INVALID_PARAMS, "a set is an object")
            need(one, "seeds", list)
            for key in ("param", "index", "replicate"):
                need(one, key, int)
        for one in listed:
            need(one, "params", dict)
        for one in tables:
            if need(one, "each", int) * len(need(one, "params", list)) != len(one["seeds"]):
                raise RpcError(INVALID_PARAMS, "a table has another number of seeds than of replicates")
        model = replicates.model(need(params, "entry", str), wire=need(params, "wire", bool, False))
        root = params.get("checkpoint_root")
        if self._isolation == "fork":
            timeout_s = params.get("replicate_timeout_s")
            finished = replicates.run_forked(identifier, sets, model, root, timeout_s)
        else:
            finished = replicates.run(
                identifier, sets, model, root, floats=need(params, "floats", bool, False)
            )
        replicates.mark_end()
        stopped = "true" if finished < sum(len(one["seeds"]) for one in sets) else "false"
        return f'{{"finished":{finished},"stopped":{stopped}}}'

    def _call(self, _: object, params: dict[str, Any]) -> str:
        replicates = self._ready()
        entry, cwd = need(params, "entry", str), params.get("cwd")
        encoded = need(params, "args", list, [])

        function = replicates.imported(resolve, entry)

        def call() -> Any:
            args = [read_output(kind, data) for kind, data in encoded]
            if cwd is not None:
                os.chdir(cwd)
            return replicates.encoded(function(*args))

        kind, data = replicates.called(call)
        return f'{{"value":["{kind}",{data}]}}'

    def _aggregate_start(self, _: object, params: dict[str, Any]) -> str:
        identifier = params.get("id")
        self._broken_aggregates.pop(identifier, None)
        replicates, wire = self._ready(), need(params, "wire", bool, False)
        function = replicates.imported(aggregates.find, need(params, "entry", str), wire=wire)
        own_params = values.untagged(need(params, "params", dict, {}))
        target_data = values.untagged(params.get("target_data"))
        self._aggregates[identifier] = replicates.called(
            aggregates.Aggregate, function, wire, own_params, target_data
        )
        return "null"

    def _aggregate_add(self, _: object, params: dict[str, Any]) -> str:
        identifier = params.get("id")
        if identifier in self._broken_aggregates:
            return "null"
        aggregate = self._aggregate(identifier)

        def add_rows() -> None:
            for index, returned, outputs in need(params, "rows", list):
                aggregate.add(index, returned, outputs)

        try:
            self._ready().called(add_rows)
        except RpcError:
            del self._aggregates[identifier]  # its state may be large, and is of no use any more
            raise
        return "null"

    def _aggregate_finish(self, _: object, params: dict[str, Any]) -> str:
        identifier = params.get("id")
        aggregate = self._aggregates.pop(identifier, None)
        broken = self._broken_aggregates.pop(identifier, None)
        if broken is not None:
            raise broken
        if aggregate is None:
            raise RpcError(INVALID_PARAMS, f"no aggregate {identifier!r} was started")
        replicates = self._ready()
        before, cpu_before = perf_counter(), process_time()
        returned, outputs = replicates.called(lambda: replicates.outputs(aggregate.finish()))
        seconds, cpu = perf_counter() - before, process_time() - cpu_before
        fed = ',"incremental":true' if aggregate.incremental else ""
        return f'{{"returned":"{returned}","outputs":{outputs},"seconds":{seconds:.9f},"cpu":{cpu:.9f}{fed}}}'

    def _aggregates_run(self, identifier: object, params: dict[str, Any]) -> str:
        """Make one aggregate after another; the first one that fails is made again by itself, to say how."""
        replicates, channel = self._ready(), self._channel
        function = replicates.imported(aggregates.find, need(params, "entry", str), wire=False)
        sets, target_data = need(params, "sets", list), params.get("target_data")
        if "table" in params:
            table = need(params, "table", dict)
            made = AggregateTable(replicates, channel, function, table, target_data)
            finished, whole = made.run(identifier)
            return f'{{"finished":{finished},"stopped":{"false" if whole else "true"}}}'
        cpu_before = process_time()
        for finished, one in enumerate(sets):
            before = perf_counter()
            try:
                returned, outputs = replicates.called(self._aggregate_of, function, one, target_data)
            except RpcError:
                return f'{{"finished":{finished},"stopped":true}}'
            cpu_now, after = process_time(), perf_counter()
            seconds, cpu, cpu_before = after - before, cpu_now - cpu_before, cpu_now
            channel.send(
                f'{{"jsonrpc":"2.0","method":"aggregate/finished","params":{{"param":{one["param"]}'
                f',"returned":"{returned}","outputs":{outputs},"seconds":{seconds:.9f},"cpu":{cpu:.9f}}}}}'
            )
            if identifier in channel.cancelled or channel.ended:
                return f'{{"finished":{finished + 1},"stopped":true}}'
        return f'{{"finished":{len(sets)},"stopped":false}}'

    def _aggregate_of(self, function: Any, one: dict[str, Any], target_data: object) -> tuple[str, str]:
        own_params = values.untagged(need(one, "params", dict))
        aggregate = aggregates.Aggregate(function, False, own_params, values.untagged(target_data))
        if "floats" in one:
            aggregate.add_floats(need(one, "names", list), need(one, "floats", str))
        else:
            for index, returned, outputs in need(one, "rows", list):
                aggregate.add(index, returned, outputs)
        return self._ready().outputs(aggregate.finish())

    def _aggregate(self, identifier: object) -> aggregates.Aggregate:
        try:
            return self._aggregates[identifier]
        except KeyError:
            raise RpcError(INVALID_PARAMS, f"no aggregate {identifier!r} was started") from None

    def _ready(self) -> Replicates:
        if self._replicates is None:
            raise RpcError(INTERNAL_ERROR, "not initialized")
        return self._replicates


CAPABILITIES: dict[str, object] = {
    "isolation": ["warm", "fork", "spawn"],
    "aggregate_incremental": True,
    "tables": True,
}


def need(params: dict[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    """Return a member of the params, or refuse the request."""
    value = params.get(name, default)
    if value is _MISSING:
        raise RpcError(INVALID_PARAMS, f"{name!r} is missing")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RpcError(INVALID_PARAMS, f"{name!r} is {value!r:.80}, not {kind.__name__}")
    return value


def _put_on_path(snapshot: str) -> None:
    """Put the bundle first on `sys.path`, and keep bytecode out of it, whoever we run as."""
    from importlib.machinery import (
        EXTENSION_SUFFIXES,
        SOURCE_SUFFIXES,
        ExtensionFileLoader,
        FileFinder,
        SourceFileLoader,
    )

    class SnapshotLoader(SourceFileLoader):
        def set_data(self, path: str, data: bytes, *, _mode: int = 0o666) -> None:  # type: ignore[override]
            if sys.pycache_prefix is not None:
                super().set_data(path, data, _mode=_mode)

    make = FileFinder.path_hook((ExtensionFileLoader, EXTENSION_SUFFIXES), (SnapshotLoader, SOURCE_SUFFIXES))

    def hook(path: str) -> Any:
        if path == snapshot or path.startswith(snapshot + os.sep):
            return make(path)
        raise ImportError

    sys.path_hooks.insert(0, hook)
    source = os.path.join(snapshot, "src")
    sys.path[:0] = [snapshot, source] if os.path.isdir(source) else [snapshot]
