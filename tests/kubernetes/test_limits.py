"""Too much memory: of a replicate, which is named; of a pod as a whole, which finds the culprit."""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING

from tests.kubernetes.conftest import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.kubernetes.conftest import Cluster

HEAD = """# /// script
# requires-python = ">=3.9"
# dependencies = []
# [tool.modelops]
# model = "{name}:simulate"
# ///
"""
GREEDY = (
    HEAD.format(name="greedy")
    + """
def simulate(params, seed):
    if seed == 5:
        x = bytearray(600_000_000)
        x[::4096] = x[::4096]
    return {"x": seed}
"""
)
# As nodes with cgroup v2 do it: when the kernel ends one process of the container for its memory, it ends them all.
# With v1 it picks one, so the culprit sees to it that it is the first, with which all others end: nobody is preferred
# to that, and what fills the memory is in no process. The pod asks for much memory then: the more it asks for, the less
# its other processes are preferred, and the first one is smaller than they are.
DEADLY = (
    HEAD.format(name="deadly")
    + """
import os

def simulate(params, seed):
    if seed == 5:
        with open("/proc/1/oom_score_adj", "w") as first:
            first.write("1000")
        hoard = os.memfd_create("hoard")
        while True:
            os.write(hoard, bytes(1 << 20))
    return {"x": seed}
"""
)
SEEDS = range(12)


def failures(cluster: Cluster, job: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(cluster.modelops("jobs", "failures", job, "--json"))[
        "failures"
    ]
    return found


def submit(cluster: Cluster, bundle: Path, *options: str) -> str:
    seeds = ",".join(map(str, SEEDS))
    return cluster.submit(bundle, "-p", "p=1", "--seeds", seeds, *options)


@contextlib.contextmanager
def memory(cluster: Cluster, size: str) -> Iterator[None]:
    """Let the one pod of workers ask for so much memory, and have no more, within the block."""
    path = "{.spec.template.spec.containers[0].resources.%s.memory}"
    kinds = ("requests", "limits")
    before = [
        cluster.kubectl("get", "deployment/modelops-worker", "-o", f"jsonpath={path % kind}")
        for kind in kinds
    ]

    def have(sizes: Sequence[str]) -> None:
        said = [f"--{kind}=memory={size}" for kind, size in zip(kinds, sizes, strict=True)]
        cluster.kubectl("set", "resources", "deployment/modelops-worker", *said)
        cluster.ready("modelops-worker")
        wait_for(lambda: len(cluster.pods("worker")) == 1, "the pod before is gone")

    have([size, size])
    try:
        yield
    finally:
        have(before)


def test_a_replicate_over_its_limit_is_named_and_its_siblings_and_its_pod_go_on(
    equipped: Cluster, tmp_path: Path
) -> None:
    equipped.scale(1)
    (pod,) = equipped.pods("worker")
    before = equipped.restarts("worker")
    (tmp_path / "greedy.py").write_text(GREEDY)
    with equipped.forwarded():
        job = submit(equipped, tmp_path / "greedy.py", "--memory", "300MiB")
        assert equipped.ended(job) == "partial"
        assert equipped.status(job)["counts"] == {"succeeded": len(SEEDS) - 1, "out_of_memory": 1}
        (failure,) = failures(equipped, job)
    assert re.fullmatch(r"limit 300\.0 MiB, peak [0-9.]+ MiB", str(failure["message"]))
    assert (equipped.pods("worker"), equipped.restarts("worker")) == ([pod], before)


def test_of_a_pod_that_is_out_of_memory_as_a_whole_the_culprit_is_found_and_the_job_ends(
    equipped: Cluster, tmp_path: Path
) -> None:
    equipped.scale(1)
    (tmp_path / "deadly.py").write_text(DEADLY)
    with memory(equipped, "2Gi"), equipped.forwarded():
        job = submit(equipped, tmp_path / "deadly.py")
        assert equipped.ended(job) == "partial"
        assert equipped.status(job)["counts"] == {"succeeded": len(SEEDS) - 1, "crashed": 1}
        (failure,) = failures(equipped, job)
        deaths = [event["text"] for event in equipped.events(job) if event["kind"] == "worker_died"]
        assert "took its worker down 3 times" in str(failure)
        assert len(deaths) >= 3
        last = "{.items[*].status.containerStatuses[*].lastState.terminated.reason}"
        pods = ("get", "pods", "-l", "app.kubernetes.io/component=worker", "-o", f"jsonpath={last}")
        assert "OOMKilled" in equipped.kubectl(*pods)
