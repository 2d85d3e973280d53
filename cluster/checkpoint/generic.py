"""A config.json of an architecture without rules of its own: standard fields under all the names they go by.

What the config leaves out is taken from the shapes of the stored tensors; those also tell what the model consists of,
so such a model can be planned only where its headers are at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cluster.checkpoint.fields import Fields
from cluster.checkpoint.headers import TensorHeader
from cluster.checkpoint.stored import stored_layer_prefix, stored_shapes
from cluster.checkpoint.tensors import Part, outside_part
from cluster.domain.errors import CheckpointError, UnsupportedModelError

_HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim", "embed_dim", "dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
_HEAD_DIM = ("head_dim", "attention_head_size", "kv_channels")
_FFN = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "inner_dim")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
# Tokens are mixed by something else than attention over a cache of keys and values.
_NO_ATTENTION = re.compile(
    r"mamba|rwkv|xlstm|recurrent_?gemma|jamba|bamba|zamba|nemotron_?h|falcon_?h1|granitemoehybrid|lfm2|qwen3_?next|"
    r"qwen3_5|kimi_?linear|olmo_?hybrid|retnet|reformer|minimax(_?text)?(_01)?$",
    re.IGNORECASE,
)


def refuse_unserved(architecture: str, model_type: str, config: Mapping[str, Any]) -> None:
    """UnsupportedModelError for what is known not to work; anything else is built and looked at in its ranks."""
    if config.get("quantization_config"):
        raise UnsupportedModelError("Quantised checkpoints are not served; use the float16, bfloat16 or float32 one.")
    if _NO_ATTENTION.search(model_type) or _NO_ATTENTION.search(architecture.replace("ForCausalLM", "")):
        raise UnsupportedModelError(
            f"{architecture} keeps a recurrent state beside or instead of attention; only models whose every layer is "
            "plain attention are served."
        )
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{architecture} has an encoder; only decoder-only models are served.")
    if not _CAUSAL.search(architecture):
        raise UnsupportedModelError(
            f"The architecture {architecture or model_type or '(none named)'} is not supported; served are causal "
            "language models (names that end in ForCausalLM or LMHeadModel)."
        )
    if isinstance(config.get("vision_config"), Mapping) or isinstance(config.get("audio_config"), Mapping):
        raise UnsupportedModelError(
            f"{architecture} takes more than text; export its language model alone (its text_config) to serve that."
        )


def generic_values(architecture: str, fields: Fields, tensors: Mapping[str, TensorHeader] | None) -> dict[str, Any]:
    """The fields of a ModelSpec. CheckpointError names a field that neither config nor headers tell."""
    if tensors is None:
        raise UnsupportedModelError(
            f"{architecture} is planned from the headers of its weights; give a local checkpoint, not its config.json."
        )
    shapes = stored_shapes(tensors.values())
    vocab_size, embedded = _embedding(fields, shapes)
    hidden = _first(fields, _HIDDEN, embedded)
    layers = _first(fields, _LAYERS, None)
    heads = _first(fields, _HEADS, None)
    mla = fields.get("qk_rope_head_dim") is not None and fields.get("qk_nope_head_dim") is not None
    multi_query = fields.flag("multi_query", False) and not fields.flag("new_decoder_architecture", False)
    kv_heads = 1 if multi_query else heads if mla else _kv_heads(fields, heads)
    head_dim = _head_dim(fields, hidden, heads, mla=mla)
    has_head = any(outside_part(name, shape, vocab_size) is Part.HEAD for name, shape in _outside(shapes, layers))
    return {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_head_dim": fields.whole("v_head_dim", head_dim) if mla else None,
        "ffn_size": _first(fields, _FFN, 4 * hidden),
        "vocab_size": vocab_size,
        "max_position_embeddings": _first(fields, _CONTEXT, 2048),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", not has_head),
        "experts_per_token": fields.whole("num_experts_per_tok", 0, least=0, absent_is_none=True),
        "eos_default": None,
        "stored_tensors": shapes,
    }


def _first(fields: Fields, names: tuple[str, ...], default: int | None) -> int:
    for name in names:
        value = fields.get(name)
        if isinstance(value, list) and value and all(type(item) is int and item > 0 for item in value):
            return int(max(value))  # one for each layer
        if value is not None:
            return fields.whole(name, 1)
    if default is None:
        raise CheckpointError(f"config.json has none of {', '.join(names)}; add the one that the model's class uses.")
    return default


def _kv_heads(fields: Fields, heads: int) -> int:
    attention = fields.get("attn_config")
    if isinstance(attention, Mapping) and isinstance(attention.get("kv_n_heads"), int):
        return int(attention["kv_n_heads"])
    return _first(fields, _KV_HEADS, heads)


def _head_dim(fields: Fields, hidden: int, heads: int, *, mla: bool) -> int:
    if mla:
        return fields.whole("qk_nope_head_dim", 1) + fields.whole("qk_rope_head_dim", 1)
    for name in _HEAD_DIM:
        if fields.get(name) is not None:
            return fields.whole(name, 1)
    return fields.head_dim(hidden, heads, None)


def _outside(
    shapes: tuple[tuple[str, tuple[int, ...]], ...], layers: int
) -> tuple[tuple[str, tuple[int, ...]], ...]:  # fmt: skip
    prefix = f"{stored_layer_prefix(shapes, layers)}."
    return tuple((name, shape) for name, shape in shapes if not name.startswith(prefix))


def _embedding(fields: Fields, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[int, int | None]:
    """Rows and columns of the word embedding: the largest stored matrix that is named like one."""
    found = [
        shape
        for name, shape in shapes
        if len(shape) == 2 and re.search(r"(embed_tokens|word_embeddings|wte|embed_in|tokens_embed)\.weight$", name)
    ]
    rows, columns = max(found, default=(0, 0))
    vocab_size = fields.whole("vocab_size", rows or 1)
    return vocab_size, columns or None
