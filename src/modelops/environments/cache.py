"""The environments of one machine: found, validated, built once however many ask, repaired, removed."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from modelops.counters import Measured, measure
from modelops.environments.build import build_environment
from modelops.environments.collect import (
    NO_MANIFEST,
    Collected,
    EnvironmentInfo,
    Verified,
    choose,
    list_environments,
    lock_file,
    remove,
)
from modelops.environments.failures import Failures
from modelops.environments.inputs import dependency_inputs
from modelops.environments.interpreters import Interpreter, Interpreters, fits
from modelops.environments.lock import EnvironmentKey, Lock, environment_key, parse_lock
from modelops.environments.locking import IN_USE, exclusive, share, unused
from modelops.environments.manifest import (
    Damage,
    Manifest,
    hash_damage,
    manifest_mark,
    read_manifest,
    stat_damage,
)
from modelops.environments.resolve import inputs_digest, resolve_inputs
from modelops.environments.uv import Progress, Uv, kill_tree, start_time
from modelops.errors import (
    IndexUnreachableError,
    InternalError,
    NoInterpreterError,
    NotFoundError,
    RequestError,
    ResolutionError,
    StorageError,
)
from modelops.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

KEPT_IN_QUARANTINE: Final = 3
SCRATCH_S: Final = 86_400.0  # no build takes longer


@dataclass(frozen=True)
class Environment:
    """A whole environment. ``built``: by this call; ``seconds``: what the call took.

    ``damage``: what was wrong with the one that this call replaced, if it did. ``mark``: differs from that of any
    other environment that was or will be in the same place.
    """

    path: Path
    python: Path
    key: EnvironmentKey
    interpreter: Interpreter
    built: bool
    seconds: float
    damage: str | None = None
    mark: str = ""


class Environments:
    """Resolves, builds, validates and removes environments below one cache folder.

    Safe for any number of threads and processes on one machine; every method may block.

    Parameters
    ----------
    cache_dir
        Holds ``envs/``, ``locks/``, ``quarantine/`` and what is remembered.
    uv
        The uv program; the one installed with ModelOps by default.
    """

    def __init__(self, cache_dir: Path, *, uv: Path | None = None, log: logging.Logger | None = None) -> None:
        self.cache_dir = cache_dir.absolute()
        self.interpreters = Interpreters(self.cache_dir / "interpreters.json")
        self._uv = Uv(uv)
        self._log = log or logging.getLogger(__name__)
        self._envs = self.cache_dir / "envs"
        self._locks = self.cache_dir / "locks"
        self._quarantine = self.cache_dir / "quarantine"
        self._scratch = self.cache_dir / "scratch"
        self._failures = Failures(self.cache_dir / "failures")

    def resolve(
        self,
        bundle_root: Path,
        *,
        interpreter: Interpreter | None = None,
        upgrade: bool = False,
        on_progress: Progress | None = None,
    ) -> Lock:
        """Return the lock of a bundle: the one made before for the same inputs, or a new one.

        Parameters
        ----------
        interpreter
            The Python to resolve for; by default the one that the bundle's ``requires-python`` and
            ``.python-version`` pick on this machine.
        upgrade
            Resolve anew, and forget a remembered failure.

        Raises
        ------
        NoInterpreterError
            No Python on this machine fits.
        ResolutionError
            The dependencies cannot be resolved: final, with uv's words; remembered for ten minutes.
        IndexUnreachableError
            The package index did not answer; try again later.
        StorageError
            The cache cannot be written.
        BundleError
            A file of the bundle is not valid.
        """
        asked_at = time.time()
        inputs = dependency_inputs(bundle_root)
        if interpreter is None:
            interpreter = self.interpreters.find(inputs.requires_python, inputs.python_pin)
        digest = inputs_digest(inputs, interpreter, os.environ)
        file = self._locks / f"{digest}.toml"
        if not upgrade and (lock := _read_lock(file)):
            return lock
        with self._storage(), exclusive(self._locks / f".{digest}"):
            if upgrade:
                self._failures.forget(digest)
            elif lock := _read_lock(file):
                return lock
            elif failure := self._failures.recall(digest, asked_at):
                raise failure
            try:
                lock = resolve_inputs(
                    inputs,
                    interpreter,
                    self._uv,
                    refresh=upgrade,
                    scratch=self._scratch,
                    on_progress=on_progress,
                )
            except (ResolutionError, IndexUnreachableError) as e:
                self._failures.remember(digest, e)
                raise
            write_whole(file, lock.text.encode())
            return lock

    def known_lock(self, bundle_root: Path) -> Lock | None:
        """Return the lock that `resolve` would find as made before; None if it would have to make one.

        Raises
        ------
        NoInterpreterError, BundleError
            As `resolve`.
        """
        if next(self._locks.glob("*.toml"), None) is None:
            return None
        inputs = dependency_inputs(bundle_root)
        interpreter = self.interpreters.find(inputs.requires_python, inputs.python_pin)
        return _read_lock(self._locks / f"{inputs_digest(inputs, interpreter, os.environ)}.toml")

    def key(self, lock: Lock, interpreter: Interpreter | None = None) -> EnvironmentKey:
        """Name the environment of a lock on this machine."""
        return environment_key(lock, interpreter or self.interpreter_for(lock))

    def interpreter_for(self, lock: Lock) -> Interpreter:
        """Return the interpreter of this machine that has the lock's X.Y, implementation and platform.

        Raises
        ------
        NoInterpreterError
            There is none.
        """
        found = self.interpreters.all()
        for interpreter in found:
            same = (interpreter.implementation, interpreter.platform) == (lock.implementation, lock.platform)
            if same and fits(interpreter, lock.requires_python, lock.python_version):
                return interpreter
        wanted = f"{lock.python_version} ({lock.implementation}, {lock.platform})"
        raise NoInterpreterError(wanted, tuple(map(str, found)))

    def ensure(
        self,
        lock: Lock,
        interpreter: Interpreter | None = None,
        *,
        bundle_root: Path | None = None,
        retry_failed: bool = False,
        on_progress: Progress | None = None,
    ) -> Environment:
        """Return the environment of a lock, whole: validated, and built or rebuilt when needed.

        A valid environment costs a few milliseconds and no uv. However many threads and processes ask at
        once, one builds and the others wait for it.

        Parameters
        ----------
        bundle_root
            The bundle's folder, for locks with ``bundle_digest``.
        retry_failed
            Build although the same build failed a short while ago.

        Raises
        ------
        ResolutionError, IndexUnreachableError, StorageError, EnvironmentDamagedError, NoInterpreterError
            As in `resolve`; a package that cannot be built is a ResolutionError.
        """
        asked_at, started = time.time(), time.monotonic()
        interpreter = interpreter or self.interpreter_for(lock)
        if interpreter.python_version != lock.python_version:
            raise InternalError(
                f"a lock for Python {lock.python_version} cannot be installed for {interpreter}"
            )
        key = environment_key(lock, interpreter)
        root = self._envs / key

        def environment(manifest: Manifest, *, built: bool, damage: str | None = None) -> Environment:
            seconds, python = time.monotonic() - started, root / "bin" / "python"
            return Environment(
                root, python, key, manifest.interpreter, built, seconds, damage, manifest_mark(root)
            )

        before = manifest_mark(root)
        if manifest := self._whole(root):
            return environment(manifest, built=False)
        if on_progress is not None:
            on_progress(f"preparing environment {key}")
        with self._storage(), self._building(key) as note_pid:
            # Many may have waited, and they come in one after another: what was built meanwhile needs no second look.
            if manifest := self._whole(root, fresh=manifest_mark(root) != before):
                return environment(manifest, built=False)
            if retry_failed:
                self._failures.forget(key)
            elif failure := self._failures.recall(key, asked_at):
                raise failure
            damage = self._set_aside(key)
            careful = any(self._quarantine.glob(f"{key}-*"))
            try:
                manifest = build_environment(
                    root, key, lock, interpreter, self._uv, careful=careful, scratch=self._scratch,
                    bundle_root=bundle_root, on_progress=on_progress, note_pid=note_pid,
                )  # fmt: skip
            except BaseException as e:
                shutil.rmtree(root, ignore_errors=True)  # without a manifest it is none, but it takes space
                if isinstance(e, (ResolutionError, IndexUnreachableError)):
                    self._failures.remember(key, e)
                raise
            measure(Measured.ENVIRONMENT_BUILDS, manifest.build_seconds)
            self._log.info("built environment %s in %.2f s", key, manifest.build_seconds)
            return environment(manifest, built=True, damage=damage)

    def validate(self, key: EnvironmentKey) -> list[Damage]:
        """Return how an environment differs from what was built, by stats: milliseconds."""
        root = self._envs / key
        manifest = read_manifest(root)
        return [NO_MANIFEST] if manifest is None else list(stat_damage(root, manifest))

    @contextlib.contextmanager
    def hold(self, environment: Environment) -> Iterator[None]:
        """Keep an environment from being removed while it is about to be used.

        A runner holds its own share for as long as it lives; this one bridges the time until it does.

        Raises
        ------
        FileNotFoundError
            It was removed or rebuilt since `ensure` returned; ask again.
        """
        fd = share(environment.path)
        try:
            if not self.is_in_place(environment):
                raise FileNotFoundError(f"the environment {environment.path} was rebuilt meanwhile")
            yield
        finally:
            os.close(fd)

    def is_in_place(self, environment: Environment) -> bool:
        """Say whether an environment was neither removed nor rebuilt since `ensure` returned. Two microseconds."""
        return manifest_mark(environment.path) == environment.mark

    def verify(self, key: EnvironmentKey) -> Verified:
        """Compare every content with what was installed, seconds; set a damaged environment aside.

        One that a process uses is compared too, but stays where it is.

        Raises
        ------
        NotFoundError
            There is no such environment.
        """
        root = self._envs / key
        if not root.is_dir():
            raise NotFoundError(f"there is no environment {key} in {self._envs}")
        with self._storage(), self._building(key):
            manifest = read_manifest(root)
            damages = [NO_MANIFEST] if manifest is None else hash_damage(root, manifest)
            with unused(root) as free:
                set_aside = bool(damages) and free and root.exists()
                if set_aside:
                    self._set_aside(key, damages)
        return Verified(key, tuple(damages), in_use=not free, set_aside=set_aside)

    def list(self) -> list[EnvironmentInfo]:
        """Return the environments of the cache, the most recently used first."""
        return list_environments(self._envs)

    def gc(
        self, *, max_age_s: float | None = None, max_bytes: int | None = None, everything: bool = False
    ) -> Collected:
        """Remove environments that were not used for long, or the least recently used above a size, or all.

        What is damaged or half built, quarantine, and what is remembered too long go in any case; what a
        process uses or builds stays, and is reported.
        """
        with self._storage():
            found = list_environments(self._envs)
            chosen = choose(
                found, now=time.time(), max_age_s=max_age_s, max_bytes=max_bytes, everything=everything
            )
            collected = remove(self._envs, chosen)
            self._bound_quarantine(keep=0)
            self._failures.forget_old()
            for folder in self._scratch.glob("*"):  # left by what was killed
                if time.time() - folder.stat().st_mtime > SCRATCH_S:
                    shutil.rmtree(folder, ignore_errors=True)
        return collected

    def _whole(self, root: Path, *, fresh: bool = False) -> Manifest | None:
        """Return the manifest of a valid environment, and mark it as used now. ``fresh``: it was built this moment."""
        manifest = read_manifest(root)
        if manifest is None or (not fresh and next(stat_damage(root, manifest), None) is not None):
            return None
        with contextlib.suppress(OSError):  # a read-only cache serves as well; only gc knows less
            os.utime(root / IN_USE)
        return manifest

    def _set_aside(self, key: EnvironmentKey, damages: Sequence[Damage] = ()) -> str | None:
        """Move what is left of a damaged environment to quarantine; say and return what was wrong, in one line."""
        root = self._envs / key
        if not os.path.lexists(root):
            return None
        damages = damages or self.validate(key)
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        damage = f"environment {key} is damaged: {damages[0]}{more}"
        self._log.warning("%s; it will be rebuilt", damage)
        self._quarantine.mkdir(parents=True, exist_ok=True)
        # A rename keeps the open files of a process that still runs from it.
        root.rename(self._quarantine / f"{key}-{time.time_ns()}")
        self._bound_quarantine()
        return damage

    def _bound_quarantine(self, keep: int = KEPT_IN_QUARANTINE) -> None:
        """Remove all but the newest in quarantine; those in use stay."""
        found = sorted(self._quarantine.glob("*-*"), key=lambda p: p.name.rpartition("-")[2], reverse=True)
        for folder in found[keep:]:
            with unused(folder) as free:
                if free:
                    shutil.rmtree(folder)

    @contextlib.contextmanager
    def _building(self, key: EnvironmentKey) -> Iterator[_NotePid]:
        """Be the only one that builds, moves or removes this environment."""
        with exclusive(lock_file(self._envs, key)) as fd:
            _stop_orphan(fd)
            try:
                yield _NotePid(fd)
            finally:
                os.ftruncate(fd, 0)

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        """Name the volume when the file system itself refuses."""
        try:
            yield
        except OSError as e:
            free = shutil.disk_usage(self.cache_dir).free if self.cache_dir.exists() else 0
            raise StorageError(
                f"{e.strerror or e} on the volume of {self.cache_dir} ({free / 2**20:.0f} MiB free), "
                f"at {e.filename}: free some space there, or set MODELOPS_HOME to another folder"
            ) from e


class _NotePid:
    """Writes into the lock file which uv works under it: a killed builder releases its lock, not its uv."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, pid: int) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{pid} {start_time(pid)} {_pid_namespace()}".encode(), 0)


def _stop_orphan(fd: int) -> None:
    """Stop a uv that outlived the builder that started it: it would write into the next build."""
    noted = os.pread(fd, 100, 0).decode().split()
    # In another container the number is that of another process; and there all ends with the container.
    if len(noted) == 3 and noted[2] == _pid_namespace() and start_time(int(noted[0])) == noted[1]:
        kill_tree(int(noted[0]))
        deadline = time.monotonic() + 10
        while start_time(int(noted[0])) == noted[1] and time.monotonic() < deadline:
            time.sleep(0.01)


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115  it is no path
    except OSError:
        return "-"


def _read_lock(file: Path) -> Lock | None:
    try:
        return parse_lock(file.read_text(encoding="utf-8"))
    except (OSError, RequestError, UnicodeDecodeError):
        return None  # not there, written by another version, or damaged: resolving is the remedy
