from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.checkpoint import hub
from cluster.checkpoint.resolve import demo_path
from cluster.config.schema import ModelConfig
from cluster.controller.checkpoint_planner import CheckpointPlanner, free_inventory
from cluster.domain.errors import CheckpointError, ConfigError, NoFeasiblePlan
from cluster.domain.hardware import DeviceKind, Inventory
from cluster.domain.model_spec import Dtype
from tests.unit.controller.builders import inventory, model, node


def planner(*nodes) -> CheckpointPlanner:
    there = inventory(*nodes) if nodes else inventory(node("a", 8))
    return CheckpointPlanner(lambda _: there)


async def test_the_embedded_model_is_planned():
    found = await planner().plan(ModelConfig(model="demo", tensor_parallel_size=2, replicas=2), ())
    assert found.name == "demo"
    assert (found.layout.tensor_parallel_size, found.replicas) == (2, 2)
    assert (found.dtype, found.device) == (Dtype.FLOAT32, DeviceKind.CPU)
    assert Path(found.checkpoint_path, "config.json").is_file()
    assert len(found.weight_bytes_per_rank) == 2
    assert found.max_concurrent_tokens == found.kv_blocks * 16


async def test_what_other_models_hold_is_not_free():
    config = ModelConfig(model="demo", tensor_parallel_size=2, replicas=3)
    kept = (model("other", replicas=2),)
    assert (await planner().plan(config, ())).replicas == 3
    with pytest.raises(NoFeasiblePlan):
        await planner().plan(config, kept)


async def test_pipeline_stages_are_planned_with_their_layers():
    found = await planner().plan(ModelConfig(model="demo", tensor_parallel_size=1, pipeline_parallel_size=2), ())
    first, second = found.stages
    assert first.start == 0 < first.stop == second.start < second.stop
    assert len(found.weight_bytes_per_rank) == 2


async def test_what_does_not_exist_is_the_users_to_fix():
    with pytest.raises(ConfigError, match="does not exist"):
        await planner().plan(ModelConfig(model="./nowhere"), ())


async def test_a_damaged_directory_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        await planner().plan(ModelConfig(model=str(tmp_path)), ())


async def test_an_explanation_is_text_and_json():
    good = await planner().explain(ModelConfig(model="demo", tensor_parallel_size=2), ())
    assert good.feasible
    assert "TP2" in good.text
    assert json.loads(good.json)["tensor_parallel_size"] == 2
    bad = await planner(node("a", 1)).explain(ModelConfig(model="demo", tensor_parallel_size=2), ())
    assert not bad.feasible
    assert json.loads(bad.json)["candidates"]
    wrong = await planner().explain(ModelConfig(model="./nowhere"), ())
    assert not wrong.feasible
    assert "does not exist" in json.loads(wrong.json)["reason"]


async def test_an_explanation_of_a_hub_model_fetches_no_weights(monkeypatch, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(Path(demo_path(), "config.json").read_text())
    asked = []

    def download(repo_id, commit, *, weights=True, progress=None):
        asked.append((repo_id, weights))
        return tmp_path

    monkeypatch.setattr(hub, "resolve_commit", lambda *_: "c" * 40)
    monkeypatch.setattr(hub, "download", download)
    found = await planner().explain(ModelConfig(model="org/name", tensor_parallel_size=2), ())
    assert found.feasible, found.text
    assert asked == [("org/name", False)]


async def test_the_inventory_is_asked_for_the_device_that_is_wanted():
    asked = []

    def there(device):
        asked.append(device)
        return inventory(node("a", 8))

    await CheckpointPlanner(there).plan(ModelConfig(model="demo", device="cpu"), ())
    assert asked == ["cpu"]


def test_models_that_stay_are_placed_before_they_have_started():
    free = free_inventory(inventory(node("a", 4, free=4), node("b", 4, free=0)), (model(replicas=3),))
    assert sorted(n.free_devices for n in free.nodes) == [0, 2]


def test_models_on_another_kind_of_device_take_nothing():
    free = free_inventory(inventory(node("a", 4)), (model(replicas=1, device=DeviceKind.CUDA),))
    assert free == Inventory((node("a", 4),))
