"""Values of every kind, and a comparison that forgives nothing. Runs in the bundle and in the test."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]  # no stubs are installed
import polars as pl
import pyarrow as pa

DTYPES = [np.dtype(code) for code in "?bBhHiIlLqQefdgFDGSUVMm" if code not in "SUVMm"]
DTYPES += [dtype.newbyteorder(">") for dtype in DTYPES if dtype.itemsize > 1 and dtype.char not in "gG"]
TIMES = [
    np.dtype(f"{order}{kind}8[{unit}]") for kind in "mM" for unit in ("ns", "D", "25us") for order in "<>"
]
POINT = np.dtype(
    [("x", ">f8"), ("tag", "S3"), ("inner", [("n", "<i2"), ("m", "?")]), ("grid", "<u4", (2, 3))]
)


def simulate(params: dict[str, Any], seed: int) -> dict[str, Any]:
    return {**plain(), **numpy_values(), **table_values()}


def plain() -> dict[str, Any]:
    return {
        "nan": float("nan"),
        "odd_nan": _double(0x7FF80000DEADBEEF),
        "negative_nan": _double(0xFFF8000000000001),
        "signalling_nan": _double(0x7FF4000000000002),
        "inf": float("inf"),
        "minus_inf": -float("inf"),
        "minus_zero": -0.0,
        "tiny": 5e-324,
        "huge": 2**70,
        "most_negative": -(2**63),
        "unsigned": 2**64 - 1,
        "text": '\N{GRINNING FACE}\0 caf\u00e9 \u2028 \\ " end\0',
        "surrogate": "\ud800",
        "nested": [[1, [2.0, [None, True]]], {"a": [float("nan"), 2**70]}, (1, (2,)), []],
        "keys": {1: "int", 1.5: "float", None: "none", (1, 2): "tuple", "$float": "no tag"},
        "none": None,
        "truth": True,
        "whole": 3,
        "complex": complex(-0.0, float("inf")),
        "bytes": b"\0\xff\n",
        "bytearray": bytearray(b"abc"),
        "empty_bytes": b"",
    }


def numpy_values() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for dtype in DTYPES:
        name = dtype.str.strip("|<").replace(">", "big_") + dtype.char
        raw = np.arange(24) % 2 if dtype.kind == "b" else np.arange(-4, 20)
        out[f"array_{name}"] = raw.astype(dtype).reshape(2, 3, 4)
        out[f"scalar_{name}"] = raw.astype(dtype)[5]
        if dtype.kind in "fc":
            special = np.array([np.nan, -np.inf, -0.0, 1 / 3], dtype)
            out[f"special_{name}"] = special
            out[f"special_scalar_{name}"] = special[0]
    for dtype in TIMES:
        name = f"{dtype.kind}{dtype.str[0]}{np.datetime_data(dtype)}"
        out[f"array_{name}"] = (
            np.array([0, -1, np.iinfo(np.int64).min], "<i8")
            .astype("<i8")
            .view("<" + dtype.str[1:])
            .astype(dtype)
        )
        out[f"scalar_{name}"] = out[f"array_{name}"][1]
    bits = np.array([0x7FF80000DEADBEEF, 0xFFF8000000000001], np.uint64)
    table = np.zeros(3, POINT)
    table["x"], table["tag"], table["grid"] = [np.nan, -0.0, 1e308], [b"a", b"ab", b"abc"], 7
    return {
        **out,
        "odd_nans": bits.view(np.float64),
        "odd_nan_scalar": bits.view(np.float64)[0],
        "odd_nan32": np.array([0x7FC0BEEF], np.uint32).view(np.float32)[0],
        "texts": np.array(["a", "\N{SNOWMAN}\N{GRINNING FACE}", ""]),
        "bytestrings": np.array([b"a", b"abc\0d"]),
        "raw": np.array([b"\0\1\2\3"], "V4"),
        "np_str": np.str_("nul\0 at the end\0"),
        "np_bytes": np.bytes_(b"a\0"),
        "structured": table,
        "structured_scalar": table[1],
        "aligned": np.zeros(2, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "zero_rows": np.empty((0, 5), np.float32),
        "no_dimension": np.array(1.5),
        "nested_arrays": {"a": [np.arange(3), (np.float32(0.1), np.array(2, ">i2"))]},
        "large": np.arange(100_000, dtype=">u4").reshape(100, 1000),
    }


def table_values() -> dict[str, Any]:
    days = pd.date_range("1978-01-22", periods=4, freq="D", name="day")
    zoned = pd.date_range("2020-03-28 23:30", periods=4, freq="30min", tz="Europe/London")
    frame = pd.DataFrame(
        {"cases": np.array([3, 8, 26, 76], "i2"), "rate": [0.5, np.nan, -0.0, np.inf]}, index=days
    )
    mixed = pd.DataFrame(
        {
            "category": pd.Categorical(["b", "a", None, "b"], categories=["b", "a"], ordered=True),
            "nullable": pd.array([1, None, 3, 4], dtype="Int64"),
            "text": ["x", "\N{SNOWMAN}", "", "nul\0"],
            "when": zoned,
        },
        index=zoned,
    )
    return {
        "frame": frame,
        "mixed_frame": mixed,
        "series": frame["rate"],
        "levels": frame.set_index(pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["p", "q"])),
        "empty_frame": frame.iloc[:0],
        "large_frame": pd.DataFrame({"x": np.arange(50_000.0)}),
        "polars": pl.DataFrame(
            {
                "a": [1, None],
                "b": [[1.5], []],
                "c": ["\N{SNOWMAN}", None],
                "d": pl.Series(["x", "y"], dtype=pl.Categorical),
            }
        ),
        "polars_series": pl.Series("s", [1, None, 3], dtype=pl.UInt8),
        "arrow": pa.table(
            {"a": pa.array([1, None], pa.uint16()), "b": [["x"], None]}
        ).replace_schema_metadata({"k": "v"}),
        "arrow_batch": pa.RecordBatch.from_pydict({"a": [1.5, None]}),
        "arrow_array": pa.array(["a", None, "a"]).dictionary_encode(),
        "nested_table": {"inside": [frame, pa.array([1])]},
    }


def check(replicates: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare what reached the aggregate with what the model made, value by value, in order."""
    expected = simulate({}, 0)
    return {
        "n": len(replicates),
        "wrong": sorted(
            {name for r in replicates for name in expected if not same(r.get(name), expected[name])}
        ),
        "in_order": all(list(r) == list(expected) for r in replicates),
    }


