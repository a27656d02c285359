"""Values cross bit for bit as what they were, or are refused with their path and type."""

from __future__ import annotations

import json
import math
import struct
import threading
from collections import OrderedDict, namedtuple
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelops_runner.values import InvalidOutputError, decode, dumps, encode, loads

text = st.text(st.characters())  # lone surrogates too
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | text
    | st.complex_numbers()
    | st.binary(max_size=20)
    | st.binary(max_size=20).map(bytearray)
)
keys = (
    st.none() | st.booleans() | st.integers() | text | st.tuples(st.integers(), text) | st.binary(max_size=5)
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(text | st.just("$float") | st.just("$file"), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=20,
)


def same(a: Any, b: Any) -> bool:
    """Compare what came back (a) with the original (b), bit for bit, types included, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and type(a) is float:
        return struct.pack(">d", a) == struct.pack(">d", b)
    if type(a) is complex:
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, np.generic):
        return same(np.asarray(a), np.asarray(b))
    if isinstance(a, np.ndarray):
        layout = b.flags.f_contiguous, b.flags.c_contiguous  # neither: comes back in C order
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and (a.tobytes() == b.tobytes() or (a.dtype.char in "gG" and repr(a) == repr(b)))  # padding
            and (not any(layout) or layout == (a.flags.f_contiguous, a.flags.c_contiguous))
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    return bool(a == b)


def round_trip(value: object) -> object:
    return decode(*encode(value))


@settings(max_examples=300)
@given(trees)
def test_plain_values_come_back_bit_for_bit(value: object) -> None:
    assert same(round_trip(value), value)
    assert same(loads(dumps(value)), value)


@given(trees)
def test_the_text_is_ascii_json_that_any_reader_accepts(value: object) -> None:
    def refuse(name: str) -> object:
        raise AssertionError(name)

    text = dumps(value).encode("ascii")
    assert msgspec.json.decode(text) is not refuse  # it is pickier than Python about surrogates
    assert not text.startswith(b'{"$file"')
    json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "value",
    [-0.0, math.inf, -math.inf, math.nan, 5e-324, 1.8e308, 2**63, 2**64, -(2**63) - 1, 10**5_000],
    ids=lambda value: hex(value)[:20] if isinstance(value, int) else repr(value),
)
def test_numbers_at_the_edges_come_back(value: float) -> None:
    assert same(round_trip(value), value)
    assert same(round_trip({"a": [value, (value,)]}), {"a": [value, (value,)]})


@given(st.integers(0, 2**64 - 1))
def test_every_bit_pattern_of_a_float_comes_back(bits: int) -> None:
    value = struct.unpack(">d", struct.pack(">Q", bits))[0]
    assert same(round_trip(value), value)
    assert same(round_trip([value]), [value])


def test_a_nan_with_a_payload_keeps_it() -> None:
    value = struct.unpack(">d", bytes.fromhex("7ff8000000c0ffee"))[0]
    assert dumps(value) == '{"$float":"7ff8000000c0ffee"}'
    assert same(round_trip(value), value)


def test_no_value_can_look_like_a_spooled_file_or_a_tag() -> None:
    file = {"$file": "/etc/passwd", "bytes": 1, "sha256": ""}
    value: dict[str, Any]
    for value in (file, {"$float": "nan"}, {"$": 1}, {"$dict": []}):
        assert dumps(value).startswith('{"$dict":')
        assert same(round_trip(value), value)


dtypes = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64))
    | hnp.complex_number_dtypes(endianness="?")
    | hnp.datetime64_dtypes(endianness="?")
    | hnp.timedelta64_dtypes(endianness="?")
    | hnp.byte_string_dtypes(endianness="?")
    | hnp.unicode_string_dtypes(endianness="?")
    | st.just(np.dtype(np.longdouble))
    | st.just(np.dtype(np.clongdouble))
)
structured = hnp.array_dtypes(dtypes, max_size=3) | hnp.nested_dtypes(dtypes)


@settings(max_examples=200)
@given(data=st.data(), dtype=dtypes | structured, fortran=st.booleans())
def test_arrays_of_every_dtype_come_back(data: st.DataObject, dtype: np.dtype[Any], fortran: bool) -> None:
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
    if fortran:
        array = np.asfortranarray(array)
    kind, content = encode(array)
    assert kind == "npy"
    assert same(decode(kind, content), array)
    assert same(round_trip({"nested": [array]}), {"nested": [array]})


@settings(max_examples=200)
@given(data=st.data(), dtype=dtypes)
def test_scalars_of_every_dtype_come_back(data: st.DataObject, dtype: np.dtype[Any]) -> None:
    scalar = data.draw(hnp.arrays(dtype, ()))[()]
    assert same(round_trip(scalar), scalar)
    assert same(round_trip([scalar]), [scalar])


@pytest.mark.parametrize(
    "scalar",
    [
        np.float64(0.1),
        np.float32(0.1),
        np.float16(0.1),
        np.float64(-0.0),
        np.bool_(True),
        np.uint64(2**64 - 1),
    ],
)
def test_usual_numpy_scalars_are_readable_json(scalar: np.generic) -> None:
    kind, content = encode(scalar)
    assert kind == "json"
    assert content.startswith(b'{"$np":["')
    assert same(decode(kind, content), scalar)


def test_special_arrays_come_back() -> None:
    aligned = np.zeros(3, np.dtype([("a", "i1"), ("b", "f8"), ("c", "3i2")], align=True))
    titled = np.zeros(2, np.dtype([("é", ">i4"), ("b c", "S3")]))
    void = np.zeros((), [("x", "f4"), ("y", "i8")])[()]
    wide = np.zeros(1, [(f"a_long_column_name_{i}", "f8") for i in range(4_000)])
    transposed = np.arange(12).reshape(3, 4).T
    for value in (np.array(5), np.zeros((0, 3)), transposed, np.arange(10)[::2], titled):
        assert same(round_trip(value), value)
    assert same(round_trip(void), void)
    back: Any = round_trip(aligned)
    assert back.dtype == aligned.dtype
    assert repr(back.tolist()) == repr(aligned.tolist())  # what lies between the fields is noise
    assert same(round_trip(wide), wide)


Point = namedtuple("Point", "x y")


def test_subclasses_come_back_as_what_they_extend() -> None:
    value = {"o": OrderedDict(b=1, a=2), "p": Point(1, 2.0)}
    assert same(round_trip(value), {"o": {"b": 1, "a": 2}, "p": (1, 2.0)})


cyclic: list[object] = []
cyclic.append(cyclic)
shared = [1.0]


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"bands": [0, 1, 2, {"x": {1}}]}, "bands[3].x", "set"),
        ({"a": (1, threading.Lock())}, "a[1]", "lock"),
        ({"f": {"g": lambda: 0}}, "f.g", "function"),
        ({1: {"a": object()}}, "[1].a", "object"),
        ([np.array([None])], "[0]", "numpy.ndarray of dtype object"),
        ({"m": np.ma.array([1])}, "m", "numpy.MaskedArray"),
        ({"s": np.zeros(1, [("a", "O")])}, "s", "numpy.ndarray"),
        ({"t": np.array(["a"], np.dtypes.StringDType())}, "t", "StringDType"),
        ({"c": cyclic}, "c[0]", "contains itself"),
        ({"r": range(3)}, "r", "range"),
        ({"g": (i for i in range(3))}, "g", "generator"),
    ],
)
def test_what_cannot_cross_is_named_with_its_path_and_type(value: object, path: str, kind: str) -> None:
    with pytest.raises(InvalidOutputError) as caught:
        encode(value)
    assert str(caught.value).startswith(path)
    assert kind in str(caught.value)


def test_a_value_used_twice_is_no_cycle() -> None:
    assert same(round_trip({"a": shared, "b": [shared, shared]}), {"a": shared, "b": [shared, shared]})


@given(st.sampled_from(["json", "npy", "npy0", "arrow", "arrow.pandas", "nonsense"]), st.binary(max_size=60))
def test_damaged_bytes_are_an_error_and_never_code_that_runs(kind: str, content: bytes) -> None:
    try:
        decode(kind, content)
    except (ValueError, KeyError, EOFError, OSError, TypeError):
        return


def test_a_pickle_inside_npy_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "evil.npy"
    np.save(path, np.array([threading.Thread]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        decode("npy", path.read_bytes())


def test_untagged_objects_are_new_each_time() -> None:
    source = dumps({"a": [1, {"b": 2}]})
    first, second = loads(source), loads(source)
    first["a"][1]["b"] = 99
    assert second == {"a": [1, {"b": 2}]}
