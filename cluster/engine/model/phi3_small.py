"""Phi-3-small (Microsoft, 2024), which transformers does not have: attention that is block-sparse in every other layer.

The published checkpoints bring Python code of their own, which is never run here; this is the same arithmetic on
transformers' building blocks, with names of parameters as the checkpoints have them. Multipliers of muP (Yang et al.
2022) scale embeddings, attention scores and logits; the gates of the feed-forward blocks take turns with what they
gate. LongRoPE has a multiplier of cosines and sines of its own for either set of factors.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from cluster.checkpoint.fields import Fields
from cluster.checkpoint.phi3_small import ffn_size, unused_tokens
from cluster.engine.model import probe
from cluster.engine.model.attention_features import BlockSparse


class Phi3SmallConfig(PreTrainedConfig):
    """config.json of the published models, by its own names; absent fields have the published class's defaults."""

    model_type = "phi3small"
    ignore_keys_at_rope_validation: ClassVar[set[str]] = {"short_mscale", "long_mscale"}

    def __init__(self, **fields: Any) -> None:
        read = Fields(fields)
        self.ff_intermediate_size = ffn_size(read)
        self.hidden_size = read.whole("hidden_size", 4096)
        self.num_hidden_layers = read.whole("num_hidden_layers", 32)
        self.num_attention_heads = read.whole("num_attention_heads", 32)
        self.num_key_value_heads = read.whole("num_key_value_heads", 8)
        self.head_dim = read.head_dim(self.hidden_size, self.num_attention_heads, None)
        self.vocab_size = read.whole("vocab_size", 100352)
        self.max_position_embeddings = read.whole("max_position_embeddings", 8192)
        self.layer_norm_epsilon = fields.get("layer_norm_epsilon", 1e-5)
        self.gegelu_limit = fields.get("gegelu_limit", 20.0)
        if fields.get("hidden_act", "gegelu") != "gegelu":
            raise ValueError(f"hidden_act is {fields['hidden_act']!r}; Phi-3-small has gegelu")
        self.blocksparse_homo_head_pattern = read.flag("blocksparse_homo_head_pattern", False)
        self.blocksparse_block_size = read.whole("blocksparse_block_size", 64)
        self.blocksparse_num_local_blocks = read.whole("blocksparse_num_local_blocks", 16)
        self.blocksparse_vert_stride = read.whole("blocksparse_vert_stride", 8)
        self.dense_attention_every_n_layers = read.optional_whole("dense_attention_every_n_layers", 2)
        self.mup_use_scaling = read.flag("mup_use_scaling", True)
        self.mup_width_multiplier = fields.get("mup_width_multiplier", 8.0)
        self.mup_embedding_multiplier = fields.get("mup_embedding_multiplier", 10.0)
        self.mup_attn_multiplier = fields.get("mup_attn_multiplier", 1.0)
        dummies = fields.get("dummy_token_indices")
        self.dummy_token_indices = list(unused_tokens(self.vocab_size) if dummies is None else dummies)
        self.rope_position_scale = float(fields.get("rope_position_scale", 1.0))
        self.rope_parameters = _rope(fields)
        for name in (*vars(self), "ff_dim_multiplier", "rope_scaling", "rope_embedding_base"):
            fields.pop(name, None)
        fields.setdefault("tie_word_embeddings", True)
        super().__init__(**fields)


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters as transformers has them; published are LongRoPE, also called su, or none."""
    own = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = float(own.pop("rope_theta", fields.get("rope_embedding_base", 1e6)))
    named = own.pop("type", "default")
    kind = own.pop("rope_type", named)
    if kind == "default" and "short_factor" not in own:
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in {"default", "longrope", "su"}:
        raise ValueError(f"its rope type is {kind!r}; Phi-3-small has longrope or none")
    return {"rope_type": "longrope", "rope_theta": theta, **own}


def _multipliers(config: Phi3SmallConfig) -> tuple[float, float]:
    """Of cosines and sines, in sequences up to the original length and in longer ones."""
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return 1.0, 1.0
    short, long = rope.get("short_mscale", -1.0), rope.get("long_mscale", -1.0)
    original = rope["original_max_position_embeddings"]
    stretch = config.max_position_embeddings / original
    if long <= 0:
        long = math.sqrt(1.0 + math.log(stretch) / math.log(original)) if stretch > 1.0 else 1.0
    return (short if short > 0 else 1.0), long


class Phi3SmallRotaryEmbedding(LlamaRotaryEmbedding):
    """Halves of each head rotate together; a sequence's length decides the multiplier too."""

    def __init__(self, config: Phi3SmallConfig) -> None:
        super().__init__(config)
        self.multipliers = _multipliers(config)
        self.position_scale = 1.0 if self.rope_type == "longrope" else config.rope_position_scale

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[1, tokens, head_dim]`` in the type of ``x``."""
        positions = position_ids[..., None].float() * self.position_scale
        angles = positions * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        short, long = self.multipliers
        multiplier: float | torch.Tensor = long
        if self.rope_type == "default":
            multiplier = 1.0
        elif short != long:
            is_long = position_ids.max() + 1 > self.config.rope_parameters["original_max_position_embeddings"]
            multiplier = torch.where(is_long, long, short)
        return (angles.cos() * multiplier).to(x.dtype), (angles.sin() * multiplier).to(x.dtype)


class Phi3SmallAttention(nn.Module):
    """``query_key_value`` holds, for each KV head, its query heads, its key and its value."""

    def __init__(self, config: Phi3SmallConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = self.num_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width + 2 * self.num_kv_heads * self.head_dim)
        self.dense = nn.Linear(width, config.hidden_size)
        self.scaling = config.mup_attn_multiplier / self.head_dim if config.mup_use_scaling else self.head_dim**-0.5
        every = config.dense_attention_every_n_layers
        self.block_sparse: BlockSparse | None = None
        if every is None or (layer + 1) % every:
            self.block_sparse = BlockSparse.strided(
                config.num_attention_heads,
                block=config.blocksparse_block_size,
                local_blocks=config.blocksparse_num_local_blocks,
                stride=config.blocksparse_vert_stride,
                alike=config.blocksparse_homo_head_pattern,
            )

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``[1, tokens, hidden_size]``; cos and sin ``[1, tokens, head_dim]``."""
        rows = self.query_key_value(hidden).unflatten(2, (self.num_kv_heads, -1, self.head_dim))
        parts = rows[..., :-2, :], rows[..., -2:-1, :], rows[..., -1:, :]
        query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in parts)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        out, _ = probe.interface()(self, query, key, value, None, scaling=self.scaling)
        projected: torch.Tensor = self.dense(out.flatten(2))
        return projected


