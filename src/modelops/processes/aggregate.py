"""Feed an aggregate in one process, in frames of bounded size; and call a single function.

Rows are read from their source only as fast as the runner takes them. Large values go by path; those that lie in no
file of this machine are put into one each, until the runner has taken them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from modelops.errors import describe_exit
from modelops.processes.chunk import DRAIN_S, error_of, no_more_memory, out_of_memory, output_of
from modelops.processes.outcome import (
    AggregateOutcome,
    FileSlice,
    ReplicateError,
    Row,
    SpooledFile,
    fingerprint,
)
from modelops.processes.process import Kill
from modelops.rpc import (
    AggregateAdd,
    AggregateFinish,
    AggregateResult,
    AggregateStart,
    AggregateTake,
    Answer,
    Failure,
    FunctionCall,
    FunctionResult,
    Output,
    SpoolFile,
)
from modelops.rpc.messages import encode_output
from modelops.states import ReplicateStatus
from modelops_runner import values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from modelops.processes.process import RunnerProcess
    from modelops.processes.stop import StopSignal

FRAME_BYTES = 4 * 1024 * 1024  # rows are gathered up to here; a frame stays below the 8 MiB of the protocol
INLINE_BYTES = 1024 * 1024
SPILL_BYTES = 32 * 1024 * 1024  # values in files of ours are gathered up to here, twice
_EncodedRow = tuple[int, str, tuple[Output, ...]]


class AggregateRun:
    """One aggregate of one parameter set."""

    def __init__(
        self, process: RunnerProcess, entry: str, *, stop: StopSignal, start_timeout_s: float
    ) -> None:
        self._process, self._entry, self._stop = process, entry, stop
        self._start_timeout_s = start_timeout_s
        self._deadline: float | None = None
        self._spilled = 0
        self._taking: tuple[int, list[Path]] | None = None  # a request, and our files that it names
        self._requests: set[int] = set()
        self._answers: dict[int, Answer] = {}
        self._failed: Failure | None = None

    def run(
        self, *, params: bytes, param: int, n: int, rows: Iterable[Row], wire: bool, target_data: Any
    ) -> AggregateOutcome:
        """Feed the rows and return the outcome."""
        process = self._process
        process.new_oom_kills()  # a model may have survived the death of its child in an earlier request
        aggregate_id = process.runs + 1
        start = AggregateStart(
            id=aggregate_id,
            entry=self._entry,
            params=msgspec.Raw(params),
            param=param,
            n=n,
            wire=wire,
            target_data=msgspec.Raw(values.dumps(target_data).encode()),
        )
        process.runs += 1
        spill = process.folder / "rows"
        spill.mkdir(exist_ok=True)
        try:
            with self._stop.waking(process.wake):
                if not self._started(process.request(start)):
                    return self._ended()
                for batch, files in self._batches(rows, spill):
                    if not self._taken():
                        break
                    if not files:
                        process.notify(AggregateAdd(id=aggregate_id, rows=batch))
                        continue
                    if not self._has_taken_files():
                        break
                    self._taking = process.request(AggregateTake(id=aggregate_id, rows=batch)), files
                    self._requests.add(self._taking[0])
                if not self._taken():
                    return self._ended()
                finish_id = process.request(AggregateFinish(id=aggregate_id))
                self._requests.add(finish_id)
                while self._failed is None and finish_id not in self._answers:
                    if not self._pump():
                        return self._ended()
                if self._failed is not None:
                    return self._raised(self._failed)
                process.entries.add(self._entry)
                return self._result(self._answers[finish_id].result)
        finally:
            for file in spill.iterdir():
                file.unlink()
            spill.rmdir()

    def _started(self, start_id: int) -> bool:
        """Wait for the import, which has a deadline of its own; False: it came to nothing."""
        self._requests.add(start_id)
        if self._entry not in self._process.entries:
            self._deadline = time.monotonic() + self._start_timeout_s
            while self._failed is None and start_id not in self._answers:
                if not self._pump():
                    return False
        timeout_s = self._process.spec.replicate_timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return self._failed is None

    def _taken(self) -> bool:
        """Wait until the process has taken most of what was sent; False: it is of no use any more."""
        while self._process.unsent > INLINE_BYTES:
            if not self._pump():
                return False
        return self._failed is None and not self._process.dead

    def _has_taken_files(self) -> bool:
        """Wait until the process has taken the last files of ours, and remove them; False: it will not."""
        if self._taking is not None:
            request_id, files = self._taking
            while self._failed is None and request_id not in self._answers:
                if not self._pump():
                    return False
            for file in files:
                file.unlink()
            self._taking = None
        return self._failed is None

    def _pump(self) -> bool:
        """Wait for the next thing to happen; False: the process is dead."""
        process = self._process
        if self._stop.stopped:  # an aggregate has no part that could be kept
            process.kill(Kill("cancelled", "the run was stopped"))
        messages = process.receive(self._deadline)
        dead = not messages and process.dead
        if dead:
            messages = process.receive_rest()
        for message in messages:
            if isinstance(message, Answer):
                self._answers[message.id] = message
            elif isinstance(message, Failure) and message.id in self._requests and self._failed is None:
                self._failed = message  # the first one says why; the others follow from it
        if not messages and not dead and self._deadline is not None and time.monotonic() >= self._deadline:
            process.kill(Kill("timeout", ""))
        return bool(messages) or not dead

    def _batches(
        self, rows: Iterable[Row], spill: Path
    ) -> Iterator[tuple[tuple[_EncodedRow, ...], list[Path]]]:
        """Yield rows, and the files of ours that some of their values lie in."""
        batch: list[_EncodedRow] = []
        files: list[Path] = []
        size = spilled = 0
        source = iter(rows)
        while True:
            before = time.monotonic()
            row = next(source, None)
            if self._deadline is not None:  # reading segments is our time, not the bundle's
                self._deadline += time.monotonic() - before
            if row is None:
                break
            encoded, row_size, own = self._encode(row, spill)
            batch.append(encoded)
            files += [Path(file.path) for file in own]
            size += row_size
            spilled += sum(file.bytes for file in own)
            if size >= FRAME_BYTES or spilled >= SPILL_BYTES:
                yield tuple(batch), files
                batch, files, size, spilled = [], [], 0, 0
        if batch:
            yield tuple(batch), files

    def _encode(self, row: Row, spill: Path) -> tuple[_EncodedRow, int, list[FileSlice]]:
        """Return a row as it is sent, the size of that, and the files that were made for it."""
        size, own = 0, []
        outputs = []
        for name, kind, data in row.outputs:
            if isinstance(data, bytes):
                if len(data) > INLINE_BYTES or size + len(data) > 2 * INLINE_BYTES:
                    data = self._spill(data, spill)
                    own.append(data)
                else:
                    size += len(data) * 4 // 3 + len(name) + 32
                    outputs.append((name, kind, encode_output(kind, data)))
                    continue
            offset = data.offset if isinstance(data, FileSlice) else 0
            file = SpoolFile(path=data.path, bytes=data.bytes, sha256="", offset=offset)
            size += len(data.path) + len(name) + 64
            outputs.append((name, kind, msgspec.Raw(msgspec.json.encode(file))))
        return (row.index, "dict" if row.returned_dict else "value", tuple(outputs)), size, own

    def _spill(self, data: bytes, folder: Path) -> FileSlice:
        self._spilled += 1
        path = folder / str(self._spilled)
        path.write_bytes(data)
        return FileSlice(str(path), 0, len(data))

    # --- the end ---------------------------------------------------------------------------------------

    def _result(self, result: object) -> AggregateOutcome:
        assert isinstance(result, AggregateResult)
        outputs = tuple(output_of(*output) for output in result.outputs)
        self._process.owned.update(data.path for _, _, data in outputs if isinstance(data, SpooledFile))
        return AggregateOutcome(
            status=ReplicateStatus.SUCCEEDED,
            returned_dict=result.returned == "dict",
            outputs=outputs,
            seconds=result.seconds,
            cpu_seconds=result.cpu,
            incremental=result.incremental,
        )

    def _raised(self, failure: Failure) -> AggregateOutcome:
        raised = failure.raised
        if raised is None:
            raise self._process.failure(failure, "aggregate")
        status = ReplicateStatus.INVALID_OUTPUT if raised.invalid_output else ReplicateStatus.FAILED
        error = error_of(raised, self._process.drain.tail(None))
        if self._process.new_oom_kills():  # the kernel took a child of the aggregate, which failed by it
            status, error = ReplicateStatus.OUT_OF_MEMORY, out_of_memory(self._process, error)
        return AggregateOutcome(status=status, error=error)

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
            error = msgspec.structs.replace(
                out_of_memory(process, returncode=returncode), stderr=process.drain.tail(None)
            )
            return AggregateOutcome(status=ReplicateStatus.OUT_OF_MEMORY, error=error)
        elif process.taken_for_memory():
            error = msgspec.structs.replace(
                no_more_memory(process, returncode), stderr=process.drain.tail(None)
            )
            return AggregateOutcome(status=ReplicateStatus.OUT_OF_MEMORY, error=error)
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
    encoded = tuple((kind, encode_output(kind, data)) for kind, data in map(values.encode, args))
    request_id = process.request(FunctionCall(entry=entry, args=encoded, cwd=cwd))
    result = process.answer(request_id, "function/call", timeout_s=timeout_s).result
    assert isinstance(result, FunctionResult)
    process.runs += 1
    _, kind, data = output_of("value", *result.value)
    if not isinstance(data, SpooledFile):
        return values.decode(kind, data)
    path = Path(data.path)
    try:
        return values.decode(kind, path.read_bytes())
    finally:
        path.unlink()
