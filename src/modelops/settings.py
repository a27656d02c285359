"""Settings, each from one place: a flag, else the environment, else ``config.toml``, else a default.

A value is looked at when it is asked for, so a wrong one is told to those who need it and stops nobody else.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from modelops.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from modelops.study.pools import Aliases, Membership

T = TypeVar("T")
D = TypeVar("D")

CONFIG: Final = "config.toml"
NAMES: Final = (
    "server",
    "token",
    "database",
    "storage",
    "scheduler",
    "tls",
    "workers",
    "host",
    "port",
    "allowed_hosts",
    "http_port",
    "tls_cert",
    "tls_key",
    "ca",
    "pool",
    "pool_labels",
    "pool_aliases",
)
SECRET: Final = frozenset({"token", "database"})  # a URL of a database may hold a password
OTHERS_MAY_READ: Final = 0o077
_NO_URL: Final = re.compile(r"[\s\x00-\x1f\x7f]")  # `urlsplit` leaves some of these out in silence
TLS_FILES: Final = ("ca.pem", "cert.pem", "key.pem")
TLS_FILES_OF_SECRETS: Final = (
    "ca.crt",
    "tls.crt",
    "tls.key",
)  # the keys of a Secret of type kubernetes.io/tls


@dataclass(frozen=True)
class Setting:
    """A value as it was written, and where."""

    value: Any
    where: str


@dataclass(frozen=True)
class Settings:
    """What a command was told.

    Parameters
    ----------
    environ
        The environment variables, ``MODELOPS_<NAME>``.
    flags
        Options of the command; None means "not given".
    config
        What ``config.toml`` says.
    config_file
        Its path, for messages.
    """

    environ: Mapping[str, str] = field(repr=False)
    flags: Mapping[str, Any] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    config_file: Path

    @classmethod
    def read(cls, environ: Mapping[str, str], **flags: Any) -> Settings:
        """Read the configuration file, if there is one.

        Raises
        ------
        RequestError
            It is not TOML, has a name that is no setting, or holds a token and can be read by others.
        """
        path = config_file(environ)
        return cls(environ, flags, _read(path), path)

    def found(self, name: str) -> Setting | None:
        """Return a setting as it was written, None if nobody wrote it."""
        if self.flags.get(name) is not None:
            flag = "pool-label" if name == "pool_labels" else name.replace("_", "-")
            return Setting(self.flags[name], f"--{flag}")
        variable = f"MODELOPS_{name.upper()}"
        if self.environ.get(variable, "").strip():
            return Setting(self.environ[variable].strip(), f"the environment variable {variable}")
        if name in self.config:
            return Setting(self.config[name], f"{name} in {self.config_file}")
        return None

    @property
    def server(self) -> str | None:
        """The URL of a server on another machine, None for the one of this machine."""
        return self._parsed("server", server_url, None)

    @property
    def token(self) -> str | None:
        """The token for `server`, or the one that a server started by hand asks for."""
        return self._parsed("token", _token, None)

    @property
    def database(self) -> str | None:
        """The SQLAlchemy URL of the database, None for the one in the home."""
        return self._parsed("database", _database_url, None)

    @property
    def storage(self) -> str | None:
        """The folder or URL of object storage, None for the one in the home."""
        return self._parsed("storage", _storage, None)

    @property
    def scheduler(self) -> str | None:
        """The address of a Dask scheduler, ``tls://host:port``; None for the one of this home."""
        return self._parsed("scheduler", _scheduler_address, None)

    @property
    def tls(self) -> Path | None:
        """The folder of ``ca.pem``, ``cert.pem`` and ``key.pem``; None if no setting names one."""
        return self._parsed("tls", _tls_folder, None)

    @property
    def https(self) -> tuple[Path, Path] | None:
        """The files of the certificate and the key with which a server speaks HTTPS; None: it speaks HTTP."""
        found = {name: self._parsed(name, _file, None) for name in ("tls_cert", "tls_key")}
        cert, key = found.values()
        if cert is not None and key is not None:
            return cert, key
        for name, path in found.items():
            if path is not None:
                other = "tls_key" if name == "tls_cert" else "tls_cert"
                raise RequestError(f"{name} = {path} needs {other} as well: the certificate and its key")
        return None

    @property
    def ca(self) -> Path | None:
        """The file of the authority that signed a server's certificate; None: those that this machine trusts."""
        return self._parsed("ca", _file, None)

    @property
    def workers(self) -> int:
        """How many worker processes; by default one for each core that may be used."""
        return self._parsed("workers", _whole(1, 10_000), usable_cores())

    @property
    def host(self) -> str:
        """The host name or address that a server or scheduler listens on."""
        return self._parsed("host", _host, "127.0.0.1")

    @property
    def port(self) -> int | None:
        """The port that a server or scheduler listens on, None for any free one."""
        return self._parsed("port", _whole(0, 65_535), None)

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """The names by which clients may call the server, besides the one it listens on; ``*`` is any."""
        return self._parsed("allowed_hosts", _names, ())

    @property
    def http_port(self) -> int | None:
        """The port where a scheduler or worker says how it is; None: a scheduler takes any, a worker says nothing."""
        return self._parsed("http_port", _whole(0, 65_535), None)

    @property
    def membership(self) -> Membership:
        """The pool that workers are in, with its labels."""
        from modelops.study.pools import Membership  # with it comes all that makes a study

        return Membership(self._parsed("pool", _pool, ""), self._parsed("pool_labels", _labels, {}))

    @property
    def pool_aliases(self) -> Aliases:
        """Which names of pools mean the same: a table of ``config.toml``, or a TOML file that has nothing else."""
        from modelops.study.pools import NO_ALIASES, Aliases

        setting = self.found("pool_aliases")
        if setting is None:
            return NO_ALIASES
        if isinstance(setting.value, dict):
            return Aliases.of_table(setting.value, setting.where)
        path = Path(self._parsed("pool_aliases", _text, "")).expanduser()
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise RequestError(f"{setting.where}: {path} is not TOML: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{setting.where}: {path} cannot be read: {error}") from None
        return Aliases.of_table(table, str(path))

    def _parsed(self, name: str, parse: Callable[[Any], T], default: D) -> T | D:
        setting = self.found(name)
        if setting is None:
            return default
        try:
            return parse(setting.value)
        except ValueError as error:
            shown = "" if name in SECRET else f" is {setting.value!r}"
            raise RequestError(f"{setting.where}{shown}: {error}") from None


