"""Turn what a model returned into bytes, and back, exactly. Reference: ``docs/reference/values.md``.

Used on both sides. numpy, pandas, polars and pyarrow are touched only when a value is theirs, so that a
bundle without them pays nothing.
"""

from __future__ import annotations

import io
import math
import struct
import sys
from binascii import a2b_base64, b2a_base64
from json import JSONEncoder
from json import loads as _json_loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

MAX_DEPTH = 200
_NAN_BITS = "7ff8000000000000"
to_json = JSONEncoder(separators=(",", ":"), check_circular=False, allow_nan=False).encode
"""Compact ASCII JSON of a tree that JSON can hold; what frames are made of."""


class InvalidOutputError(Exception):
    """A value that cannot cross. ``str`` names its path and its type.

    Parameters
    ----------
    reason
        What is wrong with the value found at the path.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []  # innermost first

    def within(self, step: str) -> InvalidOutputError:
        """Add the step that led to the value."""
        self.path.append(step)
        return self

    def __str__(self) -> str:
        path = "".join(reversed(self.path)).lstrip(".")
        return f"{path}: {self.reason}" if path else self.reason


# --- the two doors -------------------------------------------------------------------------------


def encode(value: object) -> tuple[str, bytes]:
    """Return the kind and the bytes of a value.

    Raises
    ------
    InvalidOutputError
        The value, or something in it, cannot cross; the message says what and where.
    """
    sink = io.BytesIO()
    kind = write(value, sink)
    return kind, sink.getvalue()


def write(value: object, sink: Any) -> str:
    """Write the bytes of a value to a binary file, once; return the kind."""
    kind_and_writer = _writer_of(value)
    if kind_and_writer is None:
        sink.write(dumps(value).encode("ascii"))
        return "json"
    kind, writer = kind_and_writer
    writer(value, sink)
    return kind


def decode(kind: str, data: bytes) -> Any:
    """Return the value that has this kind and these bytes.

    Raises
    ------
    ValueError
        The kind is unknown or the bytes are damaged.
    ImportError
        The library that the value belongs to is not installed here.
    """
    try:
        reader = _READERS[kind]
    except KeyError:
        raise ValueError(f"{kind!r} is no kind of value; this version reads {', '.join(_READERS)}") from None
    return reader(data)


def dumps(value: object) -> str:
    """Return the tagged JSON of a value, ASCII only."""
    return to_json(tagged(value))


def loads(text: str | bytes) -> Any:
    """Return the value of tagged JSON."""
    return untagged(_json_loads(text))


# --- tagged JSON ---------------------------------------------------------------------------------


def tagged(value: Any, depth: int = 0) -> Any:
    """Return a tree that JSON can hold without loss."""
    kind = type(value)
    if kind is float:
        return value if value - value == 0.0 else {"$float": _special_float(value)}
    if value is None or kind is bool:
        return value
    if kind is str:
        return value if is_unicode(value) else {"$text": _base64(value.encode("utf-8", "surrogatepass"))}
    if kind is int:
        return value if -(2**63) <= value < 2**64 else {"$int": _decimal(value)}
    if depth > MAX_DEPTH:
        raise InvalidOutputError(f"it contains itself, or is nested deeper than {MAX_DEPTH} levels")
    if kind is list:
        return _tagged_items(value, depth)
    if kind is dict:
        return _tagged_dict(value, depth)
    if kind is tuple:
        return {"$tuple": _tagged_items(value, depth)}
    return _tagged_other(value, depth)


def _tagged_items(items: Any, depth: int) -> list[Any]:
    kinds = set(map(type, items))
    if kinds == {float} and math.isfinite(sum(items)):  # one that is not finite spoils the sum
        return list(items)
    if kinds <= {bool, type(None)}:
        return list(items)
    out = []
    try:
        for item in items:
            out.append(tagged(item, depth + 1))  # one by one: len(out) is the path of an error
    except InvalidOutputError as e:
        raise e.within(f"[{len(out)}]") from None
    return out


def _tagged_dict(value: dict[Any, Any], depth: int) -> Any:
    out = {}
    key: Any = None
    try:
        for key, item in value.items():
            if type(key) is not str or key[:1] == "$" or not is_unicode(key):
                break
            out[key] = tagged(item, depth + 1)
        else:
            return out
    except InvalidOutputError as e:
        raise e.within(f".{key}") from None
    return {"$dict": _tagged_pairs(value, depth)}


def _tagged_pairs(value: dict[Any, Any], depth: int) -> list[Any]:
    out = []
    for key, item in value.items():
        try:
            out.append([tagged(key, depth + 1), tagged(item, depth + 1)])
        except InvalidOutputError as e:
            raise e.within(f"[{shown(key)}]") from None
    return out


def _tagged_other(value: Any, depth: int) -> Any:
    """Handle all other types; numpy scalars first, because some are subclasses of float and str."""
    np = sys.modules.get("numpy")
    if np is not None and isinstance(value, np.generic):
        return _tagged_numpy(np, value)
    if type(value) is complex:
        return {"$complex": [tagged(value.real), tagged(value.imag)]}
    kind_and_writer = _writer_of(value)
    if kind_and_writer is not None:
        kind, writer = kind_and_writer
        sink = io.BytesIO()
        writer(value, sink)
        text = _base64(sink.getbuffer())
        return {"$arrow": [kind, text]} if kind.startswith("arrow") else {"$" + kind: text}
    for base in (dict, list, tuple, str, int, float):  # subclasses come back as what they extend
        if isinstance(value, base):
            return tagged(_BASE_COPY[base](value), depth)
    raise InvalidOutputError(f"a {type_name(value)} cannot be returned; {_HINT}")


_BASE_COPY: dict[type, Callable[[Any], Any]] = {
    dict: lambda v: dict(dict.items(v)),
    list: lambda v: list(list.__iter__(v)),
    tuple: lambda v: tuple(tuple.__iter__(v)),
    str: str.__str__,
    int: lambda v: int.__add__(v, 0),
    float: lambda v: float.__pos__(v),
}
_HINT = (
    "return None, bool, int, float, text, bytes, lists, tuples and dicts of these, NumPy arrays, "
    "pandas, polars or Arrow tables"
)


def untagged(tree: Any) -> Any:
    """Return the value of a tagged tree, made of new objects throughout."""
    if type(tree) is dict:
        if len(tree) == 1:
            (key,) = tree
            if key[:1] == "$":
                return _untag(key, tree[key])
        return {key: untagged(item) for key, item in tree.items()}
    if type(tree) is list:
        return [untagged(item) for item in tree]
    return tree


def _untag(tag: str, data: Any) -> Any:
    try:
        reader = _TAGS[tag]
    except KeyError:
        raise ValueError(f"{tag!r} is no tag that this version reads") from None
    return reader(data)


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can hold the text: lone surrogates are in Python's text, and in no one else's."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _base64(data: Any) -> str:
    return b2a_base64(data, newline=False).decode("ascii")


def _special_float(value: float) -> str:
    if value == math.inf:
        return "inf"
    if value == -math.inf:
        return "-inf"
    bits = struct.pack(">d", value).hex()
    return "nan" if bits == _NAN_BITS else bits


def _read_float(text: str) -> float:
    if len(text) == 16:
        return struct.unpack(">d", bytes.fromhex(text))[0]  # type: ignore[no-any-return]
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"{text!r} is no tagged float")
    return float(text)


def _decimal(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # Python refuses decimal text of very large integers (sys.set_int_max_str_digits)
        return hex(value)


def _read_int(text: str) -> int:
    return int(text, 16) if "x" in text else int(text)


def _read_f8(data: bytes) -> float:
    if len(data) != 8:
        raise ValueError(f"a float is 8 bytes, not {len(data)}")
    return struct.unpack("<d", data)[0]  # type: ignore[no-any-return]


# --- numpy ---------------------------------------------------------------------------------------


def _tagged_numpy(np: Any, value: Any) -> Any:
    if isinstance(value, np.str_):
        return {"$np": ["U", tagged(str.__str__(value))]}  # an array would drop NULs at its end
    if isinstance(value, np.bytes_):
        return {"$np": ["S", _base64(bytes(value))]}
    dtype = value.dtype
    plain = dtype.kind in "biu" or (dtype.kind == "f" and dtype.itemsize <= 8 and np.isfinite(value))
    if plain and type(value) is dtype.type:
        item = value.item()
        if type(item) in (bool, int, float):
            return {"$np": [dtype.str, item]}
    sink = io.BytesIO()
    _write_npy(value, sink)
    return {"$npy0": _base64(sink.getbuffer())}


def _write_npy(value: Any, sink: Any) -> None:
    np = sys.modules["numpy"]
    dtype = value.dtype
    if dtype.hasobject:
        raise InvalidOutputError(
            f"a {type_name(value)} of dtype {dtype} cannot be returned; convert it to a typed array"
        )
    form = np.lib.format
    try:
        exact = form.descr_to_dtype(form.dtype_to_descr(dtype)) == dtype
    except (ValueError, TypeError, AttributeError):
        exact = False
    if not exact:
        raise InvalidOutputError(
            f"a {type_name(value)} of dtype {dtype} has no exact form in .npy; convert it first"
        )
    array = np.asarray(value)
    try:
        form.write_array(sink, array, version=(1, 0), allow_pickle=False)
    except ValueError:  # a header beyond 64 KiB or Latin-1: nothing is written before that is known
        form.write_array(sink, array, version=(3, 0), allow_pickle=False)


def _read_npy(data: bytes) -> Any:
    form = _library("numpy", "a NumPy array").lib.format
    try:
        return form.read_array(io.BytesIO(data), allow_pickle=False, max_header_size=2**24)
    except TypeError:  # numpy before 1.24 has no limit
        return form.read_array(io.BytesIO(data), allow_pickle=False)


def _read_np(pair: Any) -> Any:
    np = _library("numpy", "a NumPy scalar")
    dtype, item = pair
    if dtype == "U":
        return np.str_(untagged(item))
    if dtype == "S":
        return np.bytes_(a2b_base64(item))
    return np.dtype(dtype).type(item) if dtype[0] in "<|=" else np.array(item, dtype)[()]


# --- bytes, Arrow, and who writes what ------------------------------------------------------------


def _write_bytes(value: Any, sink: Any) -> None:
    sink.write(value)


def _writer_of(value: Any) -> tuple[str, Callable[[Any, Any], None]] | None:
    """Return the kind and the writer of a value that is no JSON; None if it is, or cannot cross at all."""
    kind = type(value)
    if kind is bytes or kind is bytearray:
        return kind.__name__, _write_bytes
    if kind.__module__ == "builtins":
        return None
    np = sys.modules.get("numpy")
    if np is not None:
        if kind is np.ndarray or kind is np.memmap:
            return "npy", _write_npy
        if isinstance(value, np.ndarray):
            raise InvalidOutputError(
                f"a {type_name(value)} cannot be returned; return numpy.asarray(...) of it"
            )
        if isinstance(value, np.generic):
            tree = _tagged_numpy(np, value)
            return ("npy0", _write_npy) if "$npy0" in tree else None
    if kind.__module__.partition(".")[0] in ("pandas", "polars", "pyarrow"):
        from modelops_runner import tables

        return tables.writer_of(value)
    return None


def _read_table(kind: str) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        from modelops_runner import tables

        return tables.read(kind, data)

    return read


def _library(name: str, what: str) -> Any:
    try:
        __import__(name)
    except ImportError as e:
        raise ImportError(f"this value is {what}; install {name} to read it", name=name) from e
    return sys.modules[name]


def type_name(value: object) -> str:
    """Return the name by which people know the type: ``set``, ``pandas.DataFrame``, ``seir.State``."""
    kind = type(value)
    root = kind.__module__.partition(".")[0]
    if root == "builtins":
        return kind.__qualname__
    return (
        f"{root if root in ('numpy', 'pandas', 'polars', 'pyarrow') else kind.__module__}.{kind.__qualname__}"
    )


def shown(key: object) -> str:
    """Return the start of an object's repr, whatever its class makes of it."""
    try:
        return repr(key)[:80]
    except Exception:  # noqa: BLE001  the bundle's own __repr__
        return f"a {type_name(key)}"


