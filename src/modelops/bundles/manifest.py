"""What a bundle says of itself: its models, aggregates, isolation, and a study to begin with.

Read from ``[tool.modelops]`` of `pyproject.toml`, or of the PEP 723 metadata of a single file. Nothing of
the bundle is imported: this works without its environment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from modelops.bundles.script import script_metadata, top_level_functions
from modelops.bundles.snapshot import snapshot_mark
from modelops.bundles.target_data import read_target_data
from modelops.bundles.toml import parse_toml, read_text
from modelops.bundles.wire import OF_A_DEPENDENCY, Wire, find_wire, wire_of_dependency
from modelops.errors import BundleError, NotFoundError, RequestError
from modelops.study.spec import ISOLATIONS
from modelops.study.wording import did_you_mean, shown_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KEYS = (
    "name", "model", "aggregate", "target", "target_data", "isolation", "report", "objective", "install", "study",
)  # fmt: skip
_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_WIRE_ENTRY = re.compile(r"[A-Za-z_][\w.]*[/:][\w.\-]+")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself.

    ``source``: the file that says so, relative to the bundle. ``models``, ``aggregates``, ``targets``:
    entry points by name, in the order in which they are written; the first model is the default one.
    ``targets`` are aggregates in the wire convention; ``target_data`` is the value that they are given. ``wire``: where the wire function is, if the bundle
    uses that convention. ``objective``: the scalar output of an aggregate by which parameter sets are
    ranked, lowest first. ``report``: entry point that draws the results. ``install``: the bundle itself
    must be installed in its environment. ``study``: the keys of a study to begin with.
    """

    name: str
    source: str
    models: Mapping[str, str]
    aggregates: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)
    isolation: str = "warm"
    wire: Wire | None = None
    target_data: Any = None
    objective: str = "loss"
    report: str | None = None
    install: bool = False
    study: Mapping[str, Any] = field(default_factory=dict)

    def model(self, wanted: str | None = None) -> str:
        """Return the entry point of a model, by its name, as an entry point, or the default one (None).

        Raises
        ------
        RequestError, BundleError
            The bundle has no such model, or names none; lists those it has, or says what to add.
        """
        if wanted is None:
            if not self.models and self.wire and self.wire.declared_in == OF_A_DEPENDENCY:
                raise BundleError(
                    f"the pyproject.toml of bundle {self.name!r} has no [tool.modelops] table; add one, e.g.\n\n"
                    '    [tool.modelops]\n    model = "model:simulate"'
                )
            if not self.models:
                raise RequestError(
                    f"bundle {self.name!r} names no model in {self.source}; say which one to run, "
                    "e.g. model='pkg.mod/scenario'"
                )
            return next(iter(self.models.values()))
        return _choose("model", wanted, self.models, self)

    def aggregate(self, wanted: str) -> str:
        """Return the entry point of an aggregate or target, by its name or as an entry point."""
        return _choose("aggregate", wanted, {**self.aggregates, **self.targets}, self)

    def is_target(self, entry: str) -> bool:
        """Say whether this entry point is called as a target: ``(sim_returns, target_data)``."""
        return self.wire is not None and entry not in self.aggregates.values()


def load_manifest(bundle: Path) -> Manifest:
    """Read what a bundle says of itself.

    Parameters
    ----------
    bundle
        A folder, one `.py` file, or the snapshot of either.

    Raises
    ------
    NotFoundError
        Nothing is at this path.
    BundleError
        The bundle says it wrongly, or says nothing. Names the file, and the line or key to change.
    """
    if bundle.is_file():
        return _script_manifest(bundle)
    if not bundle.is_dir():
        raise NotFoundError(f"there is no bundle at {bundle}: no such file or folder")
    file = bundle / "pyproject.toml"
    if file.is_file():
        return _folder_manifest(bundle, read_text(file))
    wire = find_wire(bundle, {})
    if wire is None and (bundle / "requirements.txt").is_file():
        wire = wire_of_dependency()
    if wire is not None:
        return Manifest(shown_path(bundle.resolve().name, 400), wire.declared_in, {}, wire=wire)
    scripts = sorted(bundle.glob("*.py"))
    if len(scripts) == 1:  # the snapshot of a single-file bundle
        return _script_manifest(scripts[0])
    raise BundleError(
        f"{bundle} is no bundle: it has no pyproject.toml. Write one with a [tool.modelops] table, "
        "or start from 'modelops bundle init'"
    )


def manifest_of_snapshot(snapshot: Path) -> Manifest:
    """Read what a snapshot says of itself, once for as long as it is the same one. Raises as `load_manifest`."""
    mark = snapshot_mark(snapshot)
    return _of_marked(snapshot, mark) if mark else load_manifest(snapshot)


@lru_cache(maxsize=8)
def _of_marked(snapshot: Path, _mark: str) -> Manifest:
    return load_manifest(snapshot)


def _folder_manifest(bundle: Path, text: str) -> Manifest:
    where = "pyproject.toml"
    pyproject = parse_toml(text, str(bundle / where))
    wire = find_wire(bundle, pyproject)
    table = pyproject.get("tool", {}).get("modelops")
    if table is None and wire is None:
        wire = wire_of_dependency()
    project = pyproject.get("project", {})
    name = project.get("name") or shown_path(bundle.resolve().name, 400)
    return _Reader(table or {}, text, where, bundle).manifest(name, wire, bool(project.get("entry-points")))