def home_folder(environ: Mapping[str, str]) -> Path | None:
    """Return the folder that ``MODELOPS_HOME`` names, None if it does not. Raises RequestError if it can name none."""
    given = environ.get("MODELOPS_HOME")
    if not given:
        return None
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError:
        raise RequestError(
            f"MODELOPS_HOME is {given!r}: there is no user of that name here; write the path of a folder"
        ) from None


def config_file(environ: Mapping[str, str]) -> Path:
    """Return where the configuration lies: in ``MODELOPS_HOME``, else in the XDG folder for configuration."""
    if (home := home_folder(environ)) is not None:
        return home / CONFIG
    given = environ.get("XDG_CONFIG_HOME", "")
    base = Path(given) if given.startswith("/") else Path(environ.get("HOME") or Path.home()) / ".config"
    return base / "modelops" / CONFIG


def usable_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            config = tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{path} is not TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None
    for name in config:
        if name not in NAMES:
            raise RequestError(f"{path}: there is no setting {name!r}; there are {', '.join(NAMES)}")
    if SECRET & config.keys() and mode & OTHERS_MAY_READ:
        raise RequestError(f"{path} holds a secret and others can read it: chmod 600 {path}")
    return config


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it must be text")
    return value.strip()


def server_url(value: Any) -> str:
    """Return the URL of a server, without a slash at its end. Raises ValueError, with what it must be."""
    text = _text(value)
    wrong = ValueError("it must be a URL such as https://modelops.example.org")
    try:
        url = urlsplit(text)
    except ValueError:  # half an IPv6 address
        raise wrong from None
    if _port_of(url.netloc) == 0:
        raise ValueError("its port must not be 0")
    if url.scheme not in ("http", "https") or url.query or url.fragment or _NO_URL.search(text):
        raise wrong
    if not _is_host(url.hostname or ""):
        raise wrong
    return text.rstrip("/")


