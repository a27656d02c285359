"""What the cache holds, and what of it can go: by age, by size, or all. Never what a process uses."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelops.environments.lock import EnvironmentKey
from modelops.environments.locking import IN_USE, exclusive, unused
from modelops.environments.manifest import Damage, read_manifest, stat_damage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

NO_MANIFEST = Damage("", "it has no manifest: its build was interrupted, or the manifest was removed")


@dataclass(frozen=True)
class EnvironmentInfo:
    """One folder of the cache. ``n_bytes``: sum of file sizes; files shared with uv's cache count in full.

    ``python`` and ``packages`` are empty, and ``damages`` says so, when there is no manifest.
    """

    key: EnvironmentKey
    path: Path
    python: str
    packages: tuple[str, ...]
    n_bytes: int
    built_at: float
    used_at: float
    in_use: bool
    damages: tuple[Damage, ...]


@dataclass(frozen=True)
class Verified:
    """The result of comparing contents. ``set_aside``: moved to quarantine, the next job rebuilds it."""

    key: EnvironmentKey
    damages: tuple[Damage, ...]
    in_use: bool
    set_aside: bool


@dataclass(frozen=True)
class Collected:
    """What a collection did. ``skipped`` pairs a key with the reason why it stayed although it was to go."""

    removed: tuple[EnvironmentInfo, ...]
    skipped: tuple[tuple[EnvironmentKey, str], ...]

    @property
    def n_bytes(self) -> int:
        """Bytes in the removed environments."""
        return sum(info.n_bytes for info in self.removed)


def list_environments(envs: Path) -> list[EnvironmentInfo]:
    """Return what lies in ``envs``, the most recently used first."""
    found = [_info(folder) for folder in _folders(envs)]
    return sorted(found, key=lambda info: -info.used_at)


def choose(
    found: Sequence[EnvironmentInfo],
    *,
    now: float,
    max_age_s: float | None,
    max_bytes: int | None,
    everything: bool,
) -> list[EnvironmentInfo]:
    """Choose what to remove: all, the unused for ``max_age_s``, the least recently used above ``max_bytes``.

    Removes nothing. What uses space and is no environment (half built, damaged) always goes.
    """
    if everything:
        return list(found)
    chosen = []
    kept_bytes = 0
    for info in sorted(found, key=lambda info: -info.used_at):
        old = max_age_s is not None and now - info.used_at > max_age_s
        too_much = max_bytes is not None and kept_bytes + info.n_bytes > max_bytes
        if info.damages or old or too_much:
            chosen.append(info)
        else:
            kept_bytes += info.n_bytes
    return chosen


def remove(envs: Path, chosen: Sequence[EnvironmentInfo]) -> Collected:
    """Remove environments; what is in use or being built is left, and reported."""
    removed, skipped = [], []
    for info in chosen:
        try:
            with exclusive(lock_file(envs, info.key), wait=False), unused(info.path) as free:
                if free:
                    # Away in one step, so that a half-removed folder is never taken for an environment.
                    trash = envs / f".trash-{info.key}-{time.time_ns()}"
                    info.path.rename(trash)
                    shutil.rmtree(trash)
                    shutil.rmtree(envs.parent / "pycache" / info.key, ignore_errors=True)
                    removed.append(info)
                else:
                    skipped.append((info.key, "a process uses it"))
        except BlockingIOError:
            skipped.append((info.key, "it is being built"))
    for trash in envs.glob(".trash-*"):  # what an earlier collection left when it was killed
        shutil.rmtree(trash, ignore_errors=True)
    return Collected(tuple(removed), tuple(skipped))


def lock_file(envs: Path, key: EnvironmentKey) -> Path:
    """Return the file that is locked by who builds or removes an environment. It stays."""
    return envs / f".{key}.lock"


def _folders(envs: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from (p for p in envs.iterdir() if not p.name.startswith(".") and p.is_dir())


def _info(folder: Path) -> EnvironmentInfo:
    key = EnvironmentKey(folder.name)
    with unused(folder) as free:
        in_use = not free
    manifest = read_manifest(folder)
    mark = folder / IN_USE
    used_at = (mark if mark.exists() else folder).stat().st_mtime
    if manifest is None:
        n_bytes = sum(
            os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118  strings, thousands of times
            for parent, _, names in os.walk(folder)
            for name in names
        )
        return EnvironmentInfo(key, folder, "", (), n_bytes, 0.0, used_at, in_use, (NO_MANIFEST,))
    damages = tuple(stat_damage(folder, manifest))
    return EnvironmentInfo(
        key, folder, str(manifest.interpreter), tuple(manifest.packages),
        manifest.n_bytes, manifest.built_at, used_at, in_use, damages,
    )  # fmt: skip
