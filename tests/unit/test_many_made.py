"""What many aggregates returned is cut as it came, and is what parsing it would have given."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.processes.many_made import ManyMade, cells_of

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
ANY = PLAIN | st.text() | st.lists(st.text(), max_size=3) | st.dictionaries(st.text(), PLAIN, max_size=2)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": ")])


@given(st.lists(st.tuples(PLAIN, PLAIN)) | st.lists(st.tuples(ANY, ANY)), SEPARATORS, st.integers(0, 20))
def test_cells_are_the_values_in_their_order_whatever_they_hold(
    pairs: list[tuple[object, object]], separators: tuple[str, str], n: int
) -> None:
    flat = [value for pair in pairs for value in pair]
    cells = cells_of(("a", "b"), json.dumps(flat, separators=separators).encode())
    rows = [(True, tuple(zip(("a", "b"), ("json", "json"), pair, strict=True))) for pair in pairs]
    parsed = [
        (returned, tuple((name, kind, json.loads(cell)) for name, kind, cell in outputs))  # type: ignore[arg-type]
        for returned, outputs in cells.rows()
    ]
    assert parsed == rows
    assert len(cells) == len(pairs)
    made = ManyMade([[(False, ())], cells, cells])
    assert len(made) == 1 + 2 * len(pairs)
    assert made.first(n).rows() == made.rows()[:n]


@pytest.mark.parametrize(
    "listed", [b"[1,2,3]", b'["a"]', b"{}", b'{"a":1,"b":2}', b"1", b"1,2,3,4", b"12", b"null", b""]
)
def test_a_list_that_has_not_a_value_for_each_name_is_refused(listed: bytes) -> None:
    with pytest.raises(ValueError, match=r"values|Expected|malformed|truncated"):
        cells_of(("a", "b"), listed)
