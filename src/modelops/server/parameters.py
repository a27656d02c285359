"""The parameter sets of a submission, from whatever carries them, in canonical form and checked."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modelops.errors import ConflictError, RequestError
from modelops.store import columns
from modelops.store.parameters import ID_BYTES, ROW_GROUP, Sets, pour_sets
from modelops.study.canonical import canonical_json, id_bytes, parse_canonical, write_plain
from modelops.study.parameter_sets import Listed, ParameterSets, check_names, refuse_duplicates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

FORMAT = 1
GROUP = 4_096  # parameter sets that are looked at together
MAX_PLAIN = 200  # names that a type is made for
MAX_TEXT_BYTES = 4 << 30  # of all canonical forms of a file together


def canonical_forms(texts: Iterable[bytes]) -> tuple[list[bytes], bytes]:
    """Return the canonical form of each parameter set, and their ids, see `id_bytes`.

    Parameters
    ----------
    texts
        One JSON object each, canonical or not; non-finite floats are tagged.

    Raises
    ------
    RequestError
        One is no parameter set, or has a name that none can have; says which.
    ConflictError
        Two are the same; says which.
    """
    out: list[bytes] = []
    names: set[str] = set()
    found: list[bytes] = []
    rest = iter(texts)
    while group := list(islice(rest, GROUP)):
        lines = b"\n".join(group) + b"\n"  # no canonical form has a line break in it: each line is one
        if (plain := _names_of_plain(lines, len(group))) is not None:
            names.update(plain)
        else:
            names.update(_make_canonical(group, len(out)))
        out += group
        found.append(id_bytes(group))
    check_names(sorted(names))
    ids = b"".join(found)
    _refuse_same(ids, out.__getitem__)
    return out, ids


def pour_uploaded(source: Any, file: IO[bytes]) -> int:
    """Write the parameter sets of an uploaded file to another as they are stored; return how many there are.

    Raises
    ------
    RequestError, ConflictError
        As `canonical_forms` and `texts_of_file`.
    """
    names: set[str] = set()
    found: list[bytes] = []

    def looked_at() -> Iterator[tuple[pa.Array, bytes]]:
        n = 0
        for array in _batches_of_file(source):
            lines = _lines_in(array)
            plain = None if lines is None else _names_of_plain(lines, len(array))
            if lines is not None and plain is not None:
                names.update(plain)
                found.append(id_bytes(lines[:-1].split(b"\n")))
                yield array, found[-1]
            else:
                group = columns.binary_values(array)
                names.update(_make_canonical(group, n))
                found.append(id_bytes(group))
                yield columns.binary(group), found[-1]
            n += len(array)

    n = pour_sets(file, _regrouped(looked_at()))
    check_names(sorted(names))
    _refuse_same(b"".join(found), lambda i: next(islice(texts_of_file(source), i, None)))
    return n


def _regrouped(parts: Iterable[tuple[pa.Array, bytes]]) -> Iterator[Sets]:
    """Yield the same sets, `ROW_GROUP` at a time."""
    texts: list[pa.Array] = []
    ids, n = b"", 0
    for array, of_array in parts:
        texts.append(array)
        ids, n = ids + of_array, n + len(array)
        if n >= ROW_GROUP:
            whole = pa.concat_arrays(texts)
            yield Sets(whole.slice(0, ROW_GROUP), ids[: ROW_GROUP * ID_BYTES])
            texts, ids, n = [whole.slice(ROW_GROUP)], ids[ROW_GROUP * ID_BYTES :], n - ROW_GROUP
    if n:
        yield Sets(pa.concat_arrays(texts), ids)


def _lines_in(texts: pa.Array) -> bytes | None:
    """Return one text a line; None if that takes a closer look."""
    n, together = len(texts), columns.joined_bytes(texts)
    if not n or b"\n" in together or together.count(b"}{") != n - 1:
        return None
    lines = together.replace(b"}{", b"}\n{") + b"\n"
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) - np.arange(n)
    _, sizes = columns.starts_and_sizes(texts)
    return lines if np.array_equal(ends, np.cumsum(sizes)) else None


def _make_canonical(group: list[bytes], first: int) -> set[str]:
    """Put canonical forms in the place of texts, and return the names. ``first``: the position of the first text."""
    if (names := _names_of_canonical(group)) is not None:
        return set(names)
    found: set[str] = set()
    for i, text in enumerate(group):
        try:
            group[i], keys = _canonical(text)
        except (ValueError, TypeError, RecursionError, RequestError) as e:
            raise RequestError(f"parameter set {first + i} cannot be used: {e}") from e
        found.update(keys)
    return found


def _refuse_same(ids: bytes, text_at: Callable[[int], bytes]) -> None:
    """Refuse parameter sets of which two are the same. Raises ConflictError."""
    halves = np.sort(np.frombuffer(ids, np.uint64)[::2])  # several times faster than `unique`
    if not (halves[1:] == halves[:-1]).any():
        return
    each = [ids[at : at + ID_BYTES].hex() for at in range(0, len(ids), ID_BYTES)]
    try:
        refuse_duplicates(each, lambda i: parse_canonical(text_at(i)))
    except RequestError as e:
        raise ConflictError(str(e)) from e


def texts_of_file(source: Any) -> Iterator[bytes]:
    """Yield the canonical forms that an uploaded ``parameters.parquet`` holds, in the order of its rows.

    Raises
    ------
    RequestError
        It is no such file, a newer ModelOps wrote it, or it holds more than a job may.
    """
    for array in _batches_of_file(source):
        yield from columns.binary_values(array)


def _batches_of_file(source: Any) -> Iterator[pa.Array]:
    """Yield the same as arrays of large_binary, of at most `GROUP` each.

    Raises
    ------
    RequestError
        It is no such file, a newer ModelOps wrote it, or it holds more than a job may.
    """
    try:
        file = pq.ParquetFile(source)
        found = (file.metadata.metadata or {}).get(b"modelops.format", b"0")
        if found.isdigit() and int(found) > FORMAT:
            raise RequestError(
                f"the parameter file was written by a newer ModelOps (format {int(found)}, this server reads up to "
                f"{FORMAT}); upgrade the server"
            )
        if "canonical" not in file.schema_arrow.names:
            raise RequestError(
                "the parameter file has no column 'canonical'; see docs/reference/layout.md for its columns"
            )
        n_bytes = 0
        # Few rows at a time: what a small file says it holds need not be small.
        for batch in file.iter_batches(batch_size=GROUP, columns=["canonical"], use_threads=False):
            n_bytes += batch.nbytes
            if n_bytes > MAX_TEXT_BYTES:
                raise RequestError(
                    f"the parameter file holds more than {MAX_TEXT_BYTES} bytes of parameter sets"
                )
            yield batch.column(0).cast(pa.large_binary())
    except (pa.ArrowException, OSError, ValueError) as e:
        raise RequestError(f"the parameter file cannot be read: {e}") from e


def _names_of_plain(lines: bytes, n: int) -> tuple[str, ...] | None:
    """Return the names, if all ``n`` lines are canonical, with the same names and values that msgspec writes as Python.

    Those are numbers and texts. A sixth of the price of `_names_of_canonical`, which is there for the others.
    """
    try:
        first = msgspec.json.decode(lines[: lines.index(b"\n")], type=dict[str, _Plain])
        names = tuple(first)
        # msgspec writes 1e-05 as 0.00001, and 1e+16 as 1e16; escapes, too, may be its own.
        own_way = b"\\" in lines or b"0.0000" in lines or lines.count(b"e") != n * "".join(names).count("e")
        if (
            own_way
            or not names
            or len(names) > MAX_PLAIN
            or list(names) != sorted(names)
            or "$" in "".join(names)
        ):
            return None
        rows = _lines_of(names).decode_lines(lines)
        same = len(rows) == n and _ENCODER.encode_lines(rows) == lines
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return names if same else None


_Plain = int | float | str
_ENCODER: Final = msgspec.json.Encoder()


@lru_cache(maxsize=16)
def _lines_of(names: tuple[str, ...]) -> msgspec.json.Decoder[Any]:
    """Return what reads parameter sets of these names, all of them and no others."""
    fields = {f"p{i}": name for i, name in enumerate(names)}
    row = msgspec.defstruct(
        "Row", [(field, _Plain) for field in fields], rename=fields, forbid_unknown_fields=True, gc=False
    )
    return msgspec.json.Decoder(row)


def _names_of_canonical(texts: list[bytes]) -> list[str] | None:
    """Return the names, if all of these are canonical and have the same; None if that takes a closer look.

    They are read as columns and written again: what comes out as it went in is canonical.
    """
    try:
        rows = msgspec.json.decode(b"[%b]" % b",".join(texts), type=list[dict[str, Any]])
        names = tuple(rows[0]) if len(rows) == len(texts) else ()
        if not names or set(map(tuple, rows)) != {names} or "$" in "".join(names):
            return None
        sets = ParameterSets({name: Listed([row[name] for row in rows]) for name in names}, len(rows))
        return sets.names if sets.canonical() == texts else None
    except (msgspec.MsgspecError, RequestError, ValueError, RecursionError):
        return None


def _canonical(text: bytes) -> tuple[bytes, Sequence[str]]:
    """Return the canonical form, and the names."""
    plain = text.decode()
    if "$" not in plain:  # no tags: what json writes is canonical, and quick
        value = json.loads(plain, parse_constant=_refuse)
        if type(value) is dict and write_plain(value) == plain:
            return text, list(value)
    parsed = json.loads(plain, object_hook=_untagged, parse_constant=_refuse)
    if not isinstance(parsed, dict):
        raise RequestError(f"not a parameter set: {plain[:100]}")
    return canonical_json(parsed), list(parsed)


def _untagged(value: dict[str, Any]) -> Any:
    if "$float" not in value:
        return value
    if len(value) != 1 or value["$float"] not in ("nan", "inf", "-inf"):
        raise ValueError(f'{value!r} is no number; write {{"$float": "nan"}}, "inf" or "-inf"')
    return float(value["$float"])


def _refuse(constant: str) -> Any:
    raise ValueError(f'{constant} is not JSON; write it as {{"$float": "nan"}}, "inf" or "-inf"')
