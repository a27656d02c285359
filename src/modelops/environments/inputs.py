"""What a bundle says about its dependencies: the first of five kinds of file, and the Python it wants."""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from modelops.bundles.toml import parse_toml
from modelops.bundles.wire import WIRE_FILE
from modelops.environments.uv_lock import not_in_lock
from modelops.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["uv.lock", "pylock.toml", "requirements.txt", "project", "pep723", "none"]
_SCRIPT: Final = re.compile(r"(?m)^# /// script\s*$\n((?:^#(?: .*)?$\n)+?)^# ///\s*$")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")  # what the folder of a snapshot is called
_PIN: Final = re.compile(r"(?:(?:cpython|python)[-@]?)?(\d+(?:\.\d+){0,2})\S*")
_INCLUDE: Final = re.compile(r"^(?:-r|--requirement|-c|--constraint)[ =]\s*(\S+)")
_LOCAL: Final = re.compile(
    r"^(?:-e\b|--editable\b|\.|/|file:)|@\s*(?:file:|\.)|^[^:]*\.(?:whl|tar\.gz|zip)(?:\s|$)"
)
_IGNORED_FOLDERS: Final = frozenset(
    {".git", ".venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
)


@dataclass(frozen=True)
class DependencyInputs:
    """The dependencies of one bundle, as its files state them.

    ``file`` is what uv reads (None for ``none``). ``contents`` maps every file that decides the resolution,
    relative to the bundle, to its bytes. ``needs_install``: the bundle itself must be installed.
    ``needs_bundle``: installing reads the bundle's folder (the bundle itself, or a path inside it).
    """

    root: Path
    kind: Kind
    file: Path | None
    contents: dict[str, bytes]
    requires_python: str | None
    python_pin: str | None
    needs_install: bool = False
    needs_bundle: bool = False
    project: str = ""

    @property
    def name(self) -> str:
        """What to call the inputs in a message: bundle and file. The folder of a snapshot is no name."""
        bundle = self.project or ("" if _DIGEST.fullmatch(self.root.name) else self.root.name)
        return "/".join(filter(None, [bundle, self.file.name if self.file else ""])) or "the bundle"

    @property
    def listed_in(self) -> str:
        """Name of the file into which one more dependency belongs; empty if the bundle has none."""
        if self.file is not None:
            return self.file.name
        if (self.root / "pyproject.toml").is_file():
            return "pyproject.toml"
        script = _only_script(self.root)
        return script.name if script and script.name != WIRE_FILE else ""

    def digest(self) -> str:
        """SHA-256 over kind and contents: the same inputs, the same digest, wherever the bundle lies."""
        h = hashlib.sha256(f"{self.kind}\0{self.needs_install}\0".encode())
        for name, data in sorted(self.contents.items()):
            h.update(f"{name}\0{len(data)}\0".encode() + data)
        return h.hexdigest()


def dependency_inputs(bundle_root: Path) -> DependencyInputs:
    """Read what a bundle's folder says about its dependencies; first found wins.

    The order: ``uv.lock``, ``pylock.toml``, ``requirements.txt``, ``[project] dependencies``, PEP 723
    metadata of the folder's only ``.py`` file.

    Raises
    ------
    BundleError
        A file is not valid; the message names it.
    """
    root = bundle_root.absolute()
    project = _read_toml(root / "pyproject.toml")
    about: dict[str, Any] = project.get("project", {})
    requires_python: str | None = about.get("requires-python")
    needs_install = _needs_install(project)
    kind: Kind = "none"
    file: Path | None = None
    script = _only_script(root)
    metadata = _script_metadata(script) if script and not project else None
    if (root / "uv.lock").is_file() and project:
        kind, file = "uv.lock", root / "uv.lock"
        if lacking := not_in_lock(project, _read_toml(file)):
            raise BundleError(
                f"uv.lock does not give what pyproject.toml asks for: {', '.join(lacking)}; make it anew: uv lock"
            )
    elif (root / "pylock.toml").is_file():
        kind, file = "pylock.toml", root / "pylock.toml"
        requires_python = requires_python or _read_toml(file).get("requires-python")
    elif (root / "requirements.txt").is_file():
        kind, file = "requirements.txt", root / "requirements.txt"
    elif about.get("dependencies") or "dependencies" in about.get("dynamic", ()):
        kind, file = "project", root / "pyproject.toml"
    elif script and metadata is not None:
        kind, file = "pep723", script
    if metadata is not None:
        requires_python = requires_python or metadata.get("requires-python")
    contents, local = _contents(root, kind, file, project, metadata)
    return DependencyInputs(
        root, kind, file, contents, requires_python, _pin(root), needs_install, needs_install or local,
        project=str(about.get("name") or ""),
    )  # fmt: skip


def tree_digest(root: Path) -> str:
    """SHA-256 of a folder's files (path, executable bit, content), caches and version control left out."""
    h = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root)
        if path.is_file() and not _IGNORED_FOLDERS.intersection(parts.parts):
            mode = "x" if path.stat().st_mode & 0o100 else "-"
            h.update(
                f"{parts.as_posix()}\0{mode}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
            )
    return h.hexdigest()