class Phi3SmallFeedForward(nn.Module):
    """``up_proj`` gives gates and what they gate in turns; both are kept within a limit before they are multiplied."""

    def __init__(self, config: Phi3SmallConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.ff_intermediate_size)
        self.down_proj = nn.Linear(config.ff_intermediate_size, config.hidden_size)
        self.limit = config.gegelu_limit

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.up_proj(hidden)
        gate, rest = inner[..., ::2], inner[..., 1::2]
        if self.limit is not None:
            gate, rest = gate.clamp(max=self.limit), rest.clamp(-self.limit, self.limit)
        out: torch.Tensor = self.down_proj(gate * torch.sigmoid(1.702 * gate) * (rest + 1))
        return out


class Phi3SmallDecoderLayer(nn.Module):
    """Norm before attention and before the feed-forward, each with its residual."""

    def __init__(self, config: Phi3SmallConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Phi3SmallAttention(config, layer)
        self.mlp = Phi3SmallFeedForward(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        out: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Phi3SmallPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model class."""

    config_class = Phi3SmallConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["Phi3SmallDecoderLayer"]


class Phi3SmallModel(Phi3SmallPreTrainedModel):
    """Embedding and its multiplier, decoder layers, final norm."""

    def __init__(self, config: Phi3SmallConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Phi3SmallDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.rotary_emb = Phi3SmallRotaryEmbedding(config)
        multiplier = config.mup_embedding_multiplier
        self.embedding_multiplier = multiplier if multiplier is not None and multiplier > 0 else 1.0
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden * self.embedding_multiplier
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        cos, sin = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden))


class Phi3SmallForCausalLM(Phi3SmallPreTrainedModel):
    """The model and its head, whose logits are divided by a multiplier; ids that stand for nothing get the lowest."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Phi3SmallConfig) -> None:
        super().__init__(config)
        self.model = Phi3SmallModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.keep_vocabulary(range(config.vocab_size))
        self.post_init()

    def keep_vocabulary(self, rows: range) -> None:
        """The head has these rows of the vocabulary alone."""
        self._unused = [token - rows.start for token in self.config.dummy_token_indices if token in rows]

    def forward(
        self, input_ids: torch.Tensor | None = None, logits_to_keep: int | torch.Tensor = 0, **inputs: Any
    ) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, **inputs).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept]).float() / (self.config.mup_width_multiplier or 1.0)
        if self._unused:
            unused = torch.tensor(self._unused, device=logits.device)
            logits.index_fill_(-1, unused, torch.finfo(logits.dtype).min)
        return CausalLMOutputWithPast(logits=logits)


def register() -> None:
    """Makes Phi-3-small known to transformers in this process."""
    AutoConfig.register("phi3small", Phi3SmallConfig, exist_ok=True)
    AutoModelForCausalLM.register(Phi3SmallConfig, Phi3SmallForCausalLM, exist_ok=True)
