"""Where the data lives: one setting, ``MODELOPS_HOME``, or the XDG directories.

Only entry points call `Home.from_environ`; everything else is handed paths.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from modelops.errors import RequestError
from modelops.settings import Settings, home_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

_DATABASE: Final = "modelops.db"
_IN_A_FILE: Final = "sqlite:///"
_LONGEST_FILE: Final = 500  # bytes of the path of a database: SQLite opens none that is a little longer


@dataclass(frozen=True)
class Home:
    """The folders of one user on one machine. Nothing is created until it is needed.

    ``data``: database and objects, kept. ``cache``: environments, snapshots and locks, can be rebuilt.
    ``state``: spools of workers, logs, and the files of running processes. ``database`` and ``objects_at``: where
    records and objects lie instead of in ``data``, if the user said so.
    """

    data: Path
    cache: Path
    state: Path
    database: str | None = field(default=None, repr=False)  # it may hold a password
    objects_at: str | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Home:
        """Read ``MODELOPS_HOME``, else the XDG base directories; and where database and objects are, if elsewhere.

        Raises
        ------
        RequestError
            What the environment or ``config.toml`` says of home, database or storage cannot be.
        """
        return cls.of(Settings.read(environ))

    @classmethod
    def of(cls, settings: Settings) -> Home:
        """Return the home that these settings name. Raises RequestError, as `from_environ`."""
        folders = cls._folders(settings.environ)
        home = replace(folders, database=settings.database, objects_at=settings.storage)
        _refuse_names(home)
        return home

    @classmethod
    def _folders(cls, environ: Mapping[str, str]) -> Home:
        """Find the folders (XDG base directory specification of freedesktop.org, version 0.8)."""
        if (home := home_folder(environ)) is not None:
            return cls.at(home)
        user = Path(environ.get("HOME") or Path.home())

        def xdg(name: str, default: str) -> Path:
            given = environ.get(name, "")
            # The specification tells us to ignore relative paths here.
            return (Path(given) if given.startswith("/") else user / default) / "modelops"

        return cls(
            xdg("XDG_DATA_HOME", ".local/share"),
            xdg("XDG_CACHE_HOME", ".cache"),
            xdg("XDG_STATE_HOME", ".local/state"),
        )

    @classmethod
    def at(cls, root: Path) -> Home:
        """Keep everything below one folder."""
        root = root.expanduser().absolute()
        return cls(root, root / "cache", root / "state")

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the database."""
        if self.database:
            return self.database
        # In a URL these two mean something; whatever else a path may hold, SQLAlchemy takes as it is.
        path = str(self.data / _DATABASE).replace("%", "%25").replace("?", "%3F")
        return f"{_IN_A_FILE}{path}"

    @property
    def database_file(self) -> Path | None:
        """The file of the database; None if it is on a server, or a URL of another form names it."""
        url = self.database_url
        if not url.startswith(_IN_A_FILE):
            return None
        return Path(unquote(url.removeprefix(_IN_A_FILE).partition("?")[0]))

    @property
    def storage(self) -> str:
        """The folder or URL of object storage."""
        return self.objects_at or str(self.objects)

    @property
    def run(self) -> Path:
        """The folder that tells which processes of this home run; only its user may look into it."""
        return self.state / "run"

    @property
    def logs(self) -> Path:
        """The folder of the logs of server, scheduler, workers and their keeper."""
        return self.state / "logs"

    @property
    def objects(self) -> Path:
        """The folder of the default object storage."""
        return self.data / "objects"


def _refuse_names(home: Home) -> None:
    """Refuse names of folders that something which is kept there cannot have. Raises RequestError."""
    for folder in (home.data, home.cache, home.state):
        if "\n" in str(folder):  # what Dask takes for a certificate itself, and not for the path of one
            raise RequestError(
                f"{str(folder)!r} can hold no data of ModelOps, as there is a line break in its name; let "
                "MODELOPS_HOME name another folder"
            )
    if home.database is None and len(os.fsencode(home.data / _DATABASE)) > _LONGEST_FILE:
        raise RequestError(
            f"{home.data} can hold no database: SQLite opens no file whose path has more than {_LONGEST_FILE} bytes; "
            "let MODELOPS_HOME name a folder with a shorter one"
        )


def refuse_no_folder(home: Home) -> None:
    """Refuse a home that neither is a folder nor can become one: else all one hears is that nothing is there.

    Raises
    ------
    RequestError
        There is a file in the place of one of its folders.
    """
    for folder in (home.data, home.cache, home.state):
        there = next((p for p in (folder, *folder.parents) if p.exists()), folder)
        if not there.is_dir():
            raise RequestError(
                f"{folder} can hold no data of ModelOps: {there} is a file; let MODELOPS_HOME name a folder, "
                "or one that can be made"
            )


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for their user only; one that exists stays as it is."""
    if folder.exists():  # nearly always; then so do those above
        return
    for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
