"""A config file that changes while its process runs: what changed, and what of it can take effect."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.config.schema import ClusterConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """``models``: the new ones, None when they are as before. ``needs_restart``: dotted names of other settings."""

    models: tuple[ModelConfig, ...] | None
    needs_restart: tuple[str, ...]


def change_between(wanted: tuple[ModelConfig, ...], running: ClusterConfig, new: ClusterConfig) -> ConfigChange:
    """``wanted``: the models asked for last; ``running``: what the process was started with."""
    names = tuple(name for name in _differences("", running, new) if name != "models")
    return ConfigChange(None if new.models == wanted else new.models, names)


def content_digest(file: Path) -> str:
    """Of what stands in it now, wherever links lead; "" when it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def _differences(prefix: str, old: BaseModel, new: BaseModel) -> list[str]:
    found: list[str] = []
    for name in type(old).model_fields:
        before: Any = getattr(old, name)
        after: Any = getattr(new, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            found += _differences(f"{prefix}{name}.", before, after)
        elif before != after:
            found.append(f"{prefix}{name}")
    return found
