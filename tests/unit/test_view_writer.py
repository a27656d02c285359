"""Groups of rows on their way into a result file, and parameter sets on theirs into columns."""

from __future__ import annotations

import errno
import io

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelops.store import columns
from modelops.store.parameter_view import _parsed
from modelops.store.view_writer import ParquetSink
from modelops.study.canonical import canonical_json

SCHEMA = pa.schema([("n", pa.int64())])


def group(first: int) -> pa.Table:
    return pa.table({"n": pa.array(range(first, first + 1_000), pa.int64())}, SCHEMA)


class Full(io.BytesIO):
    """A file on a volume that is full from some moment on."""

    is_full = False

    def write(self, data: object) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)  # type: ignore[arg-type]  # whatever Arrow gives


def test_groups_are_row_groups_in_the_order_in_which_they_came() -> None:
    file = io.BytesIO()
    sink = ParquetSink(file, SCHEMA)
    for first in range(0, 7_000, 1_000):
        sink.write(group(first))
    sink.close()
    written = pq.ParquetFile(file)
    assert written.num_row_groups == 7
    assert written.read()["n"].to_pylist() == list(range(7_000))


@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_a_group_that_cannot_be_written_fails_the_file(n_before: int) -> None:
    file = Full()
    sink = ParquetSink(file, SCHEMA)
    for nth in range(n_before):
        sink.write(group(nth))
    file.is_full = True

    def go_on() -> None:
        for nth in range(3):
            sink.write(group(nth))
        sink.close()

    with pytest.raises(OSError, match="No space left"):
        go_on()


@given(st.lists(st.dictionaries(st.text("}{x", min_size=1), st.text('}{",') | st.integers(0, 2)), min_size=1))
@example([{"x": "}{"}, {}])
@example([{}, {}, {"}{": 1}])
def test_parameter_sets_that_stand_together_are_parsed_as_each_alone(sets: list[dict[str, object]]) -> None:
    texts = [canonical_json(one) for one in sets]
    assert _parsed(columns.binary(texts)) == [msgspec.json.decode(text) for text in texts]
    assert _parsed(columns.binary([b"{}", *texts]).slice(1)) == [msgspec.json.decode(text) for text in texts]
