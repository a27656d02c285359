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
    one_thread = pa.ipc.IpcReadOptions(use_threads=False)  # a process with a pool of threads must not fork
    with pa.ipc.open_stream(pa.py_buffer(data), options=one_thread) as reader:
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
        if table.num_rows:
            out.write_table(table)
        else:  # a stream without a batch would lose the categories of a dictionary column
            out.write_batch(
                pa.RecordBatch.from_arrays(list(map(_no_rows, table.columns)), schema=table.schema)
            )


def _no_rows(column: Any) -> Any:
    import pyarrow as pa

    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


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
    _write_table(_exact_table(frame, "a pandas.DataFrame"), sink)


def _write_series(series: Any, sink: Any) -> None:
    table = _exact_table(series.to_frame(name="values"), "a pandas.Series", name=series.name)
    _write_table(table, sink)


def _exact_table(frame: Any, what: str, **more: Any) -> Any:
    """Return a table that the frame comes back from just as it is.

    Raises
    ------
    InvalidOutputError
        There is none.
    """
    try:
        table = _from_frame(frame, what, **more)
        difference = _difference(frame, _to_frame(table))
    except InvalidOutputError:
        raise
    except Exception as e:  # pyarrow and pandas have no one error for "this has no Arrow form"
        raise InvalidOutputError(f"{what} that Arrow cannot carry: {type(e).__name__}: {e}") from e
    if difference is not None:
        raise InvalidOutputError(f"{what} whose {difference}")
    return table


def _difference(frame: Any, back: Any) -> str | None:
    """Say what of a frame would not come back as it was, None if all of it would."""
    pairs = (
        ("columns", frame.columns, back.columns),
        ("dtypes", list(frame.dtypes), list(back.dtypes)),
        ("index", frame.index, back.index),
    )
    for what, ours, theirs in pairs:
        if not (ours == theirs if what == "dtypes" else _same_index(ours, theirs)):
            return f"{what} Arrow cannot carry exactly: {ours!r} would come back as {theirs!r}"
    for i, (name, dtype) in enumerate(zip(frame.columns, frame.dtypes)):
        if not _is_plain(dtype, "biuf") and not _same_values(frame.iloc[:, i], back.iloc[:, i]):
            return f"column {name!r} Arrow cannot carry exactly"
    return None


def _same_index(ours: Any, theirs: Any) -> bool:
    return bool(_index_type(ours) == _index_type(theirs) and ours.equals(theirs))


def _same_values(ours: Any, theirs: Any) -> bool:
    """Return whether two columns of one dtype are equal, also in what is missing."""
    if hasattr(ours.dtype, "pyarrow_dtype"):  # it is an Arrow array, and to `equals` a NaN is not a NaN
        return True
    return bool(ours.array.equals(theirs.array))


def _is_plain(dtype: Any, kinds: str) -> bool:
    """Return whether it is NumPy's own; such numbers are copied by Arrow as they are."""
    return isinstance(dtype, sys.modules["numpy"].dtype) and dtype.kind in kinds


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
    extra = {"freq": _frequency(frame.index, f"{what} whose index"), "objects": objects, **more}
    columns = frame.columns
    if type(columns).__name__ == "RangeIndex":  # pandas' own metadata keep its labels, not that it is one
        extra["columns"] = [columns.start, columns.stop, columns.step]
    elif getattr(columns, "freq", None) is not None:
        extra["columns_freq"] = _frequency(columns, f"{what} whose columns")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyarrow warns of what the comparison refuses
        table = pa.Table.from_pandas(frame, nthreads=1)
    for i, dtype in enumerate(frame.dtypes):
        if _is_plain(dtype, "f"):
            column = frame.iloc[:, i].to_numpy()
            if (column != column).any():  # a NaN has become a null, and lost its sign and its other bits
                table = table.set_column(i, table.schema.field(i), pa.array(column, from_pandas=False))
    text = dumps(extra).encode("ascii")
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _EXTRA: text})


def _frequency(index: Any, what: str) -> str | None:
    """Return the frequency of an index as text, None if it has none."""
    freq = getattr(index, "freq", None)
    if freq is None:
        return None
    if type(index).__name__ == "PeriodIndex":  # it belongs to the dtype
        return str(index.freqstr)
    to_offset = sys.modules["pandas"].tseries.frequencies.to_offset
    try:
        exact = to_offset(index.freqstr) == freq
    except ValueError:
        exact = False
    if not exact:
        raise InvalidOutputError(f"{what} has the frequency {freq!r}, which has no text form; set it to None")
    return str(index.freqstr)


def _to_frame(table: Any) -> Any:
    extra = loads(table.schema.metadata[_EXTRA])
    frame = table.to_pandas(use_threads=False)
    for i in extra["objects"]:
        if i < 0:
            frame.index = _as_objects(frame.index)
        elif frame.dtypes.iloc[i].name != "object":
            frame.isetitem(i, frame.iloc[:, i].astype(object).where(frame.iloc[:, i].notna(), None))
    if "columns" in extra:
        frame.columns = sys.modules["pandas"].RangeIndex(*extra["columns"], name=frame.columns.name)
    for index, freq in ((frame.index, extra["freq"]), (frame.columns, extra.get("columns_freq"))):
        if freq != getattr(index, "freqstr", None):  # the dtype of a PeriodIndex has it already
            index.freq = freq
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


def _index_type(index: Any) -> Any:
    return (
        type(index).__name__,
        list(index.names),
        [lv.dtype for lv in _levels(index)],
        getattr(index, "freq", None),
    )
