"""The only page that Dask serves to those without a certificate; Dask reads ``routes`` of this module by its name."""

from __future__ import annotations

from typing import Any, Final

from distributed.http.health import HealthHandler
from distributed.http.routing import DirectoryHandler
from tornado.web import HTTPError


def _not_found(_handler: object) -> None:
    raise HTTPError(404)


routes: Final[list[tuple[str, type, dict[str, Any]]]] = [("/health", HealthHandler, {})]
# Dask adds a page that lists all pages to each of its HTTP servers, and offers no way to leave it out.
DirectoryHandler.get = _not_found  # type: ignore[method-assign]
