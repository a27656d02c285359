"""Builds one environment into its final folder; the manifest, written last, makes it one.

In place and not moved there: scripts hold their interpreter's absolute path, and uv's relocatable form
replaces each by a slower shell wrapper. What a crash leaves behind has no manifest, so it never looks whole.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.environments.locking import IN_USE
from modelops.environments.manifest import (
    Damage,
    Manifest,
    Recorded,
    Survey,
    file_digest,
    read_records,
    record_damage,
    survey,
    unlisted_hashes,
    write_manifest,
)
from modelops.environments.resolve import copy_bundle
from modelops.errors import EnvironmentDamagedError, InternalError, ResolutionError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.environments.interpreters import Interpreter
    from modelops.environments.lock import EnvironmentKey, Lock
    from modelops.environments.uv import Progress, Uv

_log = logging.getLogger(__name__)


def build_environment(
    root: Path,
    key: EnvironmentKey,
    lock: Lock,
    interpreter: Interpreter,
    uv: Uv,
    *,
    careful: bool,
    scratch: Path,
    bundle_root: Path | None = None,
    on_progress: Progress | None = None,
    note_pid: Callable[[int], None] | None = None,
) -> Manifest:
    """Build an environment where nothing is yet.

    Parameters
    ----------
    careful
        After damage: copy instead of hard-linking from uv's cache, and check every content against RECORD.
    bundle_root
        The bundle's folder; needed when ``lock.bundle_digest`` is set.

    Raises
    ------
    ResolutionError, IndexUnreachableError, StorageError
        uv failed; see `modelops.environments.uv.explain`. Or somebody removed what it works in.
    EnvironmentDamagedError
        What was installed does not match the packages' RECORD, even after a fresh download.
    """
    started = time.monotonic()
    what = f"environment {key}"
    if lock.bundle_digest is not None and bundle_root is None:
        raise InternalError(f"{what} installs from the bundle's folder, and none was given")
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)

    def call(*arguments: str | Path, cwd: Path) -> str:
        return uv.run(arguments, what=what, volume=root, cwd=cwd, on_progress=on_progress, note_pid=note_pid)

    with tempfile.TemporaryDirectory(prefix="build-", dir=scratch) as folder:
        work = Path(folder)
        call("venv", "-q", "--no-project", "--python", interpreter.executable, root, cwd=work)
        (root / IN_USE).touch()
        if lock.bundle_digest is not None and bundle_root is not None:
            work = copy_bundle(bundle_root, work / bundle_root.name)
        pylock = work / "pylock.modelops.toml"
        pylock.write_text(lock.text, encoding="utf-8")
        python = root / "bin" / "python"

        def install(*options: str) -> None:
            if lock.packages:
                call("pip", "sync", "--python", python, *options, pylock.name, cwd=work)
            if lock.install:
                call("pip", "install", "--no-deps", "--python", python, *options, ".", cwd=work)

        if on_progress is not None and (n := len(lock.packages) + lock.install):
            on_progress(f"installing {n} package{'s' if n > 1 else ''} for Python {interpreter.version}")
        copy = ("--link-mode", "copy") if careful else ()
        try:
            install(*copy)
        except ResolutionError as e:
            # What uv cannot unpack from its own cache, it can after a fresh download.
            if not (work.is_dir() and root.is_dir()):
                raise StorageError(
                    f"{root if work.is_dir() else work} was removed while {what} was being built; look for what cleans "
                    "the cache of this machine"
                ) from e
            broken = [name for name in _names(lock) if f"({name}==" in e.uv_output]
            if "Failed to install" not in e.uv_output or not broken:
                raise
            _log.warning("uv's cache is damaged: %s; downloading again", e.uv_output)
            call("cache", "clean", "--force", *broken, cwd=work)
            install("--link-mode", "copy")
        found = survey(root, freeze=True)
        recorded = read_records(root, found.stats)
        accepted: list[str] = []
        if bad := record_damage(root, found.stats, recorded, hashes=careful):
            # Whoever rebuilds after damage has said so already: one warning for one damage.
            _log.log(
                logging.INFO if careful else logging.WARNING,
                "uv's cache is damaged: %s%s; downloading again",
                bad[0], f" (and {len(bad) - 1} more)" if len(bad) > 1 else "",
            )  # fmt: skip
            found, recorded, wrong = _mend(root, bad, install, call, work)
            if wrong:
                _log.info("%s: %s, as published", root.name, "; ".join(map(str, wrong)))
            accepted = [d.path for d in wrong]
    binary = os.stat(interpreter.executable)  # noqa: PTH116  a string
    manifest = Manifest(
        key=key,
        interpreter=interpreter,
        binary=(binary.st_size, binary.st_mtime_ns),
        folders=found.folders,
        links=found.links,
        hashes=unlisted_hashes(root, found.stats, recorded, also=accepted),
        n_bytes=found.n_bytes,
        built_at=time.time(),
        build_seconds=time.monotonic() - started,
        packages=[f"{p['name']}=={p.get('version', '?')}" for p in lock.packages],
    )
    write_manifest(root, manifest)
    return manifest


def _names(lock: Lock) -> list[str]:
    return [package["name"] for package in lock.packages]


def _mend(
    root: Path,
    bad: list[Damage],
    install: Callable[..., None],
    call: Callable[..., str],
    work: Path,
) -> tuple[Survey, Recorded, list[Damage]]:
    """Install damaged packages again from fresh downloads: uv's cache itself holds the damage.

    uv checks an archive against the lock. So where two downloads differ from their RECORD in the same way,
    the wheel was published with a wrong RECORD; such differences are returned, and are no damage.
    """
    before = None
    for _ in range(3):
        packages = sorted({d.package for d in bad})
        # --force: the default waits for every uv on this machine to end, and this package is of use to none.
        call("cache", "clean", "--force", *packages, cwd=work)
        install("--link-mode", "copy", *(f"--reinstall-package={p}" for p in packages))
        found = survey(root, freeze=True)
        recorded = read_records(root, found.stats)
        bad = record_damage(root, found.stats, recorded, hashes=True)
        digests = {(d.path, file_digest(root / d.path)) for d in bad}
        if not bad or digests == before:
            return found, recorded, bad
        before = digests
    raise EnvironmentDamagedError(
        f"{root.name}: {bad[0]}, also after fresh downloads of {', '.join(packages)}, each time differently. "
        "Check the disk, then remove uv's cache (uv cache clean) and run this again."
    )
