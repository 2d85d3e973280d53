"""Where a family differs from what every family does: its own attention, its own head counts, in-tree model code.

Nearly every causal model of transformers asks the attention interface for its attention and needs nothing here. The
rest have an attention of their own; those get a short one of ours that ends in ``paged_attention``. ``build`` proves
with a probe on meta that every layer's attention is ours, so that no model is ever served with another one.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from cluster.domain.errors import CheckpointError, UnsupportedModelError
from cluster.engine.model import attention, probe
from cluster.engine.model.attention_features import BlockSparse
from cluster.engine.model.probe import AttentionLayer


def load_config(config: Mapping[str, Any]) -> Any:
    """The contents of a config.json as the config class of its ``model_type``, transformers' or ours.

    Code in the checkpoint is never run: ``auto_map`` is passed over, and what neither of the two knows is an
    UnsupportedModelError.
    """
    from transformers import CONFIG_MAPPING

    _register()
    fields = _modern(config)
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"config.json has the model_type {model_type!r}, which this version of transformers does not build."
        )
    try:
        return prepare_config(CONFIG_MAPPING[model_type].from_dict(fields))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"config.json is no {model_type} config: {error}") from error


def _modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` under today's names: Falcon was published as RefinedWeb, with names of its own."""
    fields = dict(config)
    fields.pop("auto_map", None)
    if fields.get("model_type") in ("RefinedWeb", "RefinedWebModel"):
        names = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}
        fields = {names.get(name, name): value for name, value in fields.items()}
        fields["new_decoder_architecture"] = fields["model_type"] == "RefinedWeb"
        fields["model_type"] = "falcon"
    return fields


def prepare_config(config: Any) -> Any:
    """``config`` ready for ``build``; UnsupportedModelError for what has no single causal decoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} has an encoder and a decoder; served are decoder-only language models."
        )
    config.use_cache = False
    return config


def build(config: Any, dtype: torch.dtype) -> Any:
    """The whole model on meta, with our attention in every layer; nothing is loaded.

    UnsupportedModelError names what stands in the way: a layer whose attention does not reach us, a mask that is
    neither causal nor a sliding window, or a mixing of tokens that is no attention.
    """
    from transformers import AutoModelForCausalLM

    _register()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.IMPLEMENTATION)
    except Exception as error:  # boundary: the constructors of hundreds of model classes, each with its own
        raise UnsupportedModelError(
            f"transformers cannot build {config.model_type} for serving: {probe.line(error)}"
        ) from error
    _require_class(config, model)
    model.eval()
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _no_warning  # it looks at every step's tokens
        install = _EXCEPTIONS.get(type(module).__name__)
        if install is not None:
            install(module)
    probe.examine(model)
    return model


def _require_class(config: Any, model: Any) -> None:
    """A config may borrow another family's model_type for an architecture with code of its own."""
    named, built = (getattr(config, "architectures", None) or [None])[0], type(model).__name__
    if named is not None and named.lower() not in (built.lower(), "rwforcausallm"):
        raise UnsupportedModelError(
            f"config.json names the architecture {named}, but its model_type {config.model_type} is {built} in "
            "transformers; only architectures that transformers knows are served."
        )


def _no_warning(*_: Any) -> None:
    """For advice to people that is no use to an engine."""


def attention_layers(model: Any) -> tuple[AttentionLayer, ...]:
    """The attention of every layer of the whole model, in order: what the KV cache must hold."""
    layers = model.attention_layers
    assert isinstance(layers, tuple)
    return layers


