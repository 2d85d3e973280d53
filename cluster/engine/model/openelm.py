"""OpenELM (Apple, 2024), which transformers does not have: decoder layers that differ in heads and feed-forward width.

The published checkpoints bring Python code of their own, which is never run here; this is the same arithmetic on
transformers' building blocks, with names of parameters as the checkpoints have them. Queries and keys are normalised
per head, rotary angles are applied in float32, and the head is tied to the embedding where the config says so.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from cluster.checkpoint.fields import Fields
from cluster.checkpoint.openelm import openelm_layers
from cluster.domain.model_spec import LayerShape
from cluster.engine.model import probe


class OpenELMConfig(PreTrainedConfig):
    """config.json of the published models, by its own names; absent fields have the published class's defaults."""

    model_type = "openelm"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
    }

    def __init__(self, **fields: Any) -> None:
        layers = openelm_layers(Fields(fields))
        self.layer_shapes = layers
        self.model_dim = fields.pop("model_dim", 2048)
        self.num_transformer_layers = fields.pop("num_transformer_layers", 12)
        self.vocab_size = fields.pop("vocab_size", 32000)
        self.head_dim = fields.pop("head_dim", 128)
        self.num_query_heads = [layer.num_heads for layer in layers]
        self.num_kv_heads = [layer.num_kv_heads for layer in layers]
        fields.pop("num_query_heads", None)
        fields.pop("num_kv_heads", None)
        # The largest of a layer: what code that knows one number for all layers may read.
        self.num_attention_heads = max(self.num_query_heads)
        self.num_key_value_heads = max(self.num_kv_heads)
        self.ffn_with_glu = fields.pop("ffn_with_glu", True)
        self.activation_fn_name = fields.pop("activation_fn_name", "swish")
        self.normalize_qk_projections = fields.pop("normalize_qk_projections", True)
        self.rms_norm_eps = fields.pop("rms_norm_eps", 1e-6)
        self.max_position_embeddings = fields.pop("max_context_length", 2048)
        self.rope_parameters = _rope(fields)
        tied = bool(fields.pop("share_input_output_layers", True))
        fields["tie_word_embeddings"] = tied
        super().__init__(**fields)

    def to_dict(self) -> dict[str, Any]:
        """As it can be saved: shapes follow from the other fields."""
        fields: dict[str, Any] = super().to_dict()
        fields.pop("layer_shapes", None)
        fields["max_context_length"] = self.max_position_embeddings
        fields["share_input_output_layers"] = self.tie_word_embeddings
        return fields


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    theta = float(fields.pop("rope_freq_constant", 10000))
    own = fields.pop("rope_parameters", None) or fields.pop("rope_scaling", None) or {}
    return {"rope_type": own.get("type", "default"), "rope_theta": theta, **own}


class OpenELMRMSNorm(nn.Module):
    """x / rms(x) in float32, then times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled.type_as(x) * self.weight


class OpenELMRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's: halves of each head rotate together."""


class OpenELMAttention(nn.Module):
    """``qkv_proj`` holds all query heads, then all key heads, then all value heads of this layer."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        shape = config.layer_shapes[layer]
        self.layer_idx, self.head_dim = layer, config.head_dim
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        width = (shape.num_heads + 2 * shape.num_kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.model_dim, width, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.normalize_qk_projections:
            self.q_norm = OpenELMRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = OpenELMRMSNorm(config.head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(shape.num_heads * config.head_dim, config.model_dim, bias=False)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``[1, tokens, model_dim]``; cos and sin ``[1, tokens, head_dim]`` in float32."""
        rows = self.qkv_proj(hidden).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = rows.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        query, key = self.q_norm(query), self.k_norm(key)
        turned, turned_key = apply_rotary_pos_emb(query.float(), key.float(), cos, sin)
        query, key = turned.type_as(value), turned_key.type_as(value)
        out, _ = probe.interface()(self, query, key, value, None, scaling=self.head_dim**-0.5)
        projected: torch.Tensor = self.out_proj(out.flatten(2))
        return projected


class OpenELMFeedForward(nn.Module):
    """``proj_1`` holds the gate, then what it gates (or the one half alone, without GLU)."""

    def __init__(self, config: OpenELMConfig, shape: LayerShape) -> None:
        super().__init__()
        self.glu = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, shape.ffn_size * (2 if self.glu else 1), bias=False)
        self.proj_2 = nn.Linear(shape.ffn_size, config.model_dim, bias=False)
        self.act = ACT2FN[config.activation_fn_name]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.proj_1(hidden)
        if self.glu:
            gate, rest = inner.chunk(2, dim=-1)
            inner = self.act(gate) * rest
        else:
            inner = self.act(inner)
        out: torch.Tensor = self.proj_2(inner)
        return out


class OpenELMDecoderLayer(nn.Module):
    """Norm before attention and before the feed-forward, each with its residual."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer)
        self.ffn = OpenELMFeedForward(config, config.layer_shapes[layer])
        self.attn_norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)
        self.ffn_norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.attn_norm(hidden), cos, sin)
        out: torch.Tensor = hidden + self.ffn(self.ffn_norm(hidden))
        return out


class OpenELMPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model class."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "token_embeddings"
    _no_split_modules: ClassVar[list[str]] = ["OpenELMDecoderLayer"]


class OpenELMModel(OpenELMPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(OpenELMDecoderLayer(config, i) for i in range(config.num_transformer_layers))
        self.norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)
        self.rotary_emb = OpenELMRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        hidden = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        # In float32 whatever the model's type: only rotated queries and keys are rounded.
        cos, sin = self.rotary_emb(hidden.new_empty(0, dtype=torch.float32), position_ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class OpenELMForCausalLM(OpenELMPreTrainedModel):
    """The model and its head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.token_embeddings.weight"}

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor | None = None, logits_to_keep: int | torch.Tensor = 0, **inputs: Any
    ) -> CausalLMOutputWithPast:
        hidden = self.transformer(input_ids=input_ids, **inputs).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, kept]))


def register() -> None:
    """Makes OpenELM known to transformers in this process."""
    AutoConfig.register("openelm", OpenELMConfig, exist_ok=True)
    AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
