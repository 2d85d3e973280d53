"""The tensors of a model by family: name, shape, and how tensor parallelism cuts each.

The cut follows DeepSpeed's AutoTP as the engine drives it: q, k, v, gate and up projections by output (column),
o and down projections by input (row, their bias whole on every rank), norms and embeddings whole, lm_head by
vocabulary rows. Fused projections are cut part by part.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cluster.domain.model_spec import LayerShape, ModelSpec


class SplitKind(enum.StrEnum):
    """Which dimension ranks share."""

    REPLICATED = "replicated"
    COLUMN = "column"  # dimension 0
    ROW = "row"  # dimension 1


@dataclass(frozen=True, slots=True)
class Split:
    """How one tensor is cut. ``parts``: sizes along the cut dimension that are cut one by one and concatenated."""

    kind: SplitKind
    parts: tuple[int, ...] = ()

    @property
    def dim(self) -> int | None:
        return {SplitKind.REPLICATED: None, SplitKind.COLUMN: 0, SplitKind.ROW: 1}[self.kind]


REPLICATED = Split(SplitKind.REPLICATED)
COLUMN = Split(SplitKind.COLUMN)
ROW = Split(SplitKind.ROW)


class Part(enum.StrEnum):
    """Which part of the model a tensor belongs to: it decides the pipeline stages that hold it."""

    EMBEDDING = "embedding"  # first stage; the last one too when tied
    LAYER = "layer"
    FINAL_NORM = "final_norm"  # last stage
    HEAD = "head"  # last stage


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the unsharded model. ``layer``: its decoder layer, None outside of them."""

    name: str
    shape: tuple[int, ...]
    split: Split
    layer: int | None = None
    part: Part = Part.LAYER

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The module that owns the tensor: the name DeepSpeed decides sizes by."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class _Outside:
    """Names outside of decoder layers."""

    embedding: str
    layer_prefix: str
    final_norm: str


_OUTSIDE = {
    "FalconForCausalLM": _Outside("transformer.word_embeddings", "transformer.h", "transformer.ln_f"),
    "MptForCausalLM": _Outside("transformer.wte", "transformer.blocks", "transformer.norm_f"),
    "OpenELMForCausalLM": _Outside("transformer.token_embeddings", "transformer.layers", "transformer.norm"),
    "Phi3SmallForCausalLM": _Outside("model.embed_tokens", "model.layers", "model.final_layernorm"),
}
_LLAMA_OUTSIDE = _Outside("model.embed_tokens", "model.layers", "model.norm")


def layer_prefix(spec: ModelSpec) -> str:
    """What stands before a decoder layer's number in its tensors' names: ``model.layers``."""
    return _OUTSIDE.get(spec.architecture, _LLAMA_OUTSIDE).layer_prefix


