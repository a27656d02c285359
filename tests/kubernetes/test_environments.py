"""A pod that cannot build a job's environment gets no work of it, and the job's story says why."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from tests.kubernetes.conftest import OVERLAY, apply, kubectl, rendered, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.kubernetes.conftest import Cluster

TOLD_WITHIN_S = 60.0
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


@pytest.fixture
def cut_off(equipped: Cluster) -> Iterator[str]:
    """Add a worker that finds no index under the index's name, and shares no cache; the name of its pod."""
    manifests = rendered(OVERLAY)
    (worker,) = (
        m for m in manifests if (m["kind"], m["metadata"]["name"]) == ("Deployment", "modelops-worker")
    )
    mine: dict[str, Any] = copy.deepcopy(worker)
    mine["metadata"]["name"] = CUT_OFF
    for labels in (mine["spec"]["selector"]["matchLabels"], mine["spec"]["template"]["metadata"]["labels"]):
        labels["test"] = "cut-off"
    pod = mine["spec"]["template"]["spec"]
    pod["hostAliases"] = [{"ip": "127.0.0.1", "hostnames": ["test-index"]}]
    pod["volumes"].append({"name": "own", "emptyDir": {}})
    (cache,) = (m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"].endswith("/cache"))
    cache["name"] = "own"
    del cache["subPath"]
    try:
        apply([mine])
        equipped.ready(CUT_OFF)
        name = "{.items[*].metadata.name}"
        yield kubectl("-n", "modelops", "get", "pods", "-l", "test=cut-off", "-o", f"jsonpath={name}")
    finally:
        kubectl("-n", "modelops", "delete", "deployment", CUT_OFF)


def test_a_pod_without_an_index_says_so_within_a_minute_and_others_do_the_work(
    equipped: Cluster, cut_off: str, tmp_path: Path
) -> None:
    (tmp_path / "needy.py").write_text(BUNDLE)
    with equipped.forwarded():
        job = equipped.submit(tmp_path / "needy.py", "-p", "p=1", "-n", str(N))
        began = time.monotonic()

        def told() -> list[str]:
            return [event["text"] for event in equipped.events(job) if event["kind"] == "worker_unfit"]

        wait_for(told, "the job's story tells of the pod")
        assert time.monotonic() - began < TOLD_WITHIN_S
        assert f"on {cut_off}: the package index was not reachable" in told()[0]
        assert equipped.ended(job) == "succeeded"
        equipped.modelops("jobs", "sync", job, str(tmp_path / "out"))
    attempts = pq.read_table(tmp_path / "out/results/attempts.parquet")
    assert (attempts.num_rows, set(attempts["attempt_number"].to_pylist())) == (N, {1})
    assert cut_off not in attempts["host"].to_pylist()