def same(a: Any, b: Any) -> bool:
    """Compare bit for bit: type, dtype, byte order, shape, layout, order of keys, all the way down."""
    if isinstance(a, np.generic) and isinstance(b, np.generic):
        return same(np.asarray(a), np.asarray(b))  # longlong and int64 are one dtype and two types
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        if (a.dtype, a.dtype.str, a.shape) != (b.dtype, b.dtype.str, b.shape):
            return False
        layout = a.flags.f_contiguous, a.flags.c_contiguous
        if layout != (b.flags.f_contiguous, b.flags.c_contiguous):
            return False
        if a.dtype.names:  # between the fields there may be bytes that mean nothing
            return all(same(a[name].copy(), b[name].copy()) for name in a.dtype.names)
        if a.dtype.char in "gG":  # 10 bytes of 16 are the number
            return repr(list(a.ravel())) == repr(list(b.ravel()))
        return bool(a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, (pd.DataFrame, pd.Series)):
        return _same_pandas(a, b)
    if isinstance(a, (pl.DataFrame, pl.Series)):
        dtypes = (lambda x: x.schema) if isinstance(a, pl.DataFrame) else (lambda x: (x.name, x.dtype))
        return dtypes(a) == dtypes(b) and bool(a.equals(b, null_equal=True))
    if isinstance(a, (pa.Table, pa.RecordBatch)):
        return a.schema.equals(b.schema, check_metadata=True) and bool(a.equals(b))
    if isinstance(a, pa.Array):
        return a.type == b.type and bool(a.equals(b))
    return bool(a == b)


def _same_pandas(a: Any, b: Any) -> bool:
    check = pd.testing.assert_frame_equal if isinstance(a, pd.DataFrame) else pd.testing.assert_series_equal
    try:
        check(a, b, check_exact=True, check_index_type=True, check_freq=True, check_flags=True)
    except AssertionError:
        return False
    floats = a.select_dtypes("float") if isinstance(a, pd.DataFrame) else a
    return floats.dtypes.ndim == 0 or all(
        same(floats[c].to_numpy().copy(), b[c].to_numpy().copy()) for c in floats
    )


def large(params: dict[str, Any], seed: int) -> dict[str, Any]:
    return {"big": large_bytes(params["n_bytes"]), "small": b"s"}


def large_bytes(n: int) -> bytes:
    return hashlib.shake_128(b"modelops").digest(n)


def digests(replicates: list[dict[str, Any]]) -> dict[str, str]:
    return {
        str(i): f"{type(r['big']).__name__} {hashlib.sha256(r['big']).hexdigest()}"
        for i, r in enumerate(replicates)
    }


def _double(bits: int) -> Any:
    return struct.unpack("<d", struct.pack("<Q", bits))[0]
