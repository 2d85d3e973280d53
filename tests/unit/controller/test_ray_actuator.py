"""The actuator's own words for what Ray says; everything else of it needs a Ray and is tested with one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

from cluster.controller.rank_specs import ClusterFacts
from cluster.controller.ray_actuator import RayActuator
from cluster.controller.ray_observer import RayCalls
from cluster.domain.errors import ReplicaError
from tests.unit.controller.builders import SETTINGS


class Observer:
    def live_nodes(self) -> tuple[tuple[str, str], ...]:
        raise ray.exceptions.RaySystemError("the head is away")


async def test_nodes_that_ray_does_not_tell_are_a_sentence(monkeypatch):
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n0"))
    actuator = RayActuator(ClusterFacts("c", "/run", SETTINGS), Observer(), RayCalls())
    with pytest.raises(ReplicaError, match=r"does not say which nodes live: .*the head is away; try again"):
        await actuator.nodes()
