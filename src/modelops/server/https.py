"""The certificate by which a server speaks HTTPS, read again when its files have changed: nothing need be restarted."""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING, Final

from modelops.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

LOOK_EVERY_S: Final = 10.0
log = logging.getLogger(__name__)


class Certificate:
    """A certificate and its key, from two files. ``context``: for connections; new ones get what was read last.

    Raises
    ------
    RequestError
        They are no certificate and its key.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._mark = self._read_mark()
        try:
            self.context = self._load()
        except (OSError, ssl.SSLError) as error:
            raise RequestError(f"{cert} and {key} are no certificate and its key: {error}") from error
        self._refused: object = None

    def look(self) -> bool:
        """Read the files if they have changed since; say whether new connections get what is new.

        What does not fit, one of both being written just now perhaps, is looked at again, and told once.
        """
        mark = self._read_mark()
        if mark == self._mark:
            return False
        try:
            self._load()  # apart: what fails half-way must not end up in what is used
            self.context.load_cert_chain(self._cert, self._key)
        except (OSError, ssl.SSLError) as error:
            if mark != self._refused:
                self._refused = mark
                log.warning(
                    "%s and %s were changed, and are no certificate and its key; the one before is used: %s",
                    self._cert, self._key, error,
                )  # fmt: skip
            return False
        self._mark = mark
        log.info("the certificate %s was read again", self._cert)
        return True

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._cert, self._key)
        return context

    def _read_mark(self) -> object:
        """Return what differs when the files do. A Secret of Kubernetes is replaced by another folder behind a link."""
        try:
            stats = [path.stat() for path in (self._cert, self._key)]
        except OSError as error:
            return str(error)
        return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]
