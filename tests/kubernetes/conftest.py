"""A cluster that KUBECONFIG names, with the local overlay in it. `make k8s-test` runs this, and nothing else does.

Files are run in the order of their names: `test_cluster` meets the local overlay as it is; the others want `equipped`,
which adds what tests need (`overlay`).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml  # type: ignore[import-untyped]  # it has no types
from unfinished import pytest_runtest_logfinish, pytest_sessionfinish  # noqa: F401  # hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("modelops"))
DEADLINE_S = 300.0
OVERLAY = Path(__file__).parent / "overlay"
TOKEN = "the-token-of-a-cluster-for-tests"
ROLES = ("scheduler", "server", "worker")
BEFORE = {"policy/v1": "policy/v1beta1", "autoscaling/v2": "autoscaling/v2beta2"}  # of Kubernetes 1.20
UNREACHABLE = 5  # exit code: the server does not answer
ENDED = ("succeeded", "partial", "failed", "cancelled")


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
    namespace: str = "modelops"
    ca: Path | None = None  # authority of its HTTPS, if it speaks that
    url: str = ""
    _forward: subprocess.Popen[str] | None = None

    def kubectl(self, *arguments: str) -> str:
        return kubectl("-n", self.namespace, *arguments)

    def modelops(self, *arguments: str) -> str:
        """Run a command, again when the way to the server broke off: a port-forward ends with its pod, and before."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            environ = {
                **os.environ,
                "MODELOPS_HOME": str(self.home),
                "MODELOPS_SERVER": self.url,
                "MODELOPS_TOKEN": TOKEN,
                **({"MODELOPS_CA": str(self.ca)} if self.ca else {}),
            }
            command = [COMMAND, *arguments]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
            if done.returncode != UNREACHABLE or time.monotonic() > deadline:
                assert done.returncode == 0, done.stdout + done.stderr
                return done.stdout
            self._reach()

    def ready(self, *deployments: str) -> None:
        """Wait until all Deployments are, or these."""
        for name in deployments or [f"modelops-{role}" for role in ROLES]:
            self.kubectl("rollout", "status", f"deployment/{name}", f"--timeout={DEADLINE_S:g}s")

    def scale(self, n: int) -> None:
        """Have so many pods of workers, and wait for them."""
        self.kubectl("scale", "deployment/modelops-worker", f"--replicas={n}")
        self.ready("modelops-worker")
        wait_for(lambda: len(self.pods("worker")) == n, f"there are {n} pods of workers")

    def pods(self, role: str) -> list[str]:
        return self.kubectl("get", "pods", "-l", f"app.kubernetes.io/component={role}", "-o", "name").split()

    def restarts(self, role: str) -> list[int]:
        """Return how often the containers of a role's pods were started again."""
        path = "{.items[*].status.containerStatuses[*].restartCount}"
        label = f"app.kubernetes.io/component={role}"
        return [int(n) for n in self.kubectl("get", "pods", "-l", label, "-o", f"jsonpath={path}").split()]

    def status(self, job: str) -> dict[str, Any]:
        """Return what `modelops jobs show --json` says."""
        found: dict[str, Any] = json.loads(self.modelops("jobs", "show", job, "--json"))
        return found

    def succeeded(self, job: str) -> int:
        return int(self.status(job)["counts"].get("succeeded", 0))

    def events(self, job: str) -> list[dict[str, Any]]:
        """Return the job's story."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            request = urllib.request.Request(
                f"{self.url}/v1/jobs/{job}/events?limit=1000", headers={"Authorization": f"Bearer {TOKEN}"}
            )
            try:
                with urllib.request.urlopen(request, timeout=30, context=self._trust()) as answer:
                    found: list[dict[str, Any]] = json.load(answer)["events"]
                    return found
            except (OSError, http.client.HTTPException):  # the port-forward broke off
                if time.monotonic() > deadline:
                    raise
            self._reach()

    def submit(self, bundle: Path, *arguments: str) -> str:
        job: str = json.loads(self.modelops("submit", str(bundle), *arguments, "--json"))["job"]
        return job

    def ended(self, job: str) -> str:
        """Wait for a job's end, and return its state."""
        wait_for(lambda: self.status(job)["state"] in ENDED, f"job {job} ends")
        return str(self.status(job)["state"])

    @contextlib.contextmanager
    def forwarded(self) -> Iterator[None]:
        """Reach the server through a port-forward within this block."""
        try:
            self._reach()
            yield
        finally:
            self._leave()

    def _reach(self) -> None:
        """Begin a port-forward, until the server answers through one."""

        def reached() -> bool:
            self._leave()
            port = ":443" if self.ca else ":80"
            command = ["kubectl", "-n", self.namespace, "port-forward", "svc/modelops-server", port]
            self._forward = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert self._forward.stdout is not None
            if (ours := re.search(r":(\d+) ->", self._forward.stdout.readline())) is None:
                return False
            self.url = f"{'https' if self.ca else 'http'}://localhost:{ours[1]}"
            return self.answers()

        wait_for(reached, "the server answers through a port-forward")

    def _leave(self) -> None:
        if self._forward is not None:
            self._forward.terminate()
            self._forward.communicate()
            self._forward = None

    def answers(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            url = f"{self.url}/ready"
            with urllib.request.urlopen(url, timeout=5, context=self._trust()) as answer:
                return bool(answer.status == 200)
        return False

    def _trust(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=str(self.ca)) if self.ca else None


def for_this_cluster(manifests: str) -> list[dict[str, Any]]:
    """Return the manifests in the versions that the cluster knows: the newest, or those before them."""
    version = json.loads(kubectl("version", "-o", "json"))["serverVersion"]
    old = (int(version["major"]), int(re.sub(r"\D", "", version["minor"]))) < (1, 21)
    found: list[dict[str, Any]] = list(yaml.safe_load_all(manifests))
    for manifest in found if old else ():
        manifest["apiVersion"] = BEFORE.get(manifest["apiVersion"], manifest["apiVersion"])
        for rule in (
            *manifest.get("spec", {}).get("ingress", ()),
            *manifest.get("spec", {}).get("egress", ()),
        ):
            for port in rule.get("ports", ()):
                if port.pop("endPort", None) is not None:
                    del port["port"]
    return found


def rendered(overlay: Path) -> list[dict[str, Any]]:
    """Return the manifests of an overlay, as this cluster knows them."""
    return for_this_cluster(kubectl("kustomize", str(overlay)))


def dry_run(manifests: list[dict[str, Any]]) -> None:
    """Have the API server say what it thinks of them, where nothing of that name is."""
    for manifest in manifests:
        if "namespace" in manifest["metadata"]:
            manifest["metadata"]["namespace"] = "default"
    kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", given=yaml.safe_dump_all(manifests))


def apply(manifests: list[dict[str, Any]]) -> None:
    """Apply them, and let the names of new Services be known."""
    kubectl("apply", "-f", "-", given=yaml.safe_dump_all(manifests))
    if hook := os.environ.get("MODELOPS_AFTER_APPLY"):  # a cluster whose DNS must be told of Services
        subprocess.run(hook, shell=True, check=True)  # noqa: S602  it is the operator's own line


def secrets_of(certs: Path, namespace: str) -> list[dict[str, Any]]:
    """Return the Secrets that every overlay wants, as k8s/README.md makes them."""
    secrets: list[dict[str, Any]] = [
        {
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": {"name": f"modelops-{role}-tls", "namespace": namespace},
            "stringData": {
                theirs: (certs / role / ours).read_text()
                for ours, theirs in (("ca.pem", "ca.crt"), ("cert.pem", "tls.crt"), ("key.pem", "tls.key"))
            },
        }
        for role in ROLES
    ]  # fmt: skip
    return [*secrets, secret("modelops-token", namespace, token=TOKEN)]


def secret(name: str, namespace: str, **data: str) -> dict[str, Any]:
    where = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": where, "stringData": data}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Deploy the local overlay, and leave nothing behind. The image is there already, as k8s/README.md says."""
    if "KUBECONFIG" not in os.environ:
        pytest.fail("KUBECONFIG names no cluster")
    folder = tmp_path_factory.mktemp("cluster")
    subprocess.run([COMMAND, "certs", "create", str(folder / "certs")], check=True, stdout=subprocess.DEVNULL)
    manifests = rendered(ROOT / "k8s/overlays/local")
    secrets = secrets_of(folder / "certs", "modelops")
    namespaces = [m for m in manifests if m["kind"] == "Namespace"]
    try:
        kubectl("apply", "-f", "-", given=yaml.safe_dump_all(namespaces))
        kubectl("apply", "-f", "-", given=yaml.safe_dump_all(secrets))
        apply(manifests)
        found = Cluster(folder / "home")
        found.ready()
        yield found
    finally:
        kubectl("delete", "namespace", "modelops", "--ignore-not-found")


@pytest.fixture(scope="session")
def equipped(cluster: Cluster) -> Cluster:
    """Give the cluster PostgreSQL instead of SQLite, and a package index of its own."""
    image = os.environ.get("MODELOPS_TEST_POSTGRES", "docker.io/library/postgres:15")
    manifests = rendered(OVERLAY)
    (postgres,) = (m for m in manifests if m["kind"] == "StatefulSet")
    postgres["spec"]["template"]["spec"]["containers"][0]["image"] = image
    wheel = wheel_of_test_dependency()
    name = "modelops_test_dependency-1.0-py3-none-any.whl"
    listing = f'<a href="../../{name}#sha256={hashlib.sha256(wheel).hexdigest()}">{name}</a>'
    files = {"listing": listing.encode(), "wheel": wheel}
    index = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "test-index", "namespace": "modelops"},
        "binaryData": {key: base64.b64encode(data).decode() for key, data in files.items()},
    }  # fmt: skip
    apply([index, *manifests])
    kubectl("-n", "modelops", "rollout", "status", "statefulset/test-postgres", f"--timeout={DEADLINE_S:g}s")
    cluster.ready("test-index", "test-silence")
    cluster.ready()
    return cluster


def wheel_of_test_dependency() -> bytes:
    """Return a package that is nowhere else."""
    info = "modelops_test_dependency-1.0.dist-info"
    files = {
        "modelops_test_dependency.py": "ANSWER = 42\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: modelops-test-dependency\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={_digest(text.encode())},{len(text.encode())}\n" for name, text in files.items()
    )
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(name, text)
    return whole.getvalue()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
