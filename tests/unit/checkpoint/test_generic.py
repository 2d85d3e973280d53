"""Architectures without rules of their own: config fields under any name, tensors from the headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.headers import TensorHeader
from cluster.checkpoint.tensors import Part, expected_tensors, layer_prefix, model_cuts, outside_part, parameter_count
from cluster.domain.errors import CheckpointError
from cluster.domain.model_spec import Dtype

GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_head": 4, "n_layer": 2,
    "vocab_size": 50, "n_positions": 32,
}  # fmt: skip
LAYER = {
    "ln_1.weight": (16,), "attn.c_attn.weight": (16, 48), "attn.c_attn.bias": (48,), "attn.c_proj.weight": (16, 16),
    "attn.c_proj.bias": (16,), "mlp.c_fc.weight": (16, 64), "mlp.c_fc.bias": (64,), "mlp.c_proj.weight": (64, 16),
}  # fmt: skip
OUTSIDE = {"transformer.wte.weight": (50, 16), "transformer.wpe.weight": (32, 16), "transformer.ln_f.weight": (16,)}


def headers(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, TensorHeader]:
    return {
        name: TensorHeader(name=name, dtype=dtype, shape=shape, file=Path("x"), offset=0, nbytes=0)
        for name, shape in shapes.items()
    }


def stored(layers: int = 2, **more: tuple[int, ...]) -> dict[str, TensorHeader]:
    shapes = dict(OUTSIDE)
    for layer in range(layers):
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in LAYER.items()}
    return headers(shapes | more)


def test_a_family_nobody_listed() -> None:
    tensors = stored()
    tensors |= headers({"transformer.h.0.attn.bias": (1, 1, 32, 32)})  # a mask that old exports stored
    spec = model_spec(GPT2, tensors=tensors)
    assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (16, 2, 4, 4, 4)
    assert (spec.vocab_size, spec.max_model_len, spec.tie_word_embeddings) == (50, 32, True)
    assert layer_prefix(spec) == "transformer.h"
    layer = sum(16 * 48 if name == "attn.c_attn.weight" else 0 for name in LAYER)
    assert parameter_count(spec) == 50 * 16 + 32 * 16 + 16 + 2 * (16 + layer + 48 + 256 + 16 + 1024 + 64 + 1024)
    parts = {tensor.name: tensor.part for tensor in expected_tensors(spec) if tensor.layer is None}
    assert list(parts.values()) == [Part.FINAL_NORM, Part.ENTRY, Part.EMBEDDING]
    assert not model_cuts(spec).objection
    assert model_cuts(spec).heads == ((4, 4), (4, 4))


def test_a_stored_head_means_untied_and_more_layers_are_passed_over() -> None:
    spec = model_spec(GPT2, tensors=stored(3) | headers({"lm_head.weight": (50, 16)}))
    assert not spec.tie_word_embeddings
    assert {tensor.layer for tensor in expected_tensors(spec)} == {0, 1, None}
    assert any(tensor.part is Part.HEAD for tensor in expected_tensors(spec))


def test_latent_attention_counts_what_is_cached() -> None:
    config = GPT2 | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    config |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 1}
    spec = model_spec(config, tensors=stored())
    assert spec.kv_bytes_per_token(Dtype.FLOAT32) == 2 * 4 * (12 + 6) * 4


@pytest.mark.parametrize(
    ("config", "kv_heads"),
    [({"multi_query": True}, 1), ({"num_kv_heads": 2}, 2), ({"attn_config": {"kv_n_heads": 2}}, 2), ({}, 4)],
)
def test_kv_heads_have_many_names(config: dict[str, Any], kv_heads: int) -> None:
    assert model_spec(GPT2 | config, tensors=stored()).num_kv_heads == kv_heads


def test_a_missing_field_is_named() -> None:
    config = {key: value for key, value in GPT2.items() if key != "n_head"}
    with pytest.raises(CheckpointError, match="none of num_attention_heads, n_head"):
        model_spec(config, tensors=stored())


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("model.embed_tokens.weight", (50, 16), Part.EMBEDDING),
        ("model.embed_positions.weight", (34, 16), Part.ENTRY),
        ("transformer.word_embeddings_layernorm.weight", (16,), Part.ENTRY),
        ("lm_head.bias", (50,), Part.HEAD),
        ("embed_out.weight", (50, 16), Part.HEAD),
        ("model.norm.weight", (16,), Part.FINAL_NORM),
    ],
)
def test_what_lies_outside_of_the_layers(name: str, shape: tuple[int, ...], part: Part) -> None:
    assert outside_part(name, shape, 50) is part
