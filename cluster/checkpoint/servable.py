"""Everything about a checkpoint that would otherwise fail only once its ranks or its first request run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.layout import Checkpoint
from cluster.checkpoint.rope_scaling import rope_type, ropes
from cluster.checkpoint.tokenizer_files import check_template, check_tokenizer
from cluster.checkpoint.validate import check_tensors, stored_dtype
from cluster.domain.errors import CheckpointError
from cluster.domain.model_spec import ModelSpec

# transformers' own tables (ROPE_INIT_FUNCTIONS and ACT2FN), without importing it.
ROPE_TYPES = frozenset({"default", "linear", "dynamic", "llama3", "longrope", "proportional", "yarn"})
ACTIVATIONS = frozenset({
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2",
    "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu",
})  # fmt: skip
# Field of generation_config.json -> least and greatest value, both allowed.
_SAMPLING_BOUNDS = {
    "temperature": (0.0, 100.0), "top_p": (1e-9, 1.0), "min_p": (0.0, 1.0), "repetition_penalty": (1e-3, 100.0),
    "top_k": (0, 2**31),
}  # fmt: skip


def check_servable(checkpoint: Checkpoint) -> ModelSpec:
    """The model's shape, when this checkpoint can be served; CheckpointError or UnsupportedModelError with the fix."""
    spec = model_spec(
        checkpoint.config,
        checkpoint.generation_config,
        stored_dtype=stored_dtype(checkpoint),
        tensors=checkpoint.tensors,
    )
    check_tensors(checkpoint, spec)
    check_functions(checkpoint.config)
    check_default_sampling(checkpoint.generation_config or {})
    for file in checkpoint.tokenizer_files:
        if file.name == "tokenizer.json":
            check_tokenizer(file)
        elif file.name == "chat_template.jinja":
            check_template(file, file.read_text(encoding="utf-8"))
        elif file.name == "tokenizer_config.json":
            template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(template, str):
                check_template(file, template)
    return spec


def check_functions(config: Mapping[str, Any]) -> None:
    """CheckpointError for a rope type or an activation that transformers does not know."""
    for rope in ropes(config):
        kind = rope_type(config, rope)
        if kind not in ROPE_TYPES:
            known = ", ".join(sorted(ROPE_TYPES))
            raise CheckpointError(f"config.json asks for the rope type {kind!r}; known are {known}.")
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS and (config.get("model_type"), activation) != ("phi3small", "gegelu"):
        known = ", ".join(sorted(ACTIVATIONS))
        raise CheckpointError(f"config.json asks for hidden_act {activation!r}; known are {known}.")


def check_default_sampling(generation_config: Mapping[str, Any]) -> None:
    """CheckpointError for a default that no request could ask for."""
    for name, (least, greatest) in _SAMPLING_BOUNDS.items():
        value = generation_config.get(name)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not least <= value <= greatest or (name == "top_k" and not isinstance(value, int)):
            raise CheckpointError(
                f"generation_config.json: {name} is {value!r}; write a number from {least:g} to {greatest:g}, "
                "or delete the line."
            )
