"""Placement: no device twice, tensor-parallel groups inside nodes, few nodes, as many replicas as there is room."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.domain.hardware import Node, device_type
from cluster.domain.parallel_layout import ParallelLayout
from cluster.planner.placement import capacity, place


def nodes_with(*free: int) -> tuple[Node, ...]:
    return tuple(Node(f"n{i}", f"h{i}", device_type("h100"), 8, count) for i, count in enumerate(free))


def test_a_replica_goes_to_the_node_it_fills_best() -> None:
    (placement,) = place(ParallelLayout(2, 2), nodes_with(8, 5, 4, 2))
    assert placement.node_ids == ("n2",)


def test_a_replica_too_large_for_a_node_takes_the_fewest() -> None:
    (placement,) = place(ParallelLayout(4, 3), nodes_with(4, 8, 4, 8))
    assert len(placement.node_ids) == 2
    assert [rank.node_id for rank in placement.ranks[:8]] == ["n1"] * 8


def test_what_is_taken_is_not_given_again() -> None:
    nodes = nodes_with(4, 4)
    assert place(ParallelLayout(4), nodes, taken={"n0": 1})[0].node_ids == ("n1",)
    assert capacity(ParallelLayout(4), nodes, taken={"n0": 1, "n1": 4}) == 0


@given(
    free=st.lists(st.integers(0, 8), min_size=1, max_size=6),
    tp=st.integers(1, 8),
    pp=st.integers(1, 4),
    replicas=st.integers(0, 6),
)
def test_placements_are_sound_and_complete(free: list[int], tp: int, pp: int, replicas: int) -> None:
    layout, nodes = ParallelLayout(tp, pp), nodes_with(*free)
    placements = place(layout, nodes, replicas)
    assert len(placements) == min(replicas, capacity(layout, nodes))
    used = Counter(rank.node_id for placement in placements for rank in placement.ranks)
    assert all(used[node.node_id] <= node.free_devices for node in nodes)
    for placement in placements:
        assert len(placement.ranks) == layout.world_size
        for stage in range(pp):
            group = {rank.node_id for rank in placement.ranks if layout.stage_of(rank.rank) == stage}
            assert len(group) == 1
