"""Where one more replica goes. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.domain.hardware import Inventory
from cluster.domain.parallel_layout import ParallelLayout, Placement
from cluster.planner.placement import place

_NODES_TOLD = 8


def place_replica(layout: ParallelLayout, inventory: Inventory, crowded: Mapping[str, int]) -> Placement | str:
    """A placement, or the reason why there is no room.

    ``crowded``: replicas of the same model by node id; nodes with fewer of them are preferred, so that one
    node's end takes few replicas with it.
    """
    levels = sorted({crowded.get(node.node_id, 0) for node in inventory.nodes})
    for most in levels:
        nodes = [node for node in inventory.nodes if crowded.get(node.node_id, 0) <= most]
        placements = place(layout, nodes, 1)
        if placements:
            return placements[0]
    return _no_room(layout.tensor_parallel_size, inventory)


def _no_room(width: int, inventory: Inventory) -> str:
    if not inventory.nodes:
        return f"no node has devices of the kind asked for; {width} on one node are needed"
    table = ", ".join(f"{n.host} has {n.free_devices} of {n.devices} free" for n in inventory.nodes[:_NODES_TOLD])
    if len(inventory.nodes) > _NODES_TOLD:
        table += f" and {len(inventory.nodes) - _NODES_TOLD} more nodes"
    if all(n.devices < width for n in inventory.nodes):
        return f"no node has {width} devices ({table}); choose a smaller tensor_parallel_size or add a larger node"
    return f"{width} free devices on one node are needed: {table}; free some or add a node"
