"""Aggregates: what a function makes of all succeeded replicates of one parameter set."""

from __future__ import annotations

from struct import iter_unpack

from modelops_runner import values
from modelops_runner.entrypoints import resolve
from modelops_runner.spool import read_output
from modelops_runner.values import InvalidOutputError

_INCREMENTAL = ("start", "add", "finish")
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def find(entry: str, *, wire: bool) -> Any:
    """Import an aggregate's entry point; the wire convention may write ``/`` for ``:``."""
    return resolve(entry.replace("/", ":") if wire and ":" not in entry else entry)


class Aggregate:
    """One aggregate being fed. Three kinds of entry point share this shape.

    - ``function(replicates)``: called once with the list. If it has parameters named ``params`` or
      ``target_data``, it gets those too.
    - an object with ``start``, ``add`` and ``finish``: ``state = start(params)``,
      ``state = add(state, replicate)`` for each (None: it changed the state in place), ``finish(state)``.
      A class is made an instance first. Memory does not grow with the replicates. Whatever else it has, ``merge``
      for instance, is not used: one state takes all replicates, in their order.
    - by the wire convention ``target(sim_returns, target_data)``.
    """

    def __init__(self, function: Any, wire: bool, params: dict[str, Any], target_data: Any) -> None:
        self._function = function
        self._wire, self._params, self._target_data = wire, params, target_data
        self._rows: list[Any] = []
        self.incremental = not wire and is_incremental(function)
        if self.incremental:
            if isinstance(self._function, type):
                self._function = self._function()
            self._state = self._function.start(params)

    def add(self, index: int, returned: str, outputs: list[list[Any]]) -> None:
        """Take the outputs of one replicate."""
        decoded = {name: read_output(kind, data) for name, kind, data in outputs}
        if self._wire:
            self._rows.append(_sim_return(index, decoded))
            return
        self.take(decoded["value"] if returned == "value" else decoded)

    def add_floats(self, names: list[str], text: str) -> None:
        """Take the outputs of replicates that returned floats of these names and nothing else."""
        for row in iter_unpack(f"<{len(names)}d", bytes.fromhex(text)):
            self.take(dict(zip(names, row)))

    def take(self, replicate: Any) -> None:
        """Take what a replicate returned; not by the wire convention."""
        if not self.incremental:
            self._rows.append(replicate)
            return
        state = self._function.add(self._state, replicate)
        if state is not None:
            self._state = state

    def finish(self) -> Any:
        """Return what the aggregate returns."""
        if self.incremental:
            return self._function.finish(self._state)
        rows, self._rows = self._rows, []
        if self._wire:
            args = (rows, self._target_data) if _takes_two(self._function) else (rows,)
            return _with_loss(self._function(*args))
        offered = {"params": self._params, "target_data": self._target_data}
        wanted = parameter_names(self._function)[1:]
        return self._function(rows, **{name: value for name, value in offered.items() if name in wanted})


def is_incremental(function: Any) -> bool:
    """Say whether an aggregate is fed replicate by replicate; refuse one that only looks like it."""
    has = [name for name in _INCREMENTAL if hasattr(function, name)]
    if len(has) == len(_INCREMENTAL):
        return True
    if has and (isinstance(function, type) or not callable(function)):
        lacks = " and ".join(name for name in _INCREMENTAL if name not in has)
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"an incremental aggregate has start(params), add(state, replicate) and finish(state); "
            f"{name} has no {lacks}"
        )
    return False


def parameter_names(function: Any) -> tuple[str, ...]:
    """Return the names of what a function takes; the last one asked for is known, as it takes long to find out."""
    global _last
    if _last[0] is not function:
        import inspect

        try:
            names = tuple(inspect.signature(function).parameters)
        except (TypeError, ValueError):  # a builtin without a signature
            names = ()
        _last = function, names
    return _last[1]


_last: tuple[Any, tuple[str, ...]] = None, ()


def _takes_two(target: Any) -> bool:
    """Return whether a target has room for ``target_data`` behind ``sim_returns``."""
    import inspect

    try:
        inspect.signature(target).bind([], None)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def _with_loss(returned: Any) -> Any:
    """Return what a target returned, if it is what the wire convention says: a dict with a number ``loss``."""
    from numbers import Real

    if not isinstance(returned, dict) or "loss" not in returned:
        what = f"a dict without it: {sorted(map(str, returned))}" if isinstance(returned, dict) else ""
        raise InvalidOutputError(
            f"a target returns a dict with the number 'loss', not {what or 'a ' + values.type_name(returned)}"
        )
    loss = returned["loss"]
    if isinstance(loss, bool) or not isinstance(loss, Real):
        raise InvalidOutputError(f"it is a number, not a {values.type_name(loss)}").within(".loss")
    return returned


def _sim_return(index: int, outputs: dict[str, Any]) -> dict[str, Any]:
    from binascii import b2a_base64
    from hashlib import blake2b

    def artifact(data: bytes) -> dict[str, Any]:
        return {
            "size": len(data),
            "checksum": blake2b(data, digest_size=32).hexdigest(),
            "inline": b2a_base64(data, newline=False).decode("ascii"),
        }

    return {
        "task_id": str(index),
        "outputs": {name: artifact(_as_bytes(value)) for name, value in outputs.items()},
    }


def _as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else values.dumps(value).encode("ascii")
