"""The production overlay with a second pool, applied: PostgreSQL and S3 by address, TLS throughout, two servers.

Database and storage are on this machine. MODELOPS_TEST_ADDRESS says by which address the cluster's pods reach it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hosts_lab
import pytest
import yaml  # type: ignore[import-untyped]  # it has no types
from tests.kubernetes.conftest import (
    COMMAND,
    DEADLINE_S,
    ROOT,
    Cluster,
    apply,
    kubectl,
    rendered,
    secret,
    secrets_of,
    wait_for,
)
from tests.kubernetes.slow_job import Running

from modelops.cluster.certificates import create_certificates

if TYPE_CHECKING:
    from collections.abc import Iterator


NAMESPACE = "modelops-production"
OURS = Path(__file__).with_name("production")
OTHER = "modelops-worker-eu-west"
COMMENTED_OUT = "  # - ../../components/pool"
TRUSTED = "/etc/modelops/tls/ca.crt"  # in every pod


@dataclass(frozen=True)
class ThisMachine:
    """A host that is no other one."""

    address: str

    def inside(self, *command: str) -> list[str]:
        return list(command)


def overlay(folder: Path, settings: dict[str, str]) -> Path:
    """Do what k8s/README.md says an operator does, in a copy: list the pool, change what is marked CHANGE."""
    mine = Path(shutil.copytree(ROOT / "k8s", folder / "k8s"))
    file = mine / "overlays/production/kustomization.yaml"
    text = file.read_text("utf-8")
    assert text.count(COMMENTED_OUT) == 1
    file.write_text(text.replace(COMMENTED_OUT, COMMENTED_OUT.replace("# ", "")), "utf-8")
    ours = Path(shutil.copytree(OURS, mine / "overlays/for-tests"))
    whole = yaml.safe_load((ours / "kustomization.yaml").read_text("utf-8"))
    literals = [f"{name}={value}" for name, value in settings.items()]
    whole["configMapGenerator"] = [{"name": "modelops-config", "behavior": "merge", "literals": literals}]
    (ours / "kustomization.yaml").write_text(yaml.safe_dump(whole), "utf-8")
    return ours


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("production") / "certs"


@pytest.fixture(scope="module")
def production(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if "KUBECONFIG" not in os.environ:
        pytest.fail("KUBECONFIG names no cluster")
    if (address := os.environ.get("MODELOPS_TEST_ADDRESS")) is None:
        pytest.skip("MODELOPS_TEST_ADDRESS does not say by which address pods reach this machine")
    if not hosts_lab.INSTALLED:
        pytest.skip("there is no PostgreSQL that speaks TLS; on Debian: apt-get install postgresql")
    folder = tmp_path_factory.mktemp("production")
    create_certificates(certs, ["modelops-server", "modelops-scheduler", address])
    here = ThisMachine(address)
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(hosts_lab.Postgres(here, certs / "server"))
        storage = stack.enter_context(hosts_lab.S3(here, certs / "server"))
        url = database.url(certs / "server" / "ca.pem").replace(str(certs / "server" / "ca.pem"), TRUSTED)
        keys = {k: v for k, v in storage.environ.items() if k.startswith(("AWS_ACCESS", "AWS_SECRET"))}
        settings = {
            "MODELOPS_STORAGE": f"{storage.url}/pool",
            "AWS_REGION": storage.environ["AWS_REGION"],
            "AWS_ENDPOINT_URL": storage.environ["AWS_ENDPOINT_URL"],
            "SSL_CERT_FILE": TRUSTED,  # the storage's certificate is of the pool's authority as well
        }
        manifests = rendered(overlay(folder, settings))
        for manifest in manifests:  # beside the local overlay
            if manifest["kind"] == "Namespace":
                manifest["metadata"]["name"] = NAMESPACE
            else:
                manifest["metadata"]["namespace"] = NAMESPACE
        secrets = [
            *secrets_of(certs, NAMESPACE),
            secret("modelops-database", NAMESPACE, url=url),
            secret("modelops-storage", NAMESPACE, **keys),
        ]
        found = Cluster(folder / "home", NAMESPACE, certs / "client" / "ca.pem")
        stack.callback(kubectl, "delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=false")
        apply([m for m in manifests if m["kind"] == "Namespace"])
        apply(secrets)
        apply(manifests)
        node_cache_is_ready(found)
        found.ready()
        found.ready(OTHER)
        yield found


def pods_of(cluster: Cluster, pool: str) -> set[str]:
    found = cluster.kubectl("get", "pods", "-l", f"modelops.dev/pool={pool}", "-o", "name")
    return {name.rpartition("/")[2] for name in found.split()}


def node_cache_is_ready(cluster: Cluster) -> None:
    cluster.kubectl("rollout", "status", "daemonset/modelops-node-cache", f"--timeout={DEADLINE_S:g}s")


def test_when_the_server_that_drives_a_job_dies_the_other_one_goes_on(
    production: Cluster, tmp_path: Path
) -> None:
    assert len(production.pods("server")) == 2
    running = Running(production, tmp_path)
    with production.forwarded():
        (taken,) = (e for e in production.events(running.job) if e["kind"] == "lease_taken")
    first = taken["who"].partition(":")[0]
    production.kubectl("delete", "pod", first, "--grace-period=0", "--force")
    running.goes_on()
    assert set(running.attempts()["attempt_number"].to_pylist()) == {1}
    with production.forwarded():
        owners = [e["who"] for e in production.events(running.job) if e["kind"] == "lease_taken"]
    assert len(owners) > 1
    assert not owners[-1].startswith(first)


def test_a_job_runs_in_the_pool_it_asks_for_and_says_of_which_there_is_no_worker(
    production: Cluster, tmp_path: Path
) -> None:
    theirs = pods_of(production, "eu-west")
    running = Running(production, tmp_path, 50, "--pool", "eu_west_1", "--pool", "nowhere")
    assert set(running.attempts()["host"].to_pylist()) <= theirs
    with production.forwarded():
        counts = {pool["name"]: pool["counts"] for pool in production.status(running.job)["pools"]}
        assert counts["eu_west_1"] == {"succeeded": 2 * 50}
        waits = [e["text"] for e in production.events(running.job) if e["kind"] == "pool_waits"]
    assert waits == ["no worker of the pool nowhere is connected"]


def test_a_job_waits_for_a_pool_without_a_pod_says_so_and_runs_when_one_comes(production: Cluster) -> None:
    def size(n: int) -> None:
        production.kubectl("scale", f"deployment/{OTHER}", f"--replicas={n}")
        wait_for(lambda: len(pods_of(production, "eu-west")) == n, f"the pool has {n} pods")

    size(0)
    try:
        with production.forwarded():
            asked = ("-p", "heads=0.5", "-p", "tosses=10", "-n", "20", "--pool", "EU")
            job = production.submit(ROOT / "bundles/coin.py", *asked)

            def waits() -> bool:
                return any(pool["waiting_since"] for pool in production.status(job)["pools"])

            wait_for(waits, "the job says that it waits")
            assert production.succeeded(job) == 0
    finally:
        size(1)
    with production.forwarded():
        assert production.ended(job) == "succeeded"
        kinds = [e["kind"] for e in production.events(job)]
    assert kinds.index("pool_waits") < kinds.index("pool_joined")


def test_the_operator_runs_commands_in_the_pod_of_the_server(production: Cluster) -> None:
    command = ("exec", "deploy/modelops-server", "--", "modelops", "tokens")
    assert production.kubectl(*command, "create", "from-the-pod", "--scope", "read").startswith("mot_")
    assert "from-the-pod" in production.kubectl(*command, "list")


def test_the_cache_of_a_node_is_prepared_again_where_it_is_already(production: Cluster) -> None:
    (pod,) = production.pods("node-cache")
    production.kubectl("delete", pod)
    wait_for(lambda: production.pods("node-cache") not in ([], [pod]), "the node has another pod")
    node_cache_is_ready(production)
    assert production.restarts("node-cache") == [0]


def test_new_certificates_are_brought_to_all_parts_while_a_job_runs(
    production: Cluster, certs: Path, tmp_path: Path
) -> None:
    running = Running(production, tmp_path, 150)
    subprocess.run([COMMAND, "certs", "renew", str(certs)], check=True, stdout=subprocess.DEVNULL)
    apply(secrets_of(certs, NAMESPACE))
    production.kubectl("rollout", "restart", "deployment")
    production.ready()
    production.ready(OTHER)
    running.goes_on()
    assert set(running.attempts()["attempt_number"].to_pylist()) == {1}
