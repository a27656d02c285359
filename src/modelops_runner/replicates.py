"""Run replicates, one after another, and report each as soon as it is finished.

This loop is the price of a replicate, so it is written for speed: what is the same for all replicates is
made before it, and outputs that are plain numbers and text are written without a detour.
"""

from __future__ import annotations

import os
import sys
from time import perf_counter, process_time

from modelops_runner import calls, forking, pages, stdio, values
from modelops_runner.channel import BUNDLE_RAISED, STORAGE_FAILED, Channel, RpcError
from modelops_runner.context import Context
from modelops_runner.failures import error_object, invalid_output
from modelops_runner.frames import MAX_BODY_BYTES
from modelops_runner.isolation import ProcessState
from modelops_runner.reports import Reports
from modelops_runner.shapes import Shapes
from modelops_runner.sheet import Sheet
from modelops_runner.spool import INLINE_TOTAL, Spool, SpoolError
from modelops_runner.values import InvalidOutputError, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

    from modelops_runner.workspace import Workspace

    _Of = tuple[dict[str, Any], int]  # a set, or a table and which of its sets

_SCALARS = frozenset({float, int, str, bool, type(None)})
_MAX_INLINE_TEXT = 2_000  # characters of a text on the fast path; longer ones are measured against the limit
_MAX_PREFIXES = 10_000
_MAX_OUTPUTS_BYTES = MAX_BODY_BYTES - 65_536  # the rest of the message needs far less
_POLLNVAL = 0x20
_QUICK_S = 100e-6  # the clock of CPU time is a system call: what is quicker than this has used what it took
_CLOCK_SLACK_S = 200e-6  # how old a reading may be; what has passed since was spent in this thread
_SILENT_S = 0.2  # so long after a message, what is written to the sheet needs none of its own


