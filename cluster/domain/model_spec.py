"""A model's shape: what config.json says, in one vocabulary for every family."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal


class Dtype(enum.StrEnum):
    """Element types of weights and KV cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def itemsize(self) -> int:
        return 4 if self is Dtype.FLOAT32 else 2


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What may differ from layer to layer."""

    num_heads: int
    num_kv_heads: int
    ffn_size: int


@dataclass(frozen=True, slots=True)
class RopeByLength:
    """Rotary frequencies that depend on a sequence's length, once it passes ``original_len`` tokens.

    "dynamic": every token keeps the frequencies it was computed with: those of max(prompt, position + 1) tokens.
    "switch": the first token beyond ``original_len`` makes the whole sequence, its past included, use the other set.
    """

    kind: Literal["dynamic", "switch"]
    original_len: int

    def __post_init__(self) -> None:
        assert self.original_len >= 1, self.original_len


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model's architecture. Sizes are of the unsharded model.

    ``architecture`` is transformers' class name (``LlamaForCausalLM``), ``model_type`` its config's.
    ``sliding_window``: tokens each token can look back on, itself included; None = all.
    ``end_token_ids``: from generation_config.json, then config.json.
    """

    architecture: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_position_embeddings: int
    dtype: Dtype
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k and v
    output_bias: bool = False  # a bias on the attention's output projection
    mlp_bias: bool = False
    sliding_window: int | None = None
    end_token_ids: tuple[int, ...] = field(default_factory=tuple)
    sliding_layers: tuple[bool, ...] = ()  # which layers the window holds for; empty = all
    scaled_context: int | None = None  # context length after rope scaling, where it differs
    qk_norm: bool = False  # a norm on each head's queries and keys
    layer_norms: int = 2  # norms in a decoder layer, those of qk_norm aside
    norm_bias: bool = False
    num_experts: int = 0  # 0 = dense
    experts_per_token: int = 0
    layer_shapes: tuple[LayerShape, ...] = ()  # where layers differ (OpenELM); empty = all alike
    value_head_dim: int | None = None  # width of a head's values, where it is not head_dim
    # Names and shapes of the checkpoint, for an architecture without rules of its own; empty = the rules tell them.
    stored_tensors: tuple[tuple[str, tuple[int, ...]], ...] = field(default=(), repr=False, hash=False)
    rope_by_length: RopeByLength | None = None

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, (self.num_heads, self.num_kv_heads)
        assert len(self.layer_shapes) in (0, self.num_layers), (len(self.layer_shapes), self.num_layers)
        assert len(self.sliding_layers) in (0, self.num_layers), (len(self.sliding_layers), self.num_layers)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output that the model was made for, rope scaling included."""
        return self.scaled_context or self.max_position_embeddings

    def layer_shape(self, layer: int) -> LayerShape:
        """Heads and width of one decoder layer."""
        if self.layer_shapes:
            return self.layer_shapes[layer]
        return LayerShape(self.num_heads, self.num_kv_heads, self.ffn_size)

    @property
    def distinct_layer_shapes(self) -> tuple[LayerShape, ...]:
        """Every shape that a layer has, once; one for most models."""
        return tuple(dict.fromkeys(self.layer_shapes)) or (self.layer_shape(0),)

    def kv_bytes_per_token(self, dtype: Dtype) -> int:
        """KV cache of one token over all layers and heads: layers x kv_heads x (key + value width) x itemsize."""
        kv_heads = sum(self.layer_shape(layer).num_kv_heads for layer in range(self.num_layers))
        return kv_heads * (self.head_dim + (self.value_head_dim or self.head_dim)) * dtype.itemsize
