"""What a server makes of the parameter sets that a client sends: nothing that is not canonical passes for it."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelops.errors import ConflictError, RequestError
from modelops.server import parameters
from modelops.server.parameters import canonical_forms, pour_uploaded
from modelops.store.parameters import pour_canonicals, pour_parameters
from modelops.study.canonical import canonical_json, param_id

VALUES = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-1e-3, 1e-3),
    st.integers(-(10**30), 10**30),
    st.booleans(),
    st.none(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=2),
)
SETS = st.lists(
    st.dictionaries(st.sampled_from(["x", "beta", "é"]), VALUES, max_size=2), min_size=1, max_size=4
)


def uploaded(texts: list[bytes]) -> bytes:
    """Return the file that is stored for parameter sets that came as a file."""
    sent, stored = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.table({"canonical": pa.array(texts, pa.binary())}), sent)
    assert pour_uploaded(sent, stored) == len(texts)
    return stored.getvalue()


def written(forms: list[bytes]) -> bytes:
    file = io.BytesIO()
    pour_parameters(file, forms)
    return file.getvalue()


@given(SETS, st.booleans())
@example([{"x": 1e-05}], True)
@example([{"x": 9.9e-05}, {"x": 0.0001}], True)
@example([{"x": 1e16}], True)
@example([{"x": -0.0}, {"x": 0}], True)
@example([{"beta": "a\x7f\n"}], True)
def test_every_set_that_is_taken_has_its_canonical_form(rows: list[dict[str, Any]], canonical: bool) -> None:
    each = {canonical_json(row): row for row in rows}
    sent = each if canonical else [json.dumps(row).encode() for row in each.values()]
    forms, ids = canonical_forms(sent)
    assert forms == list(each)
    assert ids.hex() == "".join(map(param_id, each))
    assert uploaded(list(sent)) == written(forms)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (b'{"x":0.00001}', b'{"x":1e-05}'),
        (b'{"x":1e16}', b'{"x":1e+16}'),
        (b'{"x":-0}', b'{"x":0}'),
        (b'{"x":1.50}', b'{"x":1.5}'),
        (b'{"b":1,"a":2}', b'{"a":2,"b":1}'),
        (b'{"x":1,"x":2}', b'{"x":2}'),
        (b'{"x":"\\u0061"}', b'{"x":"a"}'),
        (b'{"x":{"b":1,"a":2}}', b'{"x":{"a":2,"b":1}}'),
        (b' {"x":1}\n', b'{"x":1}'),
    ],
)
def test_what_only_looks_canonical_is_written_anew(text: bytes, form: bytes) -> None:
    assert canonical_forms([text])[0] == [form]
    assert uploaded([text]) == written([form])


@pytest.mark.parametrize(
    "texts",
    [
        [b'{"x":3}', b'{"x":1', b'"y":2}', b'{"x":1},{"x":2}'],  # as many sets as texts, cut elsewhere
        [b'{"x":3}', b'{"x":1}\n{"x":2}', b""],
        [b'{"x":"a\nb"}'],
        [b'{"x":"\x01"}'],
        [b'{"x":"\xed\xa0\x80"}'],
        [b'{"x":' + b"1" * 5_000 + b"}"],
        [b'{"$x":1}'],
        [b'{"seed":1}'],
        [b"[]"],
    ],
)
def test_what_is_no_parameter_set_is_refused(texts: list[bytes]) -> None:
    with pytest.raises(RequestError):
        canonical_forms(texts)
    with pytest.raises(RequestError):
        uploaded(texts)


@pytest.mark.parametrize("n", [9, 10, 21])
def test_a_file_of_many_sets_is_stored_in_the_groups_that_it_is_read_in(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameters, "GROUP", 4)
    for module in ("modelops.server.parameters", "modelops.store.parameters"):
        monkeypatch.setattr(f"{module}.ROW_GROUP", 10)
    forms = [canonical_json({"x": i / 7, "y": "}{" if i == 6 else "a"}) for i in range(n)]
    sent, stored = io.BytesIO(), io.BytesIO()
    pour_canonicals(sent, forms)
    assert pour_uploaded(sent, stored) == n
    assert stored.getvalue() == written(forms)
    assert pq.ParquetFile(stored).num_row_groups == -(-n // 10)


@pytest.mark.parametrize("again", [b'{"x":3.0}', b'{"x": 3e0}'])
def test_a_file_with_two_sets_that_are_the_same_is_refused_by_their_rows(again: bytes) -> None:
    with pytest.raises(ConflictError, match=r"parameter sets 2 and 5 are the same: {'x': 3\.0}"):
        uploaded([*(b'{"x":%d.0}' % i for i in (1, 2, 3, 4, 5)), again])
