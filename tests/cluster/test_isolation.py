"""The three isolations give the same results; what one replicate leaves behind, the next must not see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import modelops as mo
from modelops.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.cluster.embedded import EmbeddedCluster

LEAKY = """
import os
calls = 0
def simulate(params, seed):
    global calls
    calls += 1
    os.environ["LEAK"] = "1"
    if seed == 3:
        os._exit(7)
    return {"seen": calls}
"""
THREADED = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
def simulate(params, seed):
    return {"seed": seed}
"""


@pytest.mark.parametrize("isolation", ["fork", "spawn"])
def test_a_replicate_sees_nothing_of_the_one_before(
    isolation: str, cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    study = mo.Study(
        bundle=write_bundle(LEAKY), parameters=[{"a": 1}], seeds=list(range(6)), isolation=isolation
    )
    job = mo.run(study, cluster=cluster)
    assert job.status().state == JobState.PARTIAL
    assert job.results()["seen"].to_pylist() == [1, 1, 1, None, 1, 1]
    (failure,) = job.failures().to_pylist()
    assert (failure["status"], failure["seed"]) == ("crashed", 3)
    assert "exit code 7" in failure["message"]


def test_where_forking_is_unsafe_the_job_spawns_and_says_why(
    cluster: EmbeddedCluster, write_bundle: Callable[..., Path]
) -> None:
    study = mo.Study(bundle=write_bundle(THREADED), parameters=[{"a": 1}], seeds=[5, 6, 7], isolation="fork")
    job = mo.run(study, cluster=cluster)
    assert job.status().state == JobState.SUCCEEDED
    assert job.results()["seed"].to_pylist() == [5, 6, 7]
    assert any("fork" in event.text and "spawn" in event.text for event in job.events())
