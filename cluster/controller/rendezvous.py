"""Where the ranks of one incarnation meet: a port for every listener among them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.domain.errors import ReplicaError
from cluster.domain.parallel_layout import ParallelLayout, Placement


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The ports of one incarnation.

    ``plan_port`` on the leader's host; ``master_ports`` by stage, each on the host of the stage's first rank;
    ``link_ports`` by rank, on its own host: 0 in the first stage, which takes no hidden states.
    """

    plan_port: int
    master_ports: tuple[int, ...]
    link_ports: tuple[int, ...]


def ports_needed(layout: ParallelLayout) -> int:
    """One for plans, one for each stage's torch world, and one for each rank that takes hidden states."""
    return 1 + layout.pipeline_parallel_size + layout.world_size - layout.tensor_parallel_size


def assign_ports(
    layout: ParallelLayout,
    placement: Placement,
    free_ports: Sequence[tuple[int, ...]],
    candidates: tuple[int, ...],
    port_range: tuple[int, int],
) -> Rendezvous:
    """``free_ports``: by rank, those of ``candidates`` that are free on its host. ReplicaError when they do not do.

    No port is given twice within an incarnation, not even on two hosts: the shared-memory kernel names its segments
    by host and port, and two worlds that shared them would give wrong sums.
    """
    left = dict.fromkeys(candidates)

    def take(rank: int) -> int:
        free = set(free_ports[rank])
        port = next((port for port in left if port in free), None)
        if port is None:
            first, last = port_range
            raise ReplicaError(
                f"{placement.ranks[rank].host} has too few free ports among {', '.join(map(str, candidates))}; "
                f"free some or set rank_ports to another range than {first}-{last}."
            )
        del left[port]
        return port

    tp = layout.tensor_parallel_size
    first_master, plan_port = take(0), take(0)
    masters = (first_master, *(take(stage * tp) for stage in range(1, layout.pipeline_parallel_size)))
    links = tuple(0 if rank < tp else take(rank) for rank in range(layout.world_size))
    return Rendezvous(plan_port, masters, links)
