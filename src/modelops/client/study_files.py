"""Read a study from a TOML file, or from the ``[tool.modelops.study]`` table of a bundle.

The keys are the arguments of `modelops.study.study.Study`. Paths in the file are relative to the file.
"""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.client.parameter_files import read_parameters
from modelops.errors import ModelOpsError, NotFoundError, RequestError
from modelops.study.sampling import grid, ints, latin_hypercube, log_range, sobol
from modelops.study.stopping import until_of_table
from modelops.study.study import Retry, Study, parameter_sets
from modelops.study.wording import known_words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelops.bundles.manifest import Manifest
    from modelops.study.parameter_sets import ParameterSets
    from modelops.study.spec import RetryPolicy

KEYS = tuple(f.name for f in fields(Study))
_RETRY_KEYS = ("max_retries", "initial_delay", "backoff", "max_delay", "on")
_DESIGNS = {"sobol": sobol, "latin_hypercube": latin_hypercube}


def load_study(path: str | Path) -> Study:
    """Read a study file.

    Raises
    ------
    NotFoundError
        There is no such file, or a file it names is missing.
    RequestError
        It is not valid TOML, has an unknown key, or asks for something wrong; names file and key.
    """
    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"there is no study file {file}")
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as e:  # also of an integer of thousands of digits, and of endless brackets
        raise RequestError(f"{file} is not valid TOML: {e}") from e
    if "bundle" not in table:
        raise RequestError(f'{file}: bundle is missing; name one, e.g. bundle = "path/to/bundle"')
    return _study(table, folder=file.parent, where=str(file))


def bundle_defaults(manifest: Manifest, bundle: Path) -> Study:
    """Return the study that a bundle proposes for itself."""
    where = f"{manifest.source}, [tool.modelops.study]"
    if "bundle" in manifest.study:
        raise RequestError(f"{where}: bundle cannot be set here; it is this one")
    folder = bundle if bundle.is_dir() else bundle.parent
    return replace(_study({"bundle": ".", **manifest.study}, folder=folder, where=where), bundle=bundle)


def completed(study: Study, manifest: Manifest, bundle: Path) -> Study:
    """Return a study in which nothing is left open: bundle's own study filled in, parameter file read."""
    return with_parameters_read(study.filled_from(bundle_defaults(manifest, bundle)))


def with_parameters_read(study: Study) -> Study:
    """Return the study with the sets of its parameter file instead of the path."""
    if isinstance(study.parameters, str | Path):
        return replace(study, parameters=read_parameters(study.parameters))
    return study


def parameter_sets_of(given: Any) -> ParameterSets:
    """Return the parameter sets in whatever a `Study` takes: a design, dicts, a table, the path of a file."""
    return read_parameters(given) if isinstance(given, str | Path) else parameter_sets(given)


def _study(table: Mapping[str, Any], *, folder: Path, where: str) -> Study:
    for key in table:
        if key not in KEYS:
            raise RequestError(f"{where}: unknown key {key!r}{known_words(key, KEYS)}")
    values = dict(table)
    try:
        values["bundle"] = folder / _text(values["bundle"], "bundle")
        if "parameters" in values:
            values["parameters"] = _parameters(values["parameters"], folder)
        if isinstance(values.get("replicates"), dict):
            values["replicates"] = until_of_table(values["replicates"])
        if "retry" in values:
            values["retry"] = _retry(values["retry"])
        return Study(**values)
    except ModelOpsError as e:
        if isinstance(e, RequestError) and not str(e).startswith(where):
            raise type(e)(f"{where}: {e}") from e
        raise


def _parameters(given: Any, folder: Path) -> ParameterSets | Any:
    """Read ``[parameters]``: lists are a grid, ``file`` a path, ``sobol`` and ``latin_hypercube`` designs."""
    if isinstance(given, str):
        return folder / given
    if not isinstance(given, dict):
        return given
    if isinstance(given.get("file"), str):
        _only(given, "file")
        return folder / given["file"]
    for name, design in _DESIGNS.items():
        if isinstance(given.get(name), dict):
            _only(given, name)
            options = dict(given[name])
            n, seed = options.pop("n", None), options.pop("seed", 0)
            return design(n, seed=seed, **{key: _range(value) for key, value in options.items()})
    return grid(**given)


def _only(given: Mapping[str, Any], key: str) -> None:
    if len(given) > 1:
        others = ", ".join(name for name in given if name != key)
        raise RequestError(f"[parameters] has {key}, so it cannot have {others} as well")


def _range(value: Any) -> Any:
    if isinstance(value, dict) and len(value) == 1:
        ((kind, pair),) = value.items()
        if kind in ("log", "ints") and isinstance(pair, list) and len(pair) == 2:
            return (log_range if kind == "log" else ints)(*pair)
    return tuple(value) if isinstance(value, list) else value


def _retry(given: Any) -> RetryPolicy:
    if not isinstance(given, dict):
        raise RequestError(f"retry = {given!r} must be a table, e.g. retry = {{ max_retries = 5 }}")
    for key in given:
        if key not in _RETRY_KEYS:
            raise RequestError(f"unknown key {key!r} in retry{known_words(key, _RETRY_KEYS)}")
    return Retry(**given)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{key} must be text, not {value!r}")
    return value
