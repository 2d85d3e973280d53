"""Why nodes that should be here are not: asked where a model or a replica waits for room, told to its operator."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.config.schema import ModelConfig
from cluster.controller.actuator import Actuator, Explanation, ModelPlanner, StartOrder, Talk
from cluster.controller.desired import Desired, DesiredModel
from cluster.domain.errors import NoFeasiblePlan
from cluster.domain.ids import Incarnation


class NodeOutlook(Protocol):
    """Whoever started the nodes, and sees those that never joined."""

    def reason(self) -> str:
        """One sentence, "" when nothing is missing or nothing is known. Never blocks and never raises."""


@dataclass(frozen=True, slots=True)
class OutlookEntry:
    """How another process makes its outlook: ``entry`` is "MODULE:FUNCTION", called with ``argument``."""

    entry: str
    argument: str

    def load(self) -> NodeOutlook | None:
        module, _, name = self.entry.partition(":")
        make: Callable[[str], NodeOutlook | None] = getattr(importlib.import_module(module), name)
        return make(self.argument)


def with_reason(text: str, outlook: NodeOutlook) -> str:
    why = outlook.reason()
    return f"{text.rstrip('.')}; {why}." if why else text


class OutlookPlanner:
    """A ``ModelPlanner`` that also says which nodes are still to come when nothing fits."""

    def __init__(self, planner: ModelPlanner, outlook: NodeOutlook) -> None:
        self._planner, self._outlook = planner, outlook

    async def plan(self, config: ModelConfig, kept: Desired) -> DesiredModel:
        try:
            return await self._planner.plan(config, kept)
        except NoFeasiblePlan as error:
            text = with_reason(str(error), self._outlook)
            raise NoFeasiblePlan(text, error.candidates, error.smallest_change) from error

    async def explain(self, config: ModelConfig, kept: Desired) -> Explanation:
        found = await self._planner.explain(config, kept)
        why = "" if found.feasible else self._outlook.reason()
        return replace(found, text=f"{found.text}\n{why}") if why else found


class OutlookActuator:
    """An ``Actuator`` whose waiting starts also say which nodes are still to come."""

    def __init__(self, actuator: Actuator, outlook: NodeOutlook) -> None:
        self._actuator, self._outlook = actuator, outlook

    async def start(self, order: StartOrder, talk: Talk) -> None:
        def blocked(reason: str) -> None:
            talk.blocked(with_reason(reason, self._outlook) if reason else "")

        await self._actuator.start(order, replace(talk, blocked=blocked))

    async def watch(self, incarnation: Incarnation) -> str:
        return await self._actuator.watch(incarnation)

    async def destroy(self, incarnation: Incarnation, world_size: int) -> None:
        await self._actuator.destroy(incarnation, world_size)

    async def sweep(self, live: frozenset[Incarnation], newest: frozenset[Incarnation] | None = None) -> None:
        await self._actuator.sweep(live, newest)

    async def nodes(self) -> Mapping[str, str]:
        return await self._actuator.nodes()
