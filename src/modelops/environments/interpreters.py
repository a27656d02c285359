"""The Pythons of this machine: found and probed once, remembered by path, size and mtime.

Where they are looked for are folders of thousands of files, so a process lists one again only when it has changed.

uv is always given an absolute path. Its own search starts every launcher it meets, which takes seconds
where pyenv's shims are on the PATH and fails for versions that are installed but not selected.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from modelops.errors import BundleError, NoInterpreterError
from modelops.home import make_private
from modelops.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

OLDEST: Final = Version("3.9")  # the runner's floor
PROBE_TIMEOUT_S: Final = 20.0
SETTLED_NS: Final = (
    2 * 10**9
)  # a folder that changed so recently may change again within one tick of its mtime
FORMAT: Final = 1
_SAY_PLACES: Final = ("HOME", "PYENV_ROOT", "UV_PYTHON_INSTALL_DIR", "XDG_DATA_HOME", "PATH")
_NAME: Final = re.compile(r"(python(3(\.\d+t?)?)?|pypy3?(\.\d+)?)")
_log = logging.getLogger(__name__)

# Starts in 20 ms: no site, no user settings. Written for every Python that a machine may still hold.
_PROBE: Final = """
import os, sys, sysconfig
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
except (AttributeError, ValueError, OSError):
    libc = ""
v = sys.version_info
stage = {"final": "", "alpha": "a%d" % v[4], "beta": "b%d" % v[4], "candidate": "rc%d" % v[4]}[v[3]]
full = "%d.%d.%d" % v[:3] + stage
print("\\n".join([
    full, sys.implementation.name, sysconfig.get_platform(), libc.split(" ")[-1],
    sysconfig.get_config_var("SOABI") or "", os.path.realpath(sys.base_prefix),
    os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable),
]))
"""


class Interpreter(msgspec.Struct, frozen=True):
    """One Python of this machine. ``executable`` is absolute and no link; ``glibc`` is empty elsewhere.

    ``mark``: size and time of the program, which tell it from another one in its place: after an upgrade of this
    machine, or in a container of another image.
    """

    executable: str
    version: str
    implementation: str
    platform: str
    glibc: str
    abi: str
    prefix: str
    mark: str = ""

    @property
    def python_version(self) -> str:
        """X.Y."""
        return ".".join(self.version.split(".")[:2])

    def __str__(self) -> str:
        name = "" if self.implementation == "cpython" else f"{self.implementation} "
        return f"{name}{self.version} ({self.executable})"


class _Remembered(msgspec.Struct):
    size: int
    mtime_ns: int
    found: Interpreter | None


class _Memory(msgspec.Struct):
    format: int = FORMAT
    probed: dict[str, _Remembered] = {}


class _Listed(NamedTuple):
    """What a folder was when it was listed, and what in it has the name of an interpreter."""

    inode: int
    mtime_ns: int
    paths: list[Path]


class _Places(NamedTuple):
    """Folders of versions, each of which has a ``bin``, and folders with interpreters."""

    versions: tuple[Path, ...]
    folders: tuple[Path, ...]


class _Known(NamedTuple):
    """What a look has found, and all that it went by."""

    candidates: list[tuple[Path, _Stat | None]]
    found: list[Interpreter]


_Stat = tuple[int, int, int, int, int]  # device, inode, size, mtime, ctime


class Interpreters:
    """Finds the interpreters of this machine.

    Parameters
    ----------
    memory
        File that remembers what was probed; a probe is repeated only when the binary's size or mtime changed.
    environ
        Where PATH, MODELOPS_PYTHONS, PYENV_ROOT and HOME are read.
    """

    def __init__(self, memory: Path, *, environ: Mapping[str, str] | None = None) -> None:
        self._memory_file = memory
        self._mutex = threading.Lock()  # many threads begin at once; one probes, the others read its memory
        self._environ = os.environ if environ is None else environ
        self._listed: dict[Path, _Listed] = {}
        self._said: tuple[str | None, ...] = ()
        self._to_search = _Places((), ())
        self._known = _Known([], [])

    def all(self) -> list[Interpreter]:
        """Return every interpreter found, the running one first, then newest first; one per prefix."""
        with self._mutex:
            return self._look()

    def _look(self) -> list[Interpreter]:
        candidates = [(path, _stat(path)) for path in self._candidates()]
        if candidates == self._known.candidates:
            return list(self._known.found)
        memory = self._read()
        before = dict(memory.probed)
        found: dict[str, Interpreter] = {}
        for path, _ in candidates:
            interpreter = _probe(path, memory.probed)
            if interpreter is not None:
                found.setdefault(interpreter.prefix, interpreter)
        if memory.probed != before:
            self._write(memory)
        ordered = sorted(found.values(), key=_preference)
        self._known = _Known(candidates, ordered)
        return list(ordered)

    def find(self, requires_python: str | None, pin: str | None = None) -> Interpreter:
        """Return the interpreter to use: the running X.Y if it fits, otherwise the newest that does.

        Parameters
        ----------
        requires_python
            A version specifier, e.g. ``>=3.11,<3.13``; None or empty: any.
        pin
            The content of ``.python-version``: ``3.12`` or ``3.12.1``.

        Raises
        ------
        NoInterpreterError
            None fits; the error lists those found.
        BundleError
            ``requires_python`` is no version specifier.
        """
        found = self.all()
        for interpreter in found:
            if fits(interpreter, requires_python, pin):
                return interpreter
        wanted = " and ".join(filter(None, [requires_python, pin and f"{pin} (.python-version)"]))
        raise NoInterpreterError(wanted or f">={OLDEST}", tuple(map(str, found)))

    def _candidates(self) -> Iterator[Path]:
        yield Path(getattr(sys, "_base_executable", None) or sys.executable)
        for entry in self._environ.get("MODELOPS_PYTHONS", "").split(os.pathsep):
            if entry:
                yield from (
                    [Path(entry)]
                    if not Path(entry).is_dir()
                    else self._pythons_in(Path(entry, "bin"), Path(entry))
                )
        places = self._places()
        for versions in places.versions:
            yield from self._pythons_in(*self._listing(versions, lambda name: f"{name}/bin"))
        yield from self._pythons_in(*places.folders)

    def _places(self) -> _Places:
        """Return where to look. To make these paths anew takes longer than to look whether all is as it was."""
        said = tuple(map(self._environ.get, _SAY_PLACES))
        if self._said != said:
            home = Path(self._environ.get("HOME") or Path.home())
            pyenv = Path(self._environ.get("PYENV_ROOT") or home / ".pyenv")
            managed = Path(
                self._environ.get("UV_PYTHON_INSTALL_DIR")
                or Path(self._environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "uv" / "python"
            )
            path = self._environ.get("PATH", os.defpath).split(os.pathsep)
            folders = (Path(p) for p in dict.fromkeys((*path, "/usr/bin", "/usr/local/bin")) if p)
            self._said, self._to_search = said, _Places((pyenv / "versions", managed), tuple(folders))
        return self._to_search

    def _pythons_in(self, *folders: Path) -> Iterator[Path]:
        for folder in folders:
            yield from self._listing(folder, lambda name: name if _NAME.fullmatch(name) else None)

    def _listing(self, folder: Path, pick: Callable[[str], str | None]) -> list[Path]:
        """Return what is picked of the names in a folder, sorted; nothing if there is no such folder."""
        try:
            now = os.stat(folder)  # noqa: PTH116  half the time of Path.stat, for every folder of the PATH
            known = self._listed.get(folder)
            if known is not None and (known.inode, known.mtime_ns) == (now.st_ino, now.st_mtime_ns):
                return known.paths
            names = sorted(os.listdir(folder))  # noqa: PTH208  names are enough
        except OSError:
            return []  # PATH may name folders that are not there
        paths = [folder / picked for name in names if (picked := pick(name)) is not None]
        if time.time_ns() - now.st_mtime_ns > SETTLED_NS:
            self._listed[folder] = _Listed(now.st_ino, now.st_mtime_ns, paths)
        return paths

    def _read(self) -> _Memory:
        try:
            memory = msgspec.json.decode(self._memory_file.read_bytes(), type=_Memory)
        except (OSError, msgspec.DecodeError):
            return _Memory()  # only a memory: probing again is the remedy
        return memory if memory.format == FORMAT else _Memory()

    def _write(self, memory: _Memory) -> None:
        try:
            make_private(self._memory_file.parent)
            write_whole(self._memory_file, msgspec.json.encode(memory))
        except OSError as e:  # probing again next time is slower, and no reason to fail
            _log.debug("%s cannot be written: %s", self._memory_file, e)


def fits(interpreter: Interpreter, requires_python: str | None, pin: str | None = None) -> bool:
    """Whether an interpreter satisfies a bundle's ``requires-python`` and ``.python-version``."""
    version = Version(interpreter.version)
    if version < OLDEST or interpreter.platform.startswith("win"):
        return False
    try:
        accepted = SpecifierSet(requires_python or "")
    except InvalidSpecifier as e:
        raise BundleError(
            f"requires-python = {requires_python!r} is no version specifier; write for example '>=3.11'"
        ) from e
    wanted = pin.split(".") if pin else []
    return (
        accepted.contains(version, prereleases=True)
        and interpreter.version.split(".")[: len(wanted)] == wanted
    )


