"""A cluster that KUBECONFIG names, with the local overlay in it. `make k8s-test` runs this, and nothing else does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml  # type: ignore[import-untyped]  # it has no types

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("modelops"))
DEADLINE_S = 300.0
TOKEN = "the-token-of-a-cluster-for-tests"
ROLES = ("scheduler", "server", "worker")


def kubectl(*arguments: str, given: str | None = None) -> str:
    done = subprocess.run(
        ["kubectl", *arguments], input=given, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def wait_for(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.5)


@dataclass
class Cluster:
    """The deployed parts."""

    home: Path
    url: str = ""

    def modelops(self, *arguments: str, code: int = 0) -> str:
        environ = {
            **os.environ,
            "MODELOPS_HOME": str(self.home),
            "MODELOPS_SERVER": self.url,
            "MODELOPS_TOKEN": TOKEN,
        }
        done = subprocess.run([COMMAND, *arguments], env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def ready(self) -> None:
        """Wait until every Deployment is."""
        for role in ROLES:
            kubectl(
                "-n",
                "modelops",
                "rollout",
                "status",
                f"deployment/modelops-{role}",
                f"--timeout={DEADLINE_S:g}s",
            )

    def pods(self, role: str) -> list[str]:
        found = kubectl(
            "-n", "modelops", "get", "pods", "-l", f"app.kubernetes.io/component={role}", "-o", "name"
        )
        return found.split()

    @contextlib.contextmanager
    def forwarded(self) -> Iterator[None]:
        """Reach the server through a port-forward, begun again by this block's caller when its pod goes."""
        command = ["kubectl", "-n", "modelops", "port-forward", "svc/modelops-server", ":80"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            port = re.search(r":(\d+) ->", process.stdout.readline())
            assert port is not None
            self.url = f"http://localhost:{port[1]}"
            wait_for(self.answers, "the server answers through the port-forward")
            yield
        finally:
            process.terminate()
            process.communicate()

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
        return False


def for_this_cluster(manifests: str) -> list[dict[str, Any]]:
    """Return the manifests in the versions that the cluster knows: the newest, or those before them."""
    version = json.loads(kubectl("version", "-o", "json"))["serverVersion"]
    old = (int(version["major"]), int(re.sub(r"\D", "", version["minor"]))) < (1, 21)
    found: list[dict[str, Any]] = list(yaml.safe_load_all(manifests))
    for manifest in found if old else ():
        if manifest["apiVersion"] == "policy/v1":
            manifest["apiVersion"] = "policy/v1beta1"
        for rule in (
            *manifest.get("spec", {}).get("ingress", ()),
            *manifest.get("spec", {}).get("egress", ()),
        ):
            for port in rule.get("ports", ()):
                if port.pop("endPort", None) is not None:
                    del port["port"]
    return found


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Deploy the local overlay, and leave nothing behind. The image is there already, as k8s/README.md says."""
    if "KUBECONFIG" not in os.environ:
        pytest.fail("KUBECONFIG names no cluster")
    folder = tmp_path_factory.mktemp("cluster")
    subprocess.run([COMMAND, "certs", "create", str(folder / "certs")], check=True, stdout=subprocess.DEVNULL)
    manifests = for_this_cluster(kubectl("kustomize", str(ROOT / "k8s/overlays/local")))
    secrets = [
        {
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": {"name": f"modelops-{role}-tls", "namespace": "modelops"},
            "stringData": {
                theirs: (folder / "certs" / role / ours).read_text()
                for ours, theirs in (("ca.pem", "ca.crt"), ("cert.pem", "tls.crt"), ("key.pem", "tls.key"))
            },
        }
        for role in ROLES
    ]  # fmt: skip
    name = {"name": "modelops-token", "namespace": "modelops"}
    secrets.append({"apiVersion": "v1", "kind": "Secret", "metadata": name, "stringData": {"token": TOKEN}})
    namespaces = [m for m in manifests if m["kind"] == "Namespace"]
    try:
        kubectl("apply", "-f", "-", given=yaml.safe_dump_all(namespaces))
        kubectl("apply", "-f", "-", given=yaml.safe_dump_all(secrets))
        kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", given=yaml.safe_dump_all(manifests))
        kubectl("apply", "-f", "-", given=yaml.safe_dump_all(manifests))
        if hook := os.environ.get("MODELOPS_AFTER_APPLY"):  # a cluster whose DNS must be told of Services
            subprocess.run(hook, shell=True, check=True)  # noqa: S602  it is the operator's own line
        found = Cluster(folder / "home")
        found.ready()
        yield found
    finally:
        kubectl("delete", "namespace", "modelops", "--ignore-not-found")
