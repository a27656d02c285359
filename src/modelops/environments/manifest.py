"""What an environment looked like when it was built, and what differs now.

Written last: an environment without a manifest is none. Validation compares stats, a few microseconds a
file; content hashes (`hash_damage`) are for ``env verify`` and for rebuilding after damage.
Only what was built is compared: what models add at run time is no damage.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from modelops.environments.interpreters import Interpreter
from modelops.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

FORMAT: Final = 1
NAME: Final = "modelops-manifest"
_OWN: Final = frozenset({NAME, ".in-use", ".lock"})
_HASH_BELOW_BYTES: Final = 65_536  # files that no RECORD lists are scripts and settings: small


class Damage(NamedTuple):
    """One way in which an environment is not what was built. ``package`` may be empty."""

    path: str
    what: str
    package: str = ""

    def __str__(self) -> str:
        return f"{self.path} {self.what}" if self.path else self.what


class Folder(msgspec.Struct, array_like=True):
    """The files of one folder. The four lists run in parallel."""

    path: str
    names: list[str]
    sizes: list[int]
    mtimes_ns: list[int]
    modes: list[int]


class Manifest(msgspec.Struct, kw_only=True):
    """Everything validation compares with.

    ``links`` maps a symbolic link to its target. ``hashes`` holds SHA-256 (hexadecimal) of small files that
    no RECORD lists. ``binary`` is size and mtime of the interpreter that ``bin/python`` leads to.
    """

    format: int = FORMAT
    key: str
    interpreter: Interpreter
    binary: tuple[int, int]
    folders: list[Folder]
    links: dict[str, str]
    hashes: dict[str, str] = {}
    n_bytes: int
    built_at: float
    build_seconds: float
    packages: list[str]


class _Head(msgspec.Struct):
    format: int
    key: str


_decoder = msgspec.msgpack.Decoder(Manifest)
_head_decoder = msgspec.msgpack.Decoder(_Head)


def read_manifest(root: Path) -> Manifest | None:
    """Return the manifest of an environment, or None when there is none that can be read."""
    try:
        data = (root / NAME).read_bytes()
        if _head_decoder.decode(data).format != FORMAT:
            return None
        return _decoder.decode(data)
    except (OSError, msgspec.DecodeError):
        return None


def manifest_mark(root: Path) -> str:
    """Return what tells this environment from one that is built in its place later; "" if there is none."""
    try:
        seen = (root / NAME).stat()
    except OSError:
        return ""
    return f"{seen.st_ino}-{seen.st_mtime_ns}"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest at once; from then on the environment exists."""
    write_whole(root / NAME, msgspec.msgpack.encode(manifest))


class Survey(NamedTuple):
    """What lies in a freshly built environment. ``stats`` maps a relative path to its `os.stat_result`."""

    folders: list[Folder]
    links: dict[str, str]
    stats: dict[str, os.stat_result]

    @property
    def n_bytes(self) -> int:
        """The sum of the file sizes."""
        return sum(sum(f.sizes) for f in self.folders)


def survey(root: Path, *, freeze: bool) -> Survey:
    """Walk an environment; with ``freeze`` every file loses its write permission on the way."""
    folders: list[Folder] = []
    links: dict[str, str] = {}
    stats: dict[str, os.stat_result] = {}
    todo = [""]
    while todo:
        relative = todo.pop()
        folder = Folder(relative, [], [], [], [])
        prefix = f"{relative}/" if relative else ""
        with os.scandir(root / relative) as entries:
            for entry in entries:
                path = prefix + entry.name
                if path in _OWN:
                    continue
                if entry.is_symlink():
                    links[path] = os.readlink(entry.path)  # noqa: PTH115  a string, thousands of times
                    continue
                if entry.is_dir(follow_symlinks=False):
                    todo.append(path)
                    continue
                found = entry.stat(follow_symlinks=False)
                mode = found.st_mode
                if freeze and mode & 0o222:
                    mode &= ~0o222
                    os.chmod(entry.path, stat.S_IMODE(mode))  # noqa: PTH101  a string, thousands of times
                stats[path] = found
                folder.names.append(entry.name)
                folder.sizes.append(found.st_size)
                folder.mtimes_ns.append(found.st_mtime_ns)
                folder.modes.append(mode)
        if folder.names:
            folders.append(folder)
    return Survey(folders, links, stats)


