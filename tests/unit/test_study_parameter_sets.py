"""Parameter sets: whatever they come from, their canonical form is that of the dict."""

from __future__ import annotations

import math
import re
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]  # no stubs are installed
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelops.errors import RequestError
from modelops.study.canonical import RESERVED, canonical_json, param_id
from modelops.study.parameter_sets import (
    AT_ONCE,
    FEW,
    ROW_GROUP,
    Axis,
    Listed,
    ParameterSets,
    distinct_canonicals,
    parameter_table,
)
from modelops.study.sampling import grid, sobol

if TYPE_CHECKING:
    from collections.abc import Callable

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab", max_size=2), v)
)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="$"), min_size=1).filter(
    lambda name: name not in RESERVED
)


@given(st.lists(names, unique=True, max_size=4), st.data())
@settings(deadline=None)
def test_columns_give_the_canonical_form_of_every_row(keys: list[str], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(keys, values)), max_size=4))
    sets = ParameterSets.of_rows(rows)
    assert sets.canonical() == [canonical_json(row) for row in rows]
    assert len(sets) == len(rows)


FEW_FLOATS = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, math.nan, math.inf, -math.inf, 1, True]), min_size=1, max_size=4
)


@given(st.data(), st.integers(1, 6), st.integers(1, 2))
def test_sets_are_refused_exactly_if_two_have_the_same_canonical_form(
    data: st.DataObject, n: int, n_columns: int
) -> None:
    columns: dict[str, Axis | Listed] = {}
    for name in "ab"[:n_columns]:
        listed = data.draw(FEW_FLOATS if n > 4 else st.lists(st.floats(), min_size=n, max_size=n))
        if len(listed) < n or data.draw(st.booleans()):
            columns[name] = Axis(listed, data.draw(st.integers(1, 2)))
        else:
            columns[name] = Listed(np.array(listed) if data.draw(st.booleans()) else listed)
    sets = ParameterSets(columns, n)
    forms = [canonical_json(row) for row in sets]
    if len(set(forms)) == n:
        assert distinct_canonicals(sets) == forms
    else:
        with pytest.raises(RequestError, match="are the same"):
            distinct_canonicals(sets)


@given(
    st.one_of(
        st.lists(st.floats(allow_nan=False), min_size=1),
        st.lists(st.floats(1e-5, 1e17), min_size=1),
        st.lists(st.integers(), min_size=1),
        st.lists(st.integers(-(2**63) - 2, -(2**63) + 2) | st.integers(2**63 - 2, 2**64), min_size=1),
        st.lists(st.floats() | st.integers() | st.booleans(), min_size=1),
    ),
    st.sampled_from([1, FEW]),
)
@example([1.0, 2.0], AT_ONCE)
@example([0.0, -0.0, 1e-4, math.nextafter(1e-4, 0), math.nextafter(1e16, 0), 1e15, 0.1 + 0.2], FEW)
def test_columns_of_many_numbers_give_the_canonical_form_of_every_row(column: list[Any], times: int) -> None:
    column = column * times
    sets = ParameterSets.of_rows([{"x": value, "%s": i} for i, value in enumerate(column)])
    assert sets.canonical() == [canonical_json(row) for row in sets]
    assert sets.canonical(1, len(column) - 1) == sets.canonical()[1:-1]
    row = {"all": column, "again": tuple(column)}
    assert ParameterSets.of_rows([row]).canonical() == [canonical_json(row)]


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([1, [2.0, object()]], "[1][1]': a object cannot be a parameter"),
        (({"$a": 1},), "[0]': a name must not begin with '$'"),
        ("\ud800", "text that is not valid Unicode"),
        (["fine", "\ud800"], "text that is not valid Unicode"),
        (LOOP, "has no canonical form"),
    ],
)
def test_what_no_parameter_can_be_is_named_where_it_is(value: Any, named: str) -> None:
    with pytest.raises(RequestError, match=re.escape(named)):
        canonical_json({"y": value})
    with pytest.raises(RequestError, match=f"parameter 'y.*{re.escape(named)}"):
        ParameterSets.of_rows([{"y": value}]).canonical()


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "%s", 'q"']), scalars), max_size=5))
@settings(deadline=None)
def test_rows_may_have_different_keys(rows: list[dict[str, Any]]) -> None:
    assert ParameterSets.of_rows(rows).canonical() == [canonical_json(row) for row in rows]


@pytest.mark.parametrize("dtype", ["i1", "u8", "i8", "f4", "f8", "?"])
def test_arrays_of_numbers_keep_their_kind(dtype: str) -> None:
    column = np.array([0, 1, 0.5 if dtype.startswith("f") else 1]).astype(dtype)
    sets = ParameterSets.of_table(pa.table({"x": column}))
    assert sets.canonical() == [canonical_json({"x": value}) for value in column.tolist()]
    assert type(sets[0]["x"]) is type(column.tolist()[0])


