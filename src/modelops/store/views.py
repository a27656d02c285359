"""The view: from stored outputs to columns.

A scalar output is a column when all its rows are int64, all float64, all bool or all text, exactly;
otherwise it is left out, and the reason is recorded. The rules are in docs/reference/results.md.

Numbers are classified by their first byte and by whether they contain ``.``, ``e`` or ``E``, and cast
by Arrow, a whole column at a time. What is not plain JSON (tagged, escaped, ``npy0``) is decoded value
by value, except plain numpy scalars, which a pattern recognizes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modelops.store import columns
from modelops.store.segment_body import FLOAT, FLOAT_BYTES
from modelops_runner import values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

ARROW_TYPES: Final = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "text": pa.large_string(),
}
TOO_LARGE: Final = "values over 64 KiB"
_NUMBER, _TEXT, _BOOL, _OTHER = range(4)
_CLASS: Final = np.full(256, _OTHER, np.uint8)
_CLASS[[*b"-0123456789"]] = _NUMBER
_CLASS[ord('"')] = _TEXT
_CLASS[[*b"tf"]] = _BOOL
_NUMPY: Final = r'^\{"\$np":\["[<>|]?(?P<kind>[bfiu])[1248]",(?P<value>-?[0-9][0-9.eE+-]*|true|false)\]\}$'
_TAG: Final = re.compile(rb'\{\s*"\$([a-z0-9]+)"\s*:')
_TAG_LABELS: Final = {
    b"tuple": "tuples",
    b"dict": "dicts",
    b"complex": "complex numbers",
    b"bytes": "bytes",
    b"bytearray": "bytes",
    b"npy": "arrays",
    b"arrow": "tables",
}
_KIND_LABELS: Final = {"npy": "arrays", "bytes": "bytes", "bytearray": "bytes"}


class Cells(NamedTuple):
    """One output in some rows of a table.

    ``row``: int64, the rows that have it, ascending. ``kind``: the kind of all, or of each.
    ``data``: large_binary, null where the value lies in a pack; or float64, of kind ``f8``.
    """

    row: npt.NDArray[np.int64]
    kind: str | list[str]
    data: pa.Array


class Column(NamedTuple):
    """What the values of an output are. ``values``: in the order of the cells, if they can be a column."""

    labels: frozenset[str]
    values: pa.Array | None


def convert(cells: Cells) -> Column:
    """Classify the values of an output, and convert them if all are of one type that a column can have."""
    data = cells.data
    if data.type == pa.float64():
        return Column(frozenset(["float64"]), data)
    if cells.kind == FLOAT and not data.null_count and (floats := _floats(data)) is not None:
        return Column(frozenset(["float64"]), floats)
    if cells.kind != "json" or data.null_count:
        return _convert_slowly(cells)
    first = _first_bytes(data)
    classes = _CLASS[first]
    if not len(classes) or (classes == classes[0]).all():
        return _convert_uniform(cells, int(classes[0]) if len(classes) else _OTHER)
    return _convert_numbers_and_others(cells, classes)


def _floats(data: pa.Array) -> pa.Array | None:
    """Return floats that are stored as their bits; None if some have another length."""
    starts, sizes = columns.starts_and_sizes(data)
    if not len(sizes) or (sizes != FLOAT_BYTES).any():
        return None
    first, size = int(starts[0]), len(sizes) * FLOAT_BYTES
    bits = np.frombuffer(data.buffers()[2].slice(first, size), "<f8")
    return columns.fixed(bits.astype(np.float64, copy=False), pa.float64())


def _convert_uniform(cells: Cells, what: int) -> Column:
    texts = cells.data.cast(pa.large_string(), safe=False)
    if what == _NUMBER:
        return _numbers(texts) or _convert_slowly(cells)
    if what == _BOOL:
        return Column(frozenset(["bool"]), pc.equal(texts, "true"))
    if what == _TEXT:
        if pc.any(pc.match_substring(texts, "\\")).as_py():
            return _convert_slowly(cells)
        return Column(frozenset(["text"]), pc.utf8_slice_codeunits(texts, 1, -1))
    return _numpy_scalars(texts) or _convert_slowly(cells)


def _numbers(texts: pa.Array) -> Column | None:
    """Convert JSON numbers; None if they need a closer look (mixed, or beyond int64)."""
    if len(texts) == 0:
        return None
    fractional = pc.match_substring(texts, ".")
    if not pc.all(fractional).as_py():
        fractional = pc.or_(fractional, pc.match_substring(texts, "e", ignore_case=True))
    label = "float64" if pc.all(fractional).as_py() else "int64"
    if label == "int64" and pc.any(fractional).as_py():
        return (
            Column(frozenset(["int64", "float64"]), None)
            if _fit_int64(texts.filter(pc.invert(fractional)))
            else None
        )
    try:
        return Column(frozenset([label]), texts.cast(ARROW_TYPES[label]))
    except pa.ArrowInvalid:
        return None


def _fit_int64(texts: pa.Array) -> bool:
    try:
        texts.cast(pa.int64())
    except pa.ArrowInvalid:
        return False
    return True


def _numpy_scalars(texts: pa.Array) -> Column | None:
    """Convert ``{"$np":["<f8",0.1]}`` and its like if all of them are; None if not."""
    found = pc.extract_regex(texts, _NUMPY)
    if found.null_count:
        return None
    kinds = set(found.field("kind").unique().to_pylist())
    numbers = found.field("value")
    try:
        if kinds == {"f"}:
            return Column(frozenset(["float64"]), numbers.cast(pa.float64()))
        if kinds <= {"i", "u"}:
            return Column(frozenset(["int64"]), numbers.cast(pa.int64()))
    except pa.ArrowInvalid:
        return None
    return Column(frozenset(["bool"]), pc.equal(numbers, "true")) if kinds == {"b"} else None


def _convert_numbers_and_others(cells: Cells, classes: npt.NDArray[np.uint8]) -> Column:
    """Convert floats of which some are tagged (NaN, infinities), the common mixture; else go slowly."""
    plain = classes == _NUMBER
    if plain.any():
        numbers = _numbers(_take(cells.data, plain).cast(pa.large_string(), safe=False))
        others = _convert_slowly(Cells(cells.row[~plain], "json", _take(cells.data, ~plain)))
        if numbers is not None and numbers.labels == others.labels == {"float64"}:
            merged = np.empty(len(plain), np.float64)
            merged[plain] = columns.fixed_values(numbers.values)
            merged[~plain] = columns.fixed_values(others.values)
            return Column(others.labels, columns.fixed(merged, pa.float64()))
    return _convert_slowly(cells)


def _convert_slowly(cells: Cells) -> Column:
    """Decode value by value, each distinct one once."""
    read: dict[tuple[str, bytes], tuple[str, Any]] = {}
    labels: set[str] = set()
    out: list[Any] = []
    inline = columns.bool_values(cells.data.is_valid()).tolist() if cells.data.null_count else None
    for i, data in enumerate(columns.binary_values(cells.data)):
        kind = cells.kind if isinstance(cells.kind, str) else cells.kind[i]
        if inline is not None and not inline[i]:
            labels.add(dropped_label(kind, None))
            continue
        known = read.get((kind, data))
        if known is None:
            known = _read(kind, data)
            if len(read) < 10_000:
                read[kind, data] = known
        labels.add(known[0])
        out.append(known[1])
    if len(labels) == 1 and (label := next(iter(labels))) in ARROW_TYPES:
        return Column(frozenset(labels), _BUILD[label](out))
    return Column(frozenset(labels), None)


def _read(kind: str, data: bytes) -> tuple[str, Any]:
    """Return what a value is called in a reason, and the value if a column can hold it."""
    if kind == "json":
        data = data.lstrip()
        if data[:1] == b"[":
            return "lists", None
        if data[:1] == b"{":
            tag = _TAG.match(data)
            if tag is None or tag[1] in _TAG_LABELS:
                return ("dicts" if tag is None else _TAG_LABELS[tag[1]]), None
    elif kind not in (FLOAT, "npy0"):
        return _KIND_LABELS.get(kind, "tables"), None
    try:
        return _scalar(values.decode(kind, data))
    except ValueError:  # a tag of a newer runner, or of one that is not ours
        return "values that this version cannot read", None


def dropped_label(kind: str, data: bytes | None) -> str:
    """Say what a value is that cannot be in a column. ``data``: None if it is in a pack."""
    scalar = kind in ("json", FLOAT, "npy0")
    if data is not None and scalar:
        return _read(kind, data)[0]
    return TOO_LARGE if scalar else _KIND_LABELS.get(kind, "tables")


def _scalar(value: Any) -> tuple[str, Any]:
    if value is None:
        return "None", None
    if isinstance(value, bool | np.bool_):
        return "bool", bool(value)
    if isinstance(value, int | np.integer) and not isinstance(value, np.timedelta64):
        fits = -(2**63) <= int(value) < 2**63
        return ("int64", int(value)) if fits else ("integers beyond int64", None)
    if isinstance(value, (float, np.float16, np.float32)):  # np.float64 is a float
        return "float64", value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "text that is not valid Unicode", None
        return "text", str.__str__(value)  # str() of a numpy.str_ drops NULs at its end
    return f"{type(value).__name__} values", None


_BUILD: Final[dict[str, Callable[[list[Any]], pa.Array]]] = {
    "int64": lambda out: columns.fixed(np.array(out, np.int64), pa.int64()),
    # Element by element: numpy keeps the bits of every NaN.
    "float64": lambda out: columns.fixed(np.array(out, np.float64), pa.float64()),
    "bool": columns.bools,
    "text": lambda out: columns.binary([text.encode() for text in out]).cast(pa.large_string()),
}


def scatter(found: pa.Array, row: npt.NDArray[np.int64], n_rows: int) -> pa.Array:
    """Return a column of ``n_rows`` with these values in these rows, null elsewhere."""
    if len(row) == n_rows:
        return found
    position, known = np.zeros(n_rows, np.int64), np.zeros(n_rows, np.bool_)
    position[row], known[row] = np.arange(len(row)), True
    return found.take(columns.fixed(position, pa.int64(), known))


def column_names(wanted: Iterable[str], taken: Iterable[str], prefix: str) -> dict[str, str]:
    """Return the name of the column of each output; one that is taken gets the prefix, until it is free."""
    used = set(taken)
    out: dict[str, str] = {}
    wanted = list(wanted)
    free_as_they_are = {name for name in wanted if name not in used}
    for name in wanted:
        column = name
        while column in used or (column != name and column in free_as_they_are):
            column = prefix + column
        used.add(column)
        out[name] = column
    return out


def reason(labels: Iterable[str]) -> str:
    """Say why an output with these values is no column."""
    found = sorted(labels)
    return found[0] if len(found) == 1 else f"mixed: {', '.join(found)}"


def _first_bytes(data: pa.Array) -> npt.NDArray[np.uint8]:
    starts, sizes = columns.starts_and_sizes(data)
    return np.where(sizes > 0, columns.bytes_at(data, starts), np.uint8(0))  # nothing is no JSON: read slowly


def _take(data: pa.Array, chosen: npt.NDArray[np.bool_]) -> pa.Array:
    return data.filter(columns.bools(chosen))
