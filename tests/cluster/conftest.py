"""One embedded cluster for the tests that only need some cluster; each test has its own jobs."""

from __future__ import annotations

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
