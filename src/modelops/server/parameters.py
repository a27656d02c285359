"""The parameter sets of a submission, from whatever carries them, in canonical form and checked."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

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
        if (plain := _names_of_canonical(group)) is not None:
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
    halves = np.frombuffer(ids, np.uint64)[::2]
    return len(np.unique(halves)) < len(halves)


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
