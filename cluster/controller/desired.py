"""What should be: models with everything decided about them. Frozen, and JSON at rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.config.schema import ModelConfig
from cluster.domain.errors import ConfigError
from cluster.domain.hardware import DeviceKind
from cluster.domain.model_spec import Dtype
from cluster.domain.parallel_layout import ParallelLayout, StageLayers


@dataclass(frozen=True, slots=True)
class DesiredModel:
    """One model to serve, checked and planned.

    ``checkpoint_path``: a directory, or a hub id with its pinned ``revision``. ``kv_blocks``: per rank.
    ``weight_bytes_per_rank`` in rank order. ``stages``: the decoder layers of every pipeline stage; () for one
    with all of them.
    """

    config: ModelConfig
    replicas: int
    layout: ParallelLayout
    checkpoint_path: str
    revision: str | None
    checkpoint_digest: str
    dtype: Dtype
    device: DeviceKind
    max_model_len: int
    kv_blocks: int
    weight_bytes_per_rank: tuple[int, ...]
    max_concurrent_tokens: int
    stages: tuple[StageLayers, ...] = ()

    def __post_init__(self) -> None:
        assert self.replicas >= 0, self.replicas
        assert len(self.weight_bytes_per_rank) == self.layout.world_size, self.weight_bytes_per_rank
        assert len(self.stages or (0,)) == self.layout.pipeline_parallel_size, self.stages

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def fingerprint(self) -> str:
        """Equal for two models whose replicas can be the same processes: everything but their number."""
        settings = model_to_json(replace(self, replicas=0))
        settings["config"].pop("replicas")
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def scaled(self, replicas: int) -> DesiredModel:
        return replace(self, replicas=replicas)


Desired = tuple[DesiredModel, ...]


def find_model(desired: Desired, name: str) -> DesiredModel | None:
    return next((model for model in desired if model.name == name), None)


def asks_the_same(old: ModelConfig, new: ModelConfig) -> bool:
    """Whether two configs differ in nothing but the number of replicas."""
    return old.model_dump(exclude={"replicas"}) == new.model_dump(exclude={"replicas"})


def require_names_differ(configs: tuple[ModelConfig, ...]) -> None:
    """ConfigError when two models would be served under one name."""
    names = [config.name for config in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"Two models are served as {', '.join(twice)}; give one a served_model_name.")


def model_to_json(model: DesiredModel) -> dict[str, Any]:
    return {
        "config": model.config.model_dump(mode="json"),
        "replicas": model.replicas,
        "tensor_parallel_size": model.layout.tensor_parallel_size,
        "pipeline_parallel_size": model.layout.pipeline_parallel_size,
        "checkpoint_path": model.checkpoint_path,
        "revision": model.revision,
        "checkpoint_digest": model.checkpoint_digest,
        "dtype": model.dtype.value,
        "device": model.device.value,
        "max_model_len": model.max_model_len,
        "kv_blocks": model.kv_blocks,
        "weight_bytes_per_rank": list(model.weight_bytes_per_rank),
        "max_concurrent_tokens": model.max_concurrent_tokens,
        "stages": [[layers.start, layers.stop] for layers in model.stages],
    }


def model_from_json(stored: Mapping[str, Any]) -> DesiredModel:
    """The inverse; KeyError, TypeError or ValueError when ``stored`` was not written by ``model_to_json``."""
    return DesiredModel(
        config=ModelConfig.model_validate(stored["config"]),
        replicas=int(stored["replicas"]),
        layout=ParallelLayout(stored["tensor_parallel_size"], stored["pipeline_parallel_size"]),
        checkpoint_path=stored["checkpoint_path"],
        revision=stored["revision"],
        checkpoint_digest=stored["checkpoint_digest"],
        dtype=Dtype(stored["dtype"]),
        device=DeviceKind(stored["device"]),
        max_model_len=stored["max_model_len"],
        kv_blocks=stored["kv_blocks"],
        weight_bytes_per_rank=tuple(stored["weight_bytes_per_rank"]),
        max_concurrent_tokens=stored["max_concurrent_tokens"],
        # A state from before there were stages has none, and serves models of one.
        stages=tuple(StageLayers(start, stop) for start, stop in stored.get("stages", ())),
    )
