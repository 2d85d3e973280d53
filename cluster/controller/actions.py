"""What reconcile may ask for. Frozen; the loop carries them out."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.domain.ids import Incarnation


@dataclass(frozen=True, slots=True)
class Start:
    """Bring a new incarnation of a slot to life."""

    incarnation: Incarnation
    reason: str


@dataclass(frozen=True, slots=True)
class Advance:
    """Move a replica along its life cycle; ``drain_s`` goes with DRAIN: seconds that streams may take to end."""

    incarnation: Incarnation
    event: ReplicaEvent
    reason: str
    drain_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Remove:
    """Kill whatever is left of an ended incarnation, and forget it once nothing is."""

    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Fence:
    """Kill ranks of an incarnation that is not its slot's current one."""

    incarnation: Incarnation
    world_size: int


Action = Start | Advance | Remove | Fence
