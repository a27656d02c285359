"""From a bundle's inputs to a lock, by uv: resolve, export or take as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.environments.inputs import DependencyInputs, tree_digest
from modelops.environments.lock import EMPTY, Lock, check_hashes, keep_listed_files, listed_hashes, make_lock
from modelops.environments.uv import DECIDING, Progress, Uv

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelops.environments.interpreters import Interpreter

_OUTPUT = "pylock.modelops.toml"
_SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"
)


def inputs_digest(inputs: DependencyInputs, interpreter: Interpreter, environ: Mapping[str, str]) -> str:
    """Name a lock by everything that decides it; while this is the same, the lock is used again."""
    parts = {
        "files": inputs.digest(),
        "bundle": tree_digest(inputs.root) if inputs.needs_bundle else None,
        "interpreter": [
            interpreter.implementation,
            interpreter.python_version,
            interpreter.platform,
            interpreter.glibc,
        ],
        "settings": {name: environ[name] for name in DECIDING if name in environ},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def resolve_inputs(
    inputs: DependencyInputs,
    interpreter: Interpreter,
    uv: Uv,
    *,
    refresh: bool,
    scratch: Path,
    on_progress: Progress | None = None,
) -> Lock:
    """Resolve a bundle's dependencies for one interpreter.

    uv runs in the bundle's folder, so that the bundle's own ``[tool.uv]`` settings hold. A bundle with paths
    among its dependencies is copied first: build backends write into their sources, and uv writes paths
    relative to its output.

    Raises
    ------
    ResolutionError, IndexUnreachableError, StorageError
        See `modelops.environments.uv.explain`.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    # Resolved: uv follows links in what it reads, not in where it writes, and then finds no relative path.
    with tempfile.TemporaryDirectory(prefix="resolve-", dir=scratch.resolve()) as folder:
        root, output = inputs.root, Path(folder) / _OUTPUT
        if inputs.needs_bundle:
            root = copy_bundle(inputs.root, Path(folder) / inputs.root.name)
            output = root / _OUTPUT
        text = _pylock(inputs, interpreter, uv, root, output, refresh=refresh, on_progress=on_progress)
    digest = tree_digest(inputs.root) if inputs.needs_bundle else None
    return make_lock(text, interpreter, bundle_digest=digest, install=inputs.needs_install)


def _pylock(
    inputs: DependencyInputs,
    interpreter: Interpreter,
    uv: Uv,
    root: Path,
    output: Path,
    *,
    refresh: bool,
    on_progress: Progress | None,
) -> str:
    common = ["--format", "pylock.toml", "--no-header", "--python", interpreter.executable, "-o", str(output)]
    if inputs.file is None:
        return EMPTY
    if inputs.kind == "pylock.toml":
        return inputs.contents["pylock.toml"].decode()
    if inputs.kind == "uv.lock":
        # The project itself is left out: its code runs from the snapshot. The user's lock is not refreshed.
        command = ["export", "--frozen", "--no-emit-project", "--no-default-groups", "--no-annotate", *common]
    else:
        version = interpreter.python_version  # not X.Y.Z: the next worker may have another Z
        command = ["pip", "compile", inputs.file.name, "--python-version", version, *common]
        command += ["--upgrade", "--refresh"] if refresh else []
    if on_progress is not None:
        on_progress(f"resolving the dependencies of {inputs.name} for Python {interpreter.python_version}")
    uv.run(command, what=inputs.name, volume=output.parent, cwd=root, on_progress=on_progress)
    text = output.read_text(encoding="utf-8")
    if inputs.kind == "requirements.txt":
        requirements = b"\n".join(inputs.contents.values()).decode(errors="replace")
        if listed := listed_hashes(requirements):
            # As pip does: one hash makes hashes required for all.
            check_hashes(inputs.name, text, listed, required=True)
            text = keep_listed_files(text, listed)
        elif "--require-hashes" in requirements:
            check_hashes(inputs.name, text, {}, required=True)
    return text


def copy_bundle(root: Path, to: Path) -> Path:
    """Copy a bundle where its build may write, without what version control and caches hold."""
    shutil.copytree(root, to, ignore=_SKIPPED, symlinks=True)
    for path in [to, *to.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200)  # snapshots are read-only
    return to
