"""A rolling update while a job runs. The images are made of this one: `lab/next.Dockerfile`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.kubernetes.conftest import kubectl, wait_for
from tests.kubernetes.slow_job import Running

from modelops.worker.messages import PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.kubernetes.conftest import Cluster

NOW, NEXT, INCOMPATIBLE = "0.1.0", "0.1.1", "0.2.0"


@pytest.fixture
def cluster_of_now(equipped: Cluster) -> Iterator[Cluster]:
    equipped.scale(1)
    yield equipped
    for role in ("scheduler", "server", "worker"):
        roll(equipped, role, NOW)


def roll(cluster: Cluster, role: str, version: str) -> None:
    """Have a part of this version, and wait for it."""
    name = f"modelops-{role}"
    kubectl("-n", "modelops", "set", "image", f"deployment/{name}", f"{role}=localhost/modelops:{version}")
    cluster.ready(name)
    wait_for(lambda: len(cluster.pods(role)) == 1, "the one before is gone")


def skews(cluster: Cluster, job: str) -> list[str]:
    return [event["text"] for event in cluster.events(job) if event["kind"] == "version_skew"]


def test_versions_that_understand_one_another_work_together_while_they_are_rolled_out(
    cluster_of_now: Cluster, tmp_path: Path
) -> None:
    running = Running(cluster_of_now, tmp_path, 200)
    for role in ("worker", "server"):
        roll(cluster_of_now, role, NEXT)
        running.goes_on()
    attempts = running.attempts()
    assert set(attempts["attempt_number"].to_pylist()) == {1}
    with cluster_of_now.forwarded():
        assert skews(cluster_of_now, running.job) == []


def test_workers_that_a_new_server_would_not_understand_get_nothing_and_a_table_says_why(
    cluster_of_now: Cluster, tmp_path: Path
) -> None:
    running = Running(cluster_of_now, tmp_path, 200)
    roll(cluster_of_now, "server", INCOMPATIBLE)
    with cluster_of_now.forwarded():
        wait_for(lambda: skews(cluster_of_now, running.job), "the job's story tells of the versions")
        (told,) = skews(cluster_of_now, running.job)
        protocol = next(line.split() for line in told.splitlines() if line.startswith("protocol"))
        ours = str(PROTOCOL)
        assert protocol == ["protocol", "1000", ours, ours, "must", "be", "the", "same"]
        assert f"modelops     {INCOMPATIBLE}" in told
        counts = cluster_of_now.status(running.job)["counts"]
        assert counts.get("running", 0) == 0
        assert counts.get("pending", 0) > 0
    roll(cluster_of_now, "worker", INCOMPATIBLE)
    attempts = running.attempts()
    assert set(attempts["attempt_number"].to_pylist()) == {1}
