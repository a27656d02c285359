"""Writing a view whose columns are known only when every row has been seen: usually in one pass.

The first group of rows suggests the columns. As long as later groups agree they are written as they
come; if one does not, the rest is only looked at, and a second pass writes what is then known.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from modelops.store.behind import Behind
from modelops.store.segments import FORMAT
from modelops.store.views import ARROW_TYPES, Cells, Column, column_names, convert, reason, scatter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

ROW_GROUP: Final = 65_536
FEWEST_ROWS: Final = 256
CELLS: Final = 1 << 20  # outputs of a group: some 10 MB, or 30 of texts, of which several are held at a time
PARQUET_OPTIONS: Final[dict[str, Any]] = {  # pinned: the same rows give the same bytes
    "version": "2.6",
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": ["param_id", "status"],
    "data_page_size": 1 << 20,
    "data_page_version": "1.0",
    "write_batch_size": 1024,
    "write_statistics": True,
    "store_schema": True,
}


def rows_at_once(n_rows: int, weigh: Callable[[], int]) -> int:
    """Return how many rows a group has, of a table of so many: a power of two. Few are one group, whatever they have.

    ``weigh`` returns the weight of the first row that succeeded, see `Stored.weight`.
    """
    if n_rows <= FEWEST_ROWS:
        return ROW_GROUP
    fit = max(1, CELLS // max(1, weigh()))
    return min(ROW_GROUP, max(FEWEST_ROWS, 1 << (fit.bit_length() - 1)))


class Group(NamedTuple):
    """At most `ROW_GROUP` consecutive rows.

    ``base``: the columns that every row has. ``cells``: the outputs. ``dropped``: reasons, by output, of
    values that were not even gathered. ``first``: the outputs of the group's first succeeded row, in the
    order of the model's dict; None if no row succeeded.
    """

    base: Mapping[str, pa.Array]
    cells: Mapping[str, Cells]
    dropped: Mapping[str, Iterable[str]]
    first: Sequence[str] | None


class Layout(NamedTuple):
    """The columns that outputs become: name of output, name of column, label; and why others do not."""

    columns: tuple[tuple[str, str, str], ...]
    left_out: tuple[tuple[str, str], ...]

    def schema(self, base: pa.Schema) -> pa.Schema:
        """Return the schema of the whole table, with what was left out in its metadata."""
        metadata = {
            "modelops.format": str(FORMAT),
            "modelops.left_out": json.dumps(dict(self.left_out), ensure_ascii=False),
            **(base.metadata or {}),
        }
        outputs = [pa.field(column, ARROW_TYPES[label]) for _, column, label in self.columns]
        return pa.schema([*base, *outputs], metadata)


class _Seen:
    """What is known of the outputs after some groups."""

    def __init__(
        self, base_names: Sequence[str], order_all: Callable[[Iterable[str]], list[str]] | None
    ) -> None:
        self._base_names = base_names
        self._order_all = order_all
        self._labels: defaultdict[str, set[str]] = defaultdict(set)
        self._first: Sequence[str] | None = None

    def add(self, group: Group, converted: Mapping[str, Column]) -> None:
        if self._first is None:
            self._first = group.first
        for name, labels in group.dropped.items():
            self._labels[name].update(labels)
        for name, column in converted.items():
            self._labels[name] |= column.labels

    def layout(self) -> Layout:
        first = [name for name in self._first or () if name in self._labels]
        order = first + sorted(self._labels.keys() - set(first))
        if self._order_all is not None:
            order = self._order_all(order)
        good = [n for n in order if len(self._labels[n]) == 1 and self._labels[n] <= ARROW_TYPES.keys()]
        names = column_names(good, self._base_names, "output.")
        return Layout(
            tuple((n, names[n], next(iter(self._labels[n]))) for n in good),
            tuple((n, reason(self._labels[n])) for n in order if n not in names),
        )


class Sink(Protocol):
    """Where the rows of a table go."""

    def write(self, table: pa.Table) -> None:
        """Take the next group."""


def write_view(
    base: pa.Schema,
    groups: Callable[[], Iterable[Group]],
    open_sink: Callable[[pa.Schema], Sink],
    order: Callable[[Iterable[str]], list[str]] | None = None,
) -> None:
    """Write the groups as one table to the sink that is opened last.

    Parameters
    ----------
    base
        The columns that every row has, and metadata of the table.
    groups
        Called once or twice; must yield the same groups each time.
    open_sink
        Called with the schema before any row, and again if the table has to begin anew: what was written
        to an earlier sink counts no longer.
    order
        Rearranges the outputs; by default those of the first succeeded row, in the order of its dict, then
        the others by code point.
    """
    seen = _Seen([field.name for field in base], order)
    layout: Layout | None = None
    sink: Sink | None = None
    for group in groups():
        converted = {name: convert(cells) for name, cells in group.cells.items()}
        seen.add(group, converted)
        if layout is None:
            layout = seen.layout()
            sink = open_sink(layout.schema(base))
        if sink is not None and seen.layout() == layout:
            sink.write(_table(base, layout, group, converted))
        else:
            sink = None
    if layout is None:
        open_sink(seen.layout().schema(base))
    elif sink is None:
        layout = seen.layout()
        sink = open_sink(layout.schema(base))
        for group in groups():
            wanted = {name for name, _, _ in layout.columns}
            converted = {name: convert(cells) for name, cells in group.cells.items() if name in wanted}
            sink.write(_table(base, layout, group, converted))


def _table(base: pa.Schema, layout: Layout, group: Group, converted: Mapping[str, Column]) -> pa.Table:
    arrays = [group.base[field.name] for field in base]
    n_rows = len(arrays[0])
    for name, _, label in layout.columns:
        column = converted.get(name)
        if column is None or column.values is None:
            arrays.append(pa.nulls(n_rows, ARROW_TYPES[label]))
        else:
            arrays.append(scatter(column.values, group.cells[name].row, n_rows))
    return pa.Table.from_arrays(arrays, schema=layout.schema(base))


class MemorySink:
    """Keeps the rows; `table` joins them."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._tables: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Take the next group."""
        self._tables.append(table)

    def table(self) -> pa.Table:
        """Return all rows."""
        return pa.concat_tables(self._tables) if self._tables else self._schema.empty_table()


