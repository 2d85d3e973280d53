"""What a model's flags and files rule out, said before anything is started: as the controller would say it later."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.layout import read_config, read_generation_config
from cluster.checkpoint.resolve import DEMO, ResolvedModel, fetch_config, resolve
from cluster.checkpoint.rope_scaling import stretched, stretched_config
from cluster.checkpoint.servable import check_servable
from cluster.config.schema import ModelConfig
from cluster.controller.checkpoint_planner import CheckpointPlanner, read_model
from cluster.controller.desired import Desired
from cluster.domain.errors import ClusterError
from cluster.domain.hardware import Inventory, Node, cpu_device
from cluster.domain.model_spec import ModelSpec
from cluster.planner.plan import refuse_impossible

# Any of these, and the machine may have accelerators: how many of which kind, Ray finds out.
_ACCELERATORS = ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd", "dri")


def check_models(models: tuple[ModelConfig, ...], inventory: Inventory | None) -> tuple[ModelConfig, ...]:
    """The models with absolute paths and pinned commits, their files, lengths and layouts checked.

    ``inventory``: the empty machines that they get all of; its memory may be too large, for what it cannot hold
    nothing smaller can. None while they are not known: then only what no machine could hold is refused. ConfigError,
    CheckpointError, UnsupportedModelError or NoFeasiblePlan.
    """
    kept: Desired = ()
    checked = []
    for model in models:
        resolved = resolve(model.model, model.revision)
        if resolved.path is None:
            _check_hub_model(model, resolved)
        elif inventory is None:
            refuse_impossible(check_servable(stretched(read_model(resolved, model), model.rope_scaling)), model)
        else:
            kept += (CheckpointPlanner(lambda _: inventory).plan_now(model, kept),)
        checked.append(_located(model, resolved))
    return tuple(checked)


def this_machine(slots: int, host: str, devices: Path = Path("/dev")) -> Inventory | None:
    """``slots`` CPU slots that share the memory of the machine we are on; None where it may have accelerators."""
    if any(True for pattern in _ACCELERATORS for _ in devices.glob(pattern)):
        return None
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Inventory((Node(host, host, cpu_device(memory_bytes // slots), slots, slots, slots),))


def _located(model: ModelConfig, resolved: ResolvedModel) -> ModelConfig:
    """As every process understands it, wherever it runs."""
    if model.model == DEMO:
        return model
    if resolved.path is None:
        return model.model_copy(update={"revision": resolved.commit})
    name = model.served_model_name or resolved.path.name
    return model.model_copy(update={"model": str(resolved.path), "served_model_name": name})


def _check_hub_model(model: ModelConfig, resolved: ResolvedModel) -> None:
    """By its configuration alone; where that is not to be had, or does not say all, the controller looks closer."""
    spec = _hub_spec(model, resolved)
    if spec is not None:
        refuse_impossible(spec, model)


def _hub_spec(model: ModelConfig, resolved: ResolvedModel) -> ModelSpec | None:
    try:
        folder = fetch_config(resolved)
        config = stretched_config(read_config(folder), model.rope_scaling)
        return model_spec(config, read_generation_config(folder))
    except ClusterError:
        return None