def localise(module: nn.Module, heads: range, kv_heads: range) -> None:
    """Tells an attention module that it holds these heads of the whole model's: views and slopes follow.

    ``heads`` and ``kv_heads`` are contiguous; each KV head serves as many query heads of this rank as any other.
    """
    count, kv_count = len(heads), len(kv_heads)
    whole: dict[str, Any] = dict(vars(module))
    head_dim = whole.get("head_dim") or whole.get("head_size") or 0
    before = next((whole[name] for name in _HEADS if isinstance(whole.get(name), int)), 0)
    local = dict.fromkeys(_HEADS, count) | dict.fromkeys(_KV_HEADS, kv_count)
    local |= dict.fromkeys(_GROUPS, count // kv_count)
    # The width of all heads together, where a family splits or merges by it; elsewhere these mean other widths.
    local |= {name: count * head_dim for name in _WIDTHS if before and whole.get(name) == before * head_dim}
    local["kv_dim"] = kv_count * head_dim  # GPT-BigCode
    for name, value in local.items():
        if isinstance(whole.get(name), int):
            setattr(module, name, value)
    for name in ("alibi_slopes", "alibi_table"):
        if isinstance(whole.get(name), torch.Tensor):
            setattr(module, name, whole[name][heads.start : heads.stop].clone())
    sparse = whole.get("block_sparse")
    if isinstance(sparse, BlockSparse):
        setattr(module, "block_sparse", sparse.of_heads(heads))  # noqa: B010 - mypy knows no new attributes of modules
    if type(module).__name__ in _READS_CONFIG:
        own = copy.copy(whole["config"])
        own.num_attention_heads, own.num_key_value_heads = count, kv_count
        module.config = own


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_k_heads", "num_v_heads")
_GROUPS = ("num_key_value_groups", "num_groups", "n_rep", "num_queries_per_kv")
_WIDTHS = ("embed_dim", "hidden_size", "split_size", "all_head_size", "inner_dim", "q_dim", "query_dim")
# Attention classes that slice a fused projection by the config's head count.
_READS_CONFIG = frozenset({"Phi3Attention", "Phi4MultimodalAttention", "GPTNeoXAttention"})


def _register() -> None:
    """Everything of ours that transformers must know in this process."""
    from cluster.engine.model import openelm, phi3_small

    attention.register()
    probe.register()
    openelm.register()
    phi3_small.register()
    _own_attention_classes()


def _own_attention_classes() -> None:
    """Falcon and GPT-Neo pick an attention class by the implementation's name: theirs, whose forward we replace."""
    for family, table, name in (
        ("falcon", "FALCON_ATTENTION_CLASSES", "FalconAttention"),
        ("gpt_neo", "GPT_NEO_ATTENTION_CLASSES", "GPTNeoSelfAttention"),
        ("gptj", "GPTJ_ATTENTION_CLASSES", "GPTJAttention"),
    ):
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        getattr(modeling, table)[attention.IMPLEMENTATION] = getattr(modeling, name)


def _attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """``[1, tokens, heads * value_dim]`` from ``[1, heads, tokens, head_dim]``."""
    out, _ = probe.interface()(module, query, key, value, None, **options)
    merged: torch.Tensor = out.flatten(2)
    return merged


def _grouped(fused: torch.Tensor, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows grouped by KV head, ``[its query heads | key | value]`` each -> three ``[1, heads, tokens, head_dim]``."""
    rows = fused.unflatten(2, (kv_heads, -1, head_dim))  # [1, tokens, kv_heads, q_per_kv + 2, head_dim]
    parts = rows[..., :-2, :], rows[..., -2:-1, :], rows[..., -1:, :]
    query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in parts)
    return query, key, value


def _falcon_attention(module: Any) -> None:
    """Falcon in its three layouts; all but 7B's are grouped by KV head, which 7B's one head is too."""
    if module.config.alibi:
        # transformers rounds slopes and biases to bfloat16, whatever the model's type: part of the model by now.
        slopes = _power_slopes(module.num_heads).to(torch.bfloat16)
        positions = torch.arange(module.config.max_position_embeddings, device="cpu")
        module.alibi_table = (slopes[:, None] * positions).float() / math.sqrt(module.head_dim)
    if not module.new_decoder_architecture and not module.multi_query:
        module.num_kv_heads = module.num_heads
    rotate = _function(module, "apply_rotary_pos_emb")

    def forward(
        self: Any, hidden_states: torch.Tensor, position_embeddings: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = _grouped(self.query_key_value(hidden_states), self.num_kv_heads, self.head_dim)
        if not hasattr(self, "alibi_table"):
            query, key = rotate(query, key, *position_embeddings)
        return self.dense(_attend(self, query, key, value, scaling=self.inv_norm_factor)), None

    module.forward = MethodType(forward, module)


def _falcon_model(module: Any) -> None:
    """Its forward would make biases for its layers, which have their own."""
    module.use_alibi = False


def _bloom_attention(module: Any) -> None:
    module.alibi_slopes = _power_slopes(module.num_heads)
    module.num_kv_heads = module.num_heads

    def forward(self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        query, key, value = _grouped(self.query_key_value(hidden_states), self.num_kv_heads, self.head_dim)
        return residual + self.dense(_attend(self, query, key, value, scaling=self.inv_norm_factor)), None

    module.forward = MethodType(forward, module)


def _mpt_attention(module: Any) -> None:
    module.alibi_slopes = _function(module, "build_mpt_alibi_tensor")(module.n_heads, 2)[:, 0, 0].neg()
    # The tensor is [heads, 1, 2], for the distances 1 and 0: its first column is minus the slope.

    def forward(self: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        fused = self.Wqkv(hidden_states)
        if self.clip_qkv:
            fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        parts = fused.unflatten(2, (3, self.n_heads, self.head_dim)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        return self.out_proj(_attend(self, query, key, value, scaling=self.softmax_scale)), None

    module.forward = MethodType(forward, module)


def _mpt_model(module: Any) -> None:
    """Its own forward builds masks and biases for the whole context, and fails where there is no mask."""

    def forward(
        self: Any, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **_: Any
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            hidden = block(hidden, position_bias=None, attention_mask=None)[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm_f(hidden))

    module.forward = MethodType(forward, module)


def _attention_core(scaling: Callable[[Any], float]) -> Callable[[Any], None]:
    """For families whose attention has a method ``_attn`` between its own projections and rotations."""

    def attend(
        self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any = None
    ) -> tuple[torch.Tensor, None]:
        options = {"scaling": scaling(self), "sliding_window": getattr(self, "sliding_window", None)}
        out, _ = probe.interface()(self, query, key, value, None, **options)
        return out.transpose(1, 2), None

    def install(module: Any) -> None:
        module._attn = MethodType(attend, module)  # noqa: SLF001 - the method that we replace

    return install


def _gpt_neo_attention(module: Any) -> None:
    """Unscaled; its local layers have their window only in a mask of the whole context."""
    module.layer_idx = module.layer_id
    if module.attention_type == "local":
        module.sliding_window = module.config.window_size
    _attention_core(lambda _: 1.0)(module)


def _power_slopes(heads: int) -> torch.Tensor:
    """The ALiBi slopes of BLOOM and Falcon: a geometric series, filled up from that of twice as many heads."""
    powers = 2 ** math.floor(math.log2(heads))
    base = torch.full((), 2 ** (-(2 ** -(math.log2(powers) - 3))), dtype=torch.float32, device="cpu")
    slopes = torch.pow(base, torch.arange(1, 1 + powers, dtype=torch.int32, device="cpu"))
    if powers == heads:
        return slopes
    base = torch.full((), 2 ** (-(2 ** -(math.log2(2 * powers) - 3))), dtype=torch.float32, device="cpu")
    more = torch.arange(1, 1 + 2 * min(powers, heads - powers), 2, dtype=torch.int32, device="cpu")
    return torch.cat([slopes, torch.pow(base, more)])


def _function(module: Any, name: str) -> Any:
    """A function of the file that ``module``'s class is in."""
    return getattr(importlib.import_module(type(module).__module__), name)


_EXCEPTIONS: dict[str, Callable[[Any], None]] = {
    "FalconAttention": _falcon_attention,
    "FalconModel": _falcon_model,
    "BloomAttention": _bloom_attention,
    "MptAttention": _mpt_attention,
    "MptModel": _mpt_model,
    "GPTJAttention": _attention_core(lambda module: 1.0 / math.sqrt(module.head_dim)),
    "CodeGenAttention": _attention_core(lambda module: 1.0 / math.sqrt(module.head_dim)),
    "GPTNeoXJapaneseAttention": _attention_core(lambda module: 1.0 / math.sqrt(module.head_size)),
    "GPTNeoSelfAttention": _gpt_neo_attention,
}
