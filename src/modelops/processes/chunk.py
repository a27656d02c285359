"""Run replicates in one process until they are done, it is told to stop, or it is dead.

The runner works through them in order and tells of each at once, so the first one without an outcome is the
one that was running: a death is that replicate's, exactly.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import msgspec
import numpy as np

from modelops.errors import ProcessError, describe_exit
from modelops.processes.context import GivenUpError
from modelops.processes.outcome import (
    FloatOutcomes,
    Outcome,
    Output,
    ReplicateError,
    SpooledFile,
    fingerprint,
    indices,
    one_by_one,
)
from modelops.processes.process import REFUSED, Kill
from modelops.rpc import (
    Answer,
    Asked,
    Cancel,
    ErrorObject,
    Failure,
    Finished,
    FinishedFloats,
    ProgressNote,
    ReplicatesRun,
    ReplicateTable,
    decode_output,
    spool_file,
)
from modelops.states import OUTCOMES, ReplicateStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from modelops.processes.context import Conversation
    from modelops.processes.outcome import AnySet
    from modelops.processes.process import RunnerProcess
    from modelops.processes.stop import StopSignal

DRAIN_S = 5.0  # how long to wait for what a replicate printed; the pipe holds less than a second of it
FORK_SLACK_S = 1.0
LOOK_S = 0.1  # how often to ask whether the import is over and the first replicate has begun
PAUSE_S = 0.5  # at most, in which outcomes gather; far below what a person notices
PAUSE_OF_TIMEOUT = 1 / 20  # of a replicate's timeout, as one that exceeds it is seen so much later
PAUSE_AT_LEAST_S = 0.05  # however short the timeout is
SHORT_PAUSE_S = 0.002
LOOK_AFTER_MESSAGE_S = 0.2  # what is written to the sheet behind a message has none of its own
GATHERED_BYTES = 16 * 1024  # at most, in that time: far less than a pipe holds, so that nobody waits to write


FILE_HEAD = b'{"$file"'
_STATUS = {str(status): status for status in OUTCOMES}


@dataclass(frozen=True, slots=True)
class PartEnd:
    """How far one process came.

    ``n``: replicates that have an outcome. ``stopped``: the rest was asked back. ``healthy``: the process can
    be used again. ``not_begun``: it died before it began with the first one.
    """

    n: int
    stopped: bool = False
    healthy: bool = True
    not_begun: bool = False


def inline_json(output: tuple[str, str, msgspec.Raw]) -> Output | None:
    """Return an output that is inline JSON; None if it is anything else. The hot path: most outputs are."""
    name, kind, data = output
    if kind == "json" and not (raw := bytes(data)).startswith(FILE_HEAD):
        return name, kind, raw
    return None


def output_of(name: str, kind: str, data: msgspec.Raw) -> Output:
    """Return an output as the protocol carries it: inline, or in a file."""
    file = spool_file(data)
    if file is not None:
        return name, kind, SpooledFile(file.path, file.bytes, file.sha256, file.stamp or None)
    return name, kind, decode_output(kind, data)


def error_of(error: ErrorObject, stderr: str, exit_: int | None = None) -> ReplicateError:
    """Return an error that the bundle's code raised, with what the process printed."""
    return ReplicateError(
        type=error.type,
        message=error.message,
        traceback=error.traceback,
        stderr=stderr,
        fingerprint=fingerprint(error.type, f"{error.file}:{error.line}" if error.file else error.message),
        exit=exit_,
        file=error.file,
        line=error.line,
        missing_module=error.missing_module,
    )


def out_of_memory(
    process: RunnerProcess,
    error: ReplicateError | None = None,
    *,
    returncode: int | None = None,
    message: str = "",
) -> ReplicateError:
    """Return the error that names limit and peak; ``error``: what the bundle's code made of it."""
    return ReplicateError(
        type="OutOfMemory",
        message=message or process.memory_message(),
        traceback=error.traceback if error else "",
        stderr=error.stderr if error else "",
        fingerprint=fingerprint("OutOfMemory", f"{error.file}:{error.line}" if error else ""),
        exit=returncode,
    )


