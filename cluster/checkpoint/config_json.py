"""config.json in one vocabulary: every family's names and defaults become a ModelSpec.

Absent fields take the defaults of transformers' config classes; old and new spellings (``torch_dtype`` and
``dtype``, ``rope_scaling`` and ``rope_parameters``) mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cluster.checkpoint.fields import Fields
from cluster.checkpoint.generic import generic_values, refuse_unserved
from cluster.checkpoint.headers import TensorHeader
from cluster.checkpoint.openelm import openelm_layers
from cluster.checkpoint.phi3_small import ffn_size
from cluster.checkpoint.rope_scaling import rope_by_length, scaled_context
from cluster.checkpoint.transformers_types import CLASS_BY_MODEL_TYPE
from cluster.domain.errors import CheckpointError, UnsupportedModelError
from cluster.domain.model_spec import Dtype, ModelSpec

_DTYPES = {f"{prefix}{dtype.value}": dtype for dtype in Dtype for prefix in ("", "torch.")}


def model_spec(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    *,
    stored_dtype: Dtype | None = None,
    tensors: Mapping[str, TensorHeader] | None = None,
) -> ModelSpec:
    """The architecture that ``config`` describes.

    ``stored_dtype`` is the weights' own type, used when the config names none. ``tensors``: the checkpoint's headers,
    by which an architecture without a rule here is told. UnsupportedModelError for one that is known not to work, or
    that has neither a rule nor headers; CheckpointError for a config that contradicts itself.
    """
    architecture = _architecture(config)
    refuse_unserved(architecture, str(config.get("model_type", "")), config)
    fields = Fields(config)
    rule = _FAMILIES.get(architecture)
    if rule is None and architecture not in CLASS_BY_MODEL_TYPE.values():
        raise UnsupportedModelError(
            f"{architecture or 'A config without architectures'} is no causal language model that transformers has; "
            "use a checkpoint of an architecture that it knows."
        )
    values = rule(fields) if rule else generic_values(architecture, fields, tensors)
    if values.pop("by_headers", False):
        values["stored_tensors"] = generic_values(architecture, fields, tensors)["stored_tensors"]
    values.setdefault("max_position_embeddings", fields.whole("max_position_embeddings", 2048))
    values["scaled_context"] = scaled_context(config, values["max_position_embeddings"])
    values["rope_by_length"] = rope_by_length(config, values["max_position_embeddings"])
    if values["num_heads"] % values["num_kv_heads"]:
        raise CheckpointError(
            f"config.json has {values['num_heads']} attention heads and {values['num_kv_heads']} key/value heads; "
            "the first must be a multiple of the second."
        )
    return ModelSpec(
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        dtype=_dtype(config, stored_dtype),
        end_token_ids=_end_token_ids(config, generation_config, values.pop("eos_default")),
        **values,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return _ALIASES.get(names[0], names[0])
    model_type = str(config.get("model_type"))
    return _BY_MODEL_TYPE.get(model_type) or CLASS_BY_MODEL_TYPE.get(model_type, "")


def _dtype(config: Mapping[str, Any], stored: Dtype | None) -> Dtype:
    name = config.get("dtype", config.get("torch_dtype"))
    if name is None:
        return stored or Dtype.FLOAT32
    if name not in _DTYPES:
        raise UnsupportedModelError(f"config.json names the dtype {name!r}; served are float32, bfloat16 and float16.")
    return _DTYPES[name]


def _end_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, default: int | None
) -> tuple[int, ...]:
    value = (generation_config or {}).get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id", default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"eos_token_id is {value!r}; it must be a token id or a list of them.")
    return tuple(ids)


def _llama_like(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """The family of Llama: names as LlamaConfig has them; ``defaults`` as its config class has them."""
    hidden = fields.whole("hidden_size", defaults.get("hidden", 4096))
    heads = fields.whole("num_attention_heads", defaults.get("heads", 32))
    return {
        "hidden_size": hidden,
        "num_layers": fields.whole("num_hidden_layers", defaults.get("layers", 32)),
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads", defaults.get("kv_heads") or heads, absent_is_none=True),
        "head_dim": fields.head_dim(hidden, heads, defaults.get("head_dim")),
        "ffn_size": fields.whole("intermediate_size", defaults.get("ffn", 11008)),
        "vocab_size": fields.whole("vocab_size", defaults.get("vocab", 32000)),
        "max_position_embeddings": fields.whole("max_position_embeddings", defaults.get("context", 2048)),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", defaults.get("tied", False)),
        "eos_default": defaults.get("eos", 2),
    }


def _llama(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return _llama_like(fields) | {
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", False),
    }


def _mistral(fields: Fields) -> dict[str, Any]:
    return _llama_like(fields, ffn=14336, kv_heads=8, context=131072) | {
        "sliding_window": fields.optional_whole("sliding_window", 4096),
    }


def _mixtral(fields: Fields) -> dict[str, Any]:
    return _llama_like(fields, ffn=14336, kv_heads=8, context=131072) | {
        "sliding_window": fields.optional_whole("sliding_window", None),
        "num_experts": fields.whole("num_local_experts", 8),
        "experts_per_token": fields.whole("num_experts_per_tok", 2),
    }


def _qwen_window(fields: Fields, layers: int) -> dict[str, Any]:
    window = fields.optional_whole("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    if window is None:
        return {}
    types = fields.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        sliding = tuple(kind == "sliding_attention" for kind in types)
    else:
        first = fields.whole("max_window_layers", 28, least=0)
        sliding = tuple(layer >= first for layer in range(layers))
    return {"sliding_window": window, "sliding_layers": sliding} if any(sliding) else {}


def _qwen2(fields: Fields) -> dict[str, Any]:
    values = _llama_like(fields, ffn=22016, kv_heads=32, context=32768, vocab=151936, eos=None)
    return values | {"attention_bias": True} | _qwen_window(fields, values["num_layers"])


def _qwen3(fields: Fields) -> dict[str, Any]:
    values = _llama_like(fields, ffn=22016, kv_heads=32, context=32768, vocab=151936, eos=None, head_dim=128)
    bias = fields.flag("attention_bias", False)
    biases = {"attention_bias": bias, "output_bias": bias, "qk_norm": True}
    return values | biases | _qwen_window(fields, values["num_layers"])


def _gemma(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return _llama_like(
        fields, hidden=3072, ffn=24576, layers=28, heads=16, kv_heads=16, head_dim=256, vocab=256000, context=8192,
        tied=True, eos=1,
    ) | {"attention_bias": bias, "output_bias": bias}  # fmt: skip


def _phi3(fields: Fields) -> dict[str, Any]:
    return _llama_like(fields, hidden=3072, ffn=8192, vocab=32064, context=4096, eos=32000) | {
        "sliding_window": fields.optional_whole("sliding_window", None),
    }


def _phi3_small(fields: Fields) -> dict[str, Any]:
    hidden, heads = fields.whole("hidden_size", 4096), fields.whole("num_attention_heads", 32)
    return {
        "hidden_size": hidden,
        "num_layers": fields.whole("num_hidden_layers", 32),
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads", 8),
        "head_dim": fields.head_dim(hidden, heads, None),
        "ffn_size": ffn_size(fields),
        "vocab_size": fields.whole("vocab_size", 100352),
        "max_position_embeddings": fields.whole("max_position_embeddings", 8192),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
        "eos_default": 100257,
    }


def _falcon(fields: Fields) -> dict[str, Any]:
    new = fields.flag("new_decoder_architecture", fields.get("model_type") == "RefinedWeb")
    # Published first under the model types RefinedWeb and RefinedWebModel, with other names.
    hidden, heads = fields.whole("hidden_size", 4544), fields.whole("num_attention_heads", fields.whole("n_head", 71))
    multi_query = fields.flag("multi_query", True)
    kv_heads = fields.whole("num_kv_heads", fields.whole("n_head_kv", heads)) if new else 1 if multi_query else heads
    bias = fields.flag("bias", False)
    return {
        "hidden_size": hidden,
        "num_layers": fields.whole("num_hidden_layers", fields.whole("n_layer", 32)),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": fields.head_dim(hidden, heads, None),
        "by_headers": not new and not fields.flag("parallel_attn", True),
        "ffn_size": fields.whole("ffn_hidden_size", 4 * hidden, absent_is_none=True),
        "vocab_size": fields.whole("vocab_size", 65024),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "norm_bias": True,
        "layer_norms": fields.whole("num_ln_in_parallel_attn", 2 if new else 1, absent_is_none=True),
        "eos_default": 11,
    }


def _gpt_neox(fields: Fields) -> dict[str, Any]:
    hidden, heads = fields.whole("hidden_size", 6144), fields.whole("num_attention_heads", 64)
    bias = fields.flag("attention_bias", True)
    return {
        "hidden_size": hidden,
        "num_layers": fields.whole("num_hidden_layers", 44),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": fields.head_dim(hidden, heads, None),
        "ffn_size": fields.whole("intermediate_size", 24576),
        "vocab_size": fields.whole("vocab_size", 50432),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": True,
        "norm_bias": True,
        "eos_default": 2,
    }


def _mpt(fields: Fields) -> dict[str, Any]:
    hidden, heads = fields.whole("d_model", 2048), fields.whole("n_heads", 16)
    attention = fields.get("attn_config") or {}
    if attention.get("attn_type", "multihead_attention") != "multihead_attention":
        raise UnsupportedModelError("MPT is supported with multi-head attention only, as in transformers.")
    return {
        "hidden_size": hidden,
        "num_layers": fields.whole("n_layers", 24),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": fields.head_dim(hidden, heads, None),
        "ffn_size": hidden * fields.whole("expansion_ratio", 4),
        "vocab_size": fields.whole("vocab_size", 50368),
        "max_position_embeddings": fields.whole("max_seq_len", 2048),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "eos_default": None,
    }


def _openelm(fields: Fields) -> dict[str, Any]:
    layers = openelm_layers(fields)
    return {
        "hidden_size": fields.whole("model_dim", 2048),
        "num_layers": len(layers),
        "num_heads": max(layer.num_heads for layer in layers),
        "num_kv_heads": max(layer.num_kv_heads for layer in layers),
        "head_dim": fields.whole("head_dim", 128),
        "ffn_size": max(layer.ffn_size for layer in layers),
        "vocab_size": fields.whole("vocab_size", 32000),
        "max_position_embeddings": fields.whole("max_context_length", 2048),
        "tie_word_embeddings": fields.flag("share_input_output_layers", True),
        "qk_norm": fields.flag("normalize_qk_projections", True),
        "layer_shapes": layers,
        "eos_default": 2,
    }


_FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "MixtralForCausalLM": _mixtral,
    "GemmaForCausalLM": _gemma,
    "Phi3ForCausalLM": _phi3,
    "Phi3SmallForCausalLM": _phi3_small,
    "FalconForCausalLM": _falcon,
    "GPTNeoXForCausalLM": _gpt_neox,
    "MptForCausalLM": _mpt,
    "OpenELMForCausalLM": _openelm,
}
_ALIASES = {
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "RWForCausalLM": "FalconForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
}
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phi3small": "Phi3SmallForCausalLM",
    "falcon": "FalconForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mpt": "MptForCausalLM",
    "openelm": "OpenELMForCausalLM",
}
