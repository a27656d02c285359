"""The network policies of k8s/, as the firewall of each host: what may be reached, and what was tried besides.

A cluster whose network does not know policies takes them for granted, so here they are enforced: as nftables rules in
the network namespace of each host that stands for a pod. What Kubernetes says of a policy: https://kubernetes.io/docs/
concepts/services-networking/network-policies/.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]  # it has no types

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hosts_lab import Host

K8S = Path(__file__).parents[2] / "k8s"
FILES = ("base/network.yaml", "overlays/production/network.yaml")
DATABASES = "10.0.0.0/8"  # where the overlay has databases, until an operator changes it
COMPONENT = "app.kubernetes.io/component"
TABLE = "inet policies"
TRIED = {"in": "ip saddr . tcp dport", "out": "ip daddr . tcp dport"}  # what is remembered of what is refused


@dataclass(frozen=True)
class Peer:
    """Somebody at an address: a pod of ModelOps, with a component; or another one, in a namespace with these labels."""

    address: str
    component: str = ""
    namespace: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, str]:
        if not self.component:
            return {}
        return {COMPONENT: self.component, "app.kubernetes.io/part-of": "modelops"}


def policies(database: str) -> list[dict[str, Any]]:
    """Return the policies of production, of an operator whose database is at this address."""
    texts = [(K8S / file).read_text("utf-8") for file in FILES]
    assert sum(text.count(DATABASES) for text in texts) == 1
    return [p for text in texts for p in yaml.safe_load_all(text.replace(DATABASES, f"{database}/32"))]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def is_meant(rule: Mapping[str, Any], peer: Peer) -> bool:
    """Whether an entry of "from" or "to" means this one."""
    if block := rule.get("ipBlock"):
        address = ip_address(peer.address)
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(but) for but in block.get("except", ())
        )
    if "namespaceSelector" in rule:
        assert "podSelector" not in rule
        return not peer.component and selects(rule["namespaceSelector"], peer.namespace)
    return bool(peer.component) and selects(rule["podSelector"], peer.labels)


@dataclass(frozen=True)
class Allowed:
    """A line of the firewall. ``name``: policy, direction, and which of its rules and ports."""

    name: str
    way: str
    addresses: tuple[str, ...]
    port: str

    def __str__(self) -> str:
        whom = f"ip {'saddr' if self.way == 'in' else 'daddr'} {{ {', '.join(self.addresses)} }}"
        return f"{whom} tcp dport {self.port} counter name {self.name} accept"


def allowed(pod: Peer, peers: list[Peer], database: str) -> Iterator[Allowed]:
    for policy in policies(database):
        spec = policy["spec"]
        if not selects(spec["podSelector"], pod.labels):
            continue
        for way, rules, whom in (("in", "ingress", "from"), ("out", "egress", "to")):
            assert rules not in spec or rules.capitalize() in spec["policyTypes"]
            for i, rule in enumerate(spec.get(rules, ())):
                addresses = tuple(p.address for p in peers if any(is_meant(entry, p) for entry in rule[whom]))
                for j, port in enumerate(p for p in rule["ports"] if p["protocol"] == "TCP"):
                    name = f"{re.sub('-', '_', policy['metadata']['name'])}_{way}_{i}_{j}"
                    ports = f"{port['port']}-{port['endPort']}" if "endPort" in port else str(port["port"])
                    if addresses:
                        yield Allowed(name, way, addresses, ports)


def close(host: Host, pod: Peer, peers: list[Peer], database: str) -> None:
    """Let a host reach, and be reached by, whom the policies allow to the pod that it stands for, and nobody else."""
    rules = list(allowed(pod, [p for p in peers if p.address != pod.address], database))
    lines = [f"table {TABLE} {{"]
    lines += [f"counter {rule.name} {{ }}" for rule in rules]
    for way, what in TRIED.items():
        hook = f"{way}put"
        lines += [
            f"set tried_{way} {{ type ipv4_addr . inet_service; flags dynamic; size 1000; }}",
            f"chain {hook} {{ type filter hook {hook} priority 0; policy drop;",
            f"{'iif' if way == 'in' else 'oif'} lo accept",
            "ct state established,related accept",
            *(str(rule) for rule in rules if rule.way == way),
            f"tcp flags & (syn | ack) == syn add @tried_{way} {{ {what} }}",
            "}",
        ]
    _nft(host, "-f", "-", given="\n".join([*lines, "}"]))


def used(host: Host) -> dict[str, int]:
    """Return how many connections each rule of a host has allowed."""
    listed = json.loads(_nft(host, "-j", "list", "counters", "table", *TABLE.split()))["nftables"]
    return {found["counter"]["name"]: found["counter"]["packets"] for found in listed if "counter" in found}


def refused(host: Host) -> dict[str, list[tuple[str, int]]]:
    """Return who wanted to reach a host, and whom it wanted to reach, without being allowed to: address and port."""
    found = {}
    for way in TRIED:
        (listed,) = (
            entry["set"]
            for entry in json.loads(_nft(host, "-j", "list", "set", *TABLE.split(), f"tried_{way}"))[
                "nftables"
            ]
            if "set" in entry
        )
        found[way] = sorted(tuple(element["concat"]) for element in listed.get("elem", ()))
    return {way: tried for way, tried in found.items() if tried}


def _nft(host: Host, *arguments: str, given: str | None = None) -> str:
    done = subprocess.run(
        host.inside("nft", *arguments), input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"nft {' '.join(arguments)}: {done.stderr.strip()}\n{given}"
    return done.stdout
