"""How the bundle's functions are called: with or without a context, directly or through the wire function."""

from __future__ import annotations

from modelops_runner import values
from modelops_runner.entrypoints import EntryPoint, resolve, wire_function
from modelops_runner.values import InvalidOutputError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    Model = Callable[..., Any]  # (params, seed) or (params, seed, context)

_FUNCTION = type(lambda: None)
_VARARGS = 0x04  # inspect.CO_VARARGS


def model(entry: str, *, wire: bool, root: str) -> tuple[Model, bool]:
    """Return what to call for each replicate, and whether it takes a context."""
    if wire:
        return _through_wire(wire_function(root), EntryPoint(entry)), False
    found = resolve(entry)
    return found, takes_context(found)


def takes_context(function: Any) -> bool:
    """Return whether a model wants the context: its third parameter is required or called ``context``.

    A third parameter with a default and another name is the author's own, and is left alone.
    """
    code: Any = getattr(function, "__code__", None)
    if type(function) is _FUNCTION and not hasattr(function, "__wrapped__") and not code.co_flags & _VARARGS:
        if code.co_argcount < 3:
            return False
        required = code.co_argcount - len(function.__defaults__ or ())
        return bool(required >= 3 or code.co_varnames[2] == "context")
    import inspect

    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 3 and (
        positional[2].default is inspect.Parameter.empty or positional[2].name == "context"
    )


def _through_wire(wire: Callable[..., Any], entry: EntryPoint) -> Model:
    def call(params: dict[str, Any], seed: int) -> dict[str, bytes]:
        result = wire(entry, params, seed)
        if not isinstance(result, dict):
            raise InvalidOutputError(
                f"a wire function returns a dict of bytes, not a {values.type_name(result)}"
            )
        return {_name(name): _wire_bytes(name, value) for name, value in result.items()}

    return call


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise InvalidOutputError(f"an output's name is text, not a {values.type_name(name)} ({name!r})")
    return name


def _wire_bytes(name: str, value: Any) -> bytes:
    """Return bytes as they are, text as UTF-8, anything else as plain JSON: the wire convention's rule."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    import json

    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError) as e:
        raise InvalidOutputError(f"it is neither bytes nor text nor JSON: {e}").within(f".{name}") from None
