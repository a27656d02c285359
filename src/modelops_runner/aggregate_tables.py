"""Aggregates of many parameter sets whose replicates returned floats of the same names: one table in, few messages out.

What is made is kept for some milliseconds and sent together: an aggregate can be made again, so none is lost that way.
"""

from __future__ import annotations

from struct import iter_unpack
from time import perf_counter

from modelops_runner import aggregates, values
from modelops_runner.channel import INVALID_PARAMS, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from modelops_runner.channel import Channel
    from modelops_runner.replicates import Replicates

SILENT_S = 5e-3  # what is made later than so long after a message is sent with what was made before
SENT_BYTES = 64 * 1024


class AggregateTable:
    """Makes the aggregates of one request.

    Parameters
    ----------
    table
        As in the request: ``param``, ``params``, ``names``, ``counts``, ``floats``.
    """

    def __init__(
        self,
        replicates: Replicates,
        channel: Channel,
        function: Any,
        table: dict[str, Any],
        target_data: object,
    ) -> None:
        self._replicates, self._channel = replicates, channel
        self._function, self._target_data = function, target_data
        self._plain = not aggregates.is_incremental(function)
        wanted = aggregates.parameter_names(function)[1:] if self._plain else ()
        self._wants_params, self._wants_data = "params" in wanted, "target_data" in wanted
        self._names, self._param = table["names"], table["param"]
        self._params, self._counts = table["params"], table["counts"]
        self._data = bytes.fromhex(table["floats"])
        if len(self._params) != len(self._counts) or len(self._data) != 8 * len(self._names) * sum(
            self._counts
        ):
            raise RpcError(INVALID_PARAMS, "a table of aggregates that has not what it counts")
        self._made: list[str] = []
        self._n_bytes = 0
        self._n_sent = 0
        self._sent_at = perf_counter()

    def run(self, identifier: object) -> tuple[int, bool]:
        """Make one after another; return how many were made and sent, and whether that is all."""
        channel, called, one, width, at = (
            self._channel,
            self._replicates.called,
            self._one,
            8 * len(self._names),
            0,
        )
        for params, count in zip(self._params, self._counts):
            end = at + count * width
            try:
                returned, outputs = called(one, params, self._data[at:end])
            except RpcError:
                self._send()
                return self._n_sent, False
            at = end
            self._made.append(f'["{returned}",{outputs}]')
            self._n_bytes += len(outputs)
            if self._n_bytes > SENT_BYTES or perf_counter() - self._sent_at > SILENT_S:
                self._send()
            if identifier in channel.cancelled or channel.ended:
                break
        self._send()
        return self._n_sent, self._n_sent == len(self._params)

    def _one(self, params: dict[str, Any], data: bytes) -> tuple[str, str]:
        names = self._names
        rows = [dict(zip(names, row)) for row in iter_unpack(f"<{len(names)}d", data)]
        if not self._plain:
            own, target_data = values.untagged(params), values.untagged(self._target_data)
            aggregate = aggregates.Aggregate(self._function, False, own, target_data)
            for row in rows:
                aggregate.take(row)
            return self._replicates.outputs(aggregate.finish())
        given = {}
        if self._wants_params:
            given["params"] = values.untagged(params)
        if self._wants_data:
            given["target_data"] = values.untagged(self._target_data)
        return self._replicates.outputs(self._function(rows, **given))

    def _send(self) -> None:
        if self._made:
            first = self._param + self._n_sent
            self._channel.send(
                f'{{"jsonrpc":"2.0","method":"aggregates/made","params":{{"param":{first},"made":[{",".join(self._made)}]}}}}'
            )
            self._n_sent += len(self._made)
            self._made.clear()
        self._n_bytes, self._sent_at = 0, perf_counter()
