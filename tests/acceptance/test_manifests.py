"""The manifests of Kubernetes: rendered as an operator does, valid, and in agreement with themselves and the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import tomllib
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml  # type: ignore[import-untyped]  # it has no types

from modelops.cluster.certificates import create_certificates, list_certificates
from modelops.server.pool_backlog import NO_POOL_ASKED
from modelops.settings import NAMES
from modelops.study.pools import Aliases

if TYPE_CHECKING:
    from collections.abc import Iterator

K8S = Path(__file__).parents[2] / "k8s"
WITH_POOL = "production and two more pools"
OVERLAYS = [*sorted(path.name for path in (K8S / "overlays").iterdir()), WITH_POOL]
VERSIONS = ("1.32", "1.37")
kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the overlays")
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool checks the rules")


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    if overlay != WITH_POOL:
        return rendered_from(K8S, overlay)
    with tempfile.TemporaryDirectory() as folder:  # as an operator does it: a line of the overlay
        mine = Path(shutil.copytree(K8S, f"{folder}/k8s"))
        file = mine / "overlays/production/kustomization.yaml"
        text = file.read_text("utf-8")
        assert text.count("  # - ../../components/pool") == 1
        text = text.replace("  # - ../../components/pool", "  - ../../components/pool")
        shutil.copytree(mine / "components/pool", mine / "components/pool-us")
        for copied in (mine / "components/pool-us/workers").iterdir():
            copied.write_text(copied.read_text("utf-8").replace("eu-west", "us"), "utf-8")
        text = text.replace("resources:", "resources:\n  - ../../components/pool-us/workers")
        file.write_text(text, "utf-8")
        return rendered_from(mine, "production")


def rendered_from(folder: Path, overlay: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", folder / "overlays" / overlay], capture_output=True, text=True, check=True
    )
    return list(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, *kinds: str) -> Iterator[dict[str, Any]]:
    return (found for found in rendered(overlay) if found["kind"] in kinds)


def pods(overlay: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for found in of_kind(overlay, "Deployment", "DaemonSet"):
        yield found["metadata"]["name"], found["spec"]["template"]


@kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid_and_has_nothing_that_kubernetes_does_not_know(
    overlay: str, version: str
) -> None:
    for found in rendered(overlay):
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pod_for_backups_is_valid_and_has_the_image_and_the_rights_of_the_others(version: str) -> None:
    pod = yaml.safe_load((K8S / "overlays/local/volume-pod.yaml").read_text("utf-8"))
    kubernetes_validate.validate(pod, version, strict=True)
    (server,) = yaml.safe_load_all((K8S / "base/server.yaml").read_text("utf-8").partition("\n---\n")[0])
    theirs, ours = server["spec"]["template"]["spec"], pod["spec"]
    assert ours["securityContext"] == theirs["securityContext"]
    assert ours["containers"][0]["securityContext"] == theirs["containers"][0]["securityContext"]
    (image,) = yaml.safe_load((K8S / "base/kustomization.yaml").read_text("utf-8"))["images"]
    assert ours["containers"][0]["image"] == f"{image['newName']}:{image['newTag']}"


@kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_has_the_recommended_labels(overlay: str) -> None:
    recommended = {f"app.kubernetes.io/{what}" for what in ("name", "instance", "part-of", "managed-by")}
    without = {
        f"{found['kind']} {found['metadata']['name']}"
        for found in rendered(overlay)
        if not recommended <= found["metadata"].get("labels", {}).keys()
    }
    assert without == set()


@kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_selector_finds_a_pod_and_every_reference_something(overlay: str) -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(overlay)}

    def fits(selector: dict[str, Any]) -> set[str]:
        wanted = selector.get("matchLabels", {}).items()
        lists = [(e["key"], e["values"]) for e in selector.get("matchExpressions", [])]
        return {
            name for name, has in labels.items()
            if wanted <= has.items() and all(has.get(key) in values for key, values in lists)
        }  # fmt: skip

    for found in of_kind(overlay, "Deployment", "DaemonSet"):
        assert fits(found["spec"]["selector"]) == {found["metadata"]["name"]}
    for found in of_kind(overlay, "Service"):
        (name,) = fits({"matchLabels": found["spec"]["selector"]})
        ports = {
            p["name"]
            for _, pod in pods(overlay)
            for c in pod["spec"]["containers"]
            for p in c.get("ports", [])
        }
        assert {p["targetPort"] for p in found["spec"]["ports"]} <= ports, name
        assert all(p["protocol"] == "TCP" for p in found["spec"]["ports"])
    for found in of_kind(overlay, "PodDisruptionBudget"):
        assert (
            len({labels[name]["app.kubernetes.io/component"] for name in fits(found["spec"]["selector"])})
            == 1
        )
    for found in of_kind(overlay, "NetworkPolicy"):
        assert fits(found["spec"]["podSelector"])
        for rule in (*found["spec"].get("ingress", ()), *found["spec"].get("egress", ())):
            for other in (*rule.get("from", ()), *rule.get("to", ())):
                assert "podSelector" not in other or fits(other["podSelector"])
    there = {(f["kind"], f["metadata"]["name"]) for f in rendered(overlay)}
    scaled = {f["spec"]["scaleTargetRef"]["name"] for f in of_kind(overlay, "HorizontalPodAutoscaler")}
    assert scaled == ({name for name in labels if "worker" in name} if overlay != "local" else set())
    for found in of_kind(overlay, "HorizontalPodAutoscaler"):
        target = found["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in there
        (worker,) = [d for d in of_kind(overlay, "Deployment") if d["metadata"]["name"] == target["name"]]
        assert "replicas" not in worker["spec"]  # else every apply would undo what the autoscaler did
        (metric,) = (metric["external"]["metric"] for metric in found["spec"]["metrics"])
        pool = worker["metadata"]["labels"]["modelops.dev/pool"]
        assert metric["selector"]["matchLabels"]["pool"] == (NO_POOL_ASKED if pool == "main" else pool)
        assert metric["name"] == "modelops_pool_replicates_pending"  # or one pool's work would scale another
    for _, pod in pods(overlay):
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in there
        for container in pod["spec"]["containers"]:
            for source in container.get("envFrom", ()):
                if "configMapRef" in source:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in there
    assert not any(kind in ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding") for kind, _ in there)


@kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_may_do_more_than_it_needs_and_each_says_how_it_is(overlay: str) -> None:
    for name, pod in pods(overlay):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False  # their variables would be taken for settings
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]
            if name != "modelops-node-cache":  # which explains itself
                assert spec["securityContext"]["runAsNonRoot"] is True
                assert "add" not in context["capabilities"]
                ports = {p["name"] for p in container["ports"]}
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    assert container[probe]["httpGet"]["port"] in ports
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys()
        assert all("sizeLimit" in v["emptyDir"] for v in spec["volumes"] if "emptyDir" in v)


@kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_the_manifests_set_are_settings_and_the_readme_makes_every_secret(overlay: str) -> None:
    readme = (K8S / "README.md").read_text("utf-8")
    known = {f"MODELOPS_{name.upper()}" for name in NAMES}
    names: set[str] = set()
    secrets: set[str] = set()
    for found in of_kind(overlay, "ConfigMap"):
        names |= found["data"].keys()
    for _, pod in pods(overlay):
        secrets |= {v["secret"]["secretName"] for v in pod["spec"]["volumes"] if "secret" in v}
        for container in pod["spec"]["containers"]:
            names |= {e["name"] for e in container.get("env", ())}
            values = [e["valueFrom"] for e in container.get("env", ()) if "valueFrom" in e]
            refs = [value["secretKeyRef"] for value in values if "secretKeyRef" in value]
            refs += [e["secretRef"] for e in container.get("envFrom", ()) if "secretRef" in e]
            secrets |= {ref["name"] for ref in refs}
    for found in of_kind(overlay, "Ingress"):
        secrets |= {tls["secretName"] for tls in found["spec"]["tls"]}
    assert {n for n in names if n.startswith("MODELOPS_")} <= known
    assert not {"MODELOPS_TOKEN", "MODELOPS_DATABASE"} & {
        k for f in of_kind(overlay, "ConfigMap") for k in f["data"]
    }
    assert [s for s in secrets if s.partition("-tls")[0] not in readme] == []
    assert not list(of_kind(overlay, "Secret"))


@kubectl
def test_workers_know_no_database_and_no_token() -> None:
    for overlay in OVERLAYS:
        for name, pod in pods(overlay):
            if name.startswith(("modelops-worker", "modelops-scheduler")):
                said = json.dumps(pod)
                assert "MODELOPS_DATABASE" not in said
                assert "MODELOPS_TOKEN" not in said


@kubectl
def test_a_second_pool_is_like_the_first_but_for_its_name_and_place() -> None:
    workers = {n: deepcopy(pod["spec"]) for n, pod in pods(WITH_POOL) if n.startswith("modelops-worker")}
    main, other = workers["modelops-worker"], workers["modelops-worker-eu-west"]
    assert main.pop("nodeSelector", None) is None
    assert other.pop("nodeSelector")
    assert main.pop("topologySpreadConstraints")
    assert other.pop("topologySpreadConstraints")  # within the pool
    environ = {e["name"]: e for e in other["containers"][0]["env"]}
    assert {"MODELOPS_POOL", "MODELOPS_POOL_LABELS"} <= environ.keys()
    other["containers"][0]["env"] = [e for n, e in environ.items() if "POOL" not in n]
    assert other == main
    (server,) = (pod["spec"] for name, pod in pods(WITH_POOL) if name == "modelops-server")
    (file,) = (e["value"] for e in server["containers"][0]["env"] if e["name"] == "MODELOPS_POOL_ALIASES")
    (data,) = (c["data"] for c in of_kind(WITH_POOL, "ConfigMap") if "pool-aliases" in c["metadata"]["name"])
    assert Aliases.of_table(tomllib.loads(data[Path(file).name]), file).canonical("eu_west_1") == "eu"


@kubectl
def test_in_production_nobody_talks_to_the_server_without_tls() -> None:
    (pod,) = (pod["spec"] for name, pod in pods("production") if name == "modelops-server")
    container = pod["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    environ = {e["name"]: e.get("value", "") for e in container["env"]}
    (mount,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "tls")
    assert {Path(environ[f"MODELOPS_TLS_{what}"]).parent for what in ("CERT", "KEY")} == {Path(mount)}
    (ingress,) = of_kind("production", "Ingress")
    said = {key.rpartition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    assert (said["backend-protocol"], said["proxy-ssl-verify"]) == ("HTTPS", "on")


@kubectl
def test_commands_in_the_pod_of_the_server_find_it_by_a_name_of_its_certificate(tmp_path: Path) -> None:
    create_certificates(tmp_path / "certs", ["modelops-server"])
    (names,) = (kept.hosts for kept in list_certificates(tmp_path / "certs") if kept.role == "server")
    for overlay in OVERLAYS:
        (pod,) = (pod["spec"] for name, pod in pods(overlay) if name == "modelops-server")
        container = pod["containers"][0]
        environ = {e["name"]: e.get("value", "") for e in container["env"]}
        if "MODELOPS_TLS_CERT" not in environ:
            assert "MODELOPS_SERVER" not in environ  # that of this home, over HTTP
            continue
        url = urlsplit(environ["MODELOPS_SERVER"])
        assert (url.scheme, str(url.port)) == (
            "https",
            container["args"][container["args"].index("--port") + 1],
        )
        assert url.hostname in names
        assert Path(environ["MODELOPS_CA"]) == Path(environ["MODELOPS_TLS_CERT"]).with_name("ca.crt")


def test_every_metric_that_a_rule_or_a_panel_asks_for_is_one() -> None:
    page = (K8S.parent / "docs/reference/http-api.md").read_text("utf-8")
    asked = {}
    files = [
        *(K8S / "monitoring").glob("*.yml"),
        K8S / "monitoring/dashboard.json",
        *K8S.rglob("autoscaling.yaml"),
    ]
    for file in files:
        found = re.findall(r"\bmodelops_[a-z_]+\b", file.read_text("utf-8"))
        asked[file.name] = {re.sub(r"_seconds_(bucket|sum|count)$", "_seconds", name) for name in found}
    assert asked["alerts.yml"]
    assert asked["dashboard.json"]
    known = set(re.findall(r"`(modelops_[a-z_]+)`", page))  # which other tests compare with what is served
    assert {name: found - known for name, found in asked.items() if found - known} == {}
    dashboard = json.loads((K8S / "monitoring/dashboard.json").read_text("utf-8"))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    rules = yaml.safe_load((K8S / "monitoring/alerts.yml").read_text("utf-8"))
    tests = yaml.safe_load((K8S / "monitoring/alerts.test.yml").read_text("utf-8"))["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    quiet = {
        case["alertname"] for test in tests for case in test["alert_rule_test"] if not case["exp_alerts"]
    }
    assert {rule["alert"] for group in rules["groups"] for rule in group["rules"]} == fired
    assert fired == quiet


@promtool
def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=K8S / "monitoring", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_understands_what_every_panel_asks(tmp_path: Path) -> None:
    dashboard = json.loads((K8S / "monitoring/dashboard.json").read_text("utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [{"record": f"panel:{i}", "expr": expr.replace("$", "")} for i, expr in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    command = ["promtool", "check", "rules", "--lint=none", str(tmp_path / "rules.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(asked)} rules found" in done.stdout


@promtool
def test_prometheus_understands_what_it_is_to_scrape(tmp_path: Path) -> None:
    config = yaml.safe_load((K8S / "monitoring/prometheus.yml").read_text("utf-8"))
    for job in config["scrape_configs"]:  # Debian's Prometheus knows no Kubernetes
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod", "namespaces": {"names": ["modelops"]}}]
        job["static_configs"] = [{"targets": ["localhost:8785"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    command = ["promtool", "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
