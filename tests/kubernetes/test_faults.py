"""While a job runs, pods, the database and the node go away: it ends with the right results every time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from tests.kubernetes.conftest import kubectl, wait_for
from tests.kubernetes.slow_job import N, Running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.kubernetes.conftest import Cluster

SLOTS = 2  # of a worker pod of the local overlay
GRACE_S = 60.0  # terminationGracePeriodSeconds of k8s/base/worker.yaml


@pytest.fixture
def running(equipped: Cluster, tmp_path: Path) -> Iterator[Running]:
    equipped.scale(1)
    yield Running(equipped, tmp_path)
    equipped.scale(1)


def delete(pod: str, *options: str) -> None:
    kubectl("-n", "modelops", "delete", pod, *options)


def test_a_worker_that_ends_gracefully_costs_what_is_in_flight_and_no_retry(
    running: Running, equipped: Cluster
) -> None:
    (worker,) = equipped.pods("worker")
    began = time.monotonic()
    delete(worker)  # returns when it has ended
    assert time.monotonic() - began < GRACE_S
    equipped.ready()
    running.goes_on()
    attempts = running.attempts()
    assert set(attempts["attempt_number"].to_pylist()) == {1}
    assert attempts.num_rows == 2 * N, "no replicate came to an end twice"
    # What was printed on the pod that is gone is there as well.
    assert 2 * N <= running.n_begun() <= 2 * N + SLOTS


def kill_a_worker(cluster: Cluster) -> None:
    delete(cluster.pods("worker")[0], "--grace-period=0", "--force")
    wait_for(lambda: len(cluster.pods("worker")) == 1, "there is another worker")


def delete_the_scheduler(cluster: Cluster) -> None:
    delete(*cluster.pods("scheduler"))


def delete_the_server(cluster: Cluster) -> None:
    delete(*cluster.pods("server"))


def restart_postgresql(cluster: Cluster) -> None:
    delete(*cluster.pods("test-postgres"))
    kubectl("-n", "modelops", "rollout", "status", "statefulset/test-postgres", "--timeout=120s")


@pytest.mark.parametrize(
    "happens", [kill_a_worker, delete_the_scheduler, delete_the_server, restart_postgresql]
)
def test_a_job_ends_with_the_right_results(
    happens: Callable[[Cluster], None], running: Running, equipped: Cluster
) -> None:
    happens(equipped)
    equipped.ready()
    running.goes_on()
    attempts = running.attempts()
    assert set(attempts["attempt_number"].to_pylist()) == {1}, "nobody's fault, so no retry"


def test_a_job_uses_the_pods_that_come_and_goes_on_when_they_go(equipped: Cluster, tmp_path: Path) -> None:
    equipped.scale(1)
    running = Running(equipped, tmp_path, 300)
    hosts = {pod.rpartition("/")[2] for pod in equipped.pods("worker")}
    equipped.scale(3)
    hosts |= {pod.rpartition("/")[2] for pod in equipped.pods("worker")}
    running.goes_on()
    equipped.scale(1)
    running.goes_on()
    attempts = running.attempts()
    assert set(attempts["attempt_number"].to_pylist()) == {1}
    assert (attempts.num_rows, len(hosts)) == (2 * 300, 3)
    assert set(attempts["host"].to_pylist()) == hosts, "each of the three has done something"


def test_a_drain_ends_in_time_and_what_is_finished_is_stored(running: Running, equipped: Cluster) -> None:
    (worker,) = equipped.pods("worker")
    node = kubectl("-n", "modelops", "get", worker, "-o", "jsonpath={.spec.nodeName}")
    began = time.monotonic()
    try:
        kubectl(
            "drain",
            node,
            "--pod-selector=app.kubernetes.io/component=worker",
            "--ignore-daemonsets",
            "--delete-emptydir-data",
        )
        assert time.monotonic() - began < GRACE_S
        with equipped.forwarded():
            counts = equipped.status(running.job)["counts"]
            assert counts.get("running", 0) == 0, "nobody has anything of it"
            stored = counts["succeeded"]
    finally:
        kubectl("uncordon", node)
    equipped.ready()
    attempts = running.attempts()
    assert 0 < stored <= 2 * N
    assert (attempts.num_rows, set(attempts["attempt_number"].to_pylist())) == (2 * N, {1})
    assert running.n_begun() <= 2 * N + SLOTS
    with equipped.forwarded():
        assert "worker_died" not in [event["kind"] for event in equipped.events(running.job)]
