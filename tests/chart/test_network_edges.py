"""What the NetworkPolicies allow is exactly the table of edges: nothing missing, nothing more."""

from __future__ import annotations

import itertools

import pytest
from chart_harness import AUTH, NAMESPACE, NEW, OLD, component, containers, merged, of_kind, pods, render
from chart_matrix import rendered, values_of
from network_edges import EVERYTHING, Party, allowed, parties

CLIENT = Party("client", labels={"app": "chat"})
STRANGER = Party("stranger", "elsewhere", {"app": "chat"})
PROMETHEUS = Party("prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"})
DNS = Party("dns", "kube-system", {"k8s-app": "kube-dns"})
API = Party("api", address="10.0.0.1")
HUB = Party("hub", address="198.51.100.7")
OUTSIDE = Party("outside", address="203.0.113.9")
OTHERS = [CLIENT, STRANGER, PROMETHEUS, DNS, API, HUB, OUTSIDE]
PINNED = {"networkPolicy": {"kubernetesApiCidr": "10.0.0.1/32", "hubCidr": "198.51.100.0/24"}}

Edges = dict[tuple[str, str], set[str]]
RAY = {"TCP 10002-19999", "TCP 40000-49999"}
NAMES = {"TCP 53", "UDP 53"}
# docs/operating.md, "Ports", for worker pods of two devices: engines 50060 to 50063, metrics 9100 to 9104.
EDGES: Edges = {
    ("client", "router"): {"TCP 50051"},
    ("test", "router"): {"TCP 50051"},
    ("router", "controller"): {"TCP 50052"},
    ("router", "worker"): {"TCP 50060-50063"},
    ("worker", "controller"): {"TCP 50052", "TCP 6379", *RAY},
    ("controller", "worker"): RAY,
    ("worker", "worker"): {*RAY, "TCP 20000-23999"},
    ("controller", "controller"): set(),
    ("prometheus", "controller"): {"TCP 9100"},
    ("prometheus", "router"): {"TCP 9100"},
    ("prometheus", "worker"): {"TCP 9100-9104"},
    ("controller", "api"): {"TCP 443", "TCP 6443"},
    ("controller", "dns"): NAMES,
    ("worker", "dns"): NAMES,
    ("router", "dns"): NAMES,
    ("test", "dns"): NAMES,
}
HUB_EDGES: Edges = {("worker", "hub"): {"TCP 443"}, ("controller", "hub"): {"TCP 443"}}
TWO_DEVICES = {"workers": [{"name": "workers", "devicesPerPod": 2}, {"name": "small"}]}


def edges_of(objects: list[dict]) -> Edges:
    """Every pair of parties, one of them ours, between which something may pass."""
    ours = parties(objects)
    found: Edges = {}
    for source, target in itertools.product([*ours, *OTHERS], repeat=2):
        if source in OTHERS and target in OTHERS:
            continue
        ports = allowed(objects, source, target)
        if ports:
            found[source.name, target.name] = {shown(*port) for port in ports}
    return found


def shown(protocol: str, first: int, last: int) -> str:
    return f"{protocol} {first}" if first == last else f"{protocol} {first}-{last}"


def expected(*tables: Edges) -> Edges:
    return {pair: ports for table in tables for pair, ports in table.items() if ports}


def test_the_edges_are_exactly_those():
    assert edges_of(render(merged(AUTH, PINNED, TWO_DEVICES))) == expected(EDGES)


def test_a_hub_cache_adds_the_hub_and_nothing_else():
    values = merged(values_of("hub"), PINNED, TWO_DEVICES)
    assert edges_of(render(values)) == expected(EDGES, HUB_EDGES)


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("", 443), ("https://hub.example.com", 443), ("http://hub.example.com/x", 80), ("http://hub:8080", 8080)],
)
def test_the_hub_is_reached_where_it_listens(endpoint: str, port: int):
    values = merged(values_of("hub"), PINNED, TWO_DEVICES, {"hub": {"endpoint": endpoint}})
    found = edges_of(render(values))
    assert found["worker", "hub"] == found["controller", "hub"] == {f"TCP {port}"}


