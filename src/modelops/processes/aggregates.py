"""Make the aggregates of many small parameter sets in one request, as long as they succeed.

What this cannot do is left to whoever asked: an aggregate that fails, kills its process or takes too long has no
outcome here, nor have those behind it. Made by itself (`AggregateRun`), it gets one that says why.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from modelops.processes.chunk import inline_json, output_of
from modelops.processes.many_made import ManyMade, cells_of
from modelops.processes.outcome import AggregateOutcome, Output, SpooledFile
from modelops.processes.process import Kill
from modelops.rpc import AggregateFinished, AggregatesMade, AggregatesRun, Answer, Failure
from modelops.states import ReplicateStatus
from modelops_runner import values

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from modelops.processes.process import RunnerProcess
    from modelops.processes.stop import StopSignal
    from modelops.rpc import AggregateSet, AggregateTable, Message

GATHER_S = 0.002  # let some arrive: a runner whose every message wakes its reader waits for it each time


def make_aggregates(
    process: RunnerProcess,
    entry: str,
    sets: Sequence[AggregateSet],
    *,
    target_data: Any,
    stop: StopSignal,
    start_timeout_s: float,
) -> list[AggregateOutcome]:
    """Return the outcomes of the first sets, all of which succeeded: of all sets, or up to one that did not."""
    outcomes: list[AggregateOutcome] = []
    run = AggregatesRun(entry=entry, sets=tuple(sets), target_data=_tagged(target_data))
    for messages in _conversation(process, run, stop, start_timeout_s):
        for message in messages:
            if not isinstance(message, AggregateFinished):
                continue
            if len(outcomes) == len(sets) or message.param != sets[len(outcomes)].param:
                process.kill(Kill("protocol", f"it made an aggregate of set {message.param}"))
                return outcomes
            outcomes.append(_outcome(process, message))
    return outcomes


def make_table(
    process: RunnerProcess,
    entry: str,
    table: AggregateTable,
    *,
    target_data: Any,
    stop: StopSignal,
    start_timeout_s: float,
) -> ManyMade:
    """Return what the aggregates of the first sets of a table returned: of all sets, or up to one that failed."""
    made = ManyMade()
    if not process.takes_tables:
        return made
    run = AggregatesRun(entry=entry, sets=(), table=table, target_data=_tagged(target_data))
    for messages in _conversation(process, run, stop, start_timeout_s):
        for message in messages:
            if not isinstance(message, AggregatesMade):
                continue
            news = _news(process, message)
            if (
                news is None
                or message.param != table.param + len(made)
                or len(made) + len(news) > len(table.params)
            ):
                process.kill(Kill("protocol", f"it made an aggregate of set {message.param}"))
                return made
            for part in news.parts:
                made.add(part)
    return made


def _news(process: RunnerProcess, message: AggregatesMade) -> ManyMade | None:
    """Return what a message brings, None if it has values without a name, or not as many as names."""
    news = ManyMade()
    if message.made:
        news.add([(returned == "dict", _outputs(process, outputs)) for returned, outputs in message.made])
    if message.names:
        try:
            news.add(cells_of(message.names, bytes(message.data)))
        except ValueError:
            return None
    return news


def _tagged(target_data: Any) -> msgspec.Raw:
    return msgspec.Raw(values.dumps(target_data).encode())


def _conversation(
    process: RunnerProcess, run: AggregatesRun, stop: StopSignal, start_timeout_s: float
) -> Iterator[list[Message]]:
    """Yield messages until the request is answered, or the process is dead."""
    timeout_s = process.spec.replicate_timeout_s
    request_id = process.request(run)
    process.runs += 1
    start_s = 0.0 if run.entry in process.entries else start_timeout_s
    deadline = None if timeout_s is None else time.monotonic() + start_s + timeout_s
    with stop.waking(process.wake):
        while True:
            if stop.stopped:
                process.kill(Kill("cancelled", "the run was stopped"))
            messages = process.receive(deadline)
            dead = not messages and process.dead
            if dead:
                messages = process.receive_rest()
            yield messages
            if any(isinstance(message, AggregateFinished | AggregatesMade) for message in messages):
                process.entries.add(run.entry)
                deadline = None if timeout_s is None else time.monotonic() + timeout_s
            if dead or any(isinstance(m, Answer | Failure) and m.id == request_id for m in messages):
                return
            if messages:
                time.sleep(GATHER_S)
            if not messages and deadline is not None and time.monotonic() >= deadline:
                process.kill(Kill("timeout", ""))


def _outcome(process: RunnerProcess, made: AggregateFinished) -> AggregateOutcome:
    return AggregateOutcome(
        status=ReplicateStatus.SUCCEEDED,
        returned_dict=made.returned == "dict",
        outputs=_outputs(process, made.outputs),
        seconds=made.seconds,
        cpu_seconds=made.cpu,
    )


def _outputs(process: RunnerProcess, found: tuple[tuple[str, str, msgspec.Raw], ...]) -> tuple[Output, ...]:
    outputs = tuple([inline_json(output) or output_of(*output) for output in found])
    for _, _, data in outputs:
        if type(data) is SpooledFile:
            process.owned.add(data.path)
    return outputs
