"""Which node each rank goes to: best fit, whole replicas on one node where they fit, few nodes otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.domain.hardware import Node
from cluster.domain.parallel_layout import ParallelLayout, Placement, RankPlacement


def capacity(layout: ParallelLayout, nodes: Sequence[Node], taken: Mapping[str, int] | None = None) -> int:
    """How many replicas of ``layout`` find room; ``taken``: devices used up beyond what the nodes say."""
    groups = sum(_free(node, taken) // layout.tensor_parallel_size for node in nodes)
    return groups // layout.pipeline_parallel_size


def place(
    layout: ParallelLayout, nodes: Sequence[Node], replicas: int = 1, taken: Mapping[str, int] | None = None
) -> tuple[Placement, ...]:
    """Placements of up to ``replicas`` replicas, fewer when the nodes are full.

    A stage's tensor-parallel group stays inside a node; stages may lie on different ones. A replica goes to the
    node it fills best; one that no node can hold goes to as few nodes as possible.
    """
    free = {node.node_id: _free(node, taken) for node in nodes}
    placements: list[Placement] = []
    while len(placements) < replicas:
        chosen = _choose(layout, nodes, free)
        if chosen is None:
            break
        ranks: list[RankPlacement] = []
        for node, stages in chosen:
            count = stages * layout.tensor_parallel_size
            free[node.node_id] -= count
            ranks += [RankPlacement(len(ranks) + i, node.node_id, node.host) for i in range(count)]
        placements.append(Placement(tuple(ranks)))
    return tuple(placements)


def _free(node: Node, taken: Mapping[str, int] | None) -> int:
    return max(0, node.free_devices - (taken or {}).get(node.node_id, 0))


def _choose(layout: ParallelLayout, nodes: Sequence[Node], free: Mapping[str, int]) -> list[tuple[Node, int]] | None:
    """(node, stages on it) in rank order, None when there is not enough room."""
    tp, left = layout.tensor_parallel_size, layout.pipeline_parallel_size
    room = {node.node_id: free[node.node_id] // tp for node in nodes}
    if sum(room.values()) < left:
        return None
    order = {node.node_id: index for index, node in enumerate(nodes)}
    chosen: list[tuple[Node, int]] = []
    candidates = list(nodes)
    while left:
        whole = [node for node in candidates if room[node.node_id] >= left]
        if whole:  # the fullest node that can take all the rest
            node = min(whole, key=lambda n: (free[n.node_id], order[n.node_id]))
        else:
            node = max(candidates, key=lambda n: (room[n.node_id], -order[n.node_id]))
        stages = min(left, room[node.node_id])
        chosen.append((node, stages))
        candidates.remove(node)
        left -= stages
    return chosen
