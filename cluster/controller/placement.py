"""Where one more replica goes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from cluster.domain.hardware import Inventory
from cluster.domain.parallel_layout import ParallelLayout, Placement
from cluster.planner.placement import place

_NODES_TOLD = 8


def place_replica(
    layout: ParallelLayout, inventory: Inventory, crowded: Mapping[str, int], draining: Collection[str] = ()
) -> Placement | str:
    """A placement, or the reason why there is no room.

    ``crowded``: replicas of the same model by node id; nodes with fewer of them are preferred, so that one
    node's end takes few replicas with it. ``draining``: ids of nodes where nothing may go.
    """
    open_nodes = [node for node in inventory.nodes if node.node_id not in draining]
    levels = sorted({crowded.get(node.node_id, 0) for node in open_nodes})
    for most in levels:
        nodes = [node for node in open_nodes if crowded.get(node.node_id, 0) <= most]
        placements = place(layout, nodes, 1)
        if placements:
            return placements[0]
    closed = [node.host for node in inventory.nodes if node.node_id in draining]
    if closed and not open_nodes:
        return f"every node with devices of the kind asked for is {_draining(closed)}"
    reason = _no_room(layout.tensor_parallel_size, replace(inventory, nodes=tuple(open_nodes)))
    return f"{reason}; {_draining(closed)}" if closed else reason


def _draining(hosts: list[str]) -> str:
    told = ", ".join(hosts[:_NODES_TOLD])
    more = f" and {len(hosts) - _NODES_TOLD} more" if len(hosts) > _NODES_TOLD else ""
    return f"draining, and taken for nothing new: {told}{more}"


def _no_room(width: int, inventory: Inventory) -> str:
    if not inventory.nodes:
        return f"no node has devices of the kind asked for; {width} on one node are needed"
    table = ", ".join(f"{n.host} has {n.free_devices} of {n.devices} free" for n in inventory.nodes[:_NODES_TOLD])
    if len(inventory.nodes) > _NODES_TOLD:
        table += f" and {len(inventory.nodes) - _NODES_TOLD} more nodes"
    if all(n.devices < width for n in inventory.nodes):
        return f"no node has {width} devices ({table}); choose a smaller tensor_parallel_size or add a larger node"
    return f"{width} free devices on one node are needed: {table}; free some or add a node"