def _is_host(name: str) -> bool:
    """Say whether this can be looked up: an IP address, or a name whose parts are as DNS allows them."""
    if ":" in name:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
    parts = name.removesuffix(".").split(".")
    return all(0 < len(part) <= 63 and all(c.isalnum() or c in "-_" for c in part) for part in parts)


def _token(value: Any) -> str:
    text = _text(value)
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a token has only printable ASCII characters and no spaces")
    return text


def _database_url(value: Any) -> str:
    text = _text(value)
    if "://" not in text:
        raise ValueError(
            "it must be a URL such as postgresql+psycopg://user@host/name or sqlite:////path/to/modelops.db"
        )
    kind, _, path = text.partition(":///")
    if kind.startswith("sqlite") and path and not path.startswith(("/", ":")):
        raise ValueError(  # a server in the background has another current folder
            f"it must have the whole path of the file, behind a fourth slash: {kind}:////path/to/{Path(path).name}"
        )
    return text


def _storage(value: Any) -> str:
    text = _text(value)
    if "://" in text:
        return text
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise ValueError("it must be a URL such as s3://bucket/folder, or the whole path of a folder")
    return str(path)


def _scheduler_address(value: Any) -> str:
    text = _text(value)
    scheme, separator, rest = text.partition("://")
    if scheme != "tls" or not separator or not _port_of(rest):
        raise ValueError("it must be an address such as tls://scheduler.example.org:8786")
    return text


def _port_of(netloc: str) -> int | None:
    try:
        return urlsplit(f"//{netloc}").port
    except ValueError:
        raise ValueError("its port must be a number up to 65535") from None


def tls_files(folder: Path) -> tuple[Path, Path, Path]:
    """Return the authority's certificate, the own one and its key in a folder, by whichever names it has them."""
    of_secret = (folder / TLS_FILES_OF_SECRETS[1]).exists() and not (folder / TLS_FILES[1]).exists()
    ca, cert, key = TLS_FILES_OF_SECRETS if of_secret else TLS_FILES
    return folder / ca, folder / cert, folder / key


def _tls_folder(value: Any) -> Path:
    folder = Path(_text(value)).expanduser().absolute()
    missing = [path.name for path in tls_files(folder) if not path.is_file()]
    if missing:
        raise ValueError(f"that folder has no {' and no '.join(missing)}")
    return folder


def _file(value: Any) -> Path:
    path = Path(_text(value)).expanduser().absolute()
    if not path.is_file():
        raise ValueError("there is no such file")
    return path


def _whole(lowest: int, highest: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, str) and value.strip().isdecimal() and value.isascii():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise ValueError(f"it must be a whole number from {lowest} to {highest}")
        return value

    return parse


def _host(value: Any) -> str:
    text = _text(value)
    if not all(c.isalnum() or c in ".-:_%" for c in text):
        raise ValueError("it must be a host name or an address, without a port")
    return text


def _pool(value: Any) -> str:
    from modelops.study.pools import checked_name

    try:
        return checked_name("", _text(value))
    except RequestError as error:
        raise ValueError(str(error).strip()) from None


def _labels(value: Any) -> dict[str, str]:
    from modelops.study.pools import checked_labels

    texts = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise ValueError("it must be labels such as region=eu, separated by commas")
    try:
        return checked_labels(texts)
    except RequestError as error:
        raise ValueError(str(error)) from None


def _names(value: Any) -> tuple[str, ...]:
    names = value.replace(",", " ").split() if isinstance(value, str) else value
    if names in (["*"], ("*",)):
        return ("*",)  # what asks for a token is enough: behind a proxy, or where names are not known
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise ValueError("it must be host names, separated by commas")
    return tuple(_host(name) for name in names)