def stat_damage(root: Path, manifest: Manifest) -> Iterator[Damage]:
    """Yield what differs from the manifest, judged by stats alone; the cheapest and most telling first."""
    yield from _interpreter_damage(root, manifest)
    for link, target in manifest.links.items():
        if link not in ("bin/python", "bin"):
            try:
                if os.readlink(root / link) != target:  # noqa: PTH115  compared as text
                    yield Damage(link, "is a link to somewhere else")
            except OSError:
                yield Damage(link, "is missing")
    for folder in manifest.folders:
        yield from _folder_damage(root, folder)


def _folder_damage(root: Path, folder: Folder) -> Iterator[Damage]:
    path = folder.path
    try:
        fd = os.open(root / path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield Damage(path or ".", f"is missing ({len(folder.names)} files)", _owner(path))
        return
    prefix = f"{path}/" if path else ""
    try:
        look = os.stat
        for name, size, mtime_ns, mode in zip(
            folder.names, folder.sizes, folder.mtimes_ns, folder.modes, strict=True
        ):
            try:
                found = look(name, dir_fd=fd, follow_symlinks=False)
            except OSError:
                yield Damage(f"{prefix}{name}", "is missing", _owner(f"{path}/{name}"))
                continue
            if found.st_mtime_ns != mtime_ns or found.st_size != size or found.st_mode != mode:
                yield Damage(f"{prefix}{name}", _difference(found, size, mode), _owner(f"{path}/{name}"))
    finally:
        os.close(fd)


def _difference(found: os.stat_result, size: int, mode: int) -> str:
    if found.st_size != size:
        return f"has {found.st_size} bytes instead of {size}"
    if found.st_mode != mode:
        return f"has mode {stat.filemode(found.st_mode)} instead of {stat.filemode(mode)}"
    return "was written to after it was installed"


def _interpreter_damage(root: Path, manifest: Manifest) -> Iterator[Damage]:
    link = root / "bin" / "python"
    expected = manifest.interpreter
    if not (root / "bin").is_dir():
        yield Damage("bin", "is missing")
        return
    try:
        real = os.path.realpath(link, strict=True)
        found = os.stat(real)  # noqa: PTH116  a string
    except OSError:
        what = f"is dangling (it leads to {os.readlink(link)})" if link.is_symlink() else "is missing"  # noqa: PTH115
        yield Damage("bin/python", what)
        return
    if real != expected.executable:
        yield Damage(
            "bin/python", f"leads to {real} instead of {expected.executable} (Python {expected.version})"
        )
    elif (found.st_size, found.st_mtime_ns) != manifest.binary:
        yield Damage(
            "bin/python", f"leads to {real}, which was replaced since (it was Python {expected.version})"
        )


def _owner(path: str) -> str:
    """Guess the package from a path in site-packages; only for messages."""
    found = re.search(r"site-packages/([A-Za-z0-9_]+)", path)
    return found[1] if found else ""


class Record(NamedTuple):
    """One line of a RECORD: path relative to the environment, SHA-256 (url-safe base64, or empty), size."""

    path: str
    digest: str
    size: int | None


Recorded = list[tuple[str, list[Record]]]


def read_records(root: Path, paths: Iterable[str]) -> Recorded:
    """Return each installed package and what its RECORD lists; an unreadable RECORD lists nothing."""
    recorded: Recorded = []
    marks = (".dist-info/RECORD", ".dist-info/METADATA", ".dist-info/WHEEL")  # any may be what is missing
    for info in dict.fromkeys(path.rpartition("/")[0] for path in paths if path.endswith(marks)):
        site, _, folder = info.rpartition("/")
        if not site.endswith("/site-packages"):
            continue  # vendored, as in setuptools/_vendor: no installed package, its RECORD is of another place
        package = folder.removesuffix(".dist-info").rsplit("-", 1)[0]
        try:
            text = (root / info / "RECORD").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
        lines = []
        for name, digest, size in (row for row in csv.reader(text.splitlines()) if len(row) == 3):
            if name.startswith("/") or name.endswith(".dist-info/RECORD"):
                continue  # outside the environment; and RECORD cannot hold its own hash
            file = os.path.normpath(f"{site}/{name}") if ".." in name else f"{site}/{name}"
            lines.append(Record(file, digest, int(size) if size.isdigit() else None))
        recorded.append((package, lines))
    return recorded


def record_damage(
    root: Path, found: dict[str, os.stat_result], recorded: Recorded, *, hashes: bool
) -> list[Damage]:
    """Return what differs from the packages' own RECORD files.

    Sizes are compared for every file. Contents are hashed where ``hashes`` asks for it, and where a file
    shared with uv's cache is younger than its package's ``WHEEL``: wheels end with it, so such a file was
    written to after it had been unpacked, possibly without changing its size.
    """
    damages: list[Damage] = []
    for package, lines in recorded:
        if not lines:
            damages.append(Damage(package, "has no readable RECORD", package))
        wheel = next(
            (found[r.path].st_mtime_ns for r in lines if r.path.endswith("/WHEEL") and r.path in found), 0
        )
        for line in lines:
            seen = found.get(line.path)
            if seen is None:
                if not line.path.endswith(".pyc") and not (root / line.path).is_symlink():
                    damages.append(Damage(line.path, "is listed in RECORD and missing", package))
            elif line.size is not None and line.size != seen.st_size:
                damages.append(
                    Damage(line.path, f"has {seen.st_size} bytes, its RECORD says {line.size}", package)
                )
            elif (
                line.digest.startswith("sha256=")
                and (hashes or (seen.st_nlink > 1 and wheel and seen.st_mtime_ns > wheel))
                and _as_in_record(file_digest(root / line.path)) != line.digest
            ):
                damages.append(Damage(line.path, "does not have the content that its RECORD says", package))
    return damages


def unlisted_hashes(
    root: Path, found: dict[str, os.stat_result], recorded: Recorded, *, also: Iterable[str] = ()
) -> dict[str, str]:
    """Return the SHA-256 of small files that no RECORD lists (``pyvenv.cfg``, scripts), and of ``also``."""
    listed = {line.path for _, lines in recorded for line in lines}
    paths = [
        path
        for path, seen in found.items()
        if path not in listed and seen.st_size <= _HASH_BELOW_BYTES and not path.endswith(".pyc")
    ]
    return {path: file_digest(root / path) for path in (*paths, *also)}


def hash_damage(root: Path, manifest: Manifest) -> list[Damage]:
    """Return every difference, contents included; reads the whole environment."""
    damages = list(stat_damage(root, manifest))
    named = {d.path for d in damages}
    here = survey(root, freeze=False)
    built = {f"{f.path}/{n}" if f.path else n for f in manifest.folders for n in f.names}
    found = {path: seen for path, seen in here.stats.items() if path in built}
    damages += [
        d
        for d in record_damage(root, found, read_records(root, found), hashes=True)
        if d.path not in named and d.path not in manifest.hashes
    ]
    for path, digest in manifest.hashes.items():
        if path not in named and file_digest(root / path) != digest:
            damages.append(Damage(path, "does not have the content that was installed"))
    return damages


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal; empty when there is none."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _as_in_record(digest: str) -> str:
    """Turn a hexadecimal SHA-256 into ``sha256=<url-safe base64 without padding>``, as RECORD has it."""
    return "sha256=" + base64.urlsafe_b64encode(bytes.fromhex(digest)).rstrip(b"=").decode()
