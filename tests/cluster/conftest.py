"""One embedded cluster for the tests that only need some cluster; each test has its own jobs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from modelops.cluster.embedded import EmbeddedCluster
from modelops.home import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[EmbeddedCluster]:
    """Two workers with one slot each, and a home of their own."""
    root = tmp_path_factory.mktemp("cluster-home")
    (root / "cache").symlink_to(shared_cache)
    with EmbeddedCluster(Home.at(root), n_workers=2) as started:
        yield started


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Collect what ModelOps warns of in this process.

    Not ``caplog``: a `LocalCluster` sets the level of the handlers that pytest hangs on Dask's logger, and
    these are the ones of ``caplog``.
    """

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    collector = Collector(logging.WARNING)
    logging.getLogger("modelops").addHandler(collector)
    yield messages
    logging.getLogger("modelops").removeHandler(collector)
