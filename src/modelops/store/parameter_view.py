"""Parameters as columns: int64, float64, bool or text if all sets agree, canonical JSON otherwise."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from modelops.store import columns
from modelops.store.views import ARROW_TYPES

if TYPE_CHECKING:
    from modelops.store.parameters import Parameters, ParameterSet

_CANONICAL = "canonical"


class ParameterView:
    """The columns of a job's parameters, by name in order of code points.

    Attributes
    ----------
    kinds
        For each name ``int64``, ``float64``, ``bool``, ``text``, or ``canonical``.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        found: defaultdict[str, set[str]] = defaultdict(set)
        for sets in parameters.groups():
            raws = [s.raw() for s in sets]
            for name in set().union(*raws):
                found[name] |= _kinds([raw[name] for raw in raws if name in raw])
        self.kinds = {
            name: next(iter(kinds)) if len(kinds) == 1 else _CANONICAL
            for name, kinds in sorted(found.items())
        }

    def types(self) -> dict[str, pa.DataType]:
        """Return the Arrow type of each column."""
        return {name: ARROW_TYPES.get(kind, pa.large_string()) for name, kind in self.kinds.items()}

    def read(self, lo: int, hi: int) -> tuple[list[ParameterSet], dict[str, pa.Array]]:
        """Return the sets ``lo <= param < hi``, and their columns; a name that a set lacks is null."""
        sets = self._parameters.read(lo, hi)
        raws = [s.raw() for s in sets]
        return sets, {
            name: _column(kind, [raw.get(name, _ABSENT) for raw in raws]) for name, kind in self.kinds.items()
        }


_ABSENT: Any = object()


def _kinds(found: list[Any]) -> set[str]:
    kinds = set()
    for kind in set(map(type, found)):
        if kind is int:
            ints = [v for v in found if type(v) is int]
            fits = min(ints) >= -(2**63) and max(ints) < 2**63
            kinds.add("int64" if fits else _CANONICAL)
        elif kind is dict:
            kinds |= {"float64" if v.keys() == {"$float"} else _CANONICAL for v in found if type(v) is dict}
        else:
            kinds.add({float: "float64", bool: "bool", str: "text"}.get(kind, _CANONICAL))
    return kinds


def _column(kind: str, found: list[Any]) -> pa.Array:
    present = np.fromiter((v is not _ABSENT for v in found), np.bool_, len(found))
    if kind == "int64":
        return columns.fixed(
            np.array([0 if v is _ABSENT else v for v in found], np.int64), pa.int64(), present
        )
    if kind == "float64":
        return columns.fixed(np.array([_float(v) for v in found], np.float64), pa.float64(), present)
    if kind == "bool":
        return columns.bools([v is True for v in found], present)
    spell = _text if kind == "text" else _canonical
    raw = [b"" if v is _ABSENT else spell(v) for v in found]
    return columns.binary(raw, present).cast(pa.large_string())


def _float(value: Any) -> float:
    if value is _ABSENT:
        return 0.0
    return float(value["$float"]) if isinstance(value, dict) else float(value)


def _text(value: str) -> bytes:
    return value.encode()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
