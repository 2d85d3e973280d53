"""The actuator without a Ray: its words for what Ray says, and starts that never ask Ray for anything."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import ray

from cluster.controller import ray_actuator
from cluster.controller.actuator import StartOrder, Talk
from cluster.controller.rank_marker import Swept
from cluster.controller.rank_specs import ClusterFacts
from cluster.controller.ray_actuator import RayActuator
from cluster.controller.ray_observer import RayCalls
from cluster.domain.errors import ReplicaError
from cluster.domain.hardware import DeviceKind
from tests.unit.controller.builders import SETTINGS, incarnation, inventory, model, node

MANY = 200


class Observer:
    """One node without room; its living nodes are not told."""

    def __init__(self) -> None:
        self.asked = 0

    def inventory(self, _):
        self.asked += 1
        return inventory(node(free=0))

    def live_nodes(self) -> tuple[tuple[str, str], ...]:
        raise ray.exceptions.RaySystemError("the head is away")


@pytest.fixture
def actuator(monkeypatch) -> RayActuator:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n0"))
    return RayActuator(ClusterFacts("c", "/run", SETTINGS), Observer(), RayCalls())


async def test_nodes_that_ray_does_not_tell_are_a_sentence(actuator):
    with pytest.raises(ReplicaError, match=r"does not say which nodes live: .*the head is away; try again"):
        await actuator.nodes()


async def test_those_that_waited_for_room_go_without_a_search_for_their_remains(actuator, monkeypatch):
    swept: list = []
    monkeypatch.setattr(ray_actuator, "ROOM_POLL_S", 0.05)
    monkeypatch.setattr(ray_actuator, "sweep_node", swept.append)
    waiting = [incarnation(slot) for slot in range(MANY)]
    blocked: dict = {}
    starts = [asyncio.ensure_future(actuator.start(*order_of(who, blocked))) for who in waiting]
    async with asyncio.timeout(30):
        while len(blocked) < MANY:
            await asyncio.sleep(0.001)
        await asyncio.gather(*(actuator.destroy(who, 2) for who in waiting))
        ended = await asyncio.gather(*starts, return_exceptions=True)
    assert not swept
    assert {str(error) for error in ended} == {f"{who} is not wanted any more" for who in waiting}
    assert not actuator._starting
    assert not actuator._abandoned


async def test_those_that_wait_for_room_share_a_look_at_the_nodes(actuator, monkeypatch):
    monkeypatch.setattr(ray_actuator, "ROOM_POLL_S", 0.0)
    monkeypatch.setattr(ray_actuator, "LOOK_KEPT_S", 3600.0)
    waiting = [incarnation(slot) for slot in range(MANY)]
    told: list = []
    talk = Talk(told.append, lambda _: None, tuple)
    starts = [asyncio.ensure_future(actuator.start(order_of(who, {})[0], talk)) for who in waiting]
    async with asyncio.timeout(30):
        while len(told) < 3 * MANY:  # each has tried again
            await asyncio.sleep(0.001)
        assert actuator._observer.asked == 1
        monkeypatch.setattr(ray_actuator, "LOOK_KEPT_S", 0.0)
        actuator._looks = {}  # as whenever a reservation was made or given back
        while actuator._observer.asked < 3:
            await asyncio.sleep(0.001)
        await asyncio.gather(*(actuator.destroy(who, 2) for who in waiting))
        await asyncio.gather(*starts, return_exceptions=True)


async def test_those_that_are_not_wanted_any_more_ask_for_no_room(actuator, monkeypatch):
    monkeypatch.setattr(ray_actuator, "ROOM_POLL_S", 0.0)
    waiting = [incarnation(slot) for slot in range(MANY)]
    async with asyncio.timeout(30):
        await actuator._placing.acquire()  # somebody's turn takes long
        starts = [asyncio.ensure_future(actuator.start(*order_of(who, {}))) for who in waiting]
        removals = [asyncio.ensure_future(actuator.destroy(who, 2)) for who in waiting]
        await asyncio.sleep(0)  # every removal has begun
        actuator._placing.release()
        await asyncio.gather(*removals)
        await asyncio.gather(*starts, return_exceptions=True)
    assert actuator._observer.asked == 0


async def test_what_ray_was_asked_for_is_searched(actuator, monkeypatch):
    """A reservation that was not granted in time, too: it may have been granted since."""
    swept: list = []
    monkeypatch.setattr(ray_actuator, "ROOM_POLL_S", 0.0)
    monkeypatch.setattr(ray_actuator, "sweep_node", lambda order: swept.append(order.only) or Swept())
    monkeypatch.setattr(actuator, "_make_group", lambda *_: None)
    monkeypatch.setattr(actuator, "_release", lambda *_: None)
    monkeypatch.setattr(actuator, "_group_names", list)
    actuator._observer = SimpleNamespace(inventory=lambda _: inventory(node()), live_nodes=lambda: (("n0", "::1"),))
    blocked: dict = {}
    start = asyncio.ensure_future(actuator.start(*order_of(incarnation(), blocked)))
    async with asyncio.timeout(30):
        while "did not grant" not in blocked.get(incarnation(), ""):
            await asyncio.sleep(0.001)
        looked = actuator._looks = {DeviceKind.CPU: inventory(node(free=0))}
        await actuator.destroy(incarnation(), 2)
        assert actuator._looks is not looked, "what is free has changed"
        await asyncio.gather(start, return_exceptions=True)
    assert set(swept) == {incarnation()}


def order_of(who, blocked: dict) -> tuple[StartOrder, Talk]:
    """``blocked`` gets what ``who`` waits for."""
    talk = Talk(lambda reason: blocked.update({who: reason}), lambda _: None, tuple)
    return StartOrder(who, model(), (), "127.0.0.1:1", 2), talk
