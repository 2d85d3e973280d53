"""Options of the engine on their way from a config to the ranks: each travels, and each rebuilds replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.checkpoint.resolve import demo_path
from cluster.config.schema import ModelConfig
from cluster.controller.actuator import StartOrder
from cluster.controller.checkpoint_planner import CheckpointPlanner
from cluster.controller.desired import asks_the_same, model_from_json, model_to_json
from cluster.controller.placement import place_replica
from cluster.controller.rank_specs import ClusterFacts, HostFacts, rank_specs
from cluster.domain.errors import ConfigError
from cluster.domain.hardware import DeviceKind
from cluster.domain.parallel_layout import Placement
from tests.unit.controller.builders import SETTINGS, incarnation, inventory, model, node

OPTIONS = {
    "enable_prefix_caching": False, "load_format": "dummy", "seed": 7, "rope_scaling": "linear:2", "block_size": 32,
    "max_num_waiting": 5, "max_waiting_prompt_tokens": 99, "prefill_slowdown": 2.5, "max_num_seqs": 3,
    "max_num_batched_tokens": 77,
}  # fmt: skip


def with_option(name: str):
    plain = model()
    return replace(plain, config=ModelConfig(model=plain.config.model, **{name: OPTIONS[name]}))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_changed_option_makes_other_replicas(name: str) -> None:
    changed = with_option(name)
    assert changed.fingerprint != model().fingerprint
    assert not asks_the_same(model().config, changed.config)
    assert model_from_json(model_to_json(changed)) == changed


@pytest.mark.parametrize("name", OPTIONS)
def test_every_rank_is_told(name: str) -> None:
    order = StartOrder(incarnation(), with_option(name), (20000, 20001), "10.0.0.9:50052", 2)
    placement = place_replica(order.model.layout, inventory(node("a", 8)), {})
    assert isinstance(placement, Placement)
    facts = (HostFacts(1, 4, (20000, 20001)), HostFacts(2, 4, ()))
    specs = rank_specs(order, placement, facts, {"a": 8}, ClusterFacts("c", "/run", SETTINGS), "served")
    assert {getattr(spec, name) for spec in specs} == {getattr(order.model.config, name)}


@pytest.mark.parametrize(("device", "budget"), [(DeviceKind.CPU, 512), (DeviceKind.CUDA, 2048)])
def test_a_step_that_nobody_sized_is_as_large_as_its_device_likes(device: DeviceKind, budget: int) -> None:
    order = StartOrder(incarnation(), replace(model(), device=device), (20000, 20001), "10.0.0.9:50052", 2)
    placement = place_replica(order.model.layout, inventory(node("a", 8)), {})
    assert isinstance(placement, Placement)
    facts = (HostFacts(1, 4, (20000, 20001)), HostFacts(2, 4, ()))
    specs = rank_specs(order, placement, facts, {"a": 8}, ClusterFacts("c", "/run", SETTINGS), "served")
    assert {spec.max_num_batched_tokens for spec in specs} == {budget}


async def test_the_plan_of_a_stretched_model_has_its_length() -> None:
    planner = CheckpointPlanner(lambda _: inventory(node("a", 8)))
    plain = await planner.plan(ModelConfig(model=str(demo_path())), ())
    stretched = await planner.plan(ModelConfig(model=str(demo_path()), rope_scaling="linear:2"), ())
    assert stretched.max_model_len == 2 * plain.max_model_len
    assert stretched.checkpoint_digest == plain.checkpoint_digest


async def test_a_stretch_that_the_model_cannot_take_is_the_users_to_fix() -> None:
    planner = CheckpointPlanner(lambda _: inventory(node("a", 8)))
    factors = '{"rope_type": "longrope", "factor": 2, "short_factor": [1.0], "long_factor": [2.0]}'
    with pytest.raises(ConfigError, match="rotary frequencies"):
        await planner.plan(ModelConfig(model=str(demo_path()), rope_scaling=factors), ())
