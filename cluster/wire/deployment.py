"""cluster.v1.ModelDeployment <-> the config's model section. Zero and empty mean the default; 0 replicas mean 0."""

from __future__ import annotations

from pydantic import ValidationError

from cluster.config.schema import ModelConfig
from cluster.domain.errors import ConfigError
from cluster.v1 import control_pb2

_OPTIONAL = (
    "served_model_name", "revision", "replicas", "tensor_parallel_size", "pipeline_parallel_size", "dtype", "device",
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "block_size",
    "device_memory_utilization", "kv_cache_bytes", "max_waiting_prompt_tokens", "prefill_slowdown", "rope_scaling",
    "load_format", "seed",
)  # fmt: skip


def deployment_to_message(config: ModelConfig) -> control_pb2.ModelDeployment:
    settings = {name: getattr(config, name) for name in _OPTIONAL}
    return control_pb2.ModelDeployment(
        model=config.model,
        enable_prefix_caching=config.enable_prefix_caching,
        **{name: value for name, value in settings.items() if value is not None},
    )


def deployment_from_message(message: control_pb2.ModelDeployment) -> ModelConfig:
    """ConfigError names the field that is out of its bounds."""
    given = {name: getattr(message, name) for name in _OPTIONAL if getattr(message, name)}
    if message.HasField("replicas"):
        given["replicas"] = message.replicas  # none is a number too
    if message.HasField("enable_prefix_caching"):
        given["enable_prefix_caching"] = message.enable_prefix_caching
    try:
        return ModelConfig(model=message.model, **given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "model"
        raise ConfigError(
            f"{field} of model {message.model!r} is wrong: {first['msg'].removeprefix('Value error, ')}."
        ) from error
