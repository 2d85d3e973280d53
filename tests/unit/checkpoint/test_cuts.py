"""Which tensors of a layer are cut, told by names and shapes; and what is not understood."""

from __future__ import annotations

import pytest

from cluster.checkpoint.cuts import LayerCuts, layer_cuts
from cluster.checkpoint.splits import GrainCut, HeadCut, HeadOrder, Whole
from cluster.domain.model_spec import LayerShape

SHAPE = LayerShape(num_heads=4, num_kv_heads=2, ffn_size=24)
ATTENTION = {
    "self_attn.q_proj.weight": (32, 16),
    "self_attn.k_proj.weight": (16, 16),
    "self_attn.v_proj.weight": (16, 16),
    "self_attn.o_proj.weight": (16, 32),
}
LATENT = {
    "self_attn.q_a_proj.weight": (10, 16), "self_attn.q_a_layernorm.weight": (10,),
    "self_attn.q_b_proj.weight": (32, 10), "self_attn.kv_a_proj_with_mqa.weight": (9, 16),
    "self_attn.kv_a_layernorm.weight": (6,), "self_attn.kv_b_proj.weight": (44, 6), "self_attn.o_proj.weight": (16, 24),
}  # fmt: skip
MLP = {"mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24)}


def cuts(tensors: dict[str, tuple[int, ...]], architecture: str = "XForCausalLM") -> LayerCuts:
    return layer_cuts(architecture, 8, SHAPE, tuple(tensors.items()))


def test_a_plain_layer() -> None:
    found = cuts(ATTENTION | MLP | {"input_layernorm.weight": (16,), "self_attn.o_proj.bias": (16,)})
    assert not found.objection
    assert found.heads == (4, 2)
    assert found.cuts["self_attn.k_proj.weight"] == HeadCut(0, 4, 2, HeadOrder.KV, 8)
    assert found.cuts["self_attn.o_proj.weight"] == HeadCut(1, 4, 2, HeadOrder.QUERY, 8, reduced=True)
    assert found.cuts["self_attn.o_proj.bias"] == Whole()
    assert found.cuts["mlp.up_proj.weight"] == GrainCut(0, 24)
    assert found.cuts["mlp.down_proj.weight"] == GrainCut(1, 24, reduced=True)
    assert found.cuts["input_layernorm.weight"] == Whole()


def test_heads_are_told_by_the_shapes_not_by_the_config() -> None:
    wide = ATTENTION | {"self_attn.k_proj.weight": (32, 16), "self_attn.v_proj.weight": (64, 16)}
    found = cuts(wide | {"self_attn.o_proj.weight": (16, 64)})
    assert found.heads == (4, 4)
    assert found.cuts["self_attn.v_proj.weight"] == HeadCut(0, 4, 4, HeadOrder.KV, 16)


@pytest.mark.parametrize(
    ("architecture", "order"),
    [("FalconForCausalLM", HeadOrder.GROUPED), ("GPTNeoXForCausalLM", HeadOrder.GROUPED),
     ("Phi3ForCausalLM", HeadOrder.CONCATENATED)],
)  # fmt: skip
def test_fused_projections_by_architecture(architecture: str, order: HeadOrder) -> None:
    tensors = {"a.query_key_value.weight": (64, 16), "a.query_key_value.bias": (64,), "a.dense.weight": (16, 32)}
    found = cuts(tensors, architecture)
    assert found.cuts["a.query_key_value.weight"] == HeadCut(0, 4, 2, order, 8)
    assert found.cuts["a.query_key_value.bias"] == HeadCut(0, 4, 2, order, 8)


def test_transposed_layers_are_cut_the_other_way_round() -> None:
    tensors = {
        "attn.c_attn.weight": (16, 64), "attn.c_attn.bias": (64,), "attn.c_proj.weight": (32, 16),
        "mlp.c_fc.weight": (16, 24), "mlp.c_fc.bias": (24,), "mlp.c_proj.weight": (24, 16), "mlp.c_proj.bias": (16,),
    }  # fmt: skip
    found = cuts(tensors, "GPT2LMHeadModel")
    assert found.cuts["attn.c_attn.weight"] == HeadCut(1, 4, 2, HeadOrder.CONCATENATED, 8)
    assert found.cuts["attn.c_attn.bias"] == HeadCut(0, 4, 2, HeadOrder.CONCATENATED, 8)
    assert found.cuts["mlp.c_fc.weight"] == GrainCut(1, 24)
    assert found.cuts["mlp.c_fc.bias"] == GrainCut(0, 24)
    assert found.cuts["mlp.c_proj.weight"] == GrainCut(0, 24, reduced=True)
    assert found.cuts["mlp.c_proj.bias"] == Whole()


def test_experts_in_one_tensor_are_cut_as_those_in_many() -> None:
    one = cuts(ATTENTION | {"mlp.experts.gate_up_proj": (3, 48, 16), "mlp.experts.down_proj": (3, 16, 24)})
    assert one.cuts["mlp.experts.gate_up_proj"] == GrainCut(1, 24, parts=2)
    assert one.cuts["mlp.experts.down_proj"] == GrainCut(2, 24, reduced=True)
    assert one.reduced_blocks == ("mlp.experts",)
    many = cuts(ATTENTION | {"moe.experts.0.w1.weight": (24, 16), "moe.experts.0.w2.weight": (16, 24)})
    assert many.cuts["moe.experts.0.w2.weight"] == GrainCut(1, 24, reduced=True)
    assert many.reduced_blocks == ()


def test_a_bias_inside_of_the_sum_counts_once() -> None:
    tensors = {
        "mlp.experts.gate_up_proj": (3, 16, 48), "mlp.experts.gate_up_proj_bias": (3, 48),
        "mlp.experts.down_proj": (3, 24, 16), "mlp.experts.down_proj_bias": (3, 16),
    }  # fmt: skip
    found = cuts(ATTENTION | tensors, "GptOssForCausalLM")
    assert found.cuts["mlp.experts.gate_up_proj"] == GrainCut(2, 24, unit=2)
    assert found.cuts["mlp.experts.gate_up_proj_bias"] == GrainCut(1, 24, unit=2)
    assert found.cuts["mlp.experts.down_proj"] == GrainCut(1, 24, reduced=True)
    assert found.cuts["mlp.experts.down_proj_bias"] == Whole(counts_once=True)


@pytest.mark.parametrize(
    "extra",
    [{"mlp.ffn_sub_norm.weight": (24,)}, {"mlp.mix.weight": (24, 24)}, {"mlp.up_proj.weight": (23, 16)},
     {"mlp.gate_up_proj.weight": (24, 16)}],
)  # fmt: skip
def test_a_feed_forward_block_that_is_not_understood_stays_whole(extra: dict[str, tuple[int, ...]]) -> None:
    found = cuts(ATTENTION | MLP | extra)
    assert not found.objection
    assert all(cut == Whole() for name, cut in found.cuts.items() if name.startswith("mlp."))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (MLP, "no attention"),
        (ATTENTION | {"self_attn.q_norm.weight": (24,)}, "what self_attn.q_norm.weight does across heads"),
        (ATTENTION | {"self_attn.q_norm.weight": (32,), "self_attn.q_norm.bias": (32,)}, "self_attn.q_norm.bias"),
        (ATTENTION | {"self_attn.lambda_q1": (8,)}, "self_attn.lambda_q1"),
        (ATTENTION | {"self_attn.q_norm.norms.0.weight": (8,)}, "across heads"),
        (ATTENTION | {"self_attn.k_proj.weight": (12, 16)}, "whole heads"),
        (ATTENTION | {"self_attn.o_proj.weight": (16, 30)}, "the shape of self_attn.o_proj"),
        (ATTENTION | {n.replace("self", "cross"): s for n, s in ATTENTION.items()}, "two attention blocks"),
        (LATENT | {"self_attn.indexer.wq_b.weight": (32, 10)}, "what self_attn.indexer.wq_b.weight does across heads"),
        (LATENT | {"self_attn.kv_b_proj.weight": (43, 6)}, "whole heads"),
        (LATENT | {"self_attn.q_proj.weight": (32, 16)}, "the latent attention of self_attn is not understood"),
        ({"a.qkv_proj.weight": (64, 16), "a.o_proj.weight": (16, 32)}, "holds queries, keys and values is not known"),
    ],
)
def test_attention_that_is_not_understood_is_an_objection(tensors: dict[str, tuple[int, ...]], says: str) -> None:
    assert says in cuts(tensors).objection