_ARROW = (
    "arrow",
    "arrow.batch",
    "arrow.array",
    "arrow.pandas",
    "arrow.pandas.series",
    "arrow.polars",
    "arrow.polars.series",
)
_READERS: dict[str, Callable[[bytes], Any]] = {
    "json": loads,
    "bytes": bytes,
    "bytearray": bytearray,
    "f8": _read_f8,
    "npy": _read_npy,
    "npy0": lambda data: _read_npy(data)[()],
    **{kind: _read_table(kind) for kind in _ARROW},
}
_TAGS: dict[str, Callable[[Any], Any]] = {
    "$float": _read_float,
    "$int": _read_int,
    "$tuple": lambda items: tuple(untagged(items)),
    "$dict": lambda pairs: {untagged(k): untagged(v) for k, v in pairs},
    "$text": lambda text: a2b_base64(text).decode("utf-8", "surrogatepass"),
    "$complex": lambda pair: complex(*untagged(pair)),
    "$np": _read_np,
    "$bytes": a2b_base64,
    "$bytearray": lambda text: bytearray(a2b_base64(text)),
    "$npy": lambda text: _read_npy(a2b_base64(text)),
    "$npy0": lambda text: _read_npy(a2b_base64(text))[()],
    "$arrow": lambda pair: decode(pair[0], a2b_base64(pair[1])),
}
KINDS = tuple(_READERS)
