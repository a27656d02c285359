"""The parameter sets of a study: a sequence of dicts, kept as columns, so that a million costs little.

A column is the values of one axis of a grid with the pattern in which they repeat, a numpy array, or a list.
The canonical form is put together from the text of each column; it is byte for byte that of
`modelops.study.canonical.canonical_json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from json.encoder import encode_basestring
from typing import Any, overload

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelops.errors import RequestError
from modelops.study.canonical import RESERVED, canonical_json, canonical_value, param_ids

ROW_GROUP = 65_536
AT_ONCE = 4_096  # sets whose texts are put together in one piece
FEW = 64  # values that are written one by one
FORMAT = b"1"
ID_TYPE = "S32"  # of an array of ids


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a grid: row ``i`` has ``values[i // repeat % len(values)]``."""

    values: list[Any]
    repeat: int

    def at(self, i: int) -> Any:
        """Return the value in row ``i``."""
        return self.values[i // self.repeat % len(self.values)]

    def texts(self, name: str, lo: int, hi: int) -> list[str]:
        """Return the canonical text of the rows ``lo <= i < hi``."""
        texts = _texts(name, self.values)
        if self.repeat == 1 and hi <= len(texts):
            return texts[lo:hi]
        found: list[str] = np.array(texts, object)[self._places(lo, hi)].tolist()
        return found

    def _places(self, lo: int, hi: int) -> npt.NDArray[np.int64]:
        return np.arange(lo, hi) // self.repeat % len(self.values)

    def distinct(self, n: int) -> bool:
        """Say whether no two rows have the same value, if that is seen at once."""
        return self.repeat == 1 and n <= len(self.values) and _all_differ(self.values)


@dataclass(frozen=True, slots=True)
class Listed:
    """A column whose values are listed, as a numpy array of numbers or a list of anything."""

    values: Sequence[Any] | npt.NDArray[Any]

    def at(self, i: int) -> Any:
        """Return the value in row ``i``, numpy scalars as Python's."""
        value = self.values[i]
        return value.item() if isinstance(value, np.generic) else value

    def texts(self, name: str, lo: int, hi: int) -> list[str]:
        """Return the canonical text of the rows ``lo <= i < hi``."""
        part = self.values[lo:hi]
        return _texts(name, part.tolist() if isinstance(part, np.ndarray) else part)

    def distinct(self, n: int) -> bool:
        """Say whether no two rows have the same value, if that is seen at once."""
        return _all_differ(self.values)


Column = Axis | Listed


class ParameterSets(Sequence[Mapping[str, Any]]):
    """Parameter sets in order; the position is the ordinal ``param``.

    Made by `grid`, `sobol`, `latin_hypercube`, `of_rows` or `of_table`; a list of dicts does as well
    wherever a study takes one.
    """

    __slots__ = ("_columns", "_n", "_rows")

    def __init__(
        self, columns: Mapping[str, Column], n: int, rows: list[Mapping[str, Any]] | None = None
    ) -> None:
        self._columns, self._n, self._rows = dict(columns), n, rows
        names = self.names
        check_names(names)

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]]) -> ParameterSets:
        """Take a list of dicts. They may have different keys: what is absent is not given to the model."""
        listed = list(rows)
        for i, row in enumerate(listed):
            if not isinstance(row, Mapping):
                raise RequestError(
                    f"parameter set {i} is a {type(row).__name__}, not a dict of name and value: {row!r}"
                )
        if listed and listed[0] and all(row.keys() == listed[0].keys() for row in listed):
            return cls({name: Listed([row[name] for row in listed]) for name in listed[0]}, len(listed))
        return cls({}, len(listed), listed)

    @classmethod
    def of_table(cls, table: Any) -> ParameterSets:
        """Take a table (pyarrow, pandas, polars): one row per parameter set, integers and floats kept apart.

        A missing value (null) means that the set lacks that parameter; a NaN stays a NaN.
        """
        columns = _table_columns(table)
        n = min((len(column.values) for column in columns.values()), default=0)
        if not any(_has_missing(column.values) for column in columns.values()):
            return cls(columns, n)
        rows = ({name: column.at(i) for name, column in columns.items()} for i in range(n))
        return cls({}, n, [{k: v for k, v in row.items() if v is not None} for row in rows])

    @property
    def names(self) -> list[str]:
        """The names of all parameters, in the order in which they were given."""
        if self._rows is None:
            return list(self._columns)
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, i: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(self._n))]
        k = i + self._n if i < 0 else i
        if not 0 <= k < self._n:
            raise IndexError(i)
        if self._rows is not None:
            return self._rows[k]
        return {name: column.at(k) for name, column in self._columns.items()}

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[k] for k in range(self._n))

    def __repr__(self) -> str:
        return f"<{self._n} parameter sets of {', '.join(self.names) or 'nothing'}>"

    def surely_distinct(self) -> bool:
        """Say whether no two sets are the same, if one of their columns shows it: that is soon seen."""
        return any(column.distinct(self._n) for column in self._columns.values())

    def canonical(self, lo: int = 0, hi: int | None = None) -> list[bytes]:
        """Return the canonical forms of the sets ``lo <= param < hi``."""
        hi = self._n if hi is None else min(hi, self._n)
        if self._rows is not None:
            return [canonical_json(row) for row in self._rows[lo:hi]]
        names = sorted(self._columns)
        if not names:
            return [b"{}"] * (hi - lo)
        heads = [json.dumps(name, ensure_ascii=False).replace("%", "%%") + ":%s" for name in names]
        template = "{" + ",".join(heads) + "}\n"  # no canonical form has a line break in it
        texts = [self._columns[name].texts(name, lo, hi) for name in names]
        out: list[bytes] = []
        try:
            for at in range(0, hi - lo, AT_ONCE):
                parts = [column[at : at + AT_ONCE] for column in texts]
                values = parts[0] if len(parts) == 1 else chain.from_iterable(zip(*parts, strict=True))
                out += (template * len(parts[0]) % tuple(values)).encode().splitlines()
        except UnicodeEncodeError as e:
            raise RequestError(f"a parameter holds text that is not valid Unicode: {e.object!r}") from e
        return out