@pytest.mark.parametrize("lora", [True, False])
def test_latents_stay_whole_and_what_is_made_of_them_is_cut_by_heads(lora: bool) -> None:
    tensors = dict(LATENT)
    query = "self_attn.q_b_proj.weight"
    if not lora:
        tensors = {name: shape for name, shape in LATENT.items() if ".q_" not in name}
        query = "self_attn.q_proj.weight"
        tensors[query] = (32, 16)
    found = cuts(tensors | MLP)
    assert not found.objection
    assert found.heads == (4, 4)
    assert found.cuts[query] == HeadCut(0, 4, 4, HeadOrder.QUERY, 8)
    assert found.cuts["self_attn.kv_b_proj.weight"] == HeadCut(0, 4, 4, HeadOrder.QUERY, 11)
    assert found.cuts["self_attn.o_proj.weight"] == HeadCut(1, 4, 4, HeadOrder.QUERY, 6, reduced=True)
    assert {cut for name, cut in found.cuts.items() if "_a_" in name} == {Whole()}
    assert found.cuts["mlp.up_proj.weight"] == GrainCut(0, 24)


def test_norms_of_one_head_and_of_each_head() -> None:
    whole = cuts(ATTENTION | {"self_attn.q_norm.weight": (8,), "self_attn.k_norm.weight": (8,)})
    assert not whole.objection
    each = cuts(ATTENTION | {"self_attn.k_norm.weight": (2, 8)})
    assert each.cuts["self_attn.k_norm.weight"] == HeadCut(0, 4, 2, HeadOrder.KV, 1)


