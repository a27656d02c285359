"""Arrow arrays straight from buffers, and back.

Not ``pyarrow.array``: converting a list or an array, it imports pandas where that is installed, half a
second before a worker's first segment; and it looks at every value, which costs more than the rest.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt


def fixed(
    values: npt.NDArray[Any], kind: pa.DataType, valid: npt.NDArray[np.bool_] | None = None
) -> pa.Array:
    """Return an array of fixed width; ``values`` has the layout that ``kind`` has."""
    return pa.Array.from_buffers(
        kind, len(values), [_bitmap(valid), pa.py_buffer(np.ascontiguousarray(values))]
    )


def bools(
    values: Sequence[bool] | npt.NDArray[np.bool_], valid: npt.NDArray[np.bool_] | None = None
) -> pa.Array:
    """Return an array of booleans."""
    bits = values if isinstance(values, np.ndarray) else np.fromiter(values, np.bool_, len(values))
    return pa.Array.from_buffers(pa.bool_(), len(values), [_bitmap(valid), _bits(bits)])


def binary(values: Sequence[Any], valid: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Return large_binary from buffers of bytes."""
    buffers = [_bitmap(valid), pa.py_buffer(_ends(values, np.int64)), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


def cut(data: bytes, sizes: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Return large_binary whose values have these sizes, one after another in ``data``."""
    ends = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=ends[1:])
    return pa.Array.from_buffers(
        pa.large_binary(), len(sizes), [_bitmap(valid), pa.py_buffer(ends), pa.py_buffer(data)]
    )


def text(values: Sequence[str | None]) -> pa.Array:
    """Return strings, None as null; lone surrogates, as ``surrogateescape`` makes them, are spelt out."""
    raw = [b"" if v is None else v.encode("utf-8", "backslashreplace") for v in values]
    valid = np.fromiter((v is not None for v in values), np.bool_, len(values))
    buffers = [_bitmap(valid), pa.py_buffer(_ends(raw, np.int32)), pa.py_buffer(b"".join(raw))]
    return pa.Array.from_buffers(pa.string(), len(raw), buffers)


def same_width(joined: str, width: int) -> pa.Array:
    """Return strings of ASCII, all of this length, which stand one after another."""
    data = joined.encode("ascii")
    n, rest = divmod(len(data), width)
    if rest or len(data) > np.iinfo(np.int32).max:
        raise ValueError(f"{len(data)} bytes are no texts of {width} each")
    buffers = [None, pa.py_buffer(np.arange(n + 1, dtype=np.int32) * np.int32(width)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.string(), n, buffers)


def joined(array: pa.Array) -> str:
    """Return the texts of an array of strings one after another."""
    _, ends, data = array.buffers()
    edges = np.frombuffer(ends, np.int32, len(array) + 1, array.offset * 4)
    return bytes(memoryview(data or b"")[int(edges[0]) : int(edges[-1])]).decode()


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return a table of texts and of integers, None as null; what else a row has is left out."""
    arrays = [(text if f.type == pa.string() else _integers)([row[f.name] for row in rows]) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _integers(values: Sequence[int | None]) -> pa.Array:
    valid = np.fromiter((v is not None for v in values), np.bool_, len(values))
    return fixed(np.array([0 if v is None else v for v in values], np.int64), pa.int64(), valid)


def words(values: Sequence[str], code: pa.DataType) -> pa.Array:
    """Return dictionary-encoded strings, the dictionary in order of first appearance."""
    codes = {word: i for i, word in enumerate(dict.fromkeys(values))}
    refuse_too_many(len(codes), code)
    indices = np.fromiter(map(codes.__getitem__, values), code.to_pandas_dtype(), len(values))
    return coded(indices, list(codes), code)


def coded(codes: npt.NDArray[Any], words: Sequence[str], code: pa.DataType) -> pa.Array:
    """Return dictionary-encoded strings from positions in ``words``."""
    return pa.DictionaryArray.from_arrays(fixed(codes, code), text(words), safe=False)


def refuse_too_many(n: int, code: pa.DataType) -> None:
    """Raise OverflowError if so many words have no code."""
    if n > 2 ** (code.bit_width - 1):
        raise OverflowError(f"{n} different words do not fit {code}")


def structs(fields: Sequence[pa.Array], kind: pa.StructType, valid: npt.NDArray[np.bool_]) -> pa.Array:
    """Return structs of these fields, null where not ``valid``.

    ``StructArray.from_arrays`` with a mask imports ``pyarrow.compute``, 60 ms before a worker's first outcome.
    """
    return pa.Array.from_buffers(kind, len(valid), [_bitmap(valid)], children=list(fields))


def lists(lengths: npt.NDArray[np.int32], n: int, values: pa.Array) -> pa.Array:
    """Return ``n`` lists of these lengths, cut from ``values``."""
    ends = np.zeros(n + 1, np.int32)
    np.cumsum(lengths, out=ends[1:])
    return pa.ListArray.from_arrays(fixed(ends, pa.int32()), values)


def only_chunk(table: pa.Table, name: str) -> pa.Array:
    """Return a column as one array."""
    column = table[name]
    if column.num_chunks == 0:
        return pa.nulls(0, column.type)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def fixed_values(array: pa.Array) -> npt.NDArray[Any]:
    """View an array of fixed width as numpy; what stands for a null is undefined."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def bool_values(array: pa.Array) -> npt.NDArray[np.bool_]:
    """Return booleans as numpy; what stands for a null is undefined."""
    bits = np.frombuffer(array.buffers()[1], np.uint8)
    return np.unpackbits(bits, count=array.offset + len(array), bitorder="little")[array.offset :].view(
        np.bool_
    )


def binary_values(array: pa.Array) -> list[bytes]:
    """Return the bytes of each value of a large_binary array; a null gives ``b""``."""
    _, ends_buffer, data_buffer = array.buffers()
    if not len(array):
        return []
    ends = np.frombuffer(ends_buffer, np.int64, len(array) + 1, array.offset * 8)
    first, last = int(ends[0]), int(ends[-1])
    data = data_buffer.slice(first, last - first).to_pybytes() if last > first else b""
    edges = (ends - first).tolist()
    return [data[lo:hi] for lo, hi in pairwise(edges)]


def joined_bytes(array: pa.Array) -> bytes:
    """Return the values of a large_binary array one after another."""
    _, ends_buffer, data_buffer = array.buffers()
    if not len(array) or data_buffer is None:
        return b""
    ends = np.frombuffer(ends_buffer, np.int64, len(array) + 1, array.offset * 8)
    return bytes(memoryview(data_buffer)[int(ends[0]) : int(ends[-1])])


def with_commas(array: pa.Array) -> bytes:
    """Return JSON objects, of a large_binary array, with a comma between two."""
    together = joined_bytes(array)
    # If it is found nowhere but between two of them, commas can go in at once.
    if together.count(b"}{") == len(array) - 1:
        return together.replace(b"}{", b"},{")
    return b",".join(binary_values(array))


def starts_and_sizes(array: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the bytes of each value of a large_binary array begin in its buffer, and their number."""
    if not len(array):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    ends = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, array.offset * 8)
    return ends[:-1], np.diff(ends)


def bytes_at(array: pa.Array, where: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return the bytes at these places of a large_binary array's buffer; 0 beyond its end."""
    buffer = array.buffers()[2]
    data = np.frombuffer(buffer, np.uint8) if buffer is not None and buffer.size else np.zeros(1, np.uint8)
    return np.where(where < len(data), data[np.minimum(where, len(data) - 1)], np.uint8(0))


def _ends(values: Sequence[Any], dtype: type[np.int32 | np.int64]) -> npt.NDArray[Any]:
    ends = np.zeros(len(values) + 1, dtype)
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    if lengths.sum() > np.iinfo(dtype).max:
        raise OverflowError(f"{lengths.sum()} bytes do not fit one column")
    np.cumsum(lengths, out=ends[1:])
    return ends


def _bitmap(valid: npt.NDArray[np.bool_] | None) -> pa.Buffer | None:
    return None if valid is None or valid.all() else _bits(valid)


def _bits(values: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))
