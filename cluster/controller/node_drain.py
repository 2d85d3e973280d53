"""Empties nodes that are about to go: closes them, waits until nothing is left there, forgets them once they left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace

from cluster.config.schema import MAX_DRAIN_S
from cluster.controller.actuator import Actuator
from cluster.controller.fleet import Fleet
from cluster.controller.store import StoredState
from cluster.domain.clock import Clock
from cluster.domain.errors import ClusterError, ConfigError, ReplicaError
from cluster.telemetry.logs import Logger

# After the drain's own deadline: killing, giving back, sweeping.
MARGIN_S = 90.0
WAIT_POLL_S = 0.2
# Only while a node is draining: otherwise nobody is asked.
LEFT_POLL_S = 5.0
_TOLD = 8


@dataclass(frozen=True, slots=True)
class Errands:
    """What the loop does for it: ``wake`` asks for a pass, ``spawn`` starts a task, ``save`` changes what is stored."""

    wake: Callable[[], None]
    spawn: Callable[[Coroutine[None, None, None]], None]
    save: Callable[[Callable[[StoredState], StoredState]], Awaitable[None]]


class NodeDrains:
    """Belongs to the controller's event loop, like ``fleet``."""

    def __init__(self, fleet: Fleet, actuator: Actuator, clock: Clock, log: Logger, errands: Errands) -> None:
        self._fleet, self._actuator, self._clock, self._log = fleet, actuator, clock, log
        self._errands = errands
        self._watching = False

    def resume(self, draining: Mapping[str, str]) -> None:
        """Keeps closed what an earlier controller had closed. Its deadlines are gone: whoever waits asks again."""
        for node_id, host in draining.items():
            self._fleet.drain_nodes({node_id}, host, self._clock.now() + MAX_DRAIN_S)
        self._watch()

    async def drain(self, host: str, deadline_s: float) -> None:
        """Returns when no rank is left on the node at ``host``, which stays closed.

        ConfigError when no living node has that address; ReplicaError when something is left after the deadline and
        a margin.
        """
        began_s = self._clock.now()
        nodes = await self._actuator.nodes()
        found = frozenset(node_id for node_id, address in nodes.items() if address == host)
        if not found:
            raise ConfigError(f"No node of the cluster has the address {host!r}; nodes are: {_list(nodes.values())}.")
        self._fleet.drain_nodes(found, host, began_s + deadline_s)
        self._log.info("node_draining", node=host, deadline_s=deadline_s, caused_by="an operator asked for it")
        self._errands.wake()
        self._watch()
        await self._save()
        await self._until_empty(host, found, began_s + deadline_s + MARGIN_S)
        self._log.info("node_drained", node=host, after_s=round(self._clock.now() - began_s, 3))

    async def _until_empty(self, host: str, node_ids: frozenset[str], give_up_s: float) -> None:
        while (left := self._fleet.observed().on_nodes(node_ids)) or self._adopting():
            if self._clock.now() > give_up_s:
                names = _list(str(view.incarnation) for view in left)
                raise ReplicaError(f"Node {host} is not empty: {names} did not go; see the controller's log.")
            await asyncio.sleep(WAIT_POLL_S)

    def _adopting(self) -> bool:
        """Whether ranks of an earlier controller may be there that nobody has heard of yet."""
        return self._clock.now() < self._fleet.observed().adopt_until_s

    def _watch(self) -> None:
        if self._fleet.draining() and not self._watching:
            self._watching = True
            self._errands.spawn(self._forget_those_that_leave())

    async def _forget_those_that_leave(self) -> None:
        try:
            while before := self._fleet.draining():
                await asyncio.sleep(LEFT_POLL_S)
                try:
                    self._fleet.keep_nodes(await self._actuator.nodes())
                except ClusterError as error:
                    self._log.warning("nodes_unknown", caused_by=str(error))
                if self._fleet.draining() != before:
                    await self._save()
        finally:
            self._watching = False

    async def _save(self) -> None:
        """A full disk must not keep a node from being emptied."""
        try:
            await self._errands.save(lambda state: replace(state, draining=self._fleet.draining()))
        except OSError as error:
            self._log.warning("state_not_saved", caused_by=str(error))


def _list(names: Iterable[str]) -> str:
    told = sorted(set(names))
    return (", ".join(told[:_TOLD]) + (" ..." if len(told) > _TOLD else "")) or "none"