@functools.lru_cache(maxsize=8)
def expected_tensors(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """Every tensor of the model in the order of the forward pass; a tied head is not listed (it is the embedding)."""
    outside = _OUTSIDE.get(spec.architecture, _LLAMA_OUTSIDE)
    tensors = [
        TensorSpec(f"{outside.embedding}.weight", (spec.vocab_size, spec.hidden_size), REPLICATED, part=Part.EMBEDDING)
    ]
    for layer in range(spec.num_layers):
        tensors.extend(
            replace(tensor, name=f"{outside.layer_prefix}.{layer}.{tensor.name}", layer=layer)
            for tensor in _layer_tensors(spec, spec.layer_shape(layer))
        )
    tensors.extend(
        replace(tensor, part=Part.FINAL_NORM)
        for tensor in _norm(outside.final_norm, spec.hidden_size, bias=spec.norm_bias)
    )
    if not spec.tie_word_embeddings:
        tensors.append(TensorSpec("lm_head.weight", (spec.vocab_size, spec.hidden_size), COLUMN, part=Part.HEAD))
    return tuple(tensors)


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the whole model, a tied head counted once."""
    return sum(tensor.numel for tensor in expected_tensors(spec))


@functools.lru_cache(maxsize=64)
def _layer_tensors(spec: ModelSpec, shape: LayerShape) -> tuple[TensorSpec, ...]:
    return tuple(_LAYERS.get(spec.architecture, _llama_layer)(spec, shape))


def _linear(name: str, rows: int, columns: int, split: Split, *, bias: bool = False) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (rows, columns), split)
    if bias:
        yield TensorSpec(f"{name}.bias", (rows,), REPLICATED if split.kind is SplitKind.ROW else split)


def _norm(name: str, size: int, *, bias: bool = False) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (size,), REPLICATED)
    if bias:
        yield TensorSpec(f"{name}.bias", (size,), REPLICATED)


def _llama_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden, bias = spec.hidden_size, spec.attention_bias
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    yield from _norm("input_layernorm", hidden)
    yield from _linear("self_attn.q_proj", query, hidden, COLUMN, bias=bias)
    yield from _linear("self_attn.k_proj", key, hidden, COLUMN, bias=bias)
    yield from _linear("self_attn.v_proj", key, hidden, COLUMN, bias=bias)
    if spec.qk_norm:
        yield from _norm("self_attn.q_norm", spec.head_dim)
        yield from _norm("self_attn.k_norm", spec.head_dim)
    yield from _linear("self_attn.o_proj", hidden, query, ROW, bias=spec.output_bias)
    yield from _norm("post_attention_layernorm", hidden)
    if spec.num_experts:
        yield from _experts(spec, shape)
        return
    yield from _linear("mlp.gate_proj", shape.ffn_size, hidden, COLUMN, bias=spec.mlp_bias)
    yield from _linear("mlp.up_proj", shape.ffn_size, hidden, COLUMN, bias=spec.mlp_bias)
    yield from _linear("mlp.down_proj", hidden, shape.ffn_size, ROW, bias=spec.mlp_bias)


def _experts(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    yield TensorSpec("block_sparse_moe.gate.weight", (spec.num_experts, spec.hidden_size), REPLICATED)
    for expert in range(spec.num_experts):
        prefix = f"block_sparse_moe.experts.{expert}"
        yield from _linear(f"{prefix}.w1", shape.ffn_size, spec.hidden_size, COLUMN)
        yield from _linear(f"{prefix}.w2", spec.hidden_size, shape.ffn_size, ROW)
        yield from _linear(f"{prefix}.w3", shape.ffn_size, spec.hidden_size, COLUMN)


def _phi3_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden, ffn = spec.hidden_size, shape.ffn_size
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    yield from _norm("input_layernorm", hidden)
    yield from _linear("self_attn.qkv_proj", query + 2 * key, hidden, Split(SplitKind.COLUMN, (query, key, key)))
    yield from _linear("self_attn.o_proj", hidden, query, ROW)
    yield from _norm("post_attention_layernorm", hidden)
    yield from _linear("mlp.gate_up_proj", 2 * ffn, hidden, Split(SplitKind.COLUMN, (ffn, ffn)))
    yield from _linear("mlp.down_proj", hidden, ffn, ROW)


def _phi3_small_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden = spec.hidden_size
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    yield from _norm("input_layernorm", hidden, bias=True)
    # Grouped by KV head, as in Falcon: plain column pieces of whole KV heads.
    yield from _linear("self_attn.query_key_value", query + 2 * key, hidden, COLUMN, bias=True)
    yield from _linear("self_attn.dense", hidden, query, ROW, bias=True)
    yield from _norm("post_attention_layernorm", hidden, bias=True)
    yield from _linear("mlp.up_proj", 2 * shape.ffn_size, hidden, COLUMN, bias=True)
    yield from _linear("mlp.down_proj", hidden, shape.ffn_size, ROW, bias=True)


def _falcon_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden = spec.hidden_size
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    norms = ("input_layernorm",) if spec.layer_norms == 1 else ("ln_attn", "ln_mlp")
    for norm in norms:
        yield from _norm(norm, hidden, bias=True)
    yield from _linear("self_attention.query_key_value", query + 2 * key, hidden, COLUMN, bias=spec.attention_bias)
    yield from _linear("self_attention.dense", hidden, query, ROW, bias=spec.output_bias)
    yield from _linear("mlp.dense_h_to_4h", shape.ffn_size, hidden, COLUMN, bias=spec.mlp_bias)
    yield from _linear("mlp.dense_4h_to_h", hidden, shape.ffn_size, ROW, bias=spec.mlp_bias)


def _mpt_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden = spec.hidden_size
    yield from _norm("norm_1", hidden)
    yield from _linear("attn.Wqkv", 3 * hidden, hidden, Split(SplitKind.COLUMN, (hidden, hidden, hidden)))
    yield from _linear("attn.out_proj", hidden, hidden, ROW)
    yield from _norm("norm_2", hidden)
    yield from _linear("ffn.up_proj", shape.ffn_size, hidden, COLUMN)
    yield from _linear("ffn.down_proj", hidden, shape.ffn_size, ROW)


def _openelm_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden, ffn = spec.hidden_size, shape.ffn_size
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    yield from _norm("attn_norm", hidden)
    yield from _linear("attn.qkv_proj", query + 2 * key, hidden, Split(SplitKind.COLUMN, (query, key, key)))
    if spec.qk_norm:
        yield from _norm("attn.q_norm", spec.head_dim)
        yield from _norm("attn.k_norm", spec.head_dim)
    yield from _linear("attn.out_proj", hidden, query, ROW)
    yield from _norm("ffn_norm", hidden)
    yield from _linear("ffn.proj_1", 2 * ffn, hidden, Split(SplitKind.COLUMN, (ffn, ffn)))
    yield from _linear("ffn.proj_2", hidden, ffn, ROW)


_LAYERS: dict[str, Callable[[ModelSpec, LayerShape], Iterator[TensorSpec]]] = {
    "Phi3ForCausalLM": _phi3_layer,
    "Phi3SmallForCausalLM": _phi3_small_layer,
    "FalconForCausalLM": _falcon_layer,
    "MptForCausalLM": _mpt_layer,
    "OpenELMForCausalLM": _openelm_layer,
}