def no_more_memory(process: RunnerProcess, returncode: int | None) -> ReplicateError:
    """Return the error of a process that ended because all that runs beside it took the machine's memory, too."""
    message = process.surroundings.message(process.exit_peak())
    return out_of_memory(process, returncode=returncode, message=message)


class ForkRefusedError(ProcessError):
    """Forking this bundle's process is not safe; the text says why.

    ``n``: replicates of the request that have an outcome; of the others nothing is left.
    """

    def __init__(self, text: str, n: int = 0) -> None:
        super().__init__(text, n)
        self.text, self.n = text, n

    def __str__(self) -> str:
        return f"{self.text}; spawn is used instead"


class ChunkRun:
    """One request ``replicates/run`` and what comes of it.

    Parameters
    ----------
    start_timeout_s
        How long importing the bundle may take if the process has not imported the entry point yet.
    conversation
        Answers what models ask through their contexts.
    on_floats
        Takes replicates that returned nothing but floats, many at once; None: ``on_outcome`` takes them all.
    """

    def __init__(
        self,
        process: RunnerProcess,
        entry: str,
        sets: Sequence[AnySet],
        *,
        on_outcome: Callable[[Outcome], None],
        stop: StopSignal,
        start_timeout_s: float,
        conversation: Conversation,
        on_floats: Callable[[FloatOutcomes], None] | None = None,
    ) -> None:
        self._process, self._entry, self._sets = process, entry, sets
        self._on_outcome, self._on_floats, self._stop = on_outcome, on_floats, stop
        self._start_timeout_s = start_timeout_s
        self._conversation = conversation
        self._indices = indices(sets)
        self._index_array = np.array(self._indices, np.int64)
        timeout_s = process.spec.replicate_timeout_s
        self._longest_pause_s = (
            PAUSE_S
            if timeout_s is None
            else max(PAUSE_AT_LEAST_S, min(PAUSE_S, timeout_s * PAUSE_OF_TIMEOUT))
        )
        self._sheet = process.sheet if on_floats is not None else None
        self._sheet_holds = math.inf  # records; known once there is one
        self._n = 0
        self._cancelled = self._has_asked = False
        self._model_s = 0.0
        self._ended = 0.0  # when the last one did, about
        self._read_at = 0.0  # when messages were last read
        self._clock = time.time() - time.monotonic()  # one reading, so that times of a run are in order

    def run(self) -> PartEnd:
        """Run them; calls ``on_outcome`` for each replicate that ended, in order."""
        process = self._process
        self._importing = self._entry not in process.entries
        process.new_oom_kills()  # a model may have survived the death of its child in an earlier request
        self._received_before = process.n_received_bytes
        self._since = self._sent = time.monotonic()
        if self._sheet is not None:
            self._sheet.begin()
        tables = tuple(one for one in self._sets if isinstance(one, ReplicateTable))
        if len(tables) < len(self._sets) or not process.takes_tables:
            tables = ()
        request_id = process.request(
            ReplicatesRun(
                entry=self._entry,
                sets=() if tables else tuple(one_by_one(self._sets)),
                tables=tables or msgspec.UNSET,
                wire=process.spec.wire,
                checkpoint_root=self._conversation.root,
                replicate_timeout_s=process.spec.replicate_timeout_s,
                floats=msgspec.UNSET if self._on_floats is None else True,
            )
        )
        with self._stop.waking(process.wake):
            while True:
                if not self._cancelled and (
                    self._stop.stopped or (self._stop.gives_back and self._has_begun())
                ):
                    process.notify(Cancel(id=request_id))
                    self._cancelled = True
                messages = process.receive(self._deadline())
                dead = not messages and process.dead
                if dead:
                    messages = process.receive_rest()
                now = time.monotonic()
                news = self._take_sheet(now) or bool(messages)
                for message in messages:
                    if type(message) is FinishedFloats:
                        self._finished_floats(message, now)
                    elif type(message) is Finished:
                        self._finished(message, now)
                        self._take_sheet(now)
                    elif type(message) is ProgressNote:
                        self._conversation.take(message)
                    elif type(message) is Asked:
                        self._asked(message)
                    elif type(message) is Failure and message.id == request_id:
                        if message.code == REFUSED and process.spec.isolation == "fork":
                            raise ForkRefusedError(message.message.removesuffix("; use 'spawn'"), self._n)
                        raise process.failure(message, "replicates/run")
                    elif type(message) is Answer and message.id == request_id:
                        return self._answered()
                if dead:
                    return self._died()
                self._conversation.pass_on()
                if not news:
                    self._enforce()
                hurried, self._read_at = now - self._read_at < SHORT_PAUSE_S, now
                if news and not self._has_asked and not self._cancelled:
                    self._pause(hurried=hurried)

    def _pause(self, *, hurried: bool) -> None:
        """Let outcomes gather: to wake up for each would cost more than to take it in.

        At most for half the time that the rest is expected to take, so that the end of a chunk is not noticed late;
        and a little when messages come faster than that. Not at the end of a chunk that comes by the sheet, as its
        runner sends next to no messages anyway.
        """
        n_left = len(self._indices) - self._n
        if not n_left or not self._n:
            return
        each_s = self._model_s / self._n
        if n_left <= self._sheet_holds / 2 < math.inf and SHORT_PAUSE_S < n_left * each_s <= PAUSE_S:
            return
        each_bytes = max(1, self._process.n_received_bytes - self._received_before) / self._n
        n_gathered = min(n_left / 2, GATHERED_BYTES / each_bytes, self._sheet_holds / 2)
        seconds = min(self._longest_pause_s, each_s * n_gathered)
        if seconds < SHORT_PAUSE_S and hurried:
            seconds = SHORT_PAUSE_S
        self._process.pause(seconds)

    def _answered(self) -> PartEnd:
        process = self._process
        process.entries.add(self._entry)
        process.runs += 1
        if self._n:
            process.drain.wait_closed(self._indices[self._n - 1], DRAIN_S)
        if self._n == len(self._indices) or self._cancelled:
            return PartEnd(self._n, stopped=self._n < len(self._indices), healthy=not process.dead)
        process.kill(Kill("protocol", f"it answered after {self._n} of {len(self._indices)} replicates"))
        raise process.death("replicates/run")

    def _has_begun(self) -> bool:
        """Say whether a replicate has, so that something is left to do for those who give back the rest."""
        return self._n > 0 or self._process.drain.opened(self._indices[0]) is not None

    def _asked(self, asked: Asked) -> None:
        """Do what the running replicate asked for. Its time stands still meanwhile."""
        self._has_asked = True  # and waits for the answer
        process, before = self._process, time.monotonic()
        if self._n >= len(self._indices) or asked.request.index != self._indices[self._n]:
            process.done(asked, f"replicate {asked.request.index} is not running")  # a thread it left behind
            return
        if self._importing:
            self._since, self._importing = process.drain.opened(asked.request.index) or before, False
        try:
            process.done(asked, self._conversation.perform(asked))
        except GivenUpError:
            process.kill(Kill("cancelled", "the run was stopped"))
        self._since += time.monotonic() - before

    # --- deadlines -----------------------------------------------------------------------------------

    def _deadline(self) -> float | None:
        deadlines = [
            at
            for at in (self._replicate_deadline(), self._stop.deadline, self._conversation.due)
            if at is not None
        ]
        if (self._stop.gives_back and not self._cancelled) or (self._importing and deadlines):
            deadlines.append(time.monotonic() + LOOK_S)
        if self._sheet is not None and self._sheet.shape:
            # Seldom if nothing comes: a runner that was interrupted may write long after its last message.
            deadlines.append(
                time.monotonic() + max(LOOK_AFTER_MESSAGE_S, (time.monotonic() - self._since) / 2)
            )
        return min(deadlines, default=None)

    def _replicate_deadline(self) -> float | None:
        process = self._process
        timeout_s = process.spec.replicate_timeout_s
        if timeout_s is None or self._n == len(self._indices):
            return None
        if self._importing:
            begun = process.drain.opened(self._indices[0])
            if begun is None:
                return self._sent + self._start_timeout_s + timeout_s
            self._since, self._importing = begun, False
        # A fork that takes too long is the runner's to kill; only a runner that hangs itself is ours.
        return self._since + timeout_s + (FORK_SLACK_S if process.spec.isolation == "fork" else 0.0)

    def _enforce(self) -> None:
        """Kill the process if a deadline has passed; its death is then seen like any other."""
        now = time.monotonic()
        if self._stop.deadline is not None and now >= self._stop.deadline:
            self._process.kill(Kill("cancelled", "the run was stopped"))
        deadline = self._replicate_deadline()
        if deadline is not None and now >= deadline:
            self._process.kill(Kill("timeout", "", index=self._indices[self._n]))

    # --- outcomes --------------------------------------------------------------------------------------

    def _take_sheet(self, now: float) -> bool:
        """Take what the runner has written to the sheet, up to where a message comes between; say if it was any."""
        sheet = self._sheet
        if sheet is None or not (n := sheet.n_waiting):
            return False
        names = self._process.shape(sheet.shape)
        if names is None:
            return False  # its message has not been read yet
        self._sheet_holds = sheet.capacity(len(names))
        records = sheet.waiting(len(names), n)
        expected = self._index_array[self._n : self._n + n]
        m = len(expected)
        if m < n or not np.array_equal(records.indices, expected):
            differs = np.flatnonzero(records.indices[:m] != expected)
            m = int(differs[0]) if len(differs) else m
        if m:
            self._floats(
                names,
                records.indices[:m],
                records.values[: 8 * len(names) * m],
                records.seconds[:m],
                records.cpu_seconds[:m],
                now,
            )
            sheet.take(m)
        return m > 0

    def _finished_floats(self, finished: FinishedFloats, now: float) -> None:
        given, at = finished.indices, 0
        while at < len(given):
            expected = self._indices[self._n : self._n + len(given) - at]
            n = len(expected)
            if given[at:] != expected:
                n = next((i for i, k in enumerate(expected) if k != given[at + i]), n)
            if not n or self._on_floats is None:
                self._unexpected(given[at])
            part = finished if n == len(given) else finished.cut(at, at + n)
            self._floats(
                part.names,
                np.array(part.indices, np.int64),
                part.values,
                np.array(part.seconds, np.float64),
                np.array(part.cpu, np.float64),
                now,
            )
            at += n
            self._take_sheet(now)  # these may have stood between two messages that were read at once

    def _floats(
        self,
        names: tuple[str, ...],
        found: npt.NDArray[np.int64],
        values: bytes,
        seconds: npt.NDArray[np.float64],
        cpu_seconds: npt.NDArray[np.float64],
        now: float,
    ) -> None:
        """Hand on the next replicates, which returned nothing but floats."""
        process, n, total_s = self._process, self._n, float(seconds.sum())
        if self._conversation.due is not None:
            for index in found.tolist():
                self._conversation.ended(index)
        began = max(self._ended, self._read_at - float(seconds[0])) if n else now - total_s
        ends = np.cumsum(seconds)
        self._ended = began + total_s
        assert self._on_floats is not None
        self._on_floats(
            FloatOutcomes(
                names=names,
                indices=found,
                values=values,
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                started_at=ends - seconds + (began + self._clock),
                max_rss_bytes=process.max_rss_bytes(now, float(seconds.max())),
            )
        )
        self._model_s += total_s
        self._n, self._since, self._importing = n + len(found), now, False

    def _unexpected(self, index: int) -> NoReturn:
        expected = self._indices[self._n] if self._n < len(self._indices) else "none"
        self._process.kill(Kill("protocol", f"it finished replicate {index}, expected was {expected}"))
        raise self._process.death("replicates/run")

    def _finished(self, finished: Finished, now: float) -> None:
        process, n = self._process, self._n
        if n >= len(self._indices) or finished.index != self._indices[n]:
            self._unexpected(finished.index)
        # Several are read at once, so of most it is known only that they came behind what was read before.
        self._ended = ended = max(self._read_at, self._ended + finished.seconds) if n else now
        if self._conversation.due is not None:
            self._conversation.ended(finished.index)
        outputs = tuple([inline_json(output) or self._other_output(*output) for output in finished.outputs])
        error, status = None, _STATUS[finished.status]
        if status is not ReplicateStatus.SUCCEEDED:
            process.drain.wait_closed(finished.index, DRAIN_S)
            raised = finished.error or self._fork_ended(status, finished.exit)
            error = error_of(raised, process.drain.tail(finished.index), finished.exit)
            if process.new_oom_kills():  # the kernel took a child of the model, and the model failed by it
                status, error = ReplicateStatus.OUT_OF_MEMORY, out_of_memory(process, error)
            elif (
                status is ReplicateStatus.CRASHED
                and finished.error is None  # its fork has ended, and nobody has ended it
                and process.surroundings.has_killed(finished.exit)
            ):
                message = process.surroundings.message()
                error = out_of_memory(process, error, returncode=finished.exit, message=message)
                status = ReplicateStatus.OUT_OF_MEMORY
        self._on_outcome(
            Outcome(
                index=finished.index,
                status=status,
                returned_dict=finished.returned == "dict",
                outputs=outputs,
                error=error,
                seconds=finished.seconds,
                cpu_seconds=finished.cpu,
                max_rss_bytes=process.max_rss_bytes(now, finished.seconds),
                started_at=ended + self._clock - finished.seconds,
            )
        )
        self._model_s += finished.seconds
        self._n, self._since, self._importing = n + 1, now, False

    def _fork_ended(self, status: ReplicateStatus, exit_: int | None) -> ErrorObject:
        """Say how a fork ended whose death the runner reports."""
        if status is ReplicateStatus.TIMED_OUT:
            return ErrorObject(type="ReplicateTimeout", message=self._timeout_message())
        how = describe_exit(exit_) if exit_ is not None else "its process ended"
        return ErrorObject(type="ProcessExited", message=how)

    def _timeout_message(self) -> str:
        limit = self._process.spec.replicate_timeout_s
        return f"still running after {limit:g} s (replicate_timeout); its process was killed"

    def _other_output(self, name: str, kind: str, data: msgspec.Raw) -> Output:
        output = output_of(name, kind, data)
        if isinstance(output[2], SpooledFile):
            self._process.owned.add(output[2].path)
        return output

    def _died(self) -> PartEnd:
        process = self._process
        returncode = process.returncode()
        process.drain.wait_ended(DRAIN_S)
        if self._n == len(self._indices):
            return PartEnd(self._n, healthy=False)
        killed, index = process.killed, self._indices[self._n]
        if killed is not None and killed.kind == "cancelled":
            return PartEnd(self._n, stopped=True, healthy=False)
        if killed is not None and killed.kind == "timeout" and killed.index != index:
            return PartEnd(self._n, healthy=False)  # the one that was meant had just finished
        if killed is None and process.drain.opened(index) is None:
            # It died between two replicates, of what an earlier one did to it: nobody was running.
            return PartEnd(self._n, healthy=False, not_begun=self._n == 0)
        status, error = self._verdict(killed, returncode)
        now = time.monotonic()
        stderr = process.drain.tail(index)
        seconds = now - self._since
        self._on_outcome(
            Outcome(
                index=index,
                status=status,
                error=msgspec.structs.replace(error, stderr=stderr),
                seconds=seconds,
                max_rss_bytes=process.exit_peak(),
                started_at=now + self._clock - seconds,
            )
        )
        return PartEnd(self._n + 1, healthy=False)

    def _verdict(self, killed: Kill | None, returncode: int) -> tuple[ReplicateStatus, ReplicateError]:
        process = self._process
        how = describe_exit(returncode)
        if (killed is not None and killed.kind == "memory") or process.new_oom_kills():
            return ReplicateStatus.OUT_OF_MEMORY, out_of_memory(process, returncode=returncode)
        if killed is not None and killed.kind == "timeout":
            error = ReplicateError(
                type="ReplicateTimeout",
                message=self._timeout_message(),
                fingerprint=fingerprint("ReplicateTimeout", ""),
                exit=returncode,
            )
            return ReplicateStatus.TIMED_OUT, error
        if process.taken_for_memory():
            return ReplicateStatus.OUT_OF_MEMORY, no_more_memory(process, returncode)
        message = how if killed is None else f"{how}: {killed.text}"
        error = ReplicateError(
            type="ProcessExited",
            message=message,
            fingerprint=fingerprint("ProcessExited", message),
            exit=returncode,
        )
        return ReplicateStatus.CRASHED, error
