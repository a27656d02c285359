"""Whether a ``uv.lock`` gives what the ``pyproject.toml`` beside it asks for: one that was forgotten does not. Pure.

uv itself is not asked (``--locked``): it resolves again, with the index of this machine, which need not be that of
the lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Mapping


def not_in_lock(project: Mapping[str, Any], lock: Mapping[str, Any]) -> list[str]:
    """Return those of ``[project] dependencies`` that the lock does not satisfy, each with what it has instead.

    One with a marker is not looked at, as it may be for another Python, and of one with a URL only the name.

    Parameters
    ----------
    project, lock
        ``pyproject.toml`` and ``uv.lock``, parsed.
    """
    packages: list[Mapping[str, Any]] = lock.get("package", [])
    root = next((p for p in packages if _is_root(p)), None)
    if root is None:
        return []
    versions: dict[str, list[str]] = {}
    for package in packages:
        if "version" in package:
            versions.setdefault(canonicalize_name(package["name"]), []).append(package["version"])
    extras: dict[str, set[str]] = {}
    for dependency in root.get("dependencies", ()):
        known = extras.setdefault(canonicalize_name(dependency["name"]), set())
        known.update(map(canonicalize_name, dependency.get("extra", ())))
    told = (
        _told(text, versions, extras, project) for text in project.get("project", {}).get("dependencies", ())
    )
    return [said for said in told if said]


def _told(
    text: str, versions: dict[str, list[str]], extras: dict[str, set[str]], project: Mapping[str, Any]
) -> str:
    try:
        wanted = Requirement(text)
    except InvalidRequirement:
        return ""  # uv says it better
    if wanted.marker:
        return ""
    name = canonicalize_name(wanted.name)
    if name not in extras or not set(map(canonicalize_name, wanted.extras)) <= extras[name]:
        return f"{text} (it is not in the lock)"
    sources = {canonicalize_name(n) for n in project.get("tool", {}).get("uv", {}).get("sources", {})}
    found = versions.get(name, [])
    if wanted.url or name in sources or not found:
        return ""
    if any(wanted.specifier.contains(version, prereleases=True) for version in found):
        return ""
    return f"{text} (the lock has {', '.join(found)})"


def _is_root(package: Mapping[str, Any]) -> bool:
    source = package.get("source", {})
    return "." in (source.get("virtual"), source.get("editable"))
