"""A service over SQLite and a folder, and its application behind a real uvicorn."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from http_service import MODEL, Archive, Client, Drivers, serving

from modelops.bundles import pack_bundle, take_snapshot
from modelops.home import Home
from modelops.server.service import JobService
from modelops.store import Objects, Records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def server_home(tmp_path: Path) -> Home:
    return Home.at(tmp_path / "server")


@pytest.fixture
def drivers() -> Drivers:
    return Drivers()


@pytest.fixture
def service(server_home: Home, drivers: Drivers) -> Iterator[JobService]:
    with contextlib.closing(Records.open(server_home.database_url)) as records:
        yield JobService(records, Objects.open(server_home.objects), server_home, drivers)


@pytest.fixture
def archive(write_bundle: Callable[..., Path], tmp_path: Path) -> Archive:
    """Return a small bundle, packed as a client packs it."""
    table = 'model = "model:simulate"\naggregate = "model:summarize"'
    digest, snapshot = take_snapshot(write_bundle(MODEL, table=table), tmp_path / "client")
    packed = io.BytesIO()
    pack_bundle(snapshot, packed)
    return Archive(digest, packed.getvalue())


@pytest.fixture
def bundle(archive: Archive, service: JobService) -> str:
    """Return the digest of a bundle that the server has."""
    with service.uploads.receiving() as file:
        file.write(archive.data)
        file.flush()
        service.uploads.add_bundle(archive.digest, Path(file.name))
    return archive.digest


@pytest.fixture
def client(service: JobService) -> Iterator[Client]:
    with serving(service) as served:
        yield served