def test_the_api_is_reached_where_it_listens():
    values = merged(AUTH, PINNED, {"networkPolicy": {"kubernetesApiPorts": [443, 16443]}})
    assert edges_of(render(values))["controller", "api"] == {"TCP 443", "TCP 16443"}


def test_names_are_asked_of_the_nodes_own_cache_too():
    objects = render(merged(AUTH, PINNED))
    cache, metadata = Party("cache", address="169.254.20.10"), Party("metadata", address="169.254.169.254")
    for party in parties(objects):
        assert {shown(*port) for port in allowed(objects, party, cache)} == NAMES
        assert allowed(objects, party, metadata) == frozenset()


def test_without_rbac_nobody_reaches_the_api():
    values = merged(AUTH, PINNED, TWO_DEVICES, {"rbac": {"create": False}})
    without = {pair: ports for pair, ports in EDGES.items() if pair[1] != "api"}
    assert edges_of(render(values)) == expected(without)


def test_nobody_means_nobody():
    """An empty list of peers would mean everybody if it were rendered."""
    nobody = {"networkPolicy": {"clients": [], "prometheus": [], "dns": []}}
    found = edges_of(render(merged(AUTH, PINNED, TWO_DEVICES, nobody)))
    gone = {"client", "prometheus", "dns"}
    assert found == expected({pair: ports for pair, ports in EDGES.items() if not gone & set(pair)})


def test_configured_ports_move_the_edges():
    values = merged(AUTH, TWO_DEVICES, values_of("config"), values_of("network"))
    found = edges_of(render(values))
    assert found["worker", "worker"] == {"TCP 10002-19999", "TCP 30000-32767", "TCP 21000-22999"}


def test_an_old_kubernetes_has_the_edges_without_the_ranges():
    """endPort came with 1.22; the pairs stay the same."""
    found = edges_of(render(merged(AUTH, PINNED, TWO_DEVICES), kube_version=OLD))
    assert set(found) == set(expected(EDGES))
    assert {pair: ports for pair, ports in found.items() if ports != {"any 0-65535"}} == {
        pair: ports for pair, ports in EDGES.items() if ports and not any("-" in port for port in ports)
    }
    assert render(AUTH, kube_version="v1.22.0") == render(AUTH, kube_version="v1.22.0-eks.1")


def test_every_pod_is_denied_first():
    for case, objects in rendered().items():
        policies = of_kind(objects, "NetworkPolicy")
        if "no policies" in case:
            assert policies == []
            continue
        for party in parties(objects):
            assert allowed(objects, OUTSIDE, party) == frozenset(), (case, party)
            assert allowed(objects, party, OUTSIDE) != EVERYTHING, (case, party)
        assert all(policy["spec"]["policyTypes"] == ["Ingress", "Egress"] for policy in policies)


def test_every_port_that_a_pod_opens_is_somebodys_to_reach():
    """A port that is declared and that no edge leads to would be a port that nobody can use."""
    objects = render(merged(AUTH, PINNED, TWO_DEVICES))
    edges = edges_of(objects)
    for _, pod in pods(objects):
        name = component(pod)
        reached = {port for (_, target), ports in edges.items() if target == name for port in ports}
        ranges = [tuple(map(int, f"{port.split()[1]}-{port.split()[1]}".split("-")[:2])) for port in reached]
        for container in containers(pod):
            for port in container.get("ports", []):
                assert any(first <= port["containerPort"] <= last for first, last in ranges), (name, port)


@pytest.mark.parametrize("version", [OLD, NEW])
def test_pods_of_another_release_are_strangers(version: str):
    """Two clusters in one namespace do not mix, but for what clients may do."""
    ours = render(merged(AUTH, PINNED), kube_version=version)
    theirs = [Party(f"other {party.name}", labels=party.labels) for party in parties(render(AUTH, name="other"))]
    for other, party in itertools.product(theirs, parties(ours)):
        assert other.namespace == NAMESPACE
        may = {"TCP 50051"} if party.name == "router" else set()
        assert {shown(*port) for port in allowed(ours, other, party)} == may, (other.name, party.name)
