"""The tensors of a model: names and shapes by family, or from the checkpoint's headers; and how each is cut.

Norms and embeddings are whole on every rank, the head is cut by vocabulary rows, decoder layers as
``checkpoint.cuts`` says.
"""

from __future__ import annotations

import enum
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from cluster.checkpoint.cuts import layer_cuts
from cluster.checkpoint.splits import WHOLE, Cut, GrainCut
from cluster.checkpoint.stored import stored_layer_prefix
from cluster.domain.model_spec import LayerShape, ModelSpec


class Part(enum.StrEnum):
    """Which part of the model a tensor belongs to: it decides the pipeline stages that hold it."""

    EMBEDDING = "embedding"  # first stage; the last one too when tied
    ENTRY = "entry"  # the rest of what comes before the layers: first stage
    LAYER = "layer"
    FINAL_NORM = "final_norm"  # last stage
    HEAD = "head"  # last stage


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the unsharded model. ``layer``: its decoder layer, None outside of them."""

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    part: Part = Part.LAYER

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The module that owns the tensor."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class ModelCuts:
    """How tensor parallelism cuts a model. ``by_name``: every tensor's cut; ``heads``: of each layer's attention.

    ``objection``: half a sentence on why no layout of several tensor ranks is possible, empty when they are.
    """

    by_name: Mapping[str, Cut]
    heads: tuple[tuple[int, int] | None, ...]
    objection: str


@dataclass(frozen=True, slots=True)
class _Outside:
    """Names outside of decoder layers."""

    embedding: str
    layer_prefix: str
    final_norm: str
    head: str = "lm_head"


_OUTSIDE = {
    "FalconForCausalLM": _Outside("transformer.word_embeddings", "transformer.h", "transformer.ln_f"),
    "GPTNeoXForCausalLM": _Outside("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", "embed_out"),
    "MptForCausalLM": _Outside("transformer.wte", "transformer.blocks", "transformer.norm_f"),
    "OpenELMForCausalLM": _Outside("transformer.token_embeddings", "transformer.layers", "transformer.norm"),
    "Phi3SmallForCausalLM": _Outside("model.embed_tokens", "model.layers", "model.final_layernorm"),
}
_LLAMA_OUTSIDE = _Outside("model.embed_tokens", "model.layers", "model.norm")
_HEADS = frozenset({"lm_head", "embed_out", "output", "output_layer", "output_projection"})
_EMBEDDING = re.compile(r"embed|emb\b|wte|wpe|tok_|position|project_in")


def layer_prefix(spec: ModelSpec) -> str:
    """What stands before a decoder layer's number in its tensors' names: ``model.layers``."""
    if spec.stored_tensors:
        return stored_layer_prefix(spec.stored_tensors, spec.num_layers)
    return _OUTSIDE.get(spec.architecture, _LLAMA_OUTSIDE).layer_prefix


@functools.lru_cache(maxsize=8)
def expected_tensors(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """Every tensor of the model in the order of the forward pass; a tied head is not listed (it is the embedding)."""
    if spec.stored_tensors:
        return tuple(_stored(spec))
    outside = _OUTSIDE.get(spec.architecture, _LLAMA_OUTSIDE)
    tensors = [TensorSpec(f"{outside.embedding}.weight", (spec.vocab_size, spec.hidden_size), part=Part.EMBEDDING)]
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
        tensors.append(TensorSpec(f"{outside.head}.weight", (spec.vocab_size, spec.hidden_size), part=Part.HEAD))
    return tuple(tensors)


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the whole model, a tied head counted once."""
    return sum(tensor.numel for tensor in expected_tensors(spec))


def _stored(spec: ModelSpec) -> Iterator[TensorSpec]:
    """What the checkpoint of an architecture without rules holds."""
    prefix = f"{layer_prefix(spec)}."
    for name, shape in spec.stored_tensors:
        index, _, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and index.isdigit():
            if int(index) < spec.num_layers:
                yield TensorSpec(name, shape, layer=int(index))
            continue
        part = outside_part(name, shape, spec.vocab_size)
        if part is Part.HEAD and spec.tie_word_embeddings and name.endswith("weight"):
            continue
        yield TensorSpec(name, shape, part=part)


