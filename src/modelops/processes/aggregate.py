"""Feed an aggregate in one process, in frames of bounded size; and call a single function.

Rows are read from their source only as fast as the runner takes them. Large values go by path.
"""

from __future__ import annotations

import time
from binascii import b2a_base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from modelops.errors import describe_exit
from modelops.processes.chunk import DRAIN_S, error_of, output_of
from modelops.processes.outcome import (
    AggregateOutcome,
    FileSlice,
    ReplicateError,
    Row,
    SpooledFile,
    fingerprint,
)
from modelops.processes.process import ErrorObject, Kill, decode_error_object, decode_message
from modelops.states import ReplicateStatus
from modelops_runner import values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from modelops.processes.process import Message, RunnerProcess
    from modelops.processes.stop import StopSignal

FRAME_BYTES = 4 * 1024 * 1024  # rows are gathered up to here; a frame stays below the 8 MiB of the protocol
INLINE_BYTES = 1024 * 1024
BUNDLE_RAISED = -32001


class _Result(msgspec.Struct, frozen=True):
    outputs: list[tuple[str, str, msgspec.Raw]]
    returned: str = "dict"
    seconds: float = 0.0
    cpu: float = 0.0


class _Value(msgspec.Struct, frozen=True):
    value: tuple[str, msgspec.Raw]


