"""Tables as Arrow IPC streams, with what pandas knows and Arrow does not put back. Imported on first use."""

from __future__ import annotations

import io
import sys
import warnings

from modelops_runner.values import InvalidOutputError, _library, dumps, loads, type_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

_EXTRA = b"modelops.pandas"  # schema metadata: frequencies of the index, and which columns hold objects


def writer_of(value: Any) -> tuple[str, Callable[[Any, Any], None]] | None:
    """Return the kind and the writer of a table, None if it is none that can cross."""
    kind = type(value)
    pa, pd, pl = (sys.modules.get(name) for name in ("pyarrow", "pandas", "polars"))
    if pa is not None:
        if kind is pa.Table:
            return "arrow", _write_table
        if kind is pa.RecordBatch:
            return "arrow.batch", _write_batch
        if isinstance(value, pa.Array):
            return "arrow.array", _write_array
    if pd is not None:
        if kind is pd.DataFrame:
            return "arrow.pandas", _write_frame
        if kind is pd.Series:
            return "arrow.pandas.series", _write_series
    if pl is not None:
        if kind is pl.DataFrame:
            return "arrow.polars", _write_polars
        if kind is pl.Series:
            return "arrow.polars.series", lambda v, sink: _write_polars(v.to_frame(), sink)
    return None


def read(kind: str, data: bytes) -> Any:
    """Return the table of these bytes."""
    if kind.startswith("arrow.polars"):
        frame = _library("polars", "a polars table").read_ipc_stream(io.BytesIO(data))
        return frame if kind == "arrow.polars" else frame.to_series()
    pa = _library("pyarrow", "an Arrow table")
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        if kind == "arrow.batch":
            return reader.read_next_batch()
        if kind == "arrow.array":
            return reader.read_next_batch().column(0)
        table = reader.read_all()
    if kind == "arrow":
        return table
    _library("pandas", "a pandas table")
    return _to_series(table) if kind == "arrow.pandas.series" else _to_frame(table)


def _write_table(table: Any, sink: Any) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)


def _write_batch(batch: Any, sink: Any) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(sink, batch.schema) as out:
        out.write_batch(batch)


def _write_array(array: Any, sink: Any) -> None:
    import pyarrow as pa

    _write_batch(pa.RecordBatch.from_arrays([array], names=[""]), sink)


def _write_polars(frame: Any, sink: Any) -> None:
    pl = sys.modules["polars"]
    what = f"a polars table with dtypes {', '.join(map(str, frame.dtypes))}"
    buffer, empty = io.BytesIO(), io.BytesIO()
    try:
        frame.clear().write_ipc_stream(empty)
        empty.seek(0)
        same = pl.read_ipc_stream(empty).schema == frame.schema and pl.Object not in frame.dtypes
        if same:
            frame.write_ipc_stream(buffer)
    except Exception as e:  # polars has no one error for "this dtype has no Arrow form" across versions
        raise InvalidOutputError(f"{what} cannot be returned: {e}") from e
    if not same:
        raise InvalidOutputError(f"{what} has no exact Arrow form; cast it first")
    sink.write(buffer.getbuffer())


# --- pandas --------------------------------------------------------------------------------------


def _write_frame(frame: Any, sink: Any) -> None:
    table = _from_frame(frame, "a pandas.DataFrame")
    back = _to_frame(table.slice(0, 0))
    pairs: tuple[tuple[str, Any, Any], ...] = (
        ("columns", frame.columns, back.columns),
        ("dtypes", list(frame.dtypes), list(back.dtypes)),
        ("index", _index_type(frame.index), _index_type(back.index, frame.index)),
    )
    for what, ours, theirs in pairs:
        same = ours.equals(theirs) and ours.names == theirs.names if what == "columns" else ours == theirs
        if not same:
            raise InvalidOutputError(
                f"a pandas.DataFrame whose {what} Arrow cannot carry exactly: "
                f"{ours!r} would come back as {theirs!r}"
            )
    _write_table(table, sink)


def _write_series(series: Any, sink: Any) -> None:
    frame = series.to_frame(name="values")
    table = _from_frame(frame, "a pandas.Series", name=series.name)
    back = _to_series(table.slice(0, 0))
    if back.dtype != series.dtype or _index_type(back.index, series.index) != _index_type(series.index):
        raise InvalidOutputError(f"a pandas.Series of dtype {series.dtype} that Arrow cannot carry exactly")
    _write_table(table, sink)


def _from_frame(frame: Any, what: str, **more: Any) -> Any:
    try:
        import pyarrow as pa
    except ImportError:
        raise InvalidOutputError(
            f'{what} needs pyarrow to be returned: add "pyarrow" to dependencies'
        ) from None
    objects = []
    for i, dtype in enumerate(frame.dtypes):
        if dtype.kind == "O" and dtype.name == "object":
            _check_texts(frame.iloc[:, i], what)
            objects.append(i)
    if any(_holds_objects(level) for level in _levels(frame.index)):
        objects.append(-1)  # the index
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pyarrow warns of what the check of the columns refuses
            table = pa.Table.from_pandas(frame)
    except (pa.ArrowException, ValueError, TypeError, NotImplementedError) as e:
        raise InvalidOutputError(f"{what} that Arrow cannot carry: {e}") from e
    extra = dumps({"freq": getattr(frame.index, "freqstr", None), "objects": objects, **more})
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _EXTRA: extra.encode("ascii")})


def _to_frame(table: Any) -> Any:
    extra = loads(table.schema.metadata[_EXTRA])
    frame = table.to_pandas()
    for i in extra["objects"]:
        if i < 0:
            frame.index = _as_objects(frame.index)
        elif frame.dtypes.iloc[i].name != "object":
            frame.isetitem(i, frame.iloc[:, i].astype(object).where(frame.iloc[:, i].notna(), None))
    if extra["freq"] != getattr(frame.index, "freqstr", None):  # the dtype of a PeriodIndex has it already
        frame.index.freq = extra["freq"]
    return frame


def _to_series(table: Any) -> Any:
    series = _to_frame(table)["values"]
    series.name = loads(table.schema.metadata[_EXTRA])["name"]
    return series


def _check_texts(column: Any, what: str) -> None:
    """Let an object column pass only if it is how pandas before 3 keeps text."""
    for value in column:
        if value is not None and type(value) is not str:
            raise InvalidOutputError(
                f"{what} with a {type_name(value)} in the object column {column.name!r}; "
                "give that column a dtype"
            )


def _levels(index: Any) -> list[Any]:
    return list(getattr(index, "levels", [index]))


def _holds_objects(level: Any) -> bool:
    if level.dtype != object:
        return False
    _check_texts(level, "a pandas index")
    return True


def _as_objects(index: Any) -> Any:
    if hasattr(index, "levels"):
        return index.set_levels([lv.astype(object) if lv.dtype.kind in "OTU" else lv for lv in index.levels])
    return index.astype(object)


def _index_type(index: Any, original: Any = None) -> Any:
    if type(index).__name__ == "RangeIndex" and type(original).__name__ == "RangeIndex":
        index = original  # it is stored as start, stop and step; an empty table has none of its own
    return type(index).__name__, list(index.names), [lv.dtype for lv in _levels(index)]
