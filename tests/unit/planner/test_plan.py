"""Plans: the published shapes on published machines, refusals with their smallest change, and what must always hold."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.tensors import Part, expected_tensors
from cluster.config.schema import ModelConfig
from cluster.domain.errors import ConfigError, NoFeasiblePlan
from cluster.domain.hardware import DeviceKind, DeviceType, Inventory, cpu_device, device_type, uniform_inventory
from cluster.domain.model_spec import Dtype, ModelSpec
from cluster.domain.parallel_layout import ParallelLayout
from cluster.domain.quantities import GB, GIB
from cluster.planner.layouts import shape_objection
from cluster.planner.memory import Limits, RankLedger, rank_ledgers
from cluster.planner.plan import Plan, plan
from cluster.planner.render import no_plan_to_json, plan_to_json, render_no_plan, render_plan
from cluster.planner.weights import split_stages, stage_parameters, stored_bytes


def _published() -> Any:
    spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module
    spec.loader.exec_module(module)
    return module.PUBLISHED


PUBLISHED = _published()
H100 = device_type("h100")


def spec_of(name: str) -> ModelSpec:
    return model_spec(PUBLISHED[name].config)


def tiny(**changes: Any) -> ModelSpec:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 300, "max_position_embeddings": 256,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    return model_spec(config | changes)


def ask(spec: ModelSpec, inventory: Inventory, replicas: int = 1, **config: Any) -> Plan:
    return plan(spec, ModelConfig(model="m", **config), inventory, replicas=replicas)


def test_405b_on_two_nodes_is_tp8_by_pp2() -> None:
    found = ask(spec_of("llama-3.1-405b"), uniform_inventory(2, 8, H100))
    assert found.layout == ParallelLayout(8, 2)
    assert found.dtype is Dtype.BFLOAT16
    assert [len(stage) for stage in found.stages] == [61, 65]
    per_rank = [ledger.weight_bytes for ledger in found.ledgers]
    assert max(per_rank) == 52_818_673_664  # 61 layers / 8, norms, and the whole embedding
    assert sum(per_rank) > 811 * GB
    assert all(ledger.total_bytes <= ledger.budget_bytes == 72 * GB for ledger in found.ledgers)
    assert found.max_concurrent_tokens >= found.max_model_len == 131072
    (placement,) = found.placements
    assert [rank.node_id for rank in placement.ranks] == ["node-0"] * 8 + ["node-1"] * 8


def test_405b_on_one_node_says_why_not_and_what_would_do() -> None:
    with pytest.raises(NoFeasiblePlan) as caught:
        ask(spec_of("llama-3.1-405b"), uniform_inventory(1, 8, H100))
    error = caught.value
    assert error.smallest_change == "add 1 node like node-0"
    reasons = dict(error.candidates)
    assert "105 GB of weights" in reasons["TP8 x PP1 on h100"]
    assert len(reasons) == 15
    assert all(reasons.values())


@pytest.mark.parametrize(
    ("name", "nodes", "layout"),
    [
        ("llama-3-8b", 1, ParallelLayout(1)),
        ("llama-2-70b", 1, ParallelLayout(4)),
        ("llama-3.1-70b", 1, ParallelLayout(4)),
        ("falcon-40b", 1, ParallelLayout(2)),
        ("falcon-180b", 1, ParallelLayout(8)),
        ("mpt-30b", 1, ParallelLayout(2)),
        ("phi-3-medium", 1, ParallelLayout(1)),
        ("openelm-3b", 1, ParallelLayout(1)),
    ],
)
def test_published_shapes_find_the_smallest_layout(name: str, nodes: int, layout: ParallelLayout) -> None:
    found = ask(spec_of(name), uniform_inventory(nodes, 8, H100))
    assert found.layout == layout
    assert sum(candidate.verdict == "chosen" for candidate in found.candidates) == 1


def test_ledger_of_a_small_model_by_hand() -> None:
    spec = tiny()
    found = ask(spec, uniform_inventory(1, 2, cpu_device(4 * GIB)), tensor_parallel_size=2)
    layer = 64 * 16 * 2 + 64 * 32 * 2 + 3 * 64 * 64 + 2 * 64  # k, v; q, o; gate, up, down; two norms
    outside = 300 * 64 + 64  # embedding, final norm
    # The head's 300 rows are 4 grains of 64 and 44 over: 2 grains each, the rest to the last rank.
    expected = [4 * layer + outside + rows * 64 for rows in (128, 172)]
    assert [ledger.parameters for ledger in found.ledgers] == expected
    assert found.dtype is Dtype.FLOAT32
    assert found.ledgers[0].weight_bytes == 4 * expected[0]
    assert found.ledgers[0].kv_bytes_per_token == 2 * 4 * 1 * 16 * 4
    assert found.kv_blocks == GIB // (16 * 512)  # the CPU's default cap


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_stages_hold_every_layer_once_and_the_ends_their_parts(tied: bool, pp: int) -> None:
    spec = tiny(tie_word_embeddings=tied)
    layout = ParallelLayout(1, pp)
    stages = split_stages(spec, layout)
    assert [layer for stage in stages for layer in range(stage.start, stage.stop)] == list(range(4))
    counts = [stage_parameters(spec, layout, index, stage)[0] for index, stage in enumerate(stages)]
    total = sum(tensor.numel for tensor in expected_tensors(spec))
    rows_read_again = 300 * 64 if tied and pp > 1 else 0  # the head, where the embedding is not
    assert sum(counts) == total + rows_read_again


def test_stored_bytes_follow_the_shards() -> None:
    spec = tiny()
    stored = {tensor.name: 2 * tensor.numel for tensor in expected_tensors(spec)}
    config = ModelConfig(model="m", tensor_parallel_size=2, pipeline_parallel_size=2)
    found = plan(spec, config, uniform_inventory(1, 4, cpu_device(4 * GIB)), weights_nbytes_by_name=stored)
    assert [ledger.read_bytes for ledger in found.ledgers] == [2 * ledger.parameters for ledger in found.ledgers]
    assert stored_bytes(spec, found.layout, found.stages, {}) == (0, 0, 0, 0)


def test_more_ranks_than_kv_heads_share_them() -> None:
    found = ask(tiny(), uniform_inventory(1, 4, cpu_device(4 * GIB)), tensor_parallel_size=4)
    # Each rank has one of the two KV heads whole, and one of the four query heads.
    assert [ledger.kv_bytes_per_token for ledger in found.ledgers] == [2 * 4 * 1 * 16 * 4] * 4
    layer = 64 * 16 * 4 + 3 * 64 * 32 + 2 * 64  # q, k, v, o of 16 columns; gate, up, down of 32; two norms
    assert [ledger.parameters for ledger in found.ledgers[:2]] == [4 * layer + 300 * 64 + 64 + 64 * 64] * 2


def test_405b_over_sixteen_ranks_leaves_none_idle() -> None:
    spec, layout = spec_of("llama-3.1-405b"), ParallelLayout(16)
    counts = stage_parameters(spec, layout, 0, split_stages(spec, layout)[0])
    mean = sum(counts) / 16
    assert all(abs(count - mean) <= 0.02 * mean for count in counts)


def test_more_ranks_than_query_heads_is_refused_with_the_size_that_fits() -> None:
    with pytest.raises(NoFeasiblePlan) as caught:
        ask(tiny(), uniform_inventory(1, 8, cpu_device(GIB * 4)), tensor_parallel_size=8)
    assert "8 ranks are more than the model's 4 query heads" in str(caught.value)
    assert caught.value.smallest_change.startswith("--tensor-parallel-size 1 ")


def test_uneven_kv_heads_are_allowed() -> None:
    spec = tiny(num_attention_heads=6, num_key_value_heads=3, head_dim=16)
    found = ask(spec, uniform_inventory(1, 2, cpu_device(4 * GIB)), tensor_parallel_size=2)
    assert [ledger.kv_bytes_per_token for ledger in found.ledgers] == [2 * 4 * 2 * 16 * 4, 2 * 4 * 1 * 16 * 4]


def test_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(NoFeasiblePlan, match="5 stages are more than the model's 4 layers"):
        ask(tiny(), uniform_inventory(1, 8, cpu_device(4 * GIB)), pipeline_parallel_size=5, tensor_parallel_size=1)


def test_layers_that_cannot_be_divided_are_refused_before_a_rank_starts() -> None:
    spec = replace(tiny(), architecture="BeamForCausalLM")
    objection = shape_objection(spec, ParallelLayout(1, 2), 8)
    assert objection is not None
    assert "cannot be divided into pipeline stages" in objection
    assert shape_objection(spec, ParallelLayout(1, 1), 8) is None


def test_loading_needs_room_for_its_largest_slice() -> None:
    """What fits once it is loaded may not fit while it loads; with room for both, the KV cache takes all of it."""
    spec = tiny()
    limits = Limits(16, 1, 1, 16, 1.0)
    stages = split_stages(spec, ParallelLayout(1))

    def ledger(memory_bytes: int) -> RankLedger:
        return rank_ledgers(spec, ParallelLayout(1), stages, Dtype.FLOAT32, cpu_device(memory_bytes), limits)[0]

    any_size = ledger(2**40)
    largest = max(
        tensor.numel
        for tensor in expected_tensors(spec)
        if tensor.part in {Part.LAYER, Part.HEAD} and len(tensor.shape) > 1
    )
    assert any_size.loading_bytes == 4 * largest + 100 * 10**6
    assert any_size.start_bytes - any_size.fixed_bytes == any_size.loading_bytes - any_size.activation_bytes > 0
    assert ledger(any_size.start_bytes - 1).room_bytes == -1
    enough = ledger(any_size.start_bytes)
    assert enough.room_bytes == any_size.start_bytes - any_size.fixed_bytes


def test_a_group_wider_than_a_node_is_refused() -> None:
    with pytest.raises(NoFeasiblePlan, match="no node has 16 devices"):
        ask(spec_of("llama-7b"), uniform_inventory(4, 8, H100), tensor_parallel_size=16)


def test_a_long_context_is_shortened_first() -> None:
    spec = spec_of("llama-3.1-70b")
    inventory = uniform_inventory(1, 2, device_type("h200"))
    assert ask(spec, inventory, max_model_len=65536).max_model_len == 65536
    with pytest.raises(NoFeasiblePlan) as caught:
        ask(spec, uniform_inventory(1, 1, device_type("b200")))
    change = caught.value.smallest_change
    assert change.startswith("--max-model-len ")
    assert ask(spec, uniform_inventory(1, 1, device_type("b200")), max_model_len=int(change.split()[1]))


def test_too_many_replicas_are_counted() -> None:
    with pytest.raises(NoFeasiblePlan) as caught:
        ask(spec_of("llama-3-8b"), uniform_inventory(1, 8, H100), replicas=11)
    assert caught.value.smallest_change == "--replicas 8"
    assert any("8 of 11 replicas find room" in reason for _, reason in caught.value.candidates)


def test_float32_on_too_small_a_machine_suggests_half() -> None:
    small = cpu_device(15 * GB)
    with pytest.raises(NoFeasiblePlan) as caught:
        ask(spec_of("phi-3-mini"), uniform_inventory(1, 1, small), max_model_len=256, max_num_batched_tokens=256)
    assert caught.value.smallest_change == "--dtype bfloat16"


def test_asking_for_more_than_the_models_length_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="more than the model's 256"):
        ask(tiny(), uniform_inventory(1, 1, H100), max_model_len=257)


def test_nothing_to_run_on() -> None:
    with pytest.raises(NoFeasiblePlan, match="There is no device"):
        ask(tiny(), Inventory(()))


def test_no_replicas_need_no_place() -> None:
    assert ask(tiny(), uniform_inventory(1, 1, H100), replicas=0).placements == ()


def test_a_given_cache_size_is_kept() -> None:
    found = ask(tiny(), uniform_inventory(1, 1, cpu_device(4 * GIB)), kv_cache_bytes=2**20)
    assert found.kv_blocks == 2**20 // (16 * 2 * 4 * 2 * 16 * 4)
    with pytest.raises(NoFeasiblePlan, match="kv_cache_bytes allows") as caught:
        ask(tiny(), uniform_inventory(1, 1, cpu_device(4 * GIB)), kv_cache_bytes=2**12, tensor_parallel_size=1)
    assert caught.value.smallest_change


def test_a_small_node_never_stands_in_the_way() -> None:
    big, small = uniform_inventory(1, 8, H100).nodes[0], uniform_inventory(2, 8, cpu_device(GIB)).nodes[1]
    mixed = Inventory((big, small))
    assert ask(spec_of("llama-3-8b"), mixed).device == H100
    weak = DeviceType("h100", DeviceKind.CUDA, GIB, 1e12, 1e14, 1e11)
    with_weak = Inventory((big, uniform_inventory(2, 8, weak).nodes[1]))
    assert ask(spec_of("llama-3-8b"), with_weak).placements[0].node_ids == ("node-0",)


def test_both_renderings_say_the_same() -> None:
    found = ask(spec_of("llama-3.1-405b"), uniform_inventory(2, 8, H100))
    data = plan_to_json(found)
    assert json.loads(json.dumps(data)) == data
    assert data["feasible"]
    assert data["parameters"] == 405_853_388_800
    assert len(data["ranks"]) == 16
    console = Console(width=100, file=io.StringIO())
    console.print(render_plan(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "TP8 x PP2" in text
    assert "52.8 GB" in text
    assert "ranks 8-15 on node-1" in text


def test_a_refusal_renders_every_candidate() -> None:
    with pytest.raises(NoFeasiblePlan) as caught:
        ask(spec_of("llama-3.1-405b"), uniform_inventory(1, 8, H100))
    data = no_plan_to_json(caught.value)
    assert not data["feasible"]
    assert len(data["candidates"]) == 15
    console = Console(width=100, file=io.StringIO())
    console.print(render_no_plan(caught.value))
    assert "add 1 node like node-0" in console.file.getvalue()  # type: ignore[attr-defined]


@settings(max_examples=30)
@given(
    memory_gb=st.integers(8, 300), more_gb=st.integers(0, 200), nodes=st.integers(1, 3), devices=st.sampled_from([1, 2, 4, 8]),
    name=st.sampled_from(["llama-3-8b", "llama-33b", "phi-3-medium", "falcon-40b", "openelm-1.1b"]),
)  # fmt: skip
def test_more_memory_never_makes_a_plan_infeasible(
    memory_gb: int, more_gb: int, nodes: int, devices: int, name: str
) -> None:
    def feasible(gigabytes: int) -> Plan | None:
        device = DeviceType("x", DeviceKind.CUDA, gigabytes * GB, 2e12, 3e14, 3e11)
        try:
            return ask(spec_of(name), uniform_inventory(nodes, devices, device), max_model_len=2048)
        except NoFeasiblePlan:
            return None

    before, after = feasible(memory_gb), feasible(memory_gb + more_gb)
    if before is not None:
        assert after is not None
        if before.layout.pipeline_parallel_size == 1:
            assert after.layout.world_size <= before.layout.world_size
    for found in (before, after):
        if found is not None:
            assert all(ledger.total_bytes <= ledger.budget_bytes for ledger in found.ledgers)
            assert found.max_concurrent_tokens >= found.max_model_len
