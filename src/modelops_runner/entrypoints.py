"""Find what an entry point names: ``pkg.mod:function``, or the bundle's wire function."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable


class EntryPointError(Exception):
    """An entry point names nothing in this bundle."""


class EntryPoint(str):
    """A wire entry point: the text itself, and its parts. ``pkg.mod/scenario`` or ``pkg.mod:name``."""

    __slots__ = ()

    @property
    def module(self) -> str:
        """The part before the separator."""
        return self.replace(":", "/").partition("/")[0]

    @property
    def name(self) -> str:
        """The part after the separator: a scenario or an attribute."""
        return self.replace(":", "/").partition("/")[2]


def resolve(entry: str) -> Any:
    """Import the module of ``pkg.mod:attribute`` and return the attribute, which may be dotted.

    Raises
    ------
    EntryPointError
        It is not of that form, or the module or the attribute does not exist in the bundle.
    Exception
        Whatever the module raises while it is imported.
    """
    module_name, colon, attribute = entry.partition(":")
    if not colon or not module_name or not attribute:
        raise EntryPointError(f"{entry!r} is no entry point; write 'module:function'")
    try:
        # Not importlib.import_module: its frame would stand at the top of every traceback.
        __import__(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not (module_name + ".").startswith(e.name + "."):
            raise
        raise EntryPointError(f"entry point {entry!r}: the bundle has no module {e.name!r}") from None
    found: Any = sys.modules[module_name]
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise EntryPointError(f"entry point {entry!r}: {module_name} has no {attribute!r}") from None
    return found


def wire_function(root: str) -> Callable[..., Any]:
    """Return the wire function of a bundle: entry-point group, then manifest, then ``wire.py``."""
    found = _from_metadata() or _from_manifest(root) or _from_wire_py(root)
    if found is None:
        raise EntryPointError(
            "the bundle has no wire function: no entry point in the group 'modelops.wire', "
            "no .modelops/manifest.json with 'wire', and no wire.py with a function 'wire'. A bundle that is not "
            "of the wire convention names its model in [tool.modelops] of its pyproject.toml"
        )
    return found


def _from_metadata() -> Callable[..., Any] | None:
    from importlib.metadata import entry_points

    points: Any = entry_points()
    group = (
        points.select(group="modelops.wire") if hasattr(points, "select") else points.get("modelops.wire", ())
    )
    names = {point.value: point for point in group}
    if len(names) > 1:
        raise EntryPointError(
            f"several entry points in the group 'modelops.wire': {', '.join(sorted(names))}"
        )
    for value in names:
        return resolve(value.replace(" ", ""))  # type: ignore[no-any-return]
    return None


def _from_manifest(root: str) -> Callable[..., Any] | None:
    import json

    path = os.path.join(root, ".modelops", "manifest.json")
    try:
        with open(path, encoding="utf-8") as file:
            entry = json.load(file).get("wire")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as e:
        raise EntryPointError(f".modelops/manifest.json cannot be read: {e}") from e
    if not entry:
        return None
    place, _, name = str(entry).rpartition(":")
    return _from_file(root, place, name) if place.endswith(".py") else resolve(entry)


def _from_wire_py(root: str) -> Callable[..., Any] | None:
    if not os.path.isfile(os.path.join(root, "wire.py")):
        return None
    return _from_file(root, "wire.py", "wire")


def _from_file(root: str, place: str, name: str) -> Callable[..., Any]:
    path = os.path.join(root, *place.split("/"))
    if not os.path.isfile(path):
        raise EntryPointError(f".modelops/manifest.json names {place}, which is not in the bundle")
    module_name = place[:-3].replace("/", ".")
    module = sys.modules.get(module_name)
    if module is None or getattr(module, "__file__", None) != path:
        from importlib.util import module_from_spec, spec_from_file_location

        spec: Any = spec_from_file_location(module_name, path)
        module = module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    try:
        return getattr(module, name)  # type: ignore[no-any-return]
    except AttributeError:
        raise EntryPointError(f"{place} has no {name!r}") from None
