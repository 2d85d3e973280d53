"""Which pods may reach which ports: NetworkPolicies evaluated as Kubernetes says, against pods that were rendered."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from chart_harness import NAMESPACE, Manifest, component, matches, of_kind, pods

Ports = frozenset[tuple[str, int, int]]  # protocol, first, last
EVERYTHING: Ports = frozenset({("any", 0, 65535)})


@dataclass(frozen=True)
class Party:
    """Somebody on the network: a pod with its labels, or an address outside."""

    name: str
    namespace: str = NAMESPACE
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


def parties(objects: list[Manifest]) -> list[Party]:
    """The pods that were rendered, one of each component."""
    found = {component(pod): pod["metadata"]["labels"] for _, pod in pods(objects)}
    return [Party(name, labels=labels) for name, labels in found.items()]


def allowed(objects: list[Manifest], source: Party, target: Party) -> Ports:
    """The ports of ``target`` that ``source`` may reach; both sides have to allow a port."""
    policies = of_kind(objects, "NetworkPolicy")
    leaves = _side(policies, source, target, "Egress", "to")
    enters = _side(policies, target, source, "Ingress", "from")
    if leaves == EVERYTHING or enters == EVERYTHING:
        return enters if leaves == EVERYTHING else leaves
    return _both(leaves, enters)


def _side(policies: list[Manifest], ours: Party, other: Party, direction: str, key: str) -> Ports:
    selecting = [
        policy["spec"]
        for policy in policies
        if not ours.address
        and ours.namespace == NAMESPACE
        and matches(policy["spec"]["podSelector"], ours.labels)
        and direction in policy["spec"]["policyTypes"]
    ]
    if not selecting:
        return EVERYTHING  # whom no policy selects may do as he likes
    rules = [rule for spec in selecting for rule in spec.get(direction.lower(), [])]
    open_to = [rule for rule in rules if not rule.get(key) or any(_is(peer, other) for peer in rule[key])]
    return frozenset(port for rule in open_to for port in _ports(rule))


def _ports(rule: dict[str, Any]) -> Iterable[tuple[str, int, int]]:
    if not rule.get("ports"):
        return EVERYTHING
    return [(port["protocol"], port["port"], port.get("endPort", port["port"])) for port in rule["ports"]]


def _is(peer: dict[str, Any], party: Party) -> bool:
    if "ipBlock" in peer:
        block = ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return bool(party.address) and ipaddress.ip_address(party.address) in block
    if party.address:
        return False
    if "namespaceSelector" in peer:
        name = {"kubernetes.io/metadata.name": party.namespace}
        if not matches(peer["namespaceSelector"], name):
            return False
    elif party.namespace != NAMESPACE:
        return False
    return matches(peer.get("podSelector", {}), party.labels)


def _both(one: Ports, other: Ports) -> Ports:
    """What two sets of ranges share."""
    return frozenset(
        (protocol if protocol != "any" else other_protocol, max(first, other_first), min(last, other_last))
        for protocol, first, last in one
        for other_protocol, other_first, other_last in other
        if "any" in (protocol, other_protocol) or protocol == other_protocol
        if max(first, other_first) <= min(last, other_last)
    )