@pytest.mark.parametrize("name", ["self_attn.sinks", "self_attn.attention_sink_bias"])
def test_sinks_are_cut_with_the_heads(name: str) -> None:
    """GPT-OSS's, and as MiMo-V2 stores them."""
    assert cuts(ATTENTION | {name: (4,)}).cuts[name] == HeadCut(0, 4, 2, HeadOrder.QUERY, 1)
    assert "across heads" in cuts(ATTENTION | {name: (3,)}).objection


def test_a_norm_over_all_heads_is_cut_with_them_and_named() -> None:
    found = cuts(ATTENTION | {"self_attn.q_norm.weight": (32,), "self_attn.k_norm.weight": (16,)})
    assert not found.objection
    assert found.cuts["self_attn.k_norm.weight"] == HeadCut(0, 4, 2, HeadOrder.KV, 8)
    assert found.wide_norms == ("self_attn.q_norm", "self_attn.k_norm")


@pytest.mark.parametrize(("child", "rows", "unit"), [("gate_proj", 32, 8), ("g_proj", 4, 1), ("g_proj", 32, 8)])
def test_a_gate_behind_attention_is_cut_with_the_heads(child: str, rows: int, unit: int) -> None:
    """AFMoE's by element, Laguna's by head."""
    gate = f"self_attn.{child}.weight"
    found = cuts(ATTENTION | {gate: (rows, 32)} | MLP)
    assert not found.objection
    assert found.cuts[gate] == HeadCut(0, 4, 2, HeadOrder.QUERY, unit)
    assert found.cuts["mlp.up_proj.weight"] == GrainCut(0, 24)
    assert "across heads" in cuts(ATTENTION | {gate: (rows + 1, 32)}).objection
