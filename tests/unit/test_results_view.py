"""The view of outputs as columns: exact, or left out with a reason."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelops.store import columns
from modelops.store.gather import Cover
from modelops.store.views import Cells, column_names, convert, reason, scatter
from modelops_runner.values import encode


def cells(*found: Any) -> Cells:
    pairs = [encode(v) for v in found]
    kinds = [kind for kind, _ in pairs]
    data = columns.binary([d for _, d in pairs])
    return Cells(np.arange(len(pairs)), "json" if set(kinds) <= {"json"} else kinds, data)


EXACT = [
    ([1, -2, 2**63 - 1, -(2**63)], "int64"),
    ([1.0, 1e22, 5e-324, -0.0, 1e16, 0.1], "float64"),
    ([1.5, math.nan, math.inf, -math.inf], "float64"),
    ([math.nan], "float64"),
    ([True, False], "bool"),
    (["a", "", "é😀", 'with "quotes" and \\', "a\0b", "\n"], "text"),
    (["plain", "only"], "text"),
    ([np.float64(0.1), np.float64(-1e300), np.float64(2)], "float64"),
    ([np.float64(0.1), np.float64("nan"), 0.5], "float64"),
    ([np.float32(0.1), np.float16(0.1)], "float64"),
    ([np.int64(-5), np.uint8(5), 7], "int64"),
    ([np.int8(-5), np.uint64(5)], "int64"),
    ([np.bool_(True), np.bool_(False)], "bool"),
    ([np.True_, False], "bool"),
    ([np.str_("x"), "y"], "text"),
]


@pytest.mark.parametrize(("found", "label"), EXACT)
def test_a_uniform_scalar_is_a_column_bit_for_bit(found: list[Any], label: str) -> None:
    column = convert(cells(*found))
    assert column.labels == {label}
    assert column.values is not None
    assert column.values.validate(full=True) is None
    got = column.values.to_pylist()
    assert list(map(type, got)) == [{"int64": int, "float64": float, "bool": bool, "text": str}[label]] * len(
        found
    )
    if label == "float64":
        assert [struct.pack("d", g) for g in got] == [struct.pack("d", float(f)) for f in found]
    else:
        assert got == found


LEFT_OUT = [
    ([1, 1.5], "mixed: float64, int64"),
    ([1, 1e16], "mixed: float64, int64"),
    ([1, True], "mixed: bool, int64"),
    ([1.0, "a"], "mixed: float64, text"),
    ([1, None], "mixed: None, int64"),
    ([None, None], "None"),
    ([2**63], "integers beyond int64"),
    ([1, 2**70], "mixed: int64, integers beyond int64"),
    ([1.5, 1, 2**64], "mixed: float64, int64, integers beyond int64"),
    ([np.uint64(2**63)], "integers beyond int64"),
    ([[1], [2]], "lists"),
    ([{"a": 1}, {}], "dicts"),
    ([(1,), {1: 2}], "mixed: dicts, tuples"),
    ([1j], "complex numbers"),
    ([b"x", bytearray(b"y")], "bytes"),
    ([np.zeros(2)], "arrays"),
    ([np.longdouble(1)], "longdouble values"),
    ([np.datetime64("2020-01-01")], "datetime64 values"),
    ([np.timedelta64(1, "s")], "timedelta64 values"),
    (["a\ud800"], "text that is not valid Unicode"),
    ([pa.table({"a": [1]})], "tables"),
]


@pytest.mark.parametrize(("found", "why"), LEFT_OUT)
def test_anything_else_is_left_out_and_the_reason_is_said(found: list[Any], why: str) -> None:
    column = convert(cells(*found))
    assert column.values is None
    assert reason(column.labels) == why


def plain_label(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int():
            return "int64" if -(2**63) <= value < 2**63 else "integers beyond int64"
        case float():
            return "float64"
        case str():
            return "text"
        case _:
            return "None"


@settings(max_examples=300, deadline=None)
@given(
    found=st.one_of(
        st.lists(st.integers(-(2**64), 2**64), min_size=1),
        st.lists(st.floats(), min_size=1),
        st.lists(st.booleans(), min_size=1),
        st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
        st.lists(st.one_of(st.floats(), st.integers(), st.booleans(), st.none()), min_size=1),
    )
)
def test_the_fast_way_agrees_with_looking_at_each_value(found: list[Any]) -> None:
    column = convert(cells(*found))
    labels = {plain_label(v) for v in found}
    assert column.labels == labels
    if labels in ({"int64"}, {"float64"}, {"bool"}, {"text"}):
        assert column.values is not None
        got = column.values.to_pylist()
        assert [(type(g), repr(g)) for g in got] == [(type(f), repr(f)) for f in found]
    else:
        assert column.values is None


@pytest.mark.parametrize(
    "text", [b"1E5", b"1e+05", b"-0.5E-3", b" 1.5", b"1.50", b'{"$np": ["<f8", 1.5]}', b'{ "$float": "nan" }']
)
def test_json_as_other_runners_may_write_it_is_understood(text: bytes) -> None:
    column = convert(Cells(np.arange(2), "json", columns.binary([text, b"0.25"])))
    assert column.labels == {"float64"}


def test_json_that_says_a_number_beyond_float64_is_infinite_as_in_python() -> None:
    column = convert(Cells(np.arange(2), "json", columns.binary([b"1e400", b"0.25"])))
    assert column.values is not None
    assert column.values.to_pylist() == [math.inf, 0.25]


def test_a_tag_of_a_newer_version_leaves_the_output_out() -> None:
    column = convert(Cells(np.arange(1), "json", columns.binary([b'{"$quaternion":[1,2,3,4]}'])))
    assert reason(column.labels) == "values that this version cannot read"


def test_absent_is_null_and_nan_is_nan() -> None:
    column = convert(cells(math.nan, 1.0))
    scattered = scatter(column.values, np.array([1, 3]), 4)
    assert scattered.is_null().to_pylist() == [True, False, True, False]
    assert math.isnan(scattered[1].as_py())


def test_a_taken_name_gets_a_prefix_until_it_is_free() -> None:
    names = column_names(["seed", "x", "output.seed", "y"], ["seed", "y"], "output.")
    assert names == {"seed": "output.output.seed", "x": "x", "output.seed": "output.seed", "y": "output.y"}
    assert len(set(names.values()) | {"seed", "y"}) == 6


def test_a_table_is_kept_until_all_its_keys_were_found_and_no_longer() -> None:
    loaded: list[int] = []

    def load(i: int) -> int:
        loaded.append(i)
        return i

    cover = Cover([[(0, 4), (8, 10)], [(4, 8)]], load, lambda _: 1)

    def found(lo: int, hi: int) -> list[tuple[int, list[int]]]:
        return [(i, at.tolist()) for i, at in cover.find(np.arange(lo, hi))]

    assert found(0, 3) == [(0, [0, 1, 2])]
    assert found(3, 6) == [(0, [0]), (1, [1, 2])]
    assert found(6, 12) == [(0, [2, 3]), (1, [0, 1])]
    assert loaded == [0, 1]
    assert found(9, 10) == [(0, [0])], "who asks again is answered all the same"
    assert loaded == [0, 1, 0]