def _stat(path: Path) -> _Stat | None:
    """Return what tells a file from another one in its place, links followed; None if there is none."""
    try:
        s = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def _probe(path: Path, remembered: dict[str, _Remembered]) -> Interpreter | None:
    try:
        real = path.resolve(strict=True)
        stat = real.stat()
        if not os.access(real, os.X_OK) or not real.is_file():
            return None
        known = remembered.get(str(real))
        if known and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return _marked(known)
        with real.open("rb") as f:
            launcher = f.read(2) == b"#!"  # a shim of pyenv or asdf: slow, and no interpreter itself
    except OSError:
        return None
    found = None if launcher else _ask(real)
    new = remembered[str(real)] = _Remembered(stat.st_size, stat.st_mtime_ns, found)
    return _marked(new)


def _marked(probed: _Remembered) -> Interpreter | None:
    if probed.found is None:
        return None
    return msgspec.structs.replace(probed.found, mark=f"{probed.size}-{probed.mtime_ns}")


def _ask(executable: Path) -> Interpreter | None:
    try:
        answer = subprocess.run(
            [executable, "-I", "-S", "-c", _PROBE],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True,
        ).stdout.splitlines()  # fmt: skip
        version, implementation, platform, glibc, abi, prefix, real = answer
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        # Python 2, a broken installation, or something else of that name.
        _log.debug("%s is no usable Python: %s", executable, e)
        return None
    return Interpreter(real, version, implementation, platform, glibc, abi, prefix)


def _preference(interpreter: Interpreter) -> tuple[bool, bool, bool, bool, list[int]]:
    version = Version(interpreter.version)
    running = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return (
        interpreter.executable != running,
        version.release[:2] != sys.version_info[:2],
        interpreter.implementation != sys.implementation.name,
        version.is_prerelease or bool(re.search(r"-\d+t\b", interpreter.abi)),  # free-threaded: few wheels
        [-n for n in version.release],
    )
