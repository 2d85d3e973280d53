"""What the loop asks of whoever places and kills processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.config.schema import ModelConfig
from cluster.controller.desired import Desired, DesiredModel
from cluster.domain.ids import Incarnation


@dataclass(frozen=True, slots=True)
class StartOrder:
    """One incarnation to bring to life.

    ``port_candidates``: rendezvous ports that no other incarnation was offered. ``total_ranks``: of all desired
    replicas, which bounds what a host may come to hold.
    """

    incarnation: Incarnation
    model: DesiredModel
    port_candidates: tuple[int, ...]
    control_address: str
    total_ranks: int


@dataclass(frozen=True, slots=True)
class Talk:
    """What a start says, and asks, on its way.

    ``blocked`` hears why it waits ("": no more). ``placed`` hears on which nodes (by Ray's id) it is about to reserve
    devices, none when it has let go of them again. ``draining``: nodes where nothing may be placed now.
    """

    blocked: Callable[[str], None]
    placed: Callable[[frozenset[str]], None]
    draining: Callable[[], Collection[str]]


class Actuator(Protocol):
    """Places and kills. Every method is bounded in time; ReplicaError says in one sentence what went wrong."""

    async def start(self, order: StartOrder, talk: Talk) -> None:
        """Reserves devices, starts the ranks and tells them what to run.

        Waits for room until it is abandoned by ``destroy`` of the same incarnation.
        """

    async def watch(self, incarnation: Incarnation) -> str:
        """Returns when a rank process that ``start`` began has ended, with its story."""

    async def destroy(self, incarnation: Incarnation, world_size: int) -> None:
        """Kills every process of the incarnation, gives its devices back; returns when nothing is left."""

    async def sweep(self, live: frozenset[Incarnation], newest: frozenset[Incarnation] | None = None) -> None:
        """Removes whatever this cluster left behind on any node, ``live`` incarnations excepted.

        ``newest``: every slot's last one now; what is newer, or in no slot, is spared, for it may be just starting.
        ReplicaError when a node that lives could not be swept; the others have been.
        """

    async def nodes(self) -> Mapping[str, str]:
        """Ray's id of every node that lives -> the address by which the others reach it. ReplicaError."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the planner says about one model."""

    feasible: bool
    text: str
    json: str


class ModelPlanner(Protocol):
    """Checks a model and decides how it is laid out. ConfigError, NoFeasiblePlan: the user's to fix."""

    async def plan(self, config: ModelConfig, kept: Desired) -> DesiredModel:
        """``kept``: models whose devices are spoken for."""

    async def explain(self, config: ModelConfig, kept: Desired) -> Explanation: ...
