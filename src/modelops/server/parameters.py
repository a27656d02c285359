"""The parameter sets of a submission, from whatever carries them, in canonical form and checked."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modelops.errors import ConflictError, RequestError
from modelops.store import columns
from modelops.study.canonical import canonical_json, id_bytes, param_ids, parse_canonical
from modelops.study.parameter_sets import Listed, ParameterSets, check_names, refuse_duplicates

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

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
        if (plain := _names_of_plain(group) or _names_of_canonical(group)) is not None:
            names.update(plain)
        else:
            for i, text in enumerate(group):
                try:
                    group[i], keys = _canonical(text)
                except (ValueError, TypeError, RecursionError, RequestError) as e:
                    raise RequestError(f"parameter set {len(out) + i} cannot be used: {e}") from e
                names.update(keys)
        out += group
        found.append(id_bytes(group))
    check_names(sorted(names))
    ids = b"".join(found)
    if _may_be_same(ids):
        try:
            refuse_duplicates(param_ids(out), lambda i: parse_canonical(out[i]))
        except RequestError as e:
            raise ConflictError(str(e)) from e
    return out, ids


def _may_be_same(ids: bytes) -> bool:
    """Say whether two ids have the same first half, as those have that are the same."""
    halves = np.sort(np.frombuffer(ids, np.uint64)[::2])  # several times faster than `unique`
    return bool((halves[1:] == halves[:-1]).any())


def texts_of_file(source: Any) -> Iterator[bytes]:
    """Yield the canonical forms that an uploaded ``parameters.parquet`` holds, in the order of its rows.

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
        for batch in file.iter_batches(batch_size=4096, columns=["canonical"], use_threads=False):
            n_bytes += batch.nbytes
            if n_bytes > MAX_TEXT_BYTES:
                raise RequestError(
                    f"the parameter file holds more than {MAX_TEXT_BYTES} bytes of parameter sets"
                )
            yield from columns.binary_values(batch.column(0).cast(pa.large_binary()))
    except (pa.ArrowException, OSError, ValueError) as e:
        raise RequestError(f"the parameter file cannot be read: {e}") from e


def _names_of_plain(texts: list[bytes]) -> tuple[str, ...] | None:
    """Return the names, if all of these are canonical and have the same, and values that msgspec writes as Python does.

    Those are numbers and texts. A sixth of the price of `_names_of_canonical`, which is there for the others.
    """
    lines = (
        b"\n".join(texts) + b"\n"
    )  # no canonical form has a line break in it, so that each line is one of them
    try:
        first = msgspec.json.decode(texts[0], type=dict[str, _Plain])
        names = tuple(first)
        # msgspec writes 1e-05 as 0.00001, and 1e+16 as 1e16; escapes, too, may be its own.
        own_way = (
            b"\\" in lines
            or b"0.0000" in lines
            or lines.count(b"e") != len(texts) * "".join(names).count("e")
        )
        if (
            own_way
            or not names
            or len(names) > MAX_PLAIN
            or list(names) != sorted(names)
            or "$" in "".join(names)
        ):
            return None
        rows = _lines_of(names).decode_lines(lines)
        same = len(rows) == len(texts) and _ENCODER.encode_lines(rows) == lines
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
        if type(value) is dict and _written(value) == plain:
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


def _written(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f'{constant} is not JSON; write it as {{"$float": "nan"}}, "inf" or "-inf"')