def script_metadata(text: str) -> dict[str, Any] | None:
    """Return the PEP 723 ``script`` table of a Python file's text, or None when it has none.

    Raises
    ------
    ValueError
        There are two such blocks, or the block is not TOML.
    """
    found = list(_SCRIPT.finditer(text if text.endswith("\n") else text + "\n"))
    if not found:
        return None
    if len(found) > 1:
        raise ValueError("two '# /// script' blocks; PEP 723 allows one")
    lines = found[0].group(1).splitlines()
    return tomllib.loads("\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def _contents(
    root: Path, kind: Kind, file: Path | None, project: dict[str, Any], metadata: dict[str, Any] | None
) -> tuple[dict[str, bytes], bool]:
    """Return the files that decide the resolution, and whether a dependency is a path on this machine."""
    if file is None:
        return {}, False
    if kind == "requirements.txt":
        contents: dict[str, bytes] = {}
        _read_requirements(root, file, contents)
        lines = b"\n".join(contents.values()).decode(errors="replace").splitlines()
        return contents, any(_LOCAL.search(line.split(" #")[0].strip()) for line in lines)
    if kind == "pep723":
        # The code below the metadata is no input: an edit must not resolve anew.
        assert metadata is not None
        stated = {key: metadata[key] for key in sorted(metadata)}
        return {file.name: repr(stated).encode()}, _has_local(metadata.get("dependencies", ()), metadata)
    if kind == "project":
        about = project["project"]
        stated = {
            "dependencies": about.get("dependencies"),
            "dynamic": about.get("dynamic"),
            "requires-python": about.get("requires-python"),
            "uv": project.get("tool", {}).get("uv"),
        }
        local = _has_local(about.get("dependencies", ()), project) or "dependencies" in about.get(
            "dynamic", ()
        )
        return {file.name: repr(stated).encode()}, local
    data = file.read_bytes()
    packages = _read_toml(file).get("package" if kind == "uv.lock" else "packages", [])
    if kind == "uv.lock":
        sources = [p.get("source", {}) for p in packages if p.get("source", {}).get("virtual") != "."]
        own = [s for s in sources if s.get("editable") != "."]
        return {file.name: data}, any(s.keys() & {"directory", "path", "editable", "virtual"} for s in own)
    return {file.name: data}, has_local_path(packages)


def has_local_path(packages: list[dict[str, Any]]) -> bool:
    """Whether a pylock's packages hold a path on this machine instead of a URL."""
    for package in packages:
        sources = [package.get(k, {}) for k in ("directory", "archive", "sdist", "vcs")] + package.get(
            "wheels", []
        )
        if any("path" in source for source in sources):
            return True
    return False


def _has_local(dependencies: list[str], table: dict[str, Any]) -> bool:
    uv = table.get("tool", {}).get("uv", {})
    sources = [
        s for entry in uv.get("sources", {}).values() for s in (entry if isinstance(entry, list) else [entry])
    ]
    return any(s.keys() & {"path", "workspace"} for s in sources) or any("file:" in d for d in dependencies)


def _needs_install(project: dict[str, Any]) -> bool:
    asked = project.get("tool", {}).get("modelops", {}).get("install")
    if asked is not None:
        return bool(asked)
    return bool(project.get("project", {}).get("entry-points"))


def _read_requirements(root: Path, file: Path, contents: dict[str, bytes]) -> None:
    name = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
    if name in contents:
        return
    try:
        contents[name] = file.read_bytes()
    except OSError as e:
        raise BundleError(f"{name} cannot be read ({e.strerror}); requirements.txt refers to it") from e
    for line in contents[name].decode(errors="replace").splitlines():
        if (match := _INCLUDE.match(line.strip())) and "://" not in match[1]:
            _read_requirements(root, (file.parent / match[1]).resolve(), contents)


def _only_script(root: Path) -> Path | None:
    scripts = [p for p in root.glob("*.py") if p.is_file()]
    return scripts[0] if len(scripts) == 1 else None


def _script_metadata(script: Path) -> dict[str, Any] | None:
    try:
        return script_metadata(script.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as e:
        raise BundleError(f"{script.name}: its PEP 723 metadata is not valid: {e}") from e


def _pin(root: Path) -> str | None:
    """Return the first line of ``.python-version`` that says something, e.g. ``3.12`` or ``3.12.1``."""
    file = root / ".python-version"
    if not file.is_file():
        return None
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            match = _PIN.fullmatch(line.strip())
            if match is None:
                raise BundleError(f".python-version: {line.strip()!r} is no Python version; write e.g. 3.12")
            return match[1]
    return None


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise BundleError(f"{path.name} is not valid TOML: {e}") from e
    return parse_toml(text, path.name)
