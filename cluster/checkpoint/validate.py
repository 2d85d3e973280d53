"""Does the checkpoint hold what its config promises? Names and shapes are compared before anything starts."""

from __future__ import annotations

import re

from cluster.checkpoint.headers import TensorHeader
from cluster.checkpoint.layout import Checkpoint
from cluster.checkpoint.tensors import TensorSpec, expected_tensors, layer_prefix
from cluster.domain.errors import CheckpointError, UnsupportedModelError
from cluster.domain.model_spec import Dtype, ModelSpec

STORED_DTYPES = {"F32": Dtype.FLOAT32, "BF16": Dtype.BFLOAT16, "F16": Dtype.FLOAT16}

# Which config key decides a dimension: (ending of the module's name, key of dimension 0, key of dimension 1).
_KEYS = (
    ("q_proj", "num_attention_heads (or head_dim)", "hidden_size"),
    ("k_proj", "num_key_value_heads (or head_dim)", "hidden_size"),
    ("v_proj", "num_key_value_heads (or head_dim)", "hidden_size"),
    ("o_proj", "hidden_size", "num_attention_heads (or head_dim)"),
    ("gate_proj", "intermediate_size", "hidden_size"),
    ("up_proj", "intermediate_size", "hidden_size"),
    ("down_proj", "hidden_size", "intermediate_size"),
    ("embed_tokens", "vocab_size", "hidden_size"),
    ("lm_head", "vocab_size", "hidden_size"),
    ("q_norm", "head_dim", ""),
    ("k_norm", "head_dim", ""),
    ("norm", "hidden_size", ""),
)


def check_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """CheckpointError unless every tensor of ``spec`` is there with its shape.

    Tensors that no rank reads (rotary frequencies of old exports, a tied head stored twice) are tolerated;
    decoder layers beyond the config's are not: the config would silently drop them.
    """
    for tensor in expected_tensors(spec):
        header = checkpoint.tensors.get(tensor.name)
        if header is None:
            raise _missing(checkpoint, spec, tensor)
        if header.shape != tensor.shape:
            raise _mismatch(header, tensor)
        if header.dtype not in STORED_DTYPES:
            raise UnsupportedModelError(
                f"{header.file}: {header.name} is stored as {header.dtype}; served are float32, bfloat16 and float16."
            )
    layers = _layers_present(checkpoint, spec)
    if layers < spec.num_layers:
        raise CheckpointError(
            f"{checkpoint.path} holds {layers} decoder layers, but config.json implies {spec.num_layers}; "
            "a shard or its index is incomplete."
        )
    # Of an architecture without rules, layers beyond are known: heads that predict several tokens, never read.
    if layers > spec.num_layers and not spec.stored_tensors:
        raise CheckpointError(
            f"{checkpoint.path} holds {layers} decoder layers, but config.json implies {spec.num_layers}; "
            "check num_hidden_layers."
        )


def stored_dtype(checkpoint: Checkpoint) -> Dtype | None:
    """The type that most stored bytes have, None when it is none of those served."""
    amounts = dict.fromkeys(STORED_DTYPES, 0)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in amounts:
            amounts[tensor.dtype] += tensor.nbytes
    best = max(amounts, key=lambda name: amounts[name])
    return STORED_DTYPES[best] if amounts[best] else None


def _layers_present(checkpoint: Checkpoint, spec: ModelSpec) -> int:
    pattern = re.compile(re.escape(layer_prefix(spec)) + r"\.(\d{1,6})\.")
    return max((int(m.group(1)) + 1 for m in map(pattern.match, checkpoint.tensors) if m), default=0)


def _missing(checkpoint: Checkpoint, spec: ModelSpec, tensor: TensorSpec) -> CheckpointError:
    layers = _layers_present(checkpoint, spec)
    if tensor.layer is not None and 0 < layers <= tensor.layer:
        hint = f"it holds {layers} decoder layers, config.json implies {spec.num_layers}; check num_hidden_layers"
    elif tensor.name == "lm_head.weight":
        hint = "set tie_word_embeddings to true in config.json if the head is the embedding"
    elif tensor.name.endswith(".bias"):
        hint = "check attention_bias and mlp_bias in config.json"
    else:
        hint = "a shard or its index is incomplete; download or copy the checkpoint again"
    return CheckpointError(f"{checkpoint.path} has no tensor {tensor.name}: {hint}.")


def _mismatch(header: TensorHeader, tensor: TensorSpec) -> CheckpointError:
    return CheckpointError(
        f"{header.file}: {header.name} has shape {list(header.shape)}, but config.json implies {list(tensor.shape)}; "
        f"check {_likely_key(header, tensor)}."
    )


def _likely_key(header: TensorHeader, tensor: TensorSpec) -> str:
    for ending, *keys in _KEYS:
        if tensor.module.endswith(ending):
            for found, wanted, key in zip(header.shape, tensor.shape, keys, strict=False):
                if found != wanted and key:
                    return f"{key} in config.json"
    return "the sizes in config.json"
