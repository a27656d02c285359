"""Tables of pandas, polars and Arrow come back with their index, names and dtypes, or are refused."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import polars as pl
import pyarrow as pa
import pytest

from modelops_runner.values import InvalidOutputError, decode, encode

FRAMES = {
    "plain": pd.DataFrame({"a": [1, 2], "b": [0.5, np.nan], "c": [True, False], "d": ["x", "🎲"]}),
    "empty": pd.DataFrame(),
    "no rows": pd.DataFrame({"a": pd.Series([], dtype="float32")}),
    "daily": pd.DataFrame(
        {"cases": range(5)}, index=pd.date_range("2020-01-01", periods=5, freq="D", name="day")
    ),
    "zone": pd.DataFrame({"x": [1.0]}, index=pd.DatetimeIndex(["2020-03-29 03:00"], tz="Europe/Berlin")),
    "weekly": pd.DataFrame({"x": [1, 2]}, index=pd.date_range("2020-01-05", periods=2, freq="W-SUN")),
    "two levels": pd.DataFrame(
        {"x": [1, 2, 3]}, index=pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)], names=["k", None])
    ),
    "categories": pd.DataFrame(
        {"c": pd.Categorical(["lo", "hi"], categories=["lo", "mid", "hi"], ordered=True)}
    ),
    "small types": pd.DataFrame(
        {"i": np.array([1], "int8"), "u": np.array([1], "uint16"), "f": np.array([1], "float32")}
    ),
    "nullable": pd.DataFrame(
        {"i": pd.array([1, None], dtype="Int64"), "b": pd.array([True, None], dtype="boolean")}
    ),
    "durations": pd.DataFrame(
        {"t": pd.to_timedelta([1, 2], unit="s"), "p": pd.period_range("2020", periods=2, freq="M")}
    ),
    "range index": pd.DataFrame({"x": [1, 2]}, index=pd.RangeIndex(10, 30, 10, name="n")),
    "numbers as names": pd.DataFrame(np.eye(2)),
    "column levels": pd.DataFrame(
        np.eye(2), columns=pd.MultiIndex.from_tuples([("a", "x"), ("a", "y")], names=["p", "q"])
    ),
    "empty, with a frequency": pd.DataFrame({"x": [1.0]}, index=pd.date_range("2020", periods=1)).iloc[:0],
    "periods": pd.DataFrame({"x": [1, 2]}, index=pd.period_range("2020-01", periods=2, freq="M")),
    "no periods": pd.DataFrame({"x": [1]}, index=pd.period_range("2020-01", periods=1, freq="M")).iloc[:0],
    "text objects": pd.DataFrame({"d": pd.Series(["x", None], dtype=object)}),
    "text index": pd.DataFrame({"x": [1, 2]}, index=pd.Index(["a", "b"], dtype=object)),
    "dates as names": pd.DataFrame(np.eye(2), columns=pd.date_range("2020", periods=2, name="day")),
    "a range as names": pd.DataFrame([[1, 2]], columns=pd.RangeIndex(8, 4, -2, name="n")),
    "no rows of categories": pd.DataFrame({"c": pd.Categorical([], categories=["lo", "hi"])}),
    "Arrow's own NaN": pd.DataFrame(
        {"x": pd.arrays.ArrowExtensionArray(pa.array([float("nan"), None, 1.0]))}
    ),
}
NANS = {  # what 0.0 / 0.0 gives on most machines has the sign bit set
    "float16": np.array([0x7E00, 0xFE00, 0x7E01], "uint16").view("float16"),
    "float32": np.array([0x7FC00000, 0xFFC00000, 0x7FC00ABC], "uint32").view("float32"),
    "float64": np.array([0x7FF8000000000000, 0xFFF8000000000000, 0x7FF0000000000ABC], "uint64").view(
        "float64"
    ),
}
HOLIDAYS = pd.bdate_range("2020-01-01", periods=3, freq="C", holidays=["2020-01-02"])
NAN_AND_NA = pd.arrays.FloatingArray(np.array([np.nan, 1.0]), np.array([False, True]))


@pytest.mark.parametrize("name", FRAMES)
def test_a_pandas_frame_comes_back(name: str) -> None:
    frame = FRAMES[name]
    kind, content = encode(frame)
    assert kind == "arrow.pandas"
    for back in (decode(kind, content), decode(*encode({"n": [frame]}))["n"][0]):
        pd.testing.assert_frame_equal(back, frame)
        for ours, theirs in ((frame.index, back.index), (frame.columns, back.columns)):
            assert type(ours) is type(theirs)
            assert getattr(ours, "freq", None) == getattr(theirs, "freq", None)


@pytest.mark.parametrize("dtype", NANS)
def test_every_bit_of_a_nan_in_a_pandas_column_comes_back(dtype: str) -> None:
    values = NANS[dtype]
    frame = pd.DataFrame({"a": [1, 2, 3], "x": values, "y": values[::-1]}, index=["p", "q", "r"])
    back = decode(*encode(frame))
    pd.testing.assert_frame_equal(back, frame)
    assert [back[name].to_numpy().tobytes() for name in "xy"] == [values.tobytes(), values[::-1].tobytes()]
    series = decode(*encode(frame["x"]))
    assert (series.name, series.to_numpy().tobytes()) == ("x", values.tobytes())


@pytest.mark.parametrize(
    "series",
    [
        pd.Series([1.0, np.nan], name="x"),
        pd.Series([1, 2], index=pd.date_range("2020", periods=2, freq="h"), name=3),
        pd.Series(["a", "b"], name=("a", 1)),
        pd.Series([], dtype="datetime64[ns]"),
        pd.Series(pd.Categorical(["a", "b"])),
    ],
)
def test_a_pandas_series_comes_back(series: pd.Series[Any]) -> None:
    kind, content = encode(series)
    assert kind == "arrow.pandas.series"
    back = decode(kind, content)
    pd.testing.assert_series_equal(back, series)
    assert back.name == series.name


@pytest.mark.parametrize(
    "frame",
    [
        pl.DataFrame({"a": [1, None], "b": ["x", "y"], "c": [[1.0], []]}),
        pl.DataFrame(),
        pl.DataFrame(
            {"t": [datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)], "d": [datetime.date(2020, 1, 1)]}
        ),
        pl.DataFrame(
            {"e": pl.Series(["a"], dtype=pl.Enum(["a", "b"])), "c": pl.Series(["a"], dtype=pl.Categorical)}
        ),
        pl.DataFrame({"s": [{"x": 1, "y": "z"}], "u": pl.Series([255], dtype=pl.UInt8)}),
    ],
)
def test_a_polars_frame_comes_back(frame: pl.DataFrame) -> None:
    kind, content = encode(frame)
    assert kind == "arrow.polars"
    back = decode(kind, content)
    assert back.schema == frame.schema
    assert back.equals(frame)


def test_a_polars_series_comes_back() -> None:
    series = pl.Series("x", [1, None, 3], dtype=pl.Int16)
    kind, content = encode(series)
    assert kind == "arrow.polars.series"
    back = decode(kind, content)
    assert (back.name, back.dtype, back.to_list()) == ("x", pl.Int16, [1, None, 3])


def test_arrow_comes_back() -> None:
    table = pa.table({"a": [1, None], "b": [["x"], []]}).replace_schema_metadata({"k": "v"})
    batch = pa.RecordBatch.from_pydict({"a": [1.5]})
    array = pa.array(["a", None, "a"]).dictionary_encode()
    empty = table.schema.empty_table()
    no_rows = pa.table({"d": pa.array(["a", "b"]).dictionary_encode()})[:0]
    pairs: tuple[tuple[Any, str], ...] = (
        (table, "arrow"),
        (empty, "arrow"),
        (no_rows, "arrow"),
        (batch, "arrow.batch"),
        (array, "arrow.array"),
    )
    for value, expected in pairs:
        kind, content = encode(value)
        assert kind == expected
        back = decode(kind, content)
        assert type(back) is type(value)
        assert back.equals(value)
    assert decode(*encode(table)).schema.equals(table.schema, check_metadata=True)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"t": pd.DataFrame({"a": [object()]})}, ["t: ", "pandas.DataFrame", "'a'", "object"]),
        ({"t": pd.DataFrame([[1, 2]], columns=["a", "a"])}, ["t: ", "pandas.DataFrame"]),
        ({"t": pd.DataFrame([[1, 2]], columns=pd.Index(["a", 1], dtype=object))}, ["t: ", "columns"]),
        (
            {"t": pd.DataFrame({"a": [1, 2, 3]}, index=HOLIDAYS)},
            ["t: ", "index has the frequency <CustomBusinessDay>", "set it to None"],
        ),
        ({"t": pd.DataFrame({"a": pd.cut([1, 2, 3], 2)})}, ["t: ", "pandas.DataFrame", "Arrow cannot carry"]),
        ({"t": pd.DataFrame([[1]], columns=pd.CategoricalIndex(["c"]))}, ["t: ", "Arrow cannot carry"]),
        ({"t": pd.DataFrame(index=range(3))}, ["t: ", "index", "Arrow cannot carry exactly"]),
        ({"t": pd.Series(NAN_AND_NA, name="x")}, ["t: ", "pandas.Series", "Arrow cannot carry exactly"]),
        ({"t": pl.DataFrame({"a": pl.Series([object()], dtype=pl.Object)})}, ["t: ", "polars"]),
        ({"t": pl.LazyFrame({"a": [1]})}, ["t: ", "polars.LazyFrame"]),
        ({"t": pd.Timestamp("2020")}, ["t: ", "pandas.Timestamp"]),
    ],
)
def test_a_table_that_would_come_back_changed_is_refused(value: object, words: list[str]) -> None:
    with pytest.raises(InvalidOutputError) as caught:
        encode(value)
    for word in words:
        assert word in str(caught.value)
