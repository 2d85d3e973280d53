"""The actuator on Ray: one placement group per replica, one detached actor per rank."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.controller.actuator import StartOrder, Talk
from cluster.controller.desired import DesiredModel
from cluster.controller.node_sweep import sweep_node
from cluster.controller.placement import place_replica
from cluster.controller.rank_actor import RANK_ENTRY, RankActor
from cluster.controller.rank_marker import (
    RANK_VARIABLE,
    RUN_VARIABLE,
    SweepOrder,
    Swept,
    group_name,
    parse_group_name,
    rank_marker,
)
from cluster.controller.rank_specs import ClusterFacts, HostFacts, rank_specs
from cluster.controller.ray_observer import RayCalls, RayObserver
from cluster.controller.served_digest import served_digest, weights_seen
from cluster.domain.errors import ReplicaError
from cluster.domain.hardware import DeviceKind, Inventory
from cluster.domain.ids import Incarnation, RankId
from cluster.domain.parallel_layout import Placement

NAMESPACE = "llm-cluster"
ROOM_POLL_S = 2.0
LOOK_KEPT_S = 0.5  # hundreds that wait for room share one look at the nodes
GROUP_DEADLINE_S = 10.0
ACTOR_DEADLINE_S = 120.0
FILES_DEADLINE_S = 60.0
SWEEP_DEADLINE_S = 20.0


@dataclass(slots=True)
class _Start:
    """One that is going on. ``asked``: whether Ray was asked for anything that would have to be removed."""

    asked: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class RayActuator:
    """Implements ``Actuator``. ``entry`` is what a rank runs, MODULE:FUNCTION taking a RankSpec."""

    def __init__(self, shared: ClusterFacts, observer: RayObserver, calls: RayCalls, entry: str = RANK_ENTRY) -> None:
        self._shared = shared
        self._observer = observer
        self._calls = calls
        self._entry = entry
        self._placing = asyncio.Lock()
        self._abandoned: set[Incarnation] = set()
        self._starting: dict[Incarnation, _Start] = {}
        self._crowd: dict[Incarnation, Placement] = {}
        self._looks: dict[DeviceKind, Inventory] = {}  # another one whenever we have changed what is free
        self._holds: dict[Incarnation, list[Any]] = {}
        self._weights_seen: dict[str, asyncio.Future[str]] = {}  # looks at the disk, by where they are; one at a time
        self._own_node = ray.get_runtime_context().get_node_id()

    # ---- start ----

    async def start(self, order: StartOrder, talk: Talk) -> None:
        start = self._starting[order.incarnation] = _Start()
        try:
            placement, inventory, group = await self._reserve(order, talk)
            await self._launch(order, placement, inventory, group)
        except ray.exceptions.RayError as error:
            raise ReplicaError(f"{order.incarnation} could not be started: {_first_line(error)}") from error
        finally:
            del self._starting[order.incarnation]
            start.ended.set()

    async def _reserve(self, order: StartOrder, talk: Talk) -> tuple[Placement, Inventory, PlacementGroup]:
        """Waits until there is room and Ray has given it."""
        while True:
            async with self._placing:
                self._check_wanted(order.incarnation)
                inventory = await self._look(order.model.device)
                crowded = self._crowded(order.incarnation)
                placement = place_replica(order.model.layout, inventory, crowded, talk.draining())
                if isinstance(placement, Placement):
                    talk.placed(frozenset(placement.node_ids))  # nobody else ran since ``draining`` was asked
                    self._starting[order.incarnation].asked = True
                    group = await asyncio.to_thread(self._make_group, order, placement)
                    self._looks = {}
                    if group is not None:
                        talk.blocked("")
                        self._crowd[order.incarnation] = placement
                        return placement, inventory, group
                    talk.placed(frozenset())
                    placement = f"Ray did not grant the reservation within {GROUP_DEADLINE_S:.0f} s"
            talk.blocked(placement)
            await asyncio.sleep(ROOM_POLL_S)

    async def _look(self, kind: DeviceKind) -> Inventory:
        looks = self._looks
        found = looks.get(kind)
        if found is None:
            found = looks[kind] = await asyncio.to_thread(self._observer.inventory, kind)
            asyncio.get_running_loop().call_later(LOOK_KEPT_S, looks.pop, kind, None)
        return found

    def _crowded(self, incarnation: Incarnation) -> dict[str, int]:
        counts: dict[str, int] = {}
        for other, placement in self._crowd.items():
            if other.replica.model == incarnation.replica.model:
                for node_id in placement.node_ids:
                    counts[node_id] = counts.get(node_id, 0) + 1
        return counts

    def _make_group(self, order: StartOrder, placement: Placement) -> PlacementGroup | None:
        bundle = {"CPU": 1, "GPU": 1} if order.model.device is DeviceKind.CUDA else {"CPU": 1}
        self._calls.count("placement_group")
        group = placement_group(
            [bundle for _ in placement.ranks],
            bundle_label_selector=[{"ray.io/node-id": rank.node_id} for rank in placement.ranks],
            lifetime="detached",
            name=group_name(self._shared.cluster_name, order.incarnation),
        )
        if group.wait(GROUP_DEADLINE_S):
            return group
        remove_placement_group(group)
        return None

    async def _launch(
        self, order: StartOrder, placement: Placement, inventory: Inventory, group: PlacementGroup
    ) -> None:
        actors = await asyncio.to_thread(self._make_actors, order, placement, group)
        asked = [
            actor.prepare.remote(place.host, order.port_candidates)
            for actor, place in zip(actors, placement.ranks, strict=True)
        ]
        facts: tuple[HostFacts, ...] = tuple(await self._results(asked))
        devices = {node.node_id: node.devices for node in inventory.nodes}
        served = await self._served_digest(order.model)  # last: ranks read the files that are there from now on
        specs = rank_specs(order, placement, facts, devices, self._shared, served)
        self._check_wanted(order.incarnation)
        self._holds[order.incarnation] = [actor.hold.remote() for actor in actors]
        await self._results([actor.launch.remote(spec, self._entry) for actor, spec in zip(actors, specs, strict=True)])

    async def _served_digest(self, model: DesiredModel) -> str:
        where = model.checkpoint_path
        look = self._weights_seen.get(where)
        if look is None or look.done():  # else a file system hangs: one thread that waits for it is enough
            look = self._weights_seen[where] = asyncio.ensure_future(asyncio.to_thread(weights_seen, model))
            look.add_done_callback(_heard)
        try:
            weights = await asyncio.wait_for(asyncio.shield(look), FILES_DEADLINE_S)
        except TimeoutError as error:
            limit = f"{FILES_DEADLINE_S:.0f} s"
            raise ReplicaError(f"the files in {where} did not answer the controller within {limit}") from error
        except OSError as error:
            raise ReplicaError(f"the controller cannot look at the files in {where}: {error}") from error
        return served_digest(model, weights)

    def _make_actors(self, order: StartOrder, placement: Placement, group: PlacementGroup) -> list[Any]:
        self._check_wanted(order.incarnation)
        cuda = order.model.device is DeviceKind.CUDA
        remote = ray.remote(RankActor)
        actors = []
        for place in placement.ranks:
            rank_id = RankId(order.incarnation, place.rank)
            self._calls.count("create_actor")
            options = remote.options(
                name=rank_marker(self._shared.cluster_name, rank_id),
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                max_concurrency=4,
                num_cpus=1,
                num_gpus=1 if cuda else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, place.rank),
                runtime_env={"env_vars": self._environment(order, rank_id)},
            )
            actors.append(options.remote())
        return actors

    def _environment(self, order: StartOrder, rank_id: RankId) -> dict[str, str]:
        environment = {
            RANK_VARIABLE: rank_marker(self._shared.cluster_name, rank_id),
            RUN_VARIABLE: self._shared.run_dir,
            "OMP_NUM_THREADS": "1",  # the rank sets torch's threads itself
            "TOKENIZERS_PARALLELISM": "false",
        }
        if Path(order.model.checkpoint_path).is_absolute():
            environment["HF_HUB_OFFLINE"] = "1"
        return environment

    async def _results(self, references: list[Any]) -> list[Any]:
        self._calls.count("actor_call")
        waits = asyncio.gather(*(asyncio.wrap_future(reference.future()) for reference in references))
        try:
            return list(await asyncio.wait_for(waits, ACTOR_DEADLINE_S))
        except TimeoutError as error:
            raise ReplicaError(f"its rank processes did not answer within {ACTOR_DEADLINE_S:.0f} s") from error

    def _check_wanted(self, incarnation: Incarnation) -> None:
        if incarnation in self._abandoned:
            raise ReplicaError(f"{incarnation} is not wanted any more")

    async def watch(self, incarnation: Incarnation) -> str:
        holds = [asyncio.wrap_future(hold.future()) for hold in self._holds.get(incarnation, [])]
        if not holds:
            return "its rank processes are not known"
        done, _ = await asyncio.wait(holds, return_when=asyncio.FIRST_COMPLETED)
        ended = done.pop()
        rank = holds.index(ended)
        error = ended.exception()
        return f"dead: rank {rank}'s process ended: {_first_line(error) if error else 'it returned'}"

    # ---- removal ----

    async def destroy(self, incarnation: Incarnation, world_size: int) -> None:
        self._abandoned.add(incarnation)
        try:
            if await self._found_no_room(incarnation):
                return
            shared = self._shared
            order = SweepOrder(
                shared.cluster_name, shared.run_dir, shared.settings.rank_ports, frozenset(), incarnation
            )
            swept = await asyncio.to_thread(sweep_node, order)
            await asyncio.to_thread(self._release, incarnation, world_size)
            starting = self._starting.get(incarnation)
            if starting is not None:
                await asyncio.wait_for(starting.ended.wait(), ACTOR_DEADLINE_S + GROUP_DEADLINE_S)
                await asyncio.to_thread(self._release, incarnation, world_size)
            await self._group_gone(incarnation)
            self._looks = {}
            others = await self._sweep_nodes(order)
            left = [pid for node in (swept, *others) for pid in node.left]
            if left:
                raise ReplicaError(f"{incarnation} is not gone: processes {left} do not die")
        except TimeoutError as error:
            raise ReplicaError(f"{incarnation} is not gone: its start does not end") from error
        except ray.exceptions.RayError as error:
            raise ReplicaError(f"{incarnation} is not gone: {_first_line(error)}") from error
        finally:
            self._abandoned.discard(incarnation)
        self._holds.pop(incarnation, None)
        self._crowd.pop(incarnation, None)

    async def _found_no_room(self, incarnation: Incarnation) -> bool:
        """Whether its start has ended now without a reservation: nothing of it is anywhere.

        The nodes need not be searched then, which hundreds that waited in vain would do at once.
        """
        start = self._starting.get(incarnation)
        if start is None or start.asked:
            return False
        await asyncio.wait_for(start.ended.wait(), ACTOR_DEADLINE_S + GROUP_DEADLINE_S)
        return not start.asked

    def _release(self, incarnation: Incarnation, world_size: int) -> None:
        """Kills the actors and gives the reservation back; neither need exist."""
        cluster = self._shared.cluster_name
        for rank in range(world_size):
            self._calls.count("kill_actor")
            try:
                actor = ray.get_actor(rank_marker(cluster, RankId(incarnation, rank)), namespace=NAMESPACE)
                ray.kill(actor, no_restart=True)
            except ValueError:  # Ray's word for "no such actor"
                continue
        self._calls.count("remove_placement_group")
        try:
            remove_placement_group(get_placement_group(group_name(cluster, incarnation)))
        except ValueError:
            return

    async def _group_gone(self, incarnation: Incarnation) -> None:
        name = group_name(self._shared.cluster_name, incarnation)
        for _ in range(int(GROUP_DEADLINE_S / 0.05)):
            if name not in await asyncio.to_thread(self._group_names):
                return
            await asyncio.sleep(0.05)
        raise ReplicaError(f"the reservation of {incarnation} is not given back")

    def _group_names(self) -> list[str]:
        self._calls.count("placement_group_table")
        table: dict[str, dict[str, Any]] = placement_group_table()
        return [group["name"] for group in table.values() if group["state"] != "REMOVED"]

    # ---- sweeping ----

    async def sweep(self, live: frozenset[Incarnation], newest: frozenset[Incarnation] | None = None) -> None:
        shared = self._shared
        order = SweepOrder(shared.cluster_name, shared.run_dir, shared.settings.rank_ports, live, None, newest)
        try:
            for name in await asyncio.to_thread(self._group_names):
                parsed = parse_group_name(name)
                if parsed and parsed[0] == shared.cluster_name and order.condemns_incarnation(parsed[1]):
                    self._calls.count("remove_placement_group")
                    group = await asyncio.to_thread(get_placement_group, name)
                    await asyncio.to_thread(remove_placement_group, group)
                    await self._group_gone(parsed[1])
            await self._sweep_nodes(order)
        except (ray.exceptions.RayError, ValueError) as error:
            raise ReplicaError(f"the sweep did not end: {_first_line(error)}") from error

    async def nodes(self) -> Mapping[str, str]:
        try:
            return dict(await asyncio.to_thread(self._observer.live_nodes))
        except ray.exceptions.RayError as error:
            raise ReplicaError(f"Ray does not say which nodes live: {_first_line(error)}; try again.") from error

    async def _sweep_nodes(self, order: SweepOrder) -> list[Swept]:
        """On our own node directly, on the others by a task pinned to each; a node that is gone has nothing left."""
        nodes = await asyncio.to_thread(self._observer.live_nodes)
        elsewhere = [self._sweep_far(node_id, order) for node_id, _ in nodes if node_id != self._own_node]
        swept = await asyncio.gather(asyncio.to_thread(sweep_node, order), *elsewhere, return_exceptions=True)
        for result in swept:  # once every node has had its turn
            if isinstance(result, BaseException):
                raise result
        return [result for result in swept if isinstance(result, Swept)]

    async def _sweep_far(self, node_id: str, order: SweepOrder) -> Swept:
        self._calls.count("sweep_task")
        task = ray.remote(sweep_node).options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        wait = asyncio.wrap_future(task.remote(order).future())
        try:
            swept: Swept = await asyncio.wait_for(wait, SWEEP_DEADLINE_S)
        except (TimeoutError, ray.exceptions.RayError) as error:
            if node_id in {node for node, _ in await asyncio.to_thread(self._observer.live_nodes)}:
                raise ReplicaError(f"node {node_id} could not be swept: {_first_line(error)}") from error
            return Swept()
        return swept


def _heard(look: asyncio.Future[str]) -> None:
    """Whatever it is: asyncio reports errors that nobody has waited for."""
    if not look.cancelled():
        look.exception()


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0] if lines else type(error).__name__
