"""Where the data lives: one setting, ``MODELOPS_HOME``, or the XDG directories.

Only entry points call `Home.from_environ`; everything else is handed paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Home:
    """The folders of one user on one machine. Nothing is created until it is needed.

    ``data``: database and objects, kept. ``cache``: environments, snapshots and locks, can be rebuilt.
    ``state``: spools and logs of workers.
    """

    data: Path
    cache: Path
    state: Path

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Home:
        """Read ``MODELOPS_HOME``, else the XDG base directories (freedesktop.org, version 0.8)."""
        if home := environ.get("MODELOPS_HOME"):
            return cls.at(Path(home))
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
        """The SQLAlchemy URL of the default database."""
        return f"sqlite:///{self.data / 'modelops.db'}"

    @property
    def objects(self) -> Path:
        """The folder of the default object storage."""
        return self.data / "objects"
