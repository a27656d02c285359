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
MAX_NAMES = 1_000  # of outputs that are sent without their names


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
        self._plain_made: list[str] = []  # values, of `_plain_names` again and again
        self._plain_names: tuple[str, ...] = ()
        self._known_names: tuple[str, ...] = ()  # of the last dict; that they can be names is known
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
                made = called(one, params, self._data[at:end])
            except RpcError:
                self._send()
                return self._n_sent, False
            at = end
            self._take(made)
            if self._n_bytes > SENT_BYTES or perf_counter() - self._sent_at > SILENT_S:
                self._send()
            if identifier in channel.cancelled or channel.ended:
                break
        self._send()
        return self._n_sent, self._n_sent == len(self._params)

    def _take(self, made: tuple[str, str] | list[str]) -> None:
        if type(made) is list:
            if self._made or self._plain_names is not self._known_names:
                self._send()
            self._plain_names = self._known_names
            self._plain_made += made
            self._n_bytes += sum(map(len, made))
        else:
            if self._plain_made:
                self._send()
            returned, outputs = made
            self._made.append(f'["{returned}",{outputs}]')
            self._n_bytes += len(outputs)

    def _one(self, params: dict[str, Any], data: bytes) -> tuple[str, str] | list[str]:
        names = self._names
        rows = [dict(zip(names, row)) for row in iter_unpack(f"<{len(names)}d", data)]
        if not self._plain:
            own, target_data = values.untagged(params), values.untagged(self._target_data)
            aggregate = aggregates.Aggregate(self._function, False, own, target_data)
            for row in rows:
                aggregate.take(row)
            return self._outputs(aggregate.finish())
        given = {}
        if self._wants_params:
            given["params"] = values.untagged(params)
        if self._wants_data:
            given["target_data"] = values.untagged(self._target_data)
        return self._outputs(self._function(rows, **given))

    def _outputs(self, result: Any) -> tuple[str, str] | list[str]:
        """Return the values of a dict that has the names of the one before and plain values, else kind and outputs."""
        if type(result) is not dict:
            return self._replicates.outputs(result)
        names = tuple(result)
        if names and names == self._known_names:
            plain = plain_values(result)
            if plain is not None:
                return plain
        made = self._replicates.outputs(result)
        if names != self._known_names and len(names) <= MAX_NAMES:
            self._known_names = names
        return made

    def _send(self) -> None:
        first = self._param + self._n_sent
        if self._plain_made:
            names, data = values.to_json(list(self._plain_names)), ",".join(self._plain_made)
            self._channel.send(
                f'{{"jsonrpc":"2.0","method":"aggregates/made","params":{{"param":{first},"names":{names},"data":[{data}]}}}}'
            )
            self._n_sent += len(self._plain_made) // len(self._plain_names)
            self._plain_made.clear()
        if self._made:
            self._channel.send(
                f'{{"jsonrpc":"2.0","method":"aggregates/made","params":{{"param":{first},"made":[{",".join(self._made)}]}}}}'
            )
            self._n_sent += len(self._made)
            self._made.clear()
        self._n_bytes, self._sent_at = 0, perf_counter()


def plain_values(result: dict[Any, Any]) -> list[str] | None:
    """Return the JSON of the values of a dict, if its names are text and they are numbers, truth values or None."""
    found = []
    for name, value in result.items():
        kind = type(value)
        if type(name) is not str:
            return None
        if (kind is float and value - value == 0.0) or (kind is int and -(2**63) <= value < 2**64):
            found.append(repr(value))
        elif kind is bool:
            found.append("true" if value else "false")
        elif value is None:
            found.append("null")
        else:
            return None
    return found
