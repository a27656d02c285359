"""From the words of a command line to a `Study`: a target, ``-p NAME=VALUE,...``, and options.

``-p`` says which values a parameter takes, whatever the study file or the bundle says of it; parameters that
are not named keep theirs. Values are typed as TOML and JSON type them.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelops.bundles import load_manifest
from modelops.client.parameter_files import value_of_text
from modelops.client.study_files import completed, load_study
from modelops.errors import NotFoundError, RequestError
from modelops.study.canonical import canonical_json
from modelops.study.parameter_sets import ParameterSets
from modelops.study.sampling import grid
from modelops.study.stopping import EXAMPLE, until_of_table
from modelops.study.study import Study
from modelops.study.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from modelops.study.stopping import Until

_STEPS = re.compile(r"([^:,\s]+):([^:,\s]+):([0-9]+)")
MAX_STEPS: Final = 1_000_000
_FINITE: Final = sys.float_info.max / 2**20  # times a step it is a number still
_QUOTE = '"'
_OPENS = {"[": "]", "{": "}"}


def axis_of_text(text: str) -> tuple[str, list[Any]]:
    """Read ``NAME=VALUE[,VALUE...]`` or ``NAME=LO:HI:N`` (N values, evenly spaced, both ends included).

    ``1`` is an integer, ``1.0`` and ``1e3`` are floats, ``true`` and ``false`` bools, all else is text; what
    stands in double quotes is always text, ``[...]`` and ``{...}`` are JSON.

    Raises
    ------
    RequestError
        It is not of that form; says what to write.
    """
    name, equals, rest = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise RequestError(
            f"-p {text!r} is no parameter; write NAME=VALUE or NAME=VALUE,VALUE, as in -p beta=0.1,0.2"
        )
    if match := _STEPS.fullmatch(rest.strip()):
        lo, hi = value_of_text(match[1]), value_of_text(match[2])
        if _is_number(lo) and _is_number(hi):
            return name, _steps(text, lo, hi, match[3])
    return name, [_value(text, word) for word in _split(text, rest)]


def axes_of_texts(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Read all ``-p`` options; naming a parameter twice is refused."""
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, values = axis_of_text(text)
        if name in axes:
            raise RequestError(
                f"-p names {name!r} twice; write its values behind one another, as in -p {name}=1,2"
            )
        axes[name] = values
    return axes


def sets_beside(first: Mapping[str, Any], texts: Iterable[str]) -> ParameterSets:
    """Return the sets that ``-p`` options add to a job; what they do not name is as in its first set.

    Raises
    ------
    RequestError
        The first set has no such parameter: most likely it is misspelt, and the model would never look at it.
    """
    axes = axes_of_texts(texts)
    for name in axes:
        if name not in first:
            has = f"there are {', '.join(first)}" if first else "it has none"
            raise RequestError(
                f"-p names {name!r}, which is no parameter of the job's first set, whose values all others take: "
                f"{has}{did_you_mean(name, first) or '.'} Nothing was added; sets of other parameters come with "
                "--parameters FILE"
            )
    return grid(**{**{name: [value] for name, value in first.items()}, **axes})


def replicates_of_text(text: str | None) -> int | Until | None:
    """Read ``200``, or ``until:half_width=0.01,of=attack_rate[,level=...][,min=...][,max=...]``."""
    if text is None:
        return None
    kind, colon, rest = text.partition(":")
    if colon and kind.strip() == "until":
        pairs = [word.partition("=") for word in rest.split(",")]
        if not all(name.strip() and equals for name, equals, _ in pairs):
            raise RequestError(
                f"-n {text!r}: write it as in -n until:{EXAMPLE.replace(', ', ',').replace(_QUOTE, '')}"
            )
        table = {name.strip(): value.strip() for name, _, value in pairs}
        return until_of_table({n: v if n == "of" else value_of_text(v) for n, v in table.items()})
    try:
        return int(text)
    except ValueError:
        raise RequestError(
            f"-n {text!r}: write how many replicates each parameter set gets, as in -n 200, or as in "
            f"-n until:{EXAMPLE.replace(', ', ',').replace(_QUOTE, '')}"
        ) from None


def seeds_of_text(text: str | None) -> list[int] | None:
    """Read ``11,977,35``."""
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise RequestError(
            f"--seeds {text!r}: write integers with commas between them, as in --seeds 11,977"
        ) from None


def min_success_of_text(text: str | None) -> float | int | None:
    """Read a fraction (``0.9``) or a count (``180``)."""
    value = None if text is None else value_of_text(text)
    if value is not None and not _is_number(value):
        raise RequestError(f"--min-success {text!r}: a fraction such as 0.9, or a count such as 180")
    return value


