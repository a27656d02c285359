"""One embedded cluster for the tests that only need some cluster; each test has its own jobs."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from modelops.cluster.embedded import EmbeddedCluster
from modelops.home import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def session_cluster(
    tmp_path_factory: pytest.TempPathFactory, shared_cache: Path
) -> Iterator[EmbeddedCluster]:
    """Two workers with one slot each, and a home of their own."""
    root = tmp_path_factory.mktemp("cluster-home")
    (root / "cache").symlink_to(shared_cache)
    with EmbeddedCluster(Home.at(root), n_workers=2) as started:
        yield started


@pytest.fixture
def cluster(session_cluster: EmbeddedCluster) -> Iterator[EmbeddedCluster]:
    """Lend the cluster of the session, and take it back whole.

    A worker that a test killed is started again by its nanny. Waiting for it here keeps that start out of the
    next test, which may be one that looks for processes it has left behind.
    """
    yield session_cluster
    deadline = time.monotonic() + 60
    while len(session_cluster.client.run(os.getpid, on_error="ignore")) < 2:
        assert time.monotonic() < deadline, "a killed worker was not started again"
        threading.Event().wait(0.05)