def _all_differ(values: Sequence[Any] | npt.NDArray[Any]) -> bool:
    """Say whether these are finite floats of which no two are equal; no others are looked at."""
    if isinstance(values, np.ndarray):
        numbers = values if values.dtype == np.float64 and values.ndim == 1 else None
    else:
        numbers = np.array(values) if set(map(type, values)) == {float} else None
    if numbers is None:
        return False
    if (numbers[1:] > numbers[:-1]).all():  # as most often; a NaN is larger than nothing
        return True
    numbers = np.sort(numbers)
    return bool((numbers[1:] > numbers[:-1]).all())


def distinct_canonicals(sets: ParameterSets) -> list[bytes]:
    """Return the canonical forms of all sets, in order.

    Raises
    ------
    RequestError
        There is no parameter set, or two are the same; names both rows.
    """
    if not len(sets):
        raise RequestError("the study has no parameter sets; give at least one, e.g. parameters=[{}]")
    canonicals = sets.canonical()
    if not sets.surely_distinct() and len(set(canonicals)) < len(canonicals):
        refuse_duplicates(param_ids(canonicals), lambda i: sets[i])
    return canonicals


def parameter_table(sets: ParameterSets) -> pa.Table:
    """Return what ``parameters.parquet`` holds: `param`, `param_id`, `canonical`, in chunks of 65,536 rows.

    Raises
    ------
    RequestError
        There is no parameter set, or two are the same; names both rows.
    """
    if not len(sets):
        raise RequestError("the study has no parameter sets; give at least one, e.g. parameters=[{}]")
    batches: list[pa.RecordBatch] = []
    ids: list[str] = []
    for lo in range(0, len(sets), ROW_GROUP):
        canonical = sets.canonical(lo, lo + ROW_GROUP)
        part = param_ids(canonical)
        ids += part
        batches.append(
            pa.record_batch(
                [
                    pa.array(range(lo, lo + len(canonical)), pa.int64()),
                    pa.array(part, pa.string()),
                    pa.array(canonical, pa.binary()).cast(pa.string()),
                ],
                names=["param", "param_id", "canonical"],
            )
        )
    table = pa.Table.from_batches(batches)
    refuse_duplicates(ids, lambda i: sets[i])
    return table.replace_schema_metadata({b"modelops.format": FORMAT})


