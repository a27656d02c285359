"""The canonical form of a parameter set, and its id.

UTF-8 JSON without spaces, keys sorted by code point, integers and floats distinct (``1`` is not ``1.0``),
floats as Python's shortest repr, non-finite floats tagged ``{"$float": "nan"}``. ``param_id`` is the
16-byte BLAKE2b of it, as 32 hexadecimal digits. Reference: ``docs/reference/param-id.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from modelops.errors import RequestError
from modelops.study.ids import ParamId

_PERSON = b"modelops.parm.1"
_NEW_HASH = blake2b(digest_size=16, person=_PERSON).copy  # two thirds of the price of making each anew
# Of None, bool, int, finite floats, text, lists and dicts. `json.dumps` makes such an encoder for each call.
write_plain = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode
RESERVED = frozenset({"param", "param_id", "replicate", "seed", "status"})


def canonical_json(params: Mapping[str, Any]) -> bytes:
    """Return the canonical form of a parameter set.

    Raises
    ------
    RequestError
        A name is not text, or a value is not None, bool, int, float, text, a list or a dict of these
        (numpy scalars and arrays are converted first, tuples become lists). The message names the key.
    """
    return canonical_value(params, "").encode()


def canonical_value(value: Any, name: str) -> str:
    """Return the same of one parameter's value. Raises as `canonical_json`, which names it ``name``."""
    try:
        text = write_plain(_plain(value, name))
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as e:
        which = f"parameter {name!r}" if name else "a parameter"
        raise RequestError(f"{which} holds text that is not valid Unicode: {e.object!r}") from e
    except (ValueError, RecursionError) as e:  # an integer of thousands of digits, a list inside itself
        which = f"parameter {name!r}" if name else "a parameter set"
        raise RequestError(f"{which} has no canonical form: {e}") from e
    return text


def parse_canonical(data: bytes | str) -> dict[str, Any]:
    """Return the parameter set that has this canonical form; the inverse of `canonical_json`."""
    value = json.loads(data, object_hook=_untag)
    if not isinstance(value, dict):
        raise ValueError(f"not a parameter set: {data!r}")
    return value


def param_id(canonical: bytes) -> ParamId:
    """Return the id of a parameter set from its canonical form."""
    return ParamId(blake2b(canonical, digest_size=16, person=_PERSON).hexdigest())


def param_ids(canonicals: Iterable[bytes]) -> list[str]:
    """Return the ids of many parameter sets."""
    return [digest.hex() for digest in _digests(canonicals)]


def id_bytes(canonicals: Iterable[bytes]) -> bytes:
    """Return the ids of many parameter sets as bytes, 16 each: a fifth of the memory of a list of texts."""
    return b"".join(_digests(canonicals))


def _digests(canonicals: Iterable[bytes]) -> list[bytes]:
    found = []
    update, digest = blake2b.update, blake2b.digest  # looked up once
    for canonical in canonicals:
        hashed = _NEW_HASH()
        update(hashed, canonical)
        found.append(digest(hashed))
    return found


def _untag(obj: dict[str, Any]) -> Any:
    if len(obj) == 1 and "$float" in obj:
        return float(obj["$float"])
    return obj


_AS_IT_IS = frozenset({str, int, bool, type(None)})


def _plain(value: Any, where: str) -> Any:
    if type(value) in _AS_IT_IS:
        return value
    match value:
        case np.generic() | np.ndarray():
            return _plain(value.tolist(), where)
        case None | bool() | str():
            return value if value is None or isinstance(value, bool) else str(value)
        case int():
            return int(value)
        case float():
            value = float(value)
            return value if math.isfinite(value) else {"$float": repr(value)}
        case list() | tuple():
            return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise RequestError(f"parameter {where or 'names'}: the key {key!r} is not text")
                if key.startswith("$"):
                    raise RequestError(
                        f"parameter {where or key!r}: a name must not begin with '$' ({key!r})"
                    )
            return {str(k): _plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
        case _:
            raise RequestError(
                f"parameter {where!r}: a {type(value).__name__} cannot be a parameter; "
                "use None, bool, int, float, text, or lists and dicts of these"
            )
