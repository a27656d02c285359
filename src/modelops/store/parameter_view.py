"""Parameters as columns: int64, float64, bool or text if all sets agree, canonical JSON otherwise."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import pyarrow as pa

from modelops.store import columns
from modelops.store.parameters import ID_BYTES, ROW_GROUP
from modelops.store.views import ARROW_TYPES
from modelops.study.canonical import write_plain
from modelops.study.seeds import seed_keys_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from modelops.store.parameters import Parameters
    from modelops.study.spec import JobSpec

_CANONICAL = "canonical"
KEPT_BYTES: Final = 64 << 20
KEY_BYTES: Final = 8
AT_ONCE: Final = 4_096  # sets that are parsed together; as Python's objects they take fifty times their bytes


class ParameterView:
    """The columns of a job's parameters, by name in order of code points.

    Attributes
    ----------
    kinds
        For each name ``int64``, ``float64``, ``bool``, ``text``, or ``canonical``.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._kept: dict[int, _Group] = {}
        found: defaultdict[str, set[str]] = defaultdict(set)
        n_bytes = 0
        for number in range(parameters.n_groups):
            group = _Group.of(parameters, number)
            for name, kinds in group.kinds.items():
                found[name] |= kinds
            if n_bytes <= KEPT_BYTES:  # to be written soon; verifying and parsing them again takes long
                n_bytes += group.n_bytes
                self._kept[number] = group
        self.kinds = {
            name: next(iter(kinds)) if len(kinds) == 1 else _CANONICAL
            for name, kinds in sorted(found.items())
        }
        self._last: tuple[int, _Group] | None = None

    def types(self) -> dict[str, pa.DataType]:
        """Return the Arrow type of each column."""
        return {name: ARROW_TYPES.get(kind, pa.large_string()) for name, kind in self.kinds.items()}

    def read(self, lo: int, hi: int) -> tuple[pa.Array, dict[str, pa.Array]]:
        """Return the ids of the sets ``lo <= param < hi``, and their columns; a name that a set lacks is null."""
        ids: list[pa.Array] = [columns.text([])]
        parts: dict[str, list[pa.Array]] = {name: [pa.nulls(0, kind)] for name, kind in self.types().items()}
        while lo < min(hi, len(self._parameters)):
            number, at = divmod(lo, ROW_GROUP)
            group = self._group(number)
            n = min(hi - lo, len(group) - at)
            ids.append(group.ids.slice(at, n))
            for name, kind in self.kinds.items():
                parts[name].append(group.column(name, kind).slice(at, n))
            lo += n
        return pa.concat_arrays(ids), {name: pa.concat_arrays(arrays) for name, arrays in parts.items()}

    def keys(self, study_seed: int, lo: int, hi: int) -> npt.NDArray[np.uint32]:
        """Return what the seeds of these sets are made with, see `seed_keys`."""
        parts: list[npt.NDArray[np.uint32]] = [np.zeros((0, 2), np.uint32)]
        while lo < min(hi, len(self._parameters)):
            number, at = divmod(lo, ROW_GROUP)
            group = self._group(number)
            n = min(hi - lo, len(group) - at)
            parts.append(group.keys(study_seed, at, at + n))
            lo += n
        return np.concatenate(parts)

    def derive_keys(self, spec: JobSpec) -> None:
        """Make what `keys` returns of the sets that are kept, if the seeds of the job need it."""
        if spec.seeds is None and not spec.common_random_numbers:
            for group in self._kept.values():
                group.derive_keys(spec.study_seed)

    def _group(self, number: int) -> _Group:
        if number in self._kept:
            return self._kept[number]
        if self._last is None or self._last[0] != number:
            self._last = number, _Group.of(self._parameters, number)
        return self._last[1]


class LostParameters:
    """In place of a `ParameterView` where parameters cannot be read: ids are null, and there are no columns."""

    def types(self) -> dict[str, pa.DataType]:
        """Return the Arrow type of each column."""
        return {}

    def read(self, lo: int, hi: int) -> tuple[pa.Array, dict[str, pa.Array]]:
        """Return the ids of the sets ``lo <= param < hi``, and their columns."""
        return pa.nulls(hi - lo, pa.string()), {}

    def keys(self, _study_seed: int, _lo: int, _hi: int) -> None:
        """Return nothing: without ids nothing is known of the seeds that are made with them."""


