"""Make the aggregates of many small parameter sets in one request, as long as they succeed.

What this cannot do is left to whoever asked: an aggregate that fails, kills its process or takes too long has no
outcome here, nor have those behind it. Made by itself (`AggregateRun`), it gets one that says why.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from modelops.processes.chunk import inline_json, output_of
from modelops.processes.outcome import AggregateOutcome, SpooledFile
from modelops.processes.process import Kill
from modelops.rpc import AggregateFinished, AggregatesRun, Answer, Failure
from modelops.states import ReplicateStatus
from modelops_runner import values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.processes.process import RunnerProcess
    from modelops.processes.stop import StopSignal
    from modelops.rpc import AggregateSet


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
    timeout_s = process.spec.replicate_timeout_s
    request_id = process.request(
        AggregatesRun(
            entry=entry, sets=tuple(sets), target_data=msgspec.Raw(values.dumps(target_data).encode())
        )
    )
    process.runs += 1
    start_s = 0.0 if entry in process.entries else start_timeout_s
    deadline = None if timeout_s is None else time.monotonic() + start_s + timeout_s
    with stop.waking(process.wake):
        while True:
            if stop.stopped:
                process.kill(Kill("cancelled", "the run was stopped"))
            messages = process.receive(deadline)
            dead = not messages and process.dead
            if dead:
                messages = process.receive_rest()
            for message in messages:
                if isinstance(message, AggregateFinished):
                    if len(outcomes) == len(sets) or message.param != sets[len(outcomes)].param:
                        process.kill(Kill("protocol", f"it made an aggregate of set {message.param}"))
                        return outcomes
                    outcomes.append(_outcome(process, message))
                    process.entries.add(entry)
                    deadline = None if timeout_s is None else time.monotonic() + timeout_s
                elif isinstance(message, Answer | Failure) and message.id == request_id:
                    return outcomes
            if dead:
                return outcomes
            if messages:
                time.sleep(GATHER_S)
            if not messages and deadline is not None and time.monotonic() >= deadline:
                process.kill(Kill("timeout", ""))


def _outcome(process: RunnerProcess, made: AggregateFinished) -> AggregateOutcome:
    outputs = tuple([inline_json(output) or output_of(*output) for output in made.outputs])
    process.owned.update([data.path for _, _, data in outputs if type(data) is SpooledFile])
    return AggregateOutcome(
        status=ReplicateStatus.SUCCEEDED,
        returned_dict=made.returned == "dict",
        outputs=outputs,
        seconds=made.seconds,
        cpu_seconds=made.cpu,
    )
