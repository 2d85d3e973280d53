"""Ports, placement, names and specs: everything that is decided before a rank starts."""

from __future__ import annotations

import pytest

from cluster.controller.actuator import StartOrder
from cluster.controller.placement import place_replica
from cluster.controller.ports import PortRange
from cluster.controller.rank_marker import (
    SweepOrder,
    group_name,
    parse_group_name,
    parse_marker,
    rank_marker,
)
from cluster.controller.rank_specs import ClusterFacts, HostFacts, rank_specs
from cluster.controller.rendezvous import ports_needed
from cluster.domain.errors import ReplicaError
from cluster.domain.hardware import DeviceKind
from cluster.domain.ids import RankId
from cluster.domain.parallel_layout import ParallelLayout, Placement, StageLayers
from cluster.engine.rank_spec import collective_for
from tests.unit.controller.builders import SETTINGS, incarnation, inventory, model, node

TP2 = ParallelLayout(2)


# ---- ports ----


def test_ports_are_not_handed_out_twice_until_the_range_wraps():
    ports, seen = PortRange(20000, 20009), []
    for _ in range(5):
        taken, ports = ports.take(2)
        seen += taken
    assert sorted(seen) == list(range(20000, 20010))
    assert ports.take(2)[0] == (20000, 20001)


def test_the_cursor_is_all_there_is_to_remember():
    _, ports = PortRange(20000, 23999).take(8)
    assert PortRange(20000, 23999, ports.cursor).take(1)[0] == (20008,)


# ---- placement ----


def test_the_fullest_node_that_fits_is_taken():
    placed = place_replica(TP2, inventory(node("a", 4), node("b", 4, free=2)), {})
    assert placed.node_ids == ("b",)


def test_replicas_of_one_model_go_to_different_nodes():
    placed = place_replica(TP2, inventory(node("a", 4), node("b", 4, free=2)), {"b": 1})
    assert placed.node_ids == ("a",)


def test_they_share_a_node_rather_than_wait():
    placed = place_replica(TP2, inventory(node("a", 4)), {"a": 1})
    assert placed.node_ids == ("a",)


def test_a_draining_node_takes_nothing_and_is_named():
    nodes = inventory(node("a", 4), node("b", 4))
    assert place_replica(TP2, nodes, {"b": 1}, {"a"}).node_ids == ("b",)
    reason = place_replica(TP2, nodes, {}, {"a", "b"})
    assert reason.endswith("asked for is draining, and taken for nothing new: host-a, host-b")
    reason = place_replica(TP2, inventory(node("a", 4), node("b", 4, free=1)), {}, {"a"})
    assert "host-b has 1 of 4 free" in reason
    assert reason.endswith("; draining, and taken for nothing new: host-a")
    assert "draining" not in place_replica(TP2, inventory(node("a", 1)), {}, {"z"})


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ((), "no node has devices"),
        ((node("a", 1),), "choose a smaller tensor_parallel_size"),
        ((node("a", 4, free=1),), "host-a has 1 of 4 free"),
    ],
)
def test_no_room_is_explained(nodes, words):
    from cluster.domain.hardware import Inventory

    assert words in place_replica(TP2, Inventory(nodes), {})


# ---- names ----


@pytest.mark.parametrize("name", ["m", "org.m-1", "a_b"])
def test_names_are_read_back(name):
    who = incarnation(3, 12, name)
    assert parse_marker(rank_marker("c", RankId(who, 5))) == ("c", RankId(who, 5))
    assert parse_group_name(group_name("c", who)) == ("c", who)


@pytest.mark.parametrize("text", ["", "x", "c/m/0", "c/m/0#1", "c/m/x#1.0", "/m/0#1.0", "c/0#1.0"])
def test_other_names_are_not_ours(text):
    assert parse_marker(text) is None


def test_a_sweep_condemns_the_dead_of_its_own_run_only():
    order = SweepOrder("c", "/run/a", (1, 2), live=frozenset({incarnation(0, 2)}))
    assert order.condemns("c/m/0#1.0", "/run/a")
    assert not order.condemns("c/m/0#2.1", "/run/a")
    assert not order.condemns("c/m/0#1.0", "/run/b")
    assert not order.condemns("other/m/0#1.0", "/run/a")
    assert not order.condemns("nonsense", "/run/a")


def test_a_sweep_of_one_incarnation_touches_no_other():
    order = SweepOrder("c", "/run/a", (1, 2), only=incarnation(0, 2))
    assert order.condemns("c/m/0#2.1", "/run/a")
    assert not order.condemns("c/m/0#1.0", "/run/a")


# ---- specs ----


PORTS = tuple(range(20000, 20012))


def specs_for(free_ports=PORTS, total_ranks=2, cores=4, devices=8, nodes=("a",), **changes):
    order = StartOrder(incarnation(1, 3), model(**changes), PORTS, "10.0.0.9:50052", total_ranks)
    placement = place_replica(order.model.layout, inventory(*(node(name, devices) for name in nodes)), {})
    assert isinstance(placement, Placement)
    facts = tuple(HostFacts(rank, cores, free_ports) for rank in range(order.model.layout.world_size))
    return rank_specs(
        order, placement, facts, dict.fromkeys(nodes, devices), ClusterFacts("c", "/run", SETTINGS), "served"
    )


