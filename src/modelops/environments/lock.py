"""The lock of a job: a ``pylock.toml`` that also says for which Python and platform it was made. Pure.

The extra facts stand in its ``[tool.modelops]`` table, which PEP 751 leaves to tools, so one text in the
job's record is all a worker needs, and any installer can read it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final, NewType

from packaging.utils import canonicalize_name

from modelops.errors import RequestError, ResolutionError

if TYPE_CHECKING:
    from modelops.environments.interpreters import Interpreter

FORMAT: Final = 2  # 1 had no sha256
KEY_FORMAT: Final = 2
EMPTY: Final = 'lock-version = "1.0"\ncreated-by = "modelops"\npackages = []\n'
EnvironmentKey = NewType("EnvironmentKey", str)
_OWN_TABLE: Final = re.compile(r"^\[tool\.modelops\]\n(?:(?!\[).*\n?)*", re.MULTILINE)
_DIGEST_KEY: Final = "sha256 = "
_HASHED: Final = re.compile(r"--hash[= ]\s*sha256:([0-9a-fA-F]{64})")


class NotALockError(RequestError):
    """The text is no lock, or what was cut off is missing."""


@dataclass(frozen=True)
class Lock:
    """Everything an environment is made of.

    ``text`` is the whole file, ``python_version`` is X.Y, ``platform`` e.g. ``linux-x86_64``, ``glibc`` the
    version it was resolved for (empty: not glibc). ``bundle_digest`` is set when installing reads the
    bundle's folder; ``install``: the bundle itself is installed, too.
    """

    text: str
    python_version: str
    implementation: str
    platform: str
    glibc: str
    bundle_digest: str | None = None
    install: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def document(self) -> dict[str, Any]:
        """The text, parsed."""
        return tomllib.loads(self.text)

    @property
    def packages(self) -> list[dict[str, Any]]:
        """The locked packages as the file holds them."""
        found: list[dict[str, Any]] = self.document.get("packages", [])
        return found

    @property
    def requires_python(self) -> str | None:
        """What the lock demands of the interpreter beyond ``python_version``."""
        found: str | None = self.document.get("requires-python")
        return found


def make_lock(
    pylock: str, interpreter: Interpreter, *, bundle_digest: str | None = None, install: bool = False
) -> Lock:
    """Add to a plain ``pylock.toml`` what it was made for."""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "python": interpreter.python_version,
        "implementation": interpreter.implementation,
        "platform": interpreter.platform,
        "glibc": interpreter.glibc,
    }
    if bundle_digest is not None:
        facts |= {"bundle": bundle_digest, "install": install}
    # The values are versions, names and digests: what JSON writes of them is TOML.
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in facts.items())
    plain = _OWN_TABLE.sub("", pylock)  # a job's lock may have become a bundle's pylock.toml
    whole = f"{plain.rstrip()}\n\n[tool.modelops]\n{table}"
    return parse_lock(_sealed(whole))


def _sealed(text: str) -> str:
    return f'{text}{_DIGEST_KEY}"{hashlib.sha256(text.encode()).hexdigest()}"\n'


@lru_cache(maxsize=64)  # jobs that follow each other mostly have the same one, and tomllib takes milliseconds
def parse_lock(text: str) -> Lock:
    """Read a lock from a job's record; the inverse of ``lock.text``.

    Raises
    ------
    NotALockError
        The text is no lock.
    RequestError
        It was written by a newer ModelOps.
    """
    try:
        facts = tomllib.loads(text)["tool"]["modelops"]
        if facts["format"] > FORMAT:
            raise RequestError(
                f"this lock was written by a newer ModelOps (lock format {facts['format']}, this one reads "
                f"up to {FORMAT}); upgrade modelops"
            )
        if facts["format"] > 1:  # from there on the last line tells whether it is whole
            whole, _, _ = text.rpartition(_DIGEST_KEY)
            if text != _sealed(whole):
                raise NotALockError("this is no lock of ModelOps: it was changed since it was made")
        return Lock(
            text, facts["python"], facts["implementation"], facts["platform"], facts["glibc"],
            facts.get("bundle"), facts.get("install", False),
        )  # fmt: skip
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as e:
        raise NotALockError(f"this is no lock of ModelOps: {e!r}") from e


def environment_key(lock: Lock, interpreter: Interpreter) -> EnvironmentKey:
    """Name the environment: interpreter, platform, locked packages, and the bundle where it is installed.

    Comments, order of tables and everything else about the bundle leave the key as it is, so bundles that
    differ only in code share an environment. It leads to one program: workers of two images that share a cache, whose
    Pythons are of one version and not the same program, would take each other's environments for damaged.
    """
    parts = {
        "format": KEY_FORMAT,
        "interpreter": [
            interpreter.implementation,
            interpreter.version,
            interpreter.abi,
            interpreter.platform,
            interpreter.executable,
            interpreter.mark,
        ],
        "packages": lock.packages,
        "bundle": lock.bundle_digest,
        "install": lock.install,
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str).encode()
    tag = "".join(
        c for c in f"{interpreter.implementation}{interpreter.python_version}" if c.isalnum() or c == "."
    )
    return EnvironmentKey(f"{tag}-{hashlib.sha256(canonical).hexdigest()[:32]}")


def listed_hashes(requirements: str) -> dict[str, set[str]]:
    """Return the SHA-256 hashes that a requirements file lists, by canonical package name."""
    listed: dict[str, set[str]] = {}
    for line in re.sub(r"\\\s*\n", " ", requirements).splitlines():
        name = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
        if name and (hashes := _HASHED.findall(line)):
            listed.setdefault(canonicalize_name(name[1]), set()).update(h.lower() for h in hashes)
    return listed


def check_hashes(what: str, pylock: str, listed: dict[str, set[str]], *, required: bool) -> None:
    """Refuse a resolution whose files do not have the hashes that ``requirements.txt`` lists.

    uv's resolver takes hashes from the index and does not compare them with those in its input, so a file
    that was exchanged on the index would enter the lock unseen.

    Raises
    ------
    ResolutionError
        A package has no file with a listed hash, or (``required``) has no listed hash at all.
    """
    for package in tomllib.loads(pylock).get("packages", []):
        name = canonicalize_name(package["name"])
        if name not in listed:
            if required:
                raise ResolutionError(what, f"hashes are required, and {what} lists none for {name}")
            continue
        files = [*package.get("wheels", []), *filter(None, [package.get("sdist"), package.get("archive")])]
        found = set(map(_sha256, files))
        if not found & listed[name]:
            raise ResolutionError(
                what,
                f"hash mismatch for {name}=={package.get('version', '?')}: {what} lists "
                f"{', '.join(sorted(listed[name]))}; the index offers {', '.join(sorted(found))}",
            )


def keep_listed_files(pylock: str, listed: dict[str, set[str]]) -> str:
    """Return the pylock without the wheels and sdists whose hash is not listed."""
    document = tomllib.loads(pylock)
    for package in document.get("packages", []):
        allowed = listed.get(canonicalize_name(package["name"]), set())
        kept = [w for w in package.get("wheels", []) if _sha256(w) in allowed]
        package.pop("wheels", None)
        if kept:
            package["wheels"] = kept
        if "sdist" in package and _sha256(package["sdist"]) not in allowed:
            del package["sdist"]
    packages = document.pop("packages", [])
    lines = [f"{key} = {_toml(value)}" for key, value in document.items()]
    for package in packages:
        lines += ["", "[[packages]]", *(f"{key} = {_toml(value)}" for key, value in package.items())]
    return "\n".join(lines) + "\n"


def _sha256(file: dict[str, Any]) -> str:
    return str(file.get("hashes", {}).get("sha256", "")).lower()


def _toml(value: Any) -> str:
    """Write a value of a pylock inline; such files hold nothing else than these types."""
    match value:
        case bool() | int() | float() | str():
            # JSON's escapes are TOML's, except that TOML knows no surrogate pairs and escapes DEL.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case datetime.date() | datetime.time():
            return value.isoformat()
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return "{ " + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + " }"
        case _:
            raise TypeError(f"no TOML for {value!r}")
