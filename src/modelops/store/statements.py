"""Statements that are compiled once: the few of which every commit of a driver needs some.

SQLAlchemy takes ten times as long to execute a statement as SQLite does. So SQLite's connection is given these
directly: the text that SQLAlchemy made, with values converted as SQLAlchemy converts them. A server is a round trip
away, which outweighs that, and there SQLAlchemy has to see what becomes of the connection.
"""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import sqlalchemy as sa

    Convert = Callable[[Any], Any] | None


class Statement:
    """A statement that is run with values for its parameters (of an insert or update: also for columns) by name."""

    def __init__(self, clause: sa.Select[Any] | sa.Insert | sa.Update) -> None:
        self._clause = clause
        self._compiled: dict[tuple[str, ...], _Compiled] = {}  # for SQLite, by the names of the values

    def rows(self, sql: sa.Connection, values: Mapping[str, Any]) -> Sequence[Any]:
        """Return all rows; each is a tuple whose items have names as well."""
        if sql.dialect.name != "sqlite":
            return sql.execute(self._clause, dict(values)).all()
        compiled = self._for_sqlite(sql, values)
        return compiled.rows(_raw(sql).execute(compiled.text, compiled.given(values)).fetchall())

    def row(self, sql: sa.Connection, values: Mapping[str, Any]) -> Any | None:
        """Return the only row, or None if there is none."""
        rows = self.rows(sql, values)
        return rows[0] if rows else None

    def scalar(self, sql: sa.Connection, values: Mapping[str, Any]) -> Any | None:
        """Return the first item of the only row, or None if there is none."""
        rows = self.rows(sql, values)
        return rows[0][0] if rows else None

    def run(self, sql: sa.Connection, values: Mapping[str, Any]) -> int:
        """Run what returns no rows; return how many it has changed."""
        if sql.dialect.name != "sqlite":
            return int(sql.execute(self._clause, dict(values)).rowcount)
        compiled = self._for_sqlite(sql, values)
        return int(_raw(sql).execute(compiled.text, compiled.given(values)).rowcount)

    def run_each(self, sql: sa.Connection, values: Sequence[Mapping[str, Any]]) -> None:
        """Run it with each of these values; all have the same names."""
        if sql.dialect.name != "sqlite":
            sql.execute(self._clause, [dict(one) for one in values])
        elif values:
            compiled = self._for_sqlite(sql, values[0])
            _raw(sql).executemany(compiled.text, [compiled.given(one) for one in values])

    def _for_sqlite(self, sql: sa.Connection, values: Mapping[str, Any]) -> _Compiled:
        names = tuple(values)
        compiled = self._compiled.get(names)
        if compiled is None:
            compiled = self._compiled[names] = _compiled(self._clause, sql.dialect, names)
        return compiled


class _Compiled(NamedTuple):
    """A statement as text, how its values are converted, in their order, and its rows."""

    text: str
    parameters: tuple[tuple[str, Any, Convert], ...]  # name (empty: always the same), this, and conversion
    row: Callable[[Iterable[Any]], Any]
    converted: tuple[tuple[int, Callable[[Any], Any]], ...]  # columns whose values are converted

    def given(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the values as SQLite takes them."""
        return [
            (constant if not name else values[name] if convert is None else convert(values[name]))
            for name, constant, convert in self.parameters
        ]

    def rows(self, found: list[tuple[Any, ...]]) -> Sequence[Any]:
        """Return rows as SQLAlchemy would."""
        if not self.converted:
            return [self.row(values) for values in found]
        out = []
        for values in found:
            changed = list(values)
            for i, convert in self.converted:
                changed[i] = convert(changed[i])
            out.append(self.row(changed))
        return out


def _compiled(clause: Any, dialect: sa.Dialect, names: tuple[str, ...]) -> _Compiled:
    compiled = clause.compile(dialect=dialect, column_keys=list(names))
    constants = compiled.construct_params(dict.fromkeys(names))  # raises if it needs one more
    parameters = []
    for name in compiled.positiontup:
        convert = compiled.binds[name].type.dialect_impl(dialect).bind_processor(dialect)
        if name in names:
            parameters.append((name, None, convert))
        else:
            parameters.append(("", constants[name] if convert is None else convert(constants[name]), None))
    columns = list(clause.exported_columns)
    processors = [c.type.dialect_impl(dialect).result_processor(dialect, None) for c in columns]
    row: Any = namedtuple("Row", [c.name for c in columns], rename=True)  # type: ignore[misc]
    return _Compiled(
        compiled.string,
        tuple(parameters),
        row._make,
        tuple((i, p) for i, p in enumerate(processors) if p is not None),
    )


def _raw(sql: sa.Connection) -> Any:
    return sql.connection.driver_connection