def refuse_duplicates(
    ids: Sequence[str] | npt.NDArray[np.bytes_], set_at: Callable[[int], Mapping[str, Any]]
) -> None:
    """Refuse parameter sets of which two have the same id, naming both. Raises RequestError.

    ``set_at`` returns the values of a set by its position.
    """
    digests = np.asarray(ids, dtype=ID_TYPE)
    order = np.argsort(digests, kind="stable")
    same = np.flatnonzero(digests[order[1:]] == digests[order[:-1]])
    if len(same):
        first, second = min((int(order[i]), int(order[i + 1])) for i in same)
        raise RequestError(
            f"parameter sets {first} and {second} are the same: {dict(set_at(first))!r}. Each must differ "
            "in at least one value (1 and 1.0 do differ); to run one more often, raise `replicates`"
        )


def check_names(names: Iterable[object]) -> None:
    """Refuse names that no parameter can have. Raises RequestError."""
    for name in names:
        if not isinstance(name, str) or not name or name.startswith("$"):
            raise RequestError(
                f"a parameter cannot have the name {name!r}: names are text, not empty, without '$' first"
            )
        if name in RESERVED:
            raise RequestError(
                f"a parameter cannot have the name {name!r}: results have a column of that name "
                f"(reserved are {', '.join(sorted(RESERVED))}); rename it"
            )


def _texts(name: str, values: Sequence[Any]) -> list[str]:
    """Return the canonical text of each value of a parameter."""
    if len(values) >= FEW and _msgspec_writes_as_python(values):
        return msgspec.json.encode(values)[1:-1].decode().split(",")  # a third of the price
    return [
        float.__repr__(v) if type(v) is float and -_INF < v < _INF
        else int.__repr__(v) if type(v) is int
        else encode_basestring(v) if type(v) is str and v.isascii()
        else _WORDS[v] if v is None or type(v) is bool
        else _listed(name, v) if type(v) is list or type(v) is tuple
        else canonical_value(v, name)
        for v in values
    ]  # fmt: skip


def _listed(name: str, values: Sequence[Any]) -> str:
    try:
        return f"[{','.join(_texts(name, values))}]"
    except (RequestError, RecursionError):
        return canonical_value(values, name)  # which names the place in it


def _msgspec_writes_as_python(values: Sequence[Any]) -> bool:
    """Say whether these are floats that both write without an exponent, or integers of 64 bits."""
    kinds = set(map(type, values))
    if kinds == {float}:
        sizes = np.abs(np.array(values))
        return bool((((sizes >= 1e-4) & (sizes < 1e16)) | (sizes == 0.0)).all())
    return kinds == {int} and min(values) >= -(2**63) and max(values) < 2**63


_WORDS = {None: "null", False: "false", True: "true"}
_INF = float("inf")  # NaN and the infinities fail the comparison, and are tagged in the slow way


def _has_missing(values: Sequence[Any] | npt.NDArray[Any]) -> bool:
    return not isinstance(values, np.ndarray) and any(v is None for v in values)


def _table_columns(table: Any) -> dict[str, Listed]:
    if hasattr(table, "iloc") and hasattr(table, "columns"):  # pandas, which need not be installed here
        return {str(name): _pandas_column(table[name]) for name in table.columns}
    refusal = (
        f"{table!r:.80} cannot be read as parameter sets; give a list of dicts, a table "
        "(pyarrow, pandas, polars), a path to a file, or mo.grid(...)"
    )
    if not isinstance(table, pa.Table | pa.RecordBatch) and not hasattr(table, "__arrow_c_stream__"):
        raise RequestError(refusal)
    try:
        arrow = pa.table(table)
    except pa.ArrowInvalid as e:  # one column without a name: a pandas or polars Series
        raise RequestError(refusal) from e
    return {
        name: Listed(_arrow_values(column))
        for name, column in zip(arrow.column_names, arrow.columns, strict=True)
    }


def _pandas_column(series: Any) -> Listed:
    # By way of Arrow an object column of 1 and 1.0 would become two floats, and NaN would become missing.
    if series.dtype == object:
        return Listed(list(series))
    if isinstance(series.dtype, np.dtype):
        return Listed(series.to_numpy())
    return Listed(pa.array(series).to_pylist())


def _arrow_values(column: pa.ChunkedArray[Any]) -> Sequence[Any] | npt.NDArray[Any]:
    kind = column.type
    if column.null_count == 0 and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return np.asarray(column.to_numpy())
    return list(column.to_pylist())