def outside_part(name: str, shape: tuple[int, ...], vocab_size: int) -> Part:
    """Where a tensor outside of the decoder layers belongs, told by its name."""
    module = name.rpartition(".")[0].rpartition(".")[2] or name
    if module in _HEADS:
        return Part.HEAD
    if len(shape) == 2 and shape[0] == vocab_size and _EMBEDDING.search(name):
        return Part.EMBEDDING
    return Part.ENTRY if _EMBEDDING.search(name) else Part.FINAL_NORM


@functools.lru_cache(maxsize=8)
def model_cuts(spec: ModelSpec) -> ModelCuts:
    """The cut of every tensor of ``expected_tensors``; equal layers are looked at once."""
    by_layer: dict[int, list[TensorSpec]] = {layer: [] for layer in range(spec.num_layers)}
    cuts: dict[str, Cut] = {}
    for tensor in expected_tensors(spec):
        if tensor.layer is not None:
            by_layer[tensor.layer].append(tensor)
        else:
            cuts[tensor.name] = GrainCut(0, tensor.shape[0]) if tensor.part is Part.HEAD else WHOLE
    heads, objection = [], ""
    for layer, tensors in by_layer.items():
        prefix = f"{layer_prefix(spec)}.{layer}."
        named = tuple((tensor.name.removeprefix(prefix), tensor.shape) for tensor in tensors)
        found = layer_cuts(spec.architecture, spec.head_dim, spec.layer_shape(layer), named)
        cuts.update((prefix + name, cut) for name, cut in found.cuts.items())
        heads.append(found.heads)
        objection = objection or found.objection
    return ModelCuts(cuts, tuple(heads), objection)


@functools.lru_cache(maxsize=64)
def _layer_tensors(spec: ModelSpec, shape: LayerShape) -> tuple[TensorSpec, ...]:
    return tuple(_LAYERS.get(spec.architecture, _llama_layer)(spec, shape))


def _linear(name: str, rows: int, columns: int, *, bias: bool = False) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (rows, columns))
    if bias:
        yield TensorSpec(f"{name}.bias", (rows,))


def _norm(name: str, size: int, *, bias: bool = False) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (size,))
    if bias:
        yield TensorSpec(f"{name}.bias", (size,))


def _llama_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden, bias = spec.hidden_size, spec.attention_bias
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    yield from _norm("input_layernorm", hidden)
    yield from _linear("self_attn.q_proj", query, hidden, bias=bias)
    yield from _linear("self_attn.k_proj", key, hidden, bias=bias)
    yield from _linear("self_attn.v_proj", key, hidden, bias=bias)
    if spec.qk_norm:
        yield from _norm("self_attn.q_norm", spec.head_dim)
        yield from _norm("self_attn.k_norm", spec.head_dim)
    yield from _linear("self_attn.o_proj", hidden, query, bias=spec.output_bias)
    yield from _norm("post_attention_layernorm", hidden)
    if spec.num_experts:
        yield from _experts(spec, shape)
        return
    yield from _linear("mlp.gate_proj", shape.ffn_size, hidden, bias=spec.mlp_bias)
    yield from _linear("mlp.up_proj", shape.ffn_size, hidden, bias=spec.mlp_bias)
    yield from _linear("mlp.down_proj", hidden, shape.ffn_size, bias=spec.mlp_bias)