class Replicates:
    """Runs the replicates of one bundle in this process.

    Parameters
    ----------
    marks
        Descriptor that marks are written to.
    marker
        Text of the marks; empty: none are written.
    sheet
        Descriptor of the memory that outcomes may be written to; None: there is none.
    """

    def __init__(
        self,
        channel: Channel,
        workspace: Workspace,
        spool: Spool,
        *,
        snapshot: str,
        marks: int,
        marker: str,
        sheet: int | None = None,
    ) -> None:
        self._channel, self._workspace, self._spool = channel, workspace, spool
        self._snapshot = snapshot
        self.roots = (snapshot, workspace.workdir)
        self._marks = marks
        self._mark = b"\x1e" + marker.encode("ascii") + b":" if marker else b""
        self._models: dict[tuple[str, bool], tuple[Any, bool]] = {}
        self._prefixes: dict[str, str] = {}  # name of an output -> the JSON before its value
        self._state = ProcessState(workspace.workdir, marks)
        for fd in (0, 1, 2):
            channel.poll.register(fd, 0)  # no events, but it says when one of them is closed
        self._reports = Reports(channel)
        self._shapes = Shapes(channel)
        self._sheet = Sheet(sheet) if sheet is not None else None
        self._inotify: Any = None
        self._watch()
        self._in_child = False  # of the model's; it must not go on with our work
        self._forking = False  # it is us who fork
        self._hazard: str | None = None  # what a fork has shown
        self._pages = pages.Pages()
        os.register_at_fork(after_in_child=self._forked)

    # --- models

    def model(self, entry: str, *, wire: bool) -> tuple[Any, bool]:
        """Import an entry point, once; return what to call and whether it takes a context.

        Raises
        ------
        RpcError
            The import raised, or the entry point names nothing.
        """
        key = (entry, wire)
        if key not in self._models:
            self._models[key] = self.imported(calls.model, entry, wire=wire, root=self._snapshot)
        return self._models[key]

    def imported(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what imports code of the bundle; what that sets up (variables, files) stays."""
        try:
            return self._guarded(function, args, kwargs)
        finally:
            self._state.adopt()
            if self._settle():
                self._workspace.adopt()
                self._state.workdir_was_replaced()
                self._watch()
            self._state.restore()

    def called(self, function: Any, *args: Any) -> Any:
        """Call the bundle's code outside of a replicate, and undo what it did to the process."""
        try:
            return self._guarded(function, args, {})
        finally:
            self.clean()

    def _guarded(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Turn what the bundle's code raises into the answer to the request."""
        try:
            return function(*args, **kwargs)
        except RpcError:
            raise
        except BaseException as e:  # noqa: BLE001  the bundle's code
            if self._in_child:
                _leave_child(e)
            if isinstance(e, InvalidOutputError):
                data = {**invalid_output(e), "invalid_output": True}
            else:
                data = error_object(e, self.roots)
            raise RpcError(BUNDLE_RAISED, f"{data['type']}: {data['message']}", data) from None

    # --- the loop

    def run(
        self,
        request_id: object,
        sets: list[dict[str, Any]],
        entry: tuple[Any, bool],
        checkpoint_root: str | None,
        *,
        floats: bool = False,
    ) -> int:
        """Run the replicates of these sets until the last one or a cancellation; return how many.

        ``floats``: the parent wants outputs that are floats and nothing else as `replicate/floats`.
        """
        model, takes_context = entry
        channel, send, mark, marks, write = (
            self._channel,
            self._channel.send,
            self._mark,
            self._marks,
            os.write,
        )
        reports, restore, arrived = self._reports, self._state.restore, self._channel.poll.poll
        shape_of = self._shapes.of if floats else _never
        put = None
        if floats and self._sheet is not None:
            self._sheet.begin()
            put = self._sheet.put
        finished = 0
        after, cpu_at, read_at, told_at = 0.0, 0.0, 0.0, 0.0
        for raw, first, seeds, of in _each_set(sets):
            index = first
            flat = _SCALARS.issuperset(map(type, raw.values()))
            for seed in seeds:
                params = dict(raw) if flat else values.untagged(raw)
                args: tuple[Any, ...]
                if takes_context:
                    args = (params, seed, self._context(of, index - first, checkpoint_root))
                else:
                    args = (params, seed)
                stdio.flush()
                if mark:
                    write(marks, b"%b%d\n" % (mark, index))
                before = perf_counter()
                if before - read_at > _CLOCK_SLACK_S:
                    cpu_at, read_at = process_time(), before
                shape, outcome = None, ""
                try:
                    result = model(*args)
                except BaseException as e:  # noqa: BLE001  the bundle's code
                    after = perf_counter()
                    seconds = cpu = after - before
                    if seconds > _QUICK_S:
                        cpu_now = process_time()
                        cpu = max(0.0, cpu_now - cpu_at - (before - read_at))
                        cpu_at, read_at = cpu_now, after
                    outcome = self._raised(e)
                else:
                    after = perf_counter()
                    seconds = cpu = after - before
                    if seconds > _QUICK_S:
                        cpu_now = process_time()
                        cpu = max(0.0, cpu_now - cpu_at - (before - read_at))
                        cpu_at, read_at = cpu_now, after
                    if self._in_child:
                        _leave_child(None)
                    shape = shape_of(result)
                    if shape is None:
                        outcome = self._returned(result)
                        result = None  # it may be large, and the next one too
                if reports.waits:
                    reports.end()
                if shape is not None:
                    quick = put is not None and after - told_at < _SILENT_S
                    if not (quick and put(shape, index, seconds, cpu, result)):  # type: ignore[misc]
                        send(
                            f'{{"jsonrpc":"2.0","method":"replicate/floats","params":[{index},{shape.text(result)}'
                            f",{seconds:.9f},{cpu:.9f}]}}"
                        )
                        told_at = after
                    result = None
                else:
                    send(
                        f'{{"jsonrpc":"2.0","method":"replicate/finished","params":{{"index":{index},{outcome}'
                        f',"seconds":{seconds:.9f},"cpu":{cpu:.9f}}}}}'
                    )
                    told_at = after
                    if mark and outcome[10] != "s":
                        self.mark_end()
                finished += 1
                restore()
                if arrived(0) or self._inotify is None:
                    self.clean()
                if request_id in channel.cancelled or channel.ended:
                    return finished
                index += 1
        return finished

    def run_forked(
        self,
        request_id: object,
        sets: list[dict[str, Any]],
        entry: tuple[Any, bool],
        checkpoint_root: str | None,
        timeout_s: float | None,
    ) -> int:
        """Run each replicate in a fork of this process; otherwise as `run`."""
        from functools import partial

        model, takes_context = entry
        reason = self.fork_hazard()
        if reason is not None:
            raise forking.refuse(reason)
        missing = forking.other_threads()
        self._keep_files()
        finished = 0
        for raw, first, seeds, of in _each_set(sets):
            for offset, seed in enumerate(seeds):
                index = first + offset
                args: tuple[Any, ...] = (values.untagged(raw), seed)
                if takes_context:
                    args = (*args, self._context(of, offset, checkpoint_root))
                stdio.flush()
                if self._mark:
                    os.write(self._marks, b"%b%d\n" % (self._mark, index))
                work = partial(self._in_fork, model, args)
                self._pages.before_fork()
                self._spool.begin_fork()
                self._forking = True
                try:
                    status = forking.run_in_child(self._channel, work, index, timeout_s, missing)
                except forking.HungForkError as e:
                    self._hazard = str(e)
                    self._spool.discard_fork()
                    self.mark_end()
                    raise forking.refuse(self._hazard) from None
                finally:
                    self._forking = False
                finished += 1
                if status != "finished":
                    self._spool.discard_fork()
                    self.mark_end()
                self.clean()
                if request_id in self._channel.cancelled or self._channel.ended:
                    return finished
        return finished

    def _keep_files(self) -> None:
        try:
            self._workspace.keep(self._spool.folder)
        except OSError as e:
            text = (
                f"what the import left in the working directory could not be copied to {self._spool.folder}"
            )
            raise RpcError(STORAGE_FAILED, f"{text}: {e.strerror}") from e

    def fork_hazard(self) -> str | None:
        """Return why this process must not be forked, None if it may."""
        if self._hazard is not None:
            return self._hazard
        self._forking = True
        try:
            return forking.hazard()
        finally:
            self._forking = False

    def _in_fork(self, model: Any, args: tuple[Any, ...], index: int) -> str:
        before, cpu_before = perf_counter(), process_time()
        try:
            result = model(*args)
        except BaseException as e:  # noqa: BLE001  the bundle's code
            outcome = self._raised(e)
        else:
            if self._in_child:
                _leave_child(None)
            outcome = self._returned(result)
        if self._reports.waits:
            self._reports.end()
        seconds, cpu = perf_counter() - before, process_time() - cpu_before
        return (
            f'{{"jsonrpc":"2.0","method":"replicate/finished","params":{{"index":{index},{outcome}'
            f',"seconds":{seconds:.9f},"cpu":{cpu:.9f}}}}}'
        )

    def mark_end(self) -> None:
        """Say on stderr that what follows belongs to no replicate."""
        if self._mark:
            stdio.flush()
            os.write(self._marks, self._mark + b"-\n")

    def clean(self) -> None:
        """Undo what the bundle's code did to this process and its folders; take in messages on the way."""
        self._state.restore()
        if self._settle():
            self._workspace.restore()
            self._state.workdir_was_replaced()
            self._watch()

    def _settle(self) -> bool:
        """Take in messages that have arrived; return whether our folders were touched."""
        touched = False
        for fd, event in self._channel.poll.poll(0):
            if fd <= 2:
                if event & _POLLNVAL:
                    self._state.descriptor_was_closed()
            elif fd == self._channel.requests:
                if not self._channel.ended:
                    self._channel.pump_when_ready(0)
            else:
                touched = True
        if self._inotify is None:
            touched = touched or self._workspace.touched()
        return touched or self._workspace.kept_changed()

    def _watch(self) -> None:
        """Let one `poll` tell of both a message and a change in our folders."""
        new = self._workspace.inotify
        if new is not self._inotify:
            if self._inotify is not None:
                self._channel.poll.unregister(self._inotify.fd)
            if new is not None:
                self._channel.poll.register(new.fd, 1)  # POLLIN
            self._inotify = new

    def _context(self, of: _Of, offset: int, checkpoint_root: str | None) -> Context:
        return Context(
            **_told(of, offset),
            checkpoint_root=checkpoint_root,
            tmpdir=self._workspace.tmpdir,
            ask=self._channel.request,
            report=self._reports.take,
        )

    # --- outcomes, as the JSON that stands between "index" and "seconds"

    def _returned(self, result: Any) -> str:
        try:
            kind, outputs = self.outputs(result)
        except InvalidOutputError as e:
            return _unsuccessful("invalid_output", invalid_output(e))
        except RpcError:
            raise
        except BaseException as e:  # noqa: BLE001  to look at a value may run code of its class
            return self._raised(e)
        return f'"status":"succeeded","returned":"{kind}","outputs":{outputs},"error":null'

    def _raised(self, error: BaseException) -> str:
        if self._in_child:
            _leave_child(error)
        if isinstance(error, SystemExit):
            _exit(error)
        if isinstance(error, InvalidOutputError):  # from the wire function's result
            return _unsuccessful("invalid_output", invalid_output(error))
        return _unsuccessful("failed", error_object(error, self.roots))

    def outputs(self, result: Any) -> tuple[str, str]:
        """Return ``dict`` or ``value``, and the list of outputs as JSON text.

        Raises
        ------
        InvalidOutputError
            Something in it cannot cross.
        RpcError
            The spool could not be written.
        """
        self._spool.begin()
        try:
            if isinstance(result, dict):
                outputs = self._dict_outputs(result)
                if len(outputs) > _MAX_OUTPUTS_BYTES:
                    raise InvalidOutputError(
                        f"the names and values of its {len(result)} outputs take {len(outputs)} bytes, "
                        f"more than {_MAX_OUTPUTS_BYTES}; return them as one dict, list or array"
                    )
                return "dict", outputs
        except SpoolError as e:
            raise RpcError(STORAGE_FAILED, str(e)) from e
        except BaseException:
            self._spool.discard()
            raise
        kind, data = self.encoded(result)
        return "value", f'[["value","{kind}",{data}]]'

    def encoded(self, value: Any) -> tuple[str, str]:
        """Return the kind of one value and its data as JSON text; raises as `outputs`."""
        try:
            return self._spool.output(value)
        except SpoolError as e:
            raise RpcError(STORAGE_FAILED, str(e)) from e

    def _dict_outputs(self, result: dict[Any, Any]) -> str:
        parts = []
        prefixes = self._prefixes
        room, text_room = INLINE_TOTAL, _MAX_OUTPUTS_BYTES // 2
        for name, value in result.items():
            prefix = prefixes.get(name) if type(name) is str else None
            if prefix is None:
                prefix = self._prefix(name)
            kind = type(value)
            if kind is float and value - value == 0.0:
                parts.append(f'{prefix}"json",{value!r}]')
            elif value is None or kind is bool:
                parts.append(
                    prefix
                    + ('"json",null]' if value is None else '"json",true]' if value else '"json",false]')
                )
            elif kind is int and -(2**63) <= value < 2**64:
                parts.append(f'{prefix}"json",{value}]')
            elif kind is str and len(value) < _MAX_INLINE_TEXT and text_room > 0 and value.isascii():
                text = to_json(value)
                text_room -= len(text)
                parts.append(f'{prefix}"json",{text}]')
            else:
                try:
                    form, data = self._spool.output(value, room)
                except InvalidOutputError as e:
                    raise e.within(f".{name}") from None
                room -= min(len(data), room)
                parts.append(f'{prefix}"{form}",{data}]')
        return f"[{','.join(parts)}]"

    def _prefix(self, name: Any) -> str:
        if not isinstance(name, str):
            raise InvalidOutputError(
                f"an output's name is text, not a {values.type_name(name)}: {values.shown(name)}"
            )
        if not values.is_unicode(name):
            raise InvalidOutputError(f"an output's name is no valid Unicode: {values.shown(name)}")
        if len(self._prefixes) > _MAX_PREFIXES:  # a model that invents new names all the time
            self._prefixes.clear()
        prefix = self._prefixes[str.__str__(name)] = f"[{to_json(str.__str__(name))},"
        return prefix

    # --- children that a model forks

    def _forked(self) -> None:
        """Cut a forked child off from the parent's pipes: two processes must not speak for one replicate."""
        if self._forking:
            self._forking = False
        else:
            self._in_child = True
            self._channel.detach()
            self._reports.forked()


def _each_set(sets: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int, list[int], _Of]]:
    """Yield parameters, first index and seeds of each set, those of tables, too; and what `_told` wants to know."""
    for one in sets:
        if "each" not in one:
            yield one["params"], one["index"], one["seeds"], (one, 0)
            continue
        each, seeds, index, at = one["each"], one["seeds"], one["index"], 0
        for nth, params in enumerate(one["params"]):
            yield params, index + at, seeds[at : at + each], (one, nth)
            at += each


def _told(of: _Of, offset: int) -> dict[str, Any]:
    """Return what a context says of the replicate at ``offset`` of a set: the nth of a table, or one by itself."""
    one, nth = of
    at = nth * one.get("each", 0) + offset
    ids = one.get("param_ids")
    return {
        "index": one["index"] + at,
        "param": one["param"] + nth,
        "replicate": one["replicate"] + offset,
        "seed": one["seeds"][at],
        "entropy_key": one.get("entropy_key")
        or _entropy_key(one.get("study_seed", 0), ids[32 * nth : 32 * nth + 32] if ids else ""),
    }


def _entropy_key(study_seed: int, param_id: str) -> str:
    """Return the entropy key of a parameter set, see ``docs/reference/seeds.md``; hexadecimal."""
    from hashlib import blake2b

    material = study_seed.to_bytes(8, "little") + bytes.fromhex(param_id)
    return blake2b(material, digest_size=16, person=b"modelops.entr.1").hexdigest()


def _never(_result: object) -> None:
    """See no floats: the parent takes outputs one by one only."""


def _unsuccessful(status: str, error: dict[str, Any]) -> str:
    return f'"status":"{status}","returned":"value","outputs":[],"error":{to_json(error)}'


def _exit(error: SystemExit) -> NoReturn:
    """End as the model asked: its exit code is what the parent will report."""
    code = error.code
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)  # noqa: T201  what Python itself does with sys.exit("text")
        code = 1
    stdio.flush()
    os._exit((code or 0) & 0xFF)


def _leave_child(error: BaseException | None) -> NoReturn:
    """End a child that the model forked and that came back out of the model."""
    if error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        error = SystemExit(1)
    _exit(error or SystemExit(0))