class ParquetSink:
    """Writes each group as one row group of a Parquet file, with pinned options.

    From the second one on, a group is encoded and compressed in another thread while the next one is made (if
    ``behind``: it is held longer); what goes wrong there is raised by the call after it.
    """

    def __init__(self, file: Any, schema: pa.Schema, *, behind: bool = True) -> None:
        file.seek(0)
        file.truncate()
        self._writer = pq.ParquetWriter(file, schema, **PARQUET_OPTIONS)
        self._behind = Behind("modelops-parquet")
        self._n_groups, self._may_lag = 0, behind

    def write(self, table: pa.Table) -> None:
        """Take the next group."""
        self._n_groups += 1
        if self._n_groups == 1 or not self._may_lag:  # nearly always the only one
            self._write(table)
            return
        self._behind.do(self._write, table)

    def close(self) -> None:
        """Write the end of the file."""
        try:
            self._behind.close()
        finally:
            self._writer.close()

    def _write(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=ROW_GROUP)


class StreamSink:
    """Writes each group to a file as an Arrow IPC stream."""

    def __init__(self, file: Any, schema: pa.Schema) -> None:
        file.seek(0)
        file.truncate()
        self._writer = pa.ipc.new_stream(file, schema)

    def write(self, table: pa.Table) -> None:
        """Take the next group."""
        self._writer.write_table(table)

    def close(self) -> None:
        """Write the end of the stream."""
        self._writer.close()