class _Group:
    """A row group of parameter sets as columns.

    ``kinds``: what the values of each name are. ``n_bytes``: about what it takes.
    """

    def __init__(
        self,
        ids: pa.Array,
        kinds: dict[str, set[str]],
        made: dict[str, pa.Array],
        read_again: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self._ids = bytes.fromhex(columns.joined(ids))  # less than half of what they take as texts
        self.kinds, self._made, self._read_again = kinds, made, read_again
        self._keys: npt.NDArray[np.uint32] | None = None
        of_keys = len(self._ids) // ID_BYTES * KEY_BYTES
        self.n_bytes = len(self._ids) + of_keys + sum(array.nbytes for array in made.values())

    def __len__(self) -> int:
        return len(self._ids) // ID_BYTES

    @property
    def ids(self) -> pa.Array:
        """The ids of its sets, as text."""
        return columns.same_width(self._ids.hex(), 2 * ID_BYTES)

    def keys(self, study_seed: int, lo: int, hi: int) -> npt.NDArray[np.uint32]:
        if self._keys is not None:
            return self._keys[lo:hi]
        return seed_keys_of(study_seed, self._ids[lo * ID_BYTES : hi * ID_BYTES])

    def derive_keys(self, study_seed: int) -> None:
        self._keys = seed_keys_of(study_seed, self._ids)

    @classmethod
    def of(cls, parameters: Parameters, number: int) -> _Group:
        ids, texts = parameters.texts(number)
        again = partial(_read_again, parameters, number)
        if (flat := _values_of_flat(texts)) is not None:
            kinds = {name: _kinds(column) for name, column in flat.items()}
            return cls(ids, kinds, _made(kinds, flat), again)
        found: dict[str, list[Any]] = {}
        n, in_all = 0, True
        while n < len(texts):
            raws = _parsed(texts.slice(n, AT_ONCE))
            names = set().union(*raws)
            in_all = in_all and len(set(map(tuple, raws))) == 1 and names == (found.keys() if n else names)
            for name in names - found.keys():
                found[name] = [_ABSENT] * n
            for name, values in found.items():
                values += [raw[name] for raw in raws] if in_all else [raw.get(name, _ABSENT) for raw in raws]
            n += len(raws)
        kinds = {
            name: _kinds(values if in_all else [v for v in values if v is not _ABSENT])
            for name, values in found.items()
        }
        # The texts are needed again only if a group makes of a column something else than another one does.
        return cls(ids, kinds, _made(kinds, found), again)

    def column(self, name: str, kind: str) -> pa.Array:
        """Return a column as what it is in all groups together."""
        if name not in self.kinds:
            return pa.nulls(len(self), ARROW_TYPES.get(kind, pa.large_string()))
        if self.kinds[name] == {kind}:
            return self._made[name]
        return _column(kind, [raw.get(name, _ABSENT) for raw in self._read_again()])


def _made(kinds: dict[str, set[str]], found: dict[str, list[Any]]) -> dict[str, pa.Array]:
    plain = {name: next(iter(kind)) for name, kind in kinds.items() if len(kind) == 1}
    return {name: _column(kind, found[name]) for name, kind in plain.items()}


def _values_of_flat(texts: pa.Array) -> dict[str, list[Any]] | None:
    """Return the values of each name if all sets have the same names, and values that are no texts, lists or dicts.

    Then all of it is one list of numbers once what stands between them is a comma: a third of the price of a dict for
    each. As canonical forms have their names once each and in order, it is enough to count: of n sets with k names in
    which each name occurs n times there are 2nk quotation marks if there is no other text.
    """
    n, together = len(texts), columns.joined_bytes(texts)
    if not n or b"\\" in together:
        return None
    names = list(msgspec.json.decode(columns.joined_bytes(texts.slice(0, 1)), type=dict[str, Any]))
    heads = [b'"%b":' % name.encode() for name in names]
    if (
        not names
        or together.count(b"{") != n
        or b"[" in together
        or together.count(b'"') != 2 * n * len(names)
        or together.count(b"}{" + heads[0]) != n - 1
        or any(together.count(b"," + head) != n for head in heads[1:])
    ):
        return None
    listed = together[:-1].replace(b"}{" + heads[0], b",")
    for head in heads[1:]:
        listed = listed.replace(b"," + head, b",")
    flat = msgspec.json.decode(b"[%b]" % listed[1 + len(heads[0]) :], type=list[Any])
    return {name: flat[k :: len(names)] for k, name in enumerate(names)}


def _read_again(parameters: Parameters, number: int) -> list[dict[str, Any]]:
    return _parsed(parameters.texts(number)[1])


def _parsed(texts: pa.Array) -> list[dict[str, Any]]:
    """Return canonical JSON as parsed, tags and all."""
    return msgspec.json.decode(b"[%b]" % columns.with_commas(texts), type=list[dict[str, Any]])


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
    if kind == "float64" and set(map(type, found)) == {float}:
        return columns.fixed(np.array(found, np.float64), pa.float64())
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
    return write_plain(value).encode()