def tables() -> list[Any]:
    columns = {"n": [1, 2], "x": [1.0, math.nan], "on": [True, False], "who": ["a", "b"]}
    return [
        pa.table(columns),
        pd.DataFrame(columns),
        pd.DataFrame(columns, index=["r", "s"]),
        pl.DataFrame(columns),
    ]


@pytest.mark.parametrize("table", tables(), ids=["pyarrow", "pandas", "pandas with an index", "polars"])
def test_tables_of_all_kinds_give_the_same_sets(table: Any) -> None:
    sets = ParameterSets.of_table(table)
    assert sets.canonical() == [
        b'{"n":1,"on":true,"who":"a","x":1.0}',
        b'{"n":2,"on":false,"who":"b","x":{"$float":"nan"}}',
    ]


def test_what_is_missing_in_a_table_is_absent_from_the_set() -> None:
    for table in (pa.table({"n": [1, None], "k": [1, 2]}), pl.DataFrame({"n": [1, None], "k": [1, 2]})):
        assert list(ParameterSets.of_table(table)) == [{"n": 1, "k": 1}, {"k": 2}]
    frame = pd.DataFrame({"n": pd.array([1, None], dtype="Int64"), "k": [1, 2]})
    assert list(ParameterSets.of_table(frame)) == [{"n": 1, "k": 1}, {"k": 2}]


def test_integers_and_floats_in_an_object_column_stay_apart() -> None:
    frame = pd.DataFrame({"x": pd.Series([1, 1.0], dtype=object)})
    assert ParameterSets.of_table(frame).canonical() == [b'{"x":1}', b'{"x":1.0}']


def test_duplicates_are_refused_naming_both_rows() -> None:
    rows = [{"a": i, "b": 0.5} for i in range(100)]
    rows[70] = {"b": 0.5, "a": 12}
    with pytest.raises(RequestError, match=r"parameter sets 12 and 70 are the same: \{'a': 12, 'b': 0\.5\}"):
        parameter_table(ParameterSets.of_rows(rows))
    assert parameter_table(grid(a=[1, 1.0, True, "1"])).num_rows == 4
    with pytest.raises(RequestError, match="sets 0 and 1 are the same"):
        parameter_table(grid(a=[0.1 + 0.2, 0.30000000000000004]))


def test_the_first_pair_of_many_is_named() -> None:
    with pytest.raises(RequestError, match="sets 0 and 3 are the same"):
        parameter_table(grid(a=[5, 4, 4, 5, 5]))


def test_no_set_at_all_is_refused_and_an_empty_one_is_a_set() -> None:
    with pytest.raises(RequestError, match="no parameter sets"):
        parameter_table(ParameterSets.of_rows([]))
    assert parameter_table(ParameterSets.of_rows([{}]))["canonical"].to_pylist() == ["{}"]


@pytest.mark.parametrize("name", [*sorted(RESERVED), "", "$x"])
def test_reserved_names_are_refused(name: str) -> None:
    makes: list[Callable[[], ParameterSets]] = [
        lambda: grid(**{name: [1]}),
        lambda: ParameterSets.of_rows([{"a": 1}, {name: 1}]),
    ]
    for make in makes:
        with pytest.raises(RequestError, match=f"cannot have the name '{name.replace('$', '[$]')}'"):
            make()


def test_a_value_that_is_no_parameter_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="parameter 'when': a set cannot be a parameter"):
        grid(when=[{1}]).canonical()


def test_the_table_is_what_parameters_parquet_holds() -> None:
    sets = grid(b=[1, 2], a=[0.5])
    table = parameter_table(sets)
    assert table.schema.names == ["param", "param_id", "canonical"]
    assert table.schema.metadata == {b"modelops.format": b"1"}
    assert table["param"].to_pylist() == [0, 1]
    assert table["canonical"].to_pylist() == ['{"a":0.5,"b":1}', '{"a":0.5,"b":2}']
    assert table["param_id"].to_pylist() == [param_id(canonical_json(row)) for row in sets]


def test_a_million_sets_take_seconds_and_come_in_chunks() -> None:
    sets = sobol(2**20, x=(0, 1))
    start = time.process_time()
    table = parameter_table(sets)
    # CPU time, and ten times what it takes: this catches a return to one dict per set, not a slow machine.
    assert time.process_time() - start < 40
    assert [len(chunk) for chunk in table["param_id"].chunks] == [ROW_GROUP] * 16
    last = 2**20 - 1
    assert table["canonical"][last].as_py().encode() == canonical_json(sets[last])


def test_a_series_is_no_table_and_is_refused_in_a_sentence() -> None:
    with pytest.raises(RequestError, match="cannot be read as parameter sets"):
        ParameterSets.of_table(pd.Series([1, 2]))
