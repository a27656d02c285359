"""Names of pools: what a worker is called, what a study asks for, and when two spellings mean the same. Pure.

Names are compared in one normal form: lower case, and one ``-`` for each run of ``-``, ``_`` and ``.``. What spelling
alone cannot tell (``EU``, ``eu-west``) the operator says in a table of aliases, which is looked up after that.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from modelops.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_LENGTH: Final = 63
NAME_PATTERN: Final = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
_NAME: Final = re.compile(NAME_PATTERN.replace("$", r"\Z"))
_SEPARATORS: Final = re.compile(r"[._-]+")


def normal_form(name: str) -> str:
    """Return what names are compared by. Idempotent; the same for all spellings of a name."""
    return _SEPARATORS.sub("-", name).lower()


def checked_name(what: str, name: Any) -> str:
    """Return a name of a pool or a value of a label. Raises RequestError, which begins with ``what``."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise RequestError(
            f"{what} {name!r} is no name of a pool: write up to {MAX_LENGTH} letters (a to z) and digits, with - _ . "
            "between them, as in eu-west"
        )
    return name


def checked_pools(key: str, given: str | Iterable[Any]) -> tuple[str, ...]:
    """Return the pools that a study asks for, in its order.

    Raises
    ------
    RequestError
        One is no name, or is named twice, in whatever spelling.
    """
    if not isinstance(given, str | list | tuple | set | frozenset):
        raise RequestError(f'{key} = {given!r} must be a name or a list of names, e.g. {key} = ["eu-west"]')
    names = (given,) if isinstance(given, str) else tuple(given)
    seen: dict[str, str] = {}
    for name in names:
        form = normal_form(checked_name(f"{key}:", name))
        if form in seen:
            raise RequestError(f"{key} names one pool twice: {seen[form]!r} and {name!r}")
        seen[form] = name
    return names


class Aliases(msgspec.Struct, frozen=True):
    """Which names mean the same pool, as the operator says. ``meant``: from normal form to the normal form meant."""

    meant: dict[str, str] = {}

    @classmethod
    def of_table(cls, table: Mapping[str, Any], where: str) -> Self:
        """Read ``{"eu": ["eu-west", "eu_west_1"]}``: the names in a list mean the one before it.

        Raises
        ------
        RequestError
            It has something that is no name, or a name would mean two pools; begins with ``where``.
        """
        meant: dict[str, str] = {}
        mains: dict[str, str] = {}
        for main in table:
            form = normal_form(checked_name(f"{where}:", main))
            if form in mains:
                raise RequestError(
                    f"{where}: {mains[form]!r} and {main!r} are one name; write one list for both"
                )
            mains[form] = main
        for main, names in table.items():
            form = normal_form(main)
            if isinstance(names, str):
                names = [names]
            if not isinstance(names, list | tuple) or not names:
                raise RequestError(
                    f'{where}: {main} must have a list of names, e.g. {main} = ["eu-west", "eu_west_1"]'
                )
            for name in names:
                alias = normal_form(checked_name(f"{where}: {main}:", name))
                if alias == form:
                    continue
                if alias in mains:
                    raise RequestError(
                        f"{where}: {name!r} means {main}, and has aliases of its own; write all of them behind {main}"
                    )
                if meant.setdefault(alias, form) != form:
                    raise RequestError(f"{where}: {name!r} would mean both {mains[meant[alias]]} and {main}")
        return cls(meant)

    def canonical(self, name: str) -> str:
        """Return what a name means: two names are the same pool when this is the same."""
        form = normal_form(name)
        return self.meant.get(form, form)


NO_ALIASES: Final = Aliases()


class Membership(msgspec.Struct, frozen=True):
    """What a worker says of where it belongs. ``pool``: empty if it is in none. ``labels``: values by key."""

    pool: str = ""
    labels: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """By what a study can ask for it: the name of its pool, then the values of its labels."""
        return tuple(dict.fromkeys(name for name in (self.pool, *self.labels.values()) if name))


NO_POOL: Final = Membership()


def checked_labels(texts: Iterable[Any]) -> dict[str, str]:
    """Read ``region=eu``, one for each label. Raises RequestError."""
    labels: dict[str, str] = {}
    for text in texts:
        key, equals, value = (text if isinstance(text, str) else repr(text)).partition("=")
        if not equals:
            raise RequestError(f"the label {text!r} of a pool must be KEY=VALUE, as in region=eu")
        key = checked_name("the label", key.strip())
        value = checked_name(f"the label {key}:", value.strip())
        if labels.setdefault(key, value) != value:
            raise RequestError(f"the label {key} is given twice: {labels[key]!r} and {value!r}")
    return labels
