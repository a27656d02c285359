"""A pod that cannot build a job's environment gets no work of it, and the job's story says why."""

from __future__ import annotations

import contextlib
import copy
import time
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from tests.kubernetes.conftest import OVERLAY, apply, kubectl, rendered, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.kubernetes.conftest import Cluster

TOLD_WITHIN_S = 60.0
GRACE_S = 60.0  # terminationGracePeriodSeconds of k8s/base/worker
N = 100
CUT_OFF = "modelops-worker-cut-off"
BUNDLE = """# /// script
# requires-python = ">=3.9"
# dependencies = ["modelops-test-dependency==1.0"]
# [tool.modelops]
# model = "needy:simulate"
# ///
import time
import modelops_test_dependency

def simulate(params, seed):
    time.sleep(0.2)
    return {"x": modelops_test_dependency.ANSWER}
"""


@contextlib.contextmanager
def worker_cut_off(cluster: Cluster, index: str) -> Iterator[str]:
    """Have a worker that finds this under the index's name, and shares no cache; the name of its pod."""
    manifests = rendered(OVERLAY)
    (worker,) = (
        m for m in manifests if (m["kind"], m["metadata"]["name"]) == ("Deployment", "modelops-worker")
    )
    mine: dict[str, Any] = copy.deepcopy(worker)
    mine["metadata"]["name"] = CUT_OFF
    for labels in (mine["spec"]["selector"]["matchLabels"], mine["spec"]["template"]["metadata"]["labels"]):
        labels["test"] = "cut-off"
    pod = mine["spec"]["template"]["spec"]
    pod["hostAliases"] = [{"ip": index, "hostnames": ["test-index"]}]
    pod["volumes"].append({"name": "own", "emptyDir": {}})
    (cache,) = (m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"].endswith("/cache"))
    cache["name"] = "own"
    del cache["subPath"]
    try:
        apply([mine])
        cluster.ready(CUT_OFF)
        name = "{.items[*].metadata.name}"
        yield kubectl("-n", "modelops", "get", "pods", "-l", "test=cut-off", "-o", f"jsonpath={name}")
    finally:
        kubectl("-n", "modelops", "delete", "deployment", CUT_OFF)
        left = ("-n", "modelops", "get", "pods", "-l", "test=cut-off", "-o", "name")
        wait_for(lambda: not kubectl(*left), "its pod is gone")


def told(cluster: Cluster, job: str, kind: str) -> str:
    """Wait, for a minute, until the job's story has an event of this kind; its text."""
    began = time.monotonic()

    def texts() -> list[str]:
        return [event["text"] for event in cluster.events(job) if event["kind"] == kind]

    wait_for(texts, f"the job's story has {kind}")
    assert time.monotonic() - began < TOLD_WITHIN_S
    return texts()[0]


def attempts(cluster: Cluster, job: str, folder: Path) -> Any:
    """See that a job succeeds without a retry, and return what was tried."""
    assert cluster.ended(job) == "succeeded"
    cluster.modelops("jobs", "sync", job, str(folder))
    table = pq.read_table(folder / "results/attempts.parquet")
    assert (table.num_rows, set(table["attempt_number"].to_pylist())) == (N, {1})
    return table


def test_a_pod_without_an_index_says_so_within_a_minute_and_others_do_the_work(
    equipped: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "needy.py").write_text(BUNDLE)
    with worker_cut_off(equipped, "127.0.0.1") as pod, equipped.forwarded():
        job = equipped.submit(tmp_path / "needy.py", "-p", "p=1", "-n", str(N))
        assert f"on {pod}: the package index was not reachable" in told(equipped, job, "worker_unfit")
        assert pod not in attempts(equipped, job, tmp_path / "out")["host"].to_pylist()


def test_a_pod_whose_index_is_silent_says_so_within_a_minute_and_keeps_nobody_when_it_goes(
    equipped: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "needy.py").write_text(BUNDLE)
    index = kubectl("-n", "modelops", "get", "service", "test-silence", "-o", "jsonpath={.spec.clusterIP}")
    with equipped.forwarded():
        with worker_cut_off(equipped, index) as pod:
            job = equipped.submit(tmp_path / "needy.py", "-p", "p=1", "-n", str(N))
            text = told(equipped, job, "environment_slow")
            assert text.startswith(f"{pod} has needed 30 s for the environment until now;")
            began = time.monotonic()
        assert time.monotonic() - began < GRACE_S
        assert "worker_died" not in [event["kind"] for event in equipped.events(job)]
        assert pod not in attempts(equipped, job, tmp_path / "out")["host"].to_pylist()