def study_of_target(
    target: str,
    *,
    axes: Iterable[str] = (),
    parameters: Path | None = None,
    **options: Any,
) -> Study:
    """Return the study that a command line asks for.

    Parameters
    ----------
    target
        A study file (``.toml``), a bundle folder, or a bundle's ``.py`` file.
    axes
        The texts of the ``-p`` options.
    parameters
        A file of parameter sets, instead of the study's.
    options
        Arguments of `Study`; None: as the study or the bundle says.

    Raises
    ------
    NotFoundError
        There is nothing at ``target``; says what may have been meant.
    RequestError, BundleError
        Something that was asked for is wrong.
    """
    said = axes_of_texts(axes)
    study = unfilled_study(existing(target), parameters=parameters, **options)
    if said:
        bundle = Path(study.bundle)
        complete = completed(study, load_manifest(bundle), bundle)
        study = replace(study, parameters=with_axes(complete.sets(), said))
    return study


def unfilled_study(path: Path, **options: Any) -> Study:
    """Return the study of a study file or a bundle with these arguments of `Study`; None: as it says."""
    said = {name: value for name, value in options.items() if value is not None and value != []}
    if path.suffix == ".toml" and path.name != "pyproject.toml":
        given = load_study(path)
        return Study(bundle=given.bundle, **said).filled_from(given)
    return Study(bundle=path.parent if path.name == "pyproject.toml" else path, **said)


def existing(target: str) -> Path:
    """Return the path of a bundle or a study file. Raises NotFoundError, with what may have been meant."""
    path = Path(target)
    if not path.exists():
        parent = path.parent
        siblings = [p.name for p in parent.iterdir() if not p.name.startswith(".")] if parent.is_dir() else []
        close = did_you_mean(path.name, siblings)
        raise NotFoundError(
            f"there is no bundle and no study file at {target}{close}"
            + ("" if close else "; 'modelops bundle init NAME' writes a bundle to begin with")
        )
    return path


def with_axes(base: ParameterSets, axes: Mapping[str, list[Any]]) -> ParameterSets:
    """Return the sets in which these parameters take these values, combined with all that the others had."""
    rest: dict[bytes, dict[str, Any]] = {}
    for row in base:
        kept = {name: value for name, value in row.items() if name not in axes}
        rest.setdefault(canonical_json(kept), kept)
    if list(rest) == [b"{}"]:
        return grid(**axes)
    chosen = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    return ParameterSets.of_rows({**kept, **row} for kept in rest.values() for row in chosen)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _steps(text: str, lo: float, hi: float, count: str) -> list[Any]:
    n = int(count) if len(count) <= len(str(MAX_STEPS)) else MAX_STEPS + 1
    if not 2 <= n <= MAX_STEPS or not -_FINITE <= lo < hi <= _FINITE:
        raise RequestError(
            f"-p {text:.100}: NAME=LO:HI:N needs finite LO < HI and an N of 2 to {MAX_STEPS:,}"
        )
    if isinstance(lo, int) and isinstance(hi, int) and (hi - lo) % (n - 1) == 0:
        return list(range(lo, hi + 1, (hi - lo) // (n - 1)))
    # Twelve digits: 0.3 and not 0.30000000000000004, which would be another parameter set.
    return [float(f"{lo + (hi - lo) * i / (n - 1):.12g}") for i in range(n)]


def _split(text: str, rest: str) -> list[str]:
    """Split at commas that stand neither in quotes nor in brackets."""
    words, word, quoted, closers = [], "", False, ""
    i = 0
    while i < len(rest):
        c = rest[i]
        if quoted and c == "\\":
            word, i = word + rest[i : i + 2], i + 2
            continue
        if c == '"':
            quoted = not quoted
        elif not quoted and c in _OPENS:
            closers += _OPENS[c]
        elif not quoted and closers.endswith(c):
            closers = closers[:-1]
        if c == "," and not quoted and not closers:
            words.append(word)
            word = ""
        else:
            word += c
        i += 1
    if quoted or closers:
        raise RequestError(f"-p {text}: {'a quote' if quoted else 'a bracket'} is not closed")
    return [*words, word]


def _value(text: str, word: str) -> Any:
    word = word.strip()
    if not word:
        raise RequestError(f'-p {text}: a value is missing; an empty text is written ""')
    if word[0] in '"[{':
        try:
            return json.loads(word)
        except ValueError as e:
            raise RequestError(f"-p {text}: {word} is not valid JSON: {e}") from e
    return value_of_text(word)
