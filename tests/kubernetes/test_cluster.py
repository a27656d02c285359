"""The local overlay, as an operator applies it: a job from outside gives what it gives on a laptop."""

from __future__ import annotations

import functools
import http.server
import os
import platform
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from tests.kubernetes.conftest import OVERLAY, ROOT, dry_run, rendered

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kubernetes.conftest import Cluster

DEMO = ROOT / "bundles/boarding_school_flu"
PARTS = ("deployment/modelops-server", "deployment/modelops-worker")
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_server_accepts_every_overlay(overlay: str, cluster: Cluster) -> None:
    dry_run(rendered(ROOT / "k8s/overlays" / overlay))


def test_checkov_has_nothing_to_say_that_is_not_explained() -> None:
    done = subprocess.run(["make", "k8s-check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [*(ROOT / "k8s/overlays" / overlay for overlay in OVERLAYS), OVERLAY]
    assert done.stdout.count("Failed checks: 0") == len(folders)
    for folder in folders:
        for manifest in rendered(folder):
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


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


def wheels_for(version: str, folder: Path) -> None:
    """Download what the demo needs, compiled for an interpreter of this version."""
    wanted = tomllib.loads((DEMO / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    machines = [f"--platform=manylinux{of}_{platform.machine()}" for of in ("2014", "_2_28")]
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
            f"--python-version={version}", *machines, "-d", str(folder), *wanted,
        ],
        check=True,
    )  # fmt: skip


@pytest.fixture
def index(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let pods that reach no package index find on this machine what the demo needs, and this machine as well."""
    if (address := os.environ.get("MODELOPS_TEST_ADDRESS")) is None:
        yield  # they have an index
        return
    script = "import sys; print(*sys.version_info[:2], sep='.')"
    pod = cluster.kubectl("exec", "deploy/modelops-worker", "--", "python", "-c", script).strip()
    for version in {pod, "{}.{}".format(*sys.version_info)}:
        wheels_for(version, tmp_path)
    for wheel in tmp_path.glob("*.whl"):
        name = re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()
        (tmp_path / "simple" / name).mkdir(parents=True, exist_ok=True)
        with (tmp_path / "simple" / name / "index.html").open("a", encoding="utf-8") as page:
            page.write(f'<a href="../../{wheel.name}">{wheel.name}</a>\n')
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer((address, 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        url = f"http://{address}:{server.server_port}/simple"
        monkeypatch.setenv("UV_DEFAULT_INDEX", url)
        try:
            cluster.kubectl("set", "env", *PARTS, f"UV_DEFAULT_INDEX={url}")
            cluster.ready()
            yield
        finally:
            cluster.kubectl("set", "env", *PARTS, "UV_DEFAULT_INDEX-")
            server.shutdown()
            serving.join()
    cluster.ready()


@pytest.mark.usefixtures("index")
def test_the_demo_with_its_compiled_packages_gives_what_it_gives_here(
    cluster: Cluster, tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    with cluster.forwarded():
        cluster.modelops("run", str(DEMO), "--out", str(there), "--quiet")
        cluster.modelops("run", str(DEMO), "--out", str(here), "--quiet", "--workers", "1")
    for name in ("replicates.parquet", "aggregates.parquet"):
        assert pq.read_table(there / name).equals(pq.read_table(here / name)), name
    replicates = pq.read_table(there / "replicates.parquet")
    assert (replicates.num_rows, set(replicates["status"].to_pylist())) == (4_000, {"succeeded"})
