"""The local overlay, as an operator applies it: a job from outside gives what it gives on a laptop."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from tests.kubernetes.conftest import ROOT, dry_run, rendered

if TYPE_CHECKING:
    from tests.kubernetes.conftest import Cluster

OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_server_accepts_every_overlay(overlay: str, cluster: Cluster) -> None:
    dry_run(rendered(ROOT / "k8s/overlays" / overlay))


def test_checkov_has_nothing_to_say_that_is_not_explained() -> None:
    done = subprocess.run(["make", "k8s-check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Failed checks: 0") == len(OVERLAYS)
    for overlay in OVERLAYS:
        for manifest in rendered(ROOT / "k8s/overlays" / overlay):
            for name, said in manifest["metadata"].get("annotations", {}).items():
                assert not name.startswith("checkov.io/skip") or re.fullmatch(r"CKV\w+=\w.*", said)


def test_a_job_from_outside_gives_what_it_gives_here(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.forwarded():
        there, here = str(tmp_path / "there"), str(tmp_path / "here")
        cluster.modelops("run", str(ROOT / "bundles/coin.py"), "--out", there, "--quiet")
        cluster.modelops("run", str(ROOT / "bundles/coin.py"), "--out", here, "--quiet", "--workers", "1")
    columns = ["param_id", "replicate", "seed", "status"]
    tables = [pq.read_table(Path(folder) / "replicates.parquet") for folder in (there, here)]
    assert tables[0].equals(tables[1])
    assert set(columns) <= set(tables[0].column_names)
    assert set(tables[0]["status"].to_pylist()) == {"succeeded"}