def _experts(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    yield TensorSpec("block_sparse_moe.gate.weight", (spec.num_experts, spec.hidden_size))
    for expert in range(spec.num_experts):
        prefix = f"block_sparse_moe.experts.{expert}"
        yield from _linear(f"{prefix}.w1", shape.ffn_size, spec.hidden_size)
        yield from _linear(f"{prefix}.w2", spec.hidden_size, shape.ffn_size)
        yield from _linear(f"{prefix}.w3", shape.ffn_size, spec.hidden_size)


def _phi3_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden, ffn = spec.hidden_size, shape.ffn_size
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    yield from _norm("input_layernorm", hidden)
    yield from _linear("self_attn.qkv_proj", query + 2 * key, hidden)
    yield from _linear("self_attn.o_proj", hidden, query)
    yield from _norm("post_attention_layernorm", hidden)
    yield from _linear("mlp.gate_up_proj", 2 * ffn, hidden)
    yield from _linear("mlp.down_proj", hidden, ffn)


def _phi3_small_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden = spec.hidden_size
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    yield from _norm("input_layernorm", hidden, bias=True)
    # Grouped by KV head, as in Falcon: plain column pieces of whole KV heads.
    yield from _linear("self_attn.query_key_value", query + 2 * key, hidden, bias=True)
    yield from _linear("self_attn.dense", hidden, query, bias=True)
    yield from _norm("post_attention_layernorm", hidden, bias=True)
    yield from _linear("mlp.up_proj", 2 * shape.ffn_size, hidden, bias=True)
    yield from _linear("mlp.down_proj", hidden, shape.ffn_size, bias=True)


def _falcon_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden = spec.hidden_size
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    norms = ("input_layernorm",) if spec.layer_norms == 1 else ("ln_attn", "ln_mlp")
    for norm in norms:
        yield from _norm(norm, hidden, bias=True)
    yield from _linear("self_attention.query_key_value", query + 2 * key, hidden, bias=spec.attention_bias)
    yield from _linear("self_attention.dense", hidden, query, bias=spec.output_bias)
    yield from _linear("mlp.dense_h_to_4h", shape.ffn_size, hidden, bias=spec.mlp_bias)
    yield from _linear("mlp.dense_4h_to_h", hidden, shape.ffn_size, bias=spec.mlp_bias)


def _gpt_neox_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden = spec.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield from _norm(norm, hidden, bias=True)
    yield from _linear("attention.query_key_value", 3 * hidden, hidden, bias=spec.attention_bias)
    yield from _linear("attention.dense", hidden, hidden, bias=spec.output_bias)
    yield from _linear("mlp.dense_h_to_4h", shape.ffn_size, hidden, bias=True)
    yield from _linear("mlp.dense_4h_to_h", hidden, shape.ffn_size, bias=True)


def _mpt_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden = spec.hidden_size
    yield from _norm("norm_1", hidden)
    yield from _linear("attn.Wqkv", 3 * hidden, hidden)
    yield from _linear("attn.out_proj", hidden, hidden)
    yield from _norm("norm_2", hidden)
    yield from _linear("ffn.up_proj", shape.ffn_size, hidden)
    yield from _linear("ffn.down_proj", hidden, shape.ffn_size)


def _openelm_layer(spec: ModelSpec, shape: LayerShape) -> Iterator[TensorSpec]:
    hidden, ffn = spec.hidden_size, shape.ffn_size
    query, key = shape.num_heads * spec.head_dim, shape.num_kv_heads * spec.head_dim
    yield from _norm("attn_norm", hidden)
    yield from _linear("attn.qkv_proj", query + 2 * key, hidden)
    if spec.qk_norm:
        yield from _norm("attn.q_norm", spec.head_dim)
        yield from _norm("attn.k_norm", spec.head_dim)
    yield from _linear("attn.out_proj", hidden, query)
    yield from _norm("ffn_norm", hidden)
    yield from _linear("ffn.proj_1", 2 * ffn, hidden)
    yield from _linear("ffn.proj_2", hidden, ffn)


_LAYERS: dict[str, Callable[[ModelSpec, LayerShape], Iterator[TensorSpec]]] = {
    "Phi3ForCausalLM": _phi3_layer,
    "Phi3SmallForCausalLM": _phi3_small_layer,
    "FalconForCausalLM": _falcon_layer,
    "GPTNeoXForCausalLM": _gpt_neox_layer,
    "MptForCausalLM": _mpt_layer,
    "OpenELMForCausalLM": _openelm_layer,
}
