"""What a bundle says its targets compare with reaches them, in a job and in the author's check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import modelops as mo
from modelops.client.bundle_check import check_bundle
from modelops.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.cluster.embedded import EmbeddedCluster

WIRE = """
def wire(entrypoint, params, seed):
    return {"seed": seed}

def distance(sim_returns, target_data):
    return {"loss": target_data["boys"][1], "diagnostics": sorted(sim_returns[0])}
"""
PLAIN = """
def simulate(params, seed):
    return {"seed": seed}

def summarize(replicates, target_data):
    return {"loss": len(target_data), "seen": target_data}
"""


@pytest.mark.parametrize(
    ("file", "source", "table", "loss"),
    [
        ("wire.py", WIRE, 'model = "m/any"\ntarget = "wire:distance"\ntarget_data = "seen.json"', 8),
        ("model.py", PLAIN, 'aggregate = "model:summarize"\ntarget_data = "seen.csv"', 4),
    ],
)
def test_targets_get_the_target_data_of_their_bundle(
    file: str,
    source: str,
    table: str,
    loss: int,
    cluster: EmbeddedCluster,
    write_bundle: Callable[..., Path],
) -> None:
    model = "" if file == "wire.py" else 'model = "model:simulate"\n'
    bundle = write_bundle("", table=model + table)
    (bundle / file).write_text(source)
    (bundle / "seen.json").write_text('{"boys": [3, 8]}')
    (bundle / "seen.csv").write_bytes(b"3,8\n")
    study = mo.Study(bundle=bundle, parameters=[{"a": 1}], replicates=2)

    job = mo.run(study, cluster=cluster)

    assert job.status().state == JobState.SUCCEEDED, job.aggregate_failures().to_pylist()
    assert job.aggregates()["loss"].to_pylist() == [loss]
    (checked,) = (c for c in check_bundle(study, cluster.home) if c.name == "aggregate")
    assert checked.status == "ok", checked.message