class AggregateRun:
    """One aggregate of one parameter set."""

    def __init__(
        self, process: RunnerProcess, entry: str, *, stop: StopSignal, start_timeout_s: float
    ) -> None:
        self._process, self._entry, self._stop = process, entry, stop
        timeout_s = process.spec.replicate_timeout_s
        if timeout_s is not None and entry not in process.entries:
            timeout_s += start_timeout_s  # the import happens on the way
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._spilled = 0
        self._answers: dict[int, Message] = {}
        self._failed: Message | None = None

    def run(
        self, *, params: bytes, param: int, n: int, rows: Iterable[Row], target_data: Any
    ) -> AggregateOutcome:
        """Feed the rows and return the outcome."""
        process = self._process
        start: dict[str, Any] = {
            "id": process.runs + 1,
            "entry": self._entry,
            "wire": process.spec.wire,
            "params": msgspec.Raw(params),
            "param": param,
            "n": n,
        }
        if target_data is not None:
            start["target_data"] = target_data
        process.runs += 1
        spill = process.folder / "rows"
        spill.mkdir(exist_ok=True)
        try:
            with self._stop.waking(process.wake):
                _, frame = process.encode("aggregate/start", start)
                alive = self._push(frame)
                for batch in self._batches(rows, spill):
                    if not alive:
                        break
                    add = {"id": start["id"], "rows": batch}
                    alive = self._push(process.notification("aggregate/add", add))
                if not alive:
                    return self._ended()
                finish_id, frame = process.encode("aggregate/finish", {"id": start["id"]})
                process.send(frame)
                while self._failed is None and finish_id not in self._answers:
                    if not self._pump():
                        return self._ended()
                if self._failed is not None:
                    return self._raised(self._failed)
                process.entries.add(self._entry)
                return self._result(self._answers[finish_id])
        finally:
            for file in spill.iterdir():
                file.unlink()
            spill.rmdir()

    def _push(self, frame: bytes) -> bool:
        """Send a frame and wait until the process has taken most of it; False: it is of no use any more."""
        self._process.send(frame)
        while self._process.unsent > INLINE_BYTES:
            if not self._pump():
                return False
        return self._failed is None and not self._process.dead

    def _pump(self) -> bool:
        """Wait for the next thing to happen; False: the process is dead."""
        process = self._process
        if self._stop.stopped:  # an aggregate has no part that could be kept
            process.kill(Kill("cancelled", "the run was stopped"))
        bodies = process.receive(self._deadline)
        dead = not bodies and process.dead
        if dead:
            bodies = process.receive_rest()
        for body in bodies:
            message = decode_message(body)
            if message.method is None and message.id is not None:
                self._answers[message.id] = message
                if message.error is not None:
                    self._failed = message
        if dead:
            return bool(bodies)
        if not bodies and self._deadline is not None and time.monotonic() >= self._deadline:
            process.kill(Kill("timeout", ""))
        return True

    def _batches(self, rows: Iterable[Row], spill: Path) -> Iterator[list[Any]]:
        batch: list[Any] = []
        size = 0
        source = iter(rows)
        while True:
            before = time.monotonic()
            row = next(source, None)
            if self._deadline is not None:  # reading segments is our time, not the bundle's
                self._deadline += time.monotonic() - before
            if row is None:
                break
            encoded, row_size = self._encode(row, spill)
            batch.append(encoded)
            size += row_size
            if size >= FRAME_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _encode(self, row: Row, spill: Path) -> tuple[Any, int]:
        size = 0
        outputs: list[tuple[str, str, Any]] = []
        for name, kind, data in row.outputs:
            if isinstance(data, bytes):
                if len(data) > INLINE_BYTES or size + len(data) > 2 * INLINE_BYTES:
                    data = self._spill(data, spill)
                else:
                    size += len(data) * 4 // 3 + len(name) + 32
                    inline = msgspec.Raw(data) if kind == "json" else b2a_base64(data, newline=False).decode()
                    outputs.append((name, kind, inline))
                    continue
            place: dict[str, Any] = {"$file": data.path, "bytes": data.bytes}
            if isinstance(data, FileSlice):
                place["offset"] = data.offset
            size += len(data.path) + len(name) + 64
            outputs.append((name, kind, place))
        return (row.index, "dict" if row.returned_dict else "value", outputs), size

    def _spill(self, data: bytes, folder: Path) -> FileSlice:
        self._spilled += 1
        path = folder / str(self._spilled)
        path.write_bytes(data)
        return FileSlice(str(path), 0, len(data))

    # --- the end ---------------------------------------------------------------------------------------

    def _result(self, message: Message) -> AggregateOutcome:
        result = msgspec.json.decode(message.result, type=_Result)
        outputs = tuple(output_of(*output) for output in result.outputs)
        self._process.owned.update(o.data.path for o in outputs if isinstance(o.data, SpooledFile))
        return AggregateOutcome(
            status=ReplicateStatus.SUCCEEDED,
            returned_dict=result.returned == "dict",
            outputs=outputs,
            seconds=result.seconds,
            cpu_seconds=result.cpu,
        )

    def _raised(self, message: Message) -> AggregateOutcome:
        assert message.error is not None
        if message.error.code != BUNDLE_RAISED:
            raise self._process.remote_error(message.error, "aggregate")
        raised = decode_error_object(message.error.data) or ErrorObject(
            type="Error", message=message.error.message
        )
        status = ReplicateStatus.INVALID_OUTPUT if raised.invalid_output else ReplicateStatus.FAILED
        return AggregateOutcome(status=status, error=error_of(raised, self._process.drain.tail(None)))

    def _ended(self) -> AggregateOutcome:
        if self._failed is not None:
            return self._raised(self._failed)
        process = self._process
        returncode = process.returncode()
        process.drain.wait_ended(DRAIN_S)
        killed = process.killed
        how = describe_exit(returncode)
        if killed is not None and killed.kind == "cancelled":
            return AggregateOutcome(status=ReplicateStatus.CANCELLED, stopped=True)
        if killed is not None and killed.kind == "timeout":
            status, kind = ReplicateStatus.TIMED_OUT, "AggregateTimeout"
            how = f"still running after {process.spec.replicate_timeout_s:g} s; its process was killed"
        elif (killed is not None and killed.kind == "memory") or process.new_oom_kills():
            status, kind = ReplicateStatus.OUT_OF_MEMORY, "OutOfMemory"
            how = process.memory_message()
        else:
            status, kind = ReplicateStatus.CRASHED, "ProcessExited"
            how = how if killed is None else f"{how}: {killed.text}"
        error = ReplicateError(
            type=kind,
            message=how,
            stderr=process.drain.tail(None),
            fingerprint=fingerprint(kind, how if status is ReplicateStatus.CRASHED else ""),
            exit=returncode,
        )
        return AggregateOutcome(status=status, error=error)


def call_function(
    process: RunnerProcess, entry: str, args: Sequence[Any], *, cwd: str | None, timeout_s: float | None
) -> Any:
    """Call ``entry`` there with these values and return its value."""
    encoded = []
    for value in args:
        kind, data = values.encode(value)
        encoded.append([kind, msgspec.Raw(data) if kind == "json" else b2a_base64(data, newline=False).decode()])
    params = {"entry": entry, "args": encoded, "cwd": cwd}
    result = msgspec.json.decode(process.request("function/call", params, timeout_s=timeout_s), type=_Value)
    process.runs += 1
    output = output_of("value", *result.value)
    if not isinstance(output.data, SpooledFile):
        return values.decode(output.kind, output.data)
    path = Path(output.data.path)
    try:
        return values.decode(output.kind, path.read_bytes())
    finally:
        path.unlink()