def _script_manifest(file: Path) -> Manifest:
    if file.suffix != ".py":
        raise BundleError(f"{file} is no bundle: a bundle is a folder with a pyproject.toml, or one .py file")
    text = read_text(file)
    metadata = script_metadata(text, file.name) or {}
    table = dict(metadata.get("tool", {}).get("modelops", {}))
    functions = top_level_functions(text, file.name)
    for key, function in (("model", "simulate"), ("aggregate", "summarize")):
        if key not in table and function in functions:
            table[key] = f"{file.stem}:{function}"
    if "model" not in table:
        raise BundleError(
            f"{file} has no model: define 'def simulate(params, seed)', or name another function in its "
            f"'# /// script' block under [tool.modelops], model = \"{file.stem}:NAME\""
        )
    return _Reader(table, text, file.name, file.parent).manifest(file.stem, None, needs_install=False)


class _Reader:
    """Reads one [tool.modelops] table; errors name the file and the line."""

    def __init__(self, table: Mapping[str, Any], text: str, where: str, bundle: Path) -> None:
        self.table, self.text, self.where, self.bundle = table, text, where, bundle

    def manifest(self, name: str, wire: Wire | None, needs_install: bool) -> Manifest:
        for key in self.table:
            if key not in KEYS:
                raise self.error(key, f"unknown key {key!r} in [tool.modelops]{did_you_mean(key, KEYS)}")
        models = self.entries("model", wire)
        if not models and wire is None:
            raise self.error("", '[tool.modelops] names no model; add the line model = "module:function"')
        isolation = self.text_of("isolation", "warm")
        if isolation not in ISOLATIONS:
            raise self.error("isolation", f"isolation = {isolation!r} is none of {', '.join(ISOLATIONS)}")
        study = self.table.get("study", {})
        if not isinstance(study, dict):
            raise self.error("study", "[tool.modelops.study] must be a table, e.g. with replicates = 100")
        install = self.table.get("install", needs_install)
        if not isinstance(install, bool):
            raise self.error("install", f"install must be true or false, not {install!r}")
        return Manifest(
            name=self.text_of("name", name),
            source=self.where,
            models=models,
            aggregates=self.entries("aggregate", None),
            targets=self.entries("target", wire),
            isolation=isolation,
            wire=wire,
            target_data=self.target_data(),
            objective=self.text_of("objective", "loss"),
            report=next(iter(self.entries("report", None).values()), None),
            install=install,
            study=study,
        )

    def text_of(self, key: str, default: str) -> str:
        value = self.table.get(key, default)
        if not isinstance(value, str) or not value:
            raise self.error(key, f"{key} must be text, not {value!r}")
        return value

    def target_data(self) -> Any:
        try:
            return read_target_data(self.bundle, self.table.get("target_data"))
        except BundleError as e:
            raise self.error("target_data", str(e)) from e

    def entries(self, key: str, wire: Wire | None) -> dict[str, str]:
        value = self.table.get(key)
        if value is None:
            return {}
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list):
            value = _named(value)
        if not isinstance(value, dict):
            raise self.error(key, f"{key} must be 'module:function' or a table of them, not {value!r}")
        pattern = _WIRE_ENTRY if wire else _ENTRY
        for entry in value.values():
            if not isinstance(entry, str) or not pattern.fullmatch(entry):
                forms = "'module:function' or 'module/scenario'" if wire else "'module:function'"
                raise self.error(key, f"{key} = {entry!r} is no entry point; write {forms}")
        return value

    def error(self, key: str, message: str) -> BundleError:
        inside = False
        for number, line in enumerate(self.text.splitlines(), 1):
            line = line.removeprefix("# ").strip()
            if line.startswith("["):
                inside = line.startswith("[tool.modelops")
                found = line.startswith((f"[tool.modelops.{key}]", f"[tool.modelops.{key}."))
            else:
                found = inside and line.split("=")[0].strip() == key
            if key and found:
                return BundleError(f"{self.where}, line {number}: {message}")
        return BundleError(f"{self.where}: {message}")


def _named(entries: list[Any]) -> dict[str, Any]:
    """Name entry points by their last part; by the whole when two would have one name."""
    last = [re.split("[:/]", entry)[-1] if isinstance(entry, str) else repr(entry) for entry in entries]
    return {
        str(entry) if last.count(name) > 1 else name: entry for name, entry in zip(last, entries, strict=True)
    }


def _choose(kind: str, wanted: str, known: Mapping[str, str], manifest: Manifest) -> str:
    if wanted in known:
        return known[wanted]
    if (_WIRE_ENTRY if manifest.wire else _ENTRY).fullmatch(wanted):
        return wanted
    names = ", ".join(f"{name} ({entry})" for name, entry in known.items()) or "none"
    raise RequestError(
        f"bundle {manifest.name!r} has no {kind} {wanted!r}; it has: {names}{did_you_mean(wanted, known)}"
    )
