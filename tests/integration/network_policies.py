"""Rendered NetworkPolicies, enforced: as rules of nftables in the pods' own networks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pod_sandbox import ROOT, Node, Pod

Json = dict[str, Any]
TABLE = "llmc"
# nft and the libraries that it needs, for a machine that has none of them installed.
PACKAGES = ("libnftables1", "libnftnl11", "libmnl0", "libxtables12", "libedit2", "libjansson4", "libbsd0", "libmd0")


@cache
def nft() -> Path | None:
    """The program; None where it cannot be had."""
    command = [ROOT / "ops/debian-tool", "nftables", "nft", *PACKAGES]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return Path(found.stdout.strip()) if found.returncode == 0 else None


def selects(selector: Json, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, selector
    return selector.get("matchLabels", {}).items() <= labels.items()


def addresses(peers: list[Json], pods: list[Pod]) -> list[str]:
    """Of the pods in the release's namespace that the peers select; nobody lives in another namespace here."""
    found = []
    for peer in peers:
        if "ipBlock" in peer:
            found.append(peer["ipBlock"]["cidr"])
        elif "namespaceSelector" not in peer:
            found += [pod.address for pod in pods if selects(peer["podSelector"], pod.labels)]
    return sorted(set(found))


def accepted(rule: Json, peers: str, direction: str, pods: list[Pod]) -> Iterator[str]:
    allowed = addresses(rule[peers], pods)
    if not allowed:
        return
    from_to = f"ip {direction} {{ {', '.join(allowed)} }}"
    if "ports" not in rule:
        yield f"{from_to} accept"
    for port in rule.get("ports", []):
        last = port.get("endPort", port["port"])
        yield f"{from_to} {port['protocol'].lower()} dport {port['port']}-{last} accept"


def ruleset(policies: list[Json], pod: Pod, node: Node) -> str:
    """What a pod may receive and send: nothing, once a policy selects it, but what one of them allows."""
    chains = []
    mine = [policy["spec"] for policy in policies if selects(policy["spec"]["podSelector"], pod.labels)]
    for hook, kind, peers, direction in (
        ("input", "Ingress", "from", "saddr"),
        ("output", "Egress", "to", "daddr"),
    ):
        selected = [spec for spec in mine if kind in spec["policyTypes"]]
        rules = [
            line
            for spec in selected
            for rule in spec.get(kind.lower(), [])
            for line in accepted(rule, peers, direction, node.pods)
        ]
        # A node always reaches its own pods, which is how probes get through; pings between neighbours are no edge.
        always = ["meta oifname lo accept", "meta iifname lo accept", "ct state established,related accept", "meta l4proto ipv6-icmp accept",
                  f"ip {direction} {node.address} accept"]  # fmt: skip
        if selected:
            body = "\n  ".join([*always, *rules, "counter drop"])
            chains.append(f" chain {hook} {{\n  type filter hook {hook} priority 0; policy accept;\n  {body}\n }}")
    return f"table inet {TABLE} {{\n" + "\n".join(chains) + "\n}\n"


def enforce(policies: list[Json], node: Node) -> None:
    for pod in node.pods:
        call(pod, "-f", "-", text=ruleset(policies, pod, node))


def dropped(pod: Pod) -> dict[str, int]:
    """Packets by chain that no policy allowed."""
    listed = json.loads(call(pod, "-j", "list", "ruleset"))["nftables"]
    counted = {}
    for entry in listed:
        for part in entry.get("rule", {}).get("expr", []):
            if "counter" in part:
                counted[entry["rule"]["chain"]] = part["counter"]["packets"]
    return counted


def call(pod: Pod, *arguments: str, text: str = "") -> str:
    program = nft()
    assert program is not None
    libraries = sorted({str(path.parent) for path in program.parents[2].rglob("*.so.*")})
    done = subprocess.run(
        ["ip", "netns", "exec", pod.namespace, program, *arguments],
        input=text, capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + text
    return done.stdout
