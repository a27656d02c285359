"""A service over SQLite and a folder, and its application behind a real uvicorn."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from http_service import MODEL, PYPROJECT, Archive, Client, Drivers, serving

from modelops.bundles import pack_bundle
from modelops.home import Home
from modelops.server.service import JobService
from modelops.store import Objects, Records

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def server_home(tmp_path: Path) -> Home:
    return Home.at(tmp_path / "server")


@pytest.fixture
def drivers() -> Drivers:
    return Drivers()


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty database, migrated once for all tests, which takes a third of a second."""
    home = Home.at(tmp_path_factory.mktemp("new"))
    Records.open(home.database_url).close()
    return home.data / "modelops.db"


@pytest.fixture
def service(server_home: Home, drivers: Drivers, new_database: Path) -> Iterator[JobService]:
    server_home.data.mkdir(parents=True)
    shutil.copy(new_database, server_home.data)
    with contextlib.closing(Records.open(server_home.database_url)) as records:
        yield JobService(records, Objects.open(server_home.objects), server_home, drivers)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Return a small bundle, packed as a client packs it."""
    folder = tmp_path_factory.mktemp("bundles") / "mymodel"
    folder.mkdir()
    table = 'model = "model:simulate"\naggregate = "model:summarize"'
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name="mymodel", table=table, dependencies=""))
    (folder / "model.py").write_text(MODEL)
    packed = io.BytesIO()
    return Archive(pack_bundle(folder, packed), packed.getvalue())


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
