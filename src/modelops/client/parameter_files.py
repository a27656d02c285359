"""Read parameter sets from a file: CSV, Parquet, JSON or JSON Lines. One row, one parameter set.

CSV has no types, so a value is what it is written as: ``1`` is an integer, ``1.0`` and ``1e3`` are floats,
``true`` and ``false`` are bools, an empty cell is a parameter that the set lacks, all else is text.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelops.errors import NotFoundError, RequestError
from modelops.study.parameter_sets import Listed, ParameterSets

if TYPE_CHECKING:
    from collections.abc import Mapping

# No leading zeros: 007 is a name, not a number.
_INT = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+|inf|nan)")
_WORDS = {"true": True, "True": True, "false": False, "False": False}


def read_parameters(path: str | Path) -> ParameterSets:
    """Read the parameter sets in a file; its ending says what it is.

    Raises
    ------
    NotFoundError
        There is no such file.
    RequestError
        It cannot be read; says in which line.
    """
    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"there is no file {file} to read parameter sets from")
    match file.suffix.lower():
        case ".csv" | ".tsv":
            return _read_csv(file)
        case ".parquet" | ".pq":
            try:
                return ParameterSets.of_table(pq.read_table(file))
            except (pa.ArrowException, OSError) as e:  # of damage pyarrow says now one, now the other
                raise RequestError(f"{file} cannot be read as a Parquet file: {e}") from e
        case ".json":
            return _of_rows(file, [_json(file, _text(file), 1)])
        case ".jsonl" | ".ndjson":
            lines = enumerate(_text(file).splitlines(), 1)
            return _of_rows(file, [[_json(file, line, n) for n, line in lines if line.strip()]])
        case _:
            kinds = ".csv, .tsv, .parquet, .json and .jsonl"
            raise RequestError(f"{file}: parameter sets can be read from {kinds} files")


def value_of_text(text: str) -> Any:
    """Return what a value written as text is: bool, int, float or text.

    ``value_of_text("1")`` is the integer 1, ``value_of_text("1.0")`` the float. Raises RequestError for an integer of
    more digits than Python reads.
    """
    if _INT.fullmatch(text):
        try:
            return int(text)
        except ValueError as e:
            raise RequestError(
                f"{text:.20}... is an integer of {len(text):,} digits, more than can be read; text stands in quotes"
            ) from e
    if _FLOAT.fullmatch(text):
        return float(text)
    return _WORDS.get(text, text)


def _read_csv(file: Path) -> ParameterSets:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first name.
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            rows = []
            for row in reader:
                if row and len(row) != len(names):
                    raise RequestError(
                        f"{file}, line {reader.line_num}: {len(row)} values, "
                        f"but the first line names {len(names)}"
                    )
                if row:
                    rows.append(row)
        except (csv.Error, UnicodeDecodeError) as e:
            raise RequestError(f"{file}, line {reader.line_num}: {e}") from e
    if not names:
        raise RequestError(f"{file} is empty; its first line must name the parameters")
    if len(set(names)) < len(names):
        raise RequestError(f"{file}, line 1: a parameter is named twice: {', '.join(names)}")
    columns = [[value_of_text(text.strip()) for text in column] for column in zip(*rows, strict=True)]
    if not any("" in column for column in columns):
        listed = {name: Listed(column) for name, column in zip(names, columns, strict=False)}
        return ParameterSets(listed, len(rows))
    sets = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return ParameterSets.of_rows({k: v for k, v in row.items() if v != ""} for row in sets)


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise RequestError(f"{file} is not UTF-8: {e}; save it as UTF-8") from e


def _json(file: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"{file}, line {getattr(e, 'lineno', 1) + line - 1}: not valid JSON: {e}") from e


def _of_rows(file: Path, values: list[Any]) -> ParameterSets:
    rows: list[Mapping[str, Any]] = values[0]
    if not isinstance(rows, list):
        raise RequestError(f"{file} must hold a list of objects, one per parameter set")
    return ParameterSets.of_rows(rows)