def pipeline(**options):
    """TP 2 in two stages, each on a node of its own unless the devices say otherwise."""
    stages = (StageLayers(0, 3), StageLayers(3, 5))
    return specs_for(
        **{"devices": 2, "nodes": ("a", "b"), "total_ranks": 4, **options},
        layout=ParallelLayout(2, 2), stages=stages, weight_bytes_per_rank=(1, 2, 3, 4),
    )  # fmt: skip


def test_every_rank_is_told_the_same_meeting_point():
    first, second = specs_for()
    assert (first.rank, second.rank) == (0, 1)
    assert first.is_leader
    assert not second.is_leader
    assert {(s.master_host, s.master_port, s.plan_port) for s in (first, second)} == {("host-a", 20000, 20001)}
    assert second.log_file == "/run/logs/rank-m-1-g3-r1.log"
    assert second.world_size == 2
    assert second.weight_bytes == 1000


def test_too_few_free_ports_are_an_error_that_names_the_range():
    with pytest.raises(ReplicaError, match="rank_ports"):
        specs_for(free_ports=(20000,))


def test_every_rank_of_a_pipeline_knows_its_neighbours_and_its_stage():
    specs = pipeline()
    hosts = ["host-a", "host-a", "host-b", "host-b"]
    assert [s.host for s in specs] == hosts
    assert [s.stage(5).layers for s in specs] == [StageLayers(0, 3)] * 2 + [StageLayers(3, 5)] * 2
    assert [s.tensor_rank for s in specs] == [0, 1, 0, 1]
    assert {s.sampling_rank for s in specs} == {2}
    assert [s.weight_bytes for s in specs] == [1, 2, 3, 4]
    assert [s.master_host for s in specs] == hosts
    assert specs[0].master_port == specs[1].master_port != specs[2].master_port == specs[3].master_port
    assert {(s.plan_host, s.plan_port) for s in specs} == {("host-a", specs[0].plan_port)}
    assert [(s.next_host, s.next_port) for s in specs[:2]] == [(s.host, s.link_port) for s in specs[2:]]
    assert [s.link_port for s in specs[:2]] == [s.next_port for s in specs[2:]] == [0, 0]
    used = [specs[0].plan_port, specs[0].master_port, specs[2].master_port, specs[2].link_port, specs[3].link_port]
    assert len(set(used)) == ports_needed(ParallelLayout(2, 2)) == 5
    assert set(used) <= set(PORTS)


def test_each_stage_adds_up_in_shared_memory_while_its_host_has_cores_for_all_ranks_there():
    assert {s.collective for s in pipeline(cores=2)} == {"shm"}
    assert {s.collective for s in pipeline(devices=4, nodes=("a",), cores=4)} == {"shm"}
    assert {s.collective for s in pipeline(devices=4, nodes=("a",), cores=3)} == {"gloo"}
    assert {s.threads for s in pipeline(devices=4, nodes=("a",), cores=4)} == {1}


def test_a_port_must_be_free_where_it_is_listened_on():
    order = StartOrder(
        incarnation(),
        model(layout=ParallelLayout(1, 2), stages=(StageLayers(0, 1), StageLayers(1, 2))),
        PORTS,
        "c:1",
        2,
    )
    placement = place_replica(order.model.layout, inventory(node("a", 1), node("b", 1)), {})
    facts = (HostFacts(1, 4, (20001, 20003)), HostFacts(2, 4, (20003, 20004, 20005)))
    first, second = rank_specs(order, placement, facts, {"a": 1, "b": 1}, ClusterFacts("c", "/run", SETTINGS), "served")
    assert (first.master_port, first.plan_port) == (20001, 20003)
    assert (second.master_port, second.link_port) == (20004, 20005)
    busy = (facts[0], HostFacts(2, 4, (20001, 20003)))
    with pytest.raises(ReplicaError, match=r"host-b has too few free ports .* rank_ports"):
        rank_specs(order, placement, busy, {"a": 1, "b": 1}, ClusterFacts("c", "/run", SETTINGS), "served")


@pytest.mark.parametrize(("total", "collective", "threads"), [(2, "shm", 2), (4, "shm", 1), (6, "gloo", 1)])
def test_ranks_that_the_host_may_come_to_hold_decide_how_they_add_up(total, collective, threads):
    spec = specs_for(total_ranks=total)[0]
    assert (spec.collective, spec.threads) == (collective, threads)


@pytest.mark.parametrize(
    ("device", "tp", "hosts", "ranks", "cores", "expected"),
    [
        (DeviceKind.CUDA, 8, 2, 8, 1, "nccl"),
        (DeviceKind.CPU, 2, 1, 2, 2, "shm"),
        (DeviceKind.CPU, 2, 1, 4, 2, "gloo"),
        (DeviceKind.CPU, 2, 2, 2, 2, "gloo"),
        (DeviceKind.CPU, 2, 1, 4, 4, "shm"),
        (DeviceKind.CPU, 1, 1, 1, 8, "gloo"),
    ],
)
def test_collectives(device, tp, hosts, ranks, cores, expected):
    assert collective_for(device, tp, hosts=hosts, ranks_on_host=ranks, cores_on_host=cores) == expected
