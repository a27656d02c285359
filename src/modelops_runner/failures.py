"""Describe what the bundle's code raised: type, message, traceback from the bundle's first frame on."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

    from modelops_runner.values import InvalidOutputError

MAX_TYPE_CHARS = 500
MAX_MESSAGE_CHARS = 16 * 1024
MAX_TRACEBACK_CHARS = 64 * 1024
_HERE = os.path.dirname(__file__)


def error_object(error: BaseException, roots: tuple[str, ...]) -> dict[str, Any]:
    """Return the error object of the protocol.

    Parameters
    ----------
    error
        What was raised.
    roots
        Absolute folders of the bundle: the snapshot, and the working directory that mirrors it.
    """
    kind = type(error)
    tb = _without_runner(error.__traceback__)
    file, line = _place(error, tb, roots)
    out = {
        "type": _cut(
            kind.__qualname__
            if kind.__module__ in ("builtins", "__main__")
            else f"{kind.__module__}.{kind.__qualname__}",
            MAX_TYPE_CHARS,
        ),
        "message": _cut(_message(error), MAX_MESSAGE_CHARS),
        "traceback": _cut(_relative(_format(error, tb), roots), MAX_TRACEBACK_CHARS),
        "file": file,
        "line": line,
    }
    missing = _missing_module(error, roots)
    if missing is not None:
        out["missing_module"] = missing
    return out


def invalid_output(error: InvalidOutputError) -> dict[str, Any]:
    """Return the error object of a value that cannot cross: the fault lies in it, not in a line of code."""
    return {
        "type": "InvalidOutput",
        "message": _cut(str(error), MAX_MESSAGE_CHARS),
        "traceback": "",
        "file": "",
        "line": 0,
    }


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as e:  # noqa: BLE001  the bundle's own __str__
        return f"<str() of the exception raised {type(e).__name__}>"


def _without_runner(tb: TracebackType | None) -> TracebackType | None:
    first = tb
    while first is not None and os.path.dirname(first.tb_frame.f_code.co_filename) == _HERE:
        first = first.tb_next
    return first


def _format(error: BaseException, tb: TracebackType | None) -> str:
    import traceback

    try:
        return "".join(traceback.format_exception(type(error), error, tb))
    except BaseException:  # noqa: BLE001  an exception can be built so that even formatting it fails
        return (
            "Traceback (most recent call last):\n" + "".join(traceback.format_tb(tb)) + type(error).__name__
        )


def _place(error: BaseException, tb: TracebackType | None, roots: tuple[str, ...]) -> tuple[str, int]:
    places = []
    while tb is not None:
        places.append((tb.tb_frame.f_code.co_filename, tb.tb_lineno or 0))
        tb = tb.tb_next
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno or 0))
    if not places:
        return "", 0
    inside = [place for place in places if _inside(place[0], roots)]
    file, line = (inside or places)[-1]
    return _strip(file, roots), line


def _inside(path: str, roots: tuple[str, ...]) -> bool:
    return any(path.startswith(root + os.sep) for root in roots)


def _strip(path: str, roots: tuple[str, ...]) -> str:
    for root in roots:
        if path.startswith(root + os.sep):
            return path[len(root) + 1 :]
    return path


def _relative(text: str, roots: tuple[str, ...]) -> str:
    for root in roots:
        text = text.replace(f'File "{root}{os.sep}', 'File "')
    return text


def _missing_module(error: BaseException, roots: tuple[str, ...]) -> str | None:
    """Return the module that nobody could import, if that is what the failure comes down to."""
    seen = 0
    cause: BaseException | None = error
    missing = None
    while cause is not None and seen < 20:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            missing = cause.name
        # "raise ImportError('install x') from e" and "except ImportError: raise ImportError(...)" alike.
        cause = cause.__cause__ or (cause.__context__ if isinstance(cause, ImportError) else None)
        seen += 1
    if missing is None:
        return None
    top = missing.partition(".")[0]
    own = getattr(sys.modules.get(top), "__file__", None) or ""
    return None if _inside(own, roots) else missing  # a missing part of the bundle itself is no dependency


def _cut(text: str, limit: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not JSON to everyone
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
