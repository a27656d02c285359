"""The canonical form of parameters: one form per value, an inverse, and the page's vectors."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

import numpy as np
import pytest
from doc_tables import rows_below
from hypothesis import given
from hypothesis import strategies as st

from modelops.errors import RequestError
from modelops.study.canonical import canonical_json, param_id, parse_canonical

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda s: not s.startswith("$"))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
sets = st.dictionaries(names, values, max_size=5)


def same(a: Any, b: Any) -> bool:
    """Equal in type and bits; NaNs are one value."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(sets)
def test_parsing_gives_back_the_parameters(params: dict[str, Any]) -> None:
    canonical = canonical_json(params)
    assert same(parse_canonical(canonical), params)
    assert canonical_json(parse_canonical(canonical)) == canonical


@given(sets, st.integers())
def test_the_order_of_keys_does_not_matter(params: dict[str, Any], seed: int) -> None:
    items = list(params.items())
    random.Random(seed).shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(params)


@given(sets)
def test_the_form_is_json_without_spaces_and_keys_sorted_by_code_point(params: dict[str, Any]) -> None:
    keys = list(json.loads(canonical_json(params)))
    assert keys == sorted(keys, key=lambda name: [ord(c) for c in name])


def test_integers_floats_and_booleans_stay_distinct() -> None:
    ids = {param_id(canonical_json({"x": x})) for x in (1, 1.0, True, "1", 0.0, -0.0, None, [1], math.nan)}
    assert len(ids) == 9


def test_numpy_values_are_what_they_hold() -> None:
    converted = {
        "i": np.int32(3),
        "f": np.float64(0.1),
        "b": np.bool_(True),
        "a": np.array([1, 2]),
        "s": np.str_("x"),
    }
    assert canonical_json(converted) == canonical_json({"i": 3, "f": 0.1, "b": True, "a": [1, 2], "s": "x"})
    assert canonical_json({"n": np.float64("nan"), "t": (1, 2)}) == b'{"n":{"$float":"nan"},"t":[1,2]}'


def _loop() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"a": {1, 2}}, "'a'"),
        ({"a": {"b": [object()]}}, r"'a\.b\[0\]'"),
        ({"a": b"x"}, "'a'"),
        ({"a": np.datetime64("2026-01-01")}, "'a'"),
        ({3: 1}, "3"),
        ({"$float": "nan"}, r"\$float"),
        ({"a": "\ud800"}, "Unicode"),
        ({"a": 10**5000}, "canonical form"),
        ({"a": _loop()}, "canonical form"),
    ],
    ids=["set", "nested", "bytes", "date", "key", "tag", "surrogate", "digits", "loop"],
)
def test_what_has_no_canonical_form_is_refused_by_name(params: dict[Any, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        canonical_json(params)


def test_the_vectors_of_the_reference_page_hold() -> None:
    for canonical, expected in rows_below("param-id.md", "| canonical form |"):
        assert param_id(canonical.encode()) == expected
        assert canonical_json(parse_canonical(canonical)) == canonical.encode()
