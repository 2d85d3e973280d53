"""Checks a model's files and plans it on Ray's nodes: what stands between a wish and the desired state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace

from cluster.checkpoint.config_json import model_spec, require_served
from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.resolve import fetch, resolve
from cluster.checkpoint.validate import check_tensors, stored_dtype
from cluster.config.schema import ModelConfig
from cluster.controller.actuator import Explanation
from cluster.controller.desired import Desired, DesiredModel
from cluster.domain.errors import ClusterError, NoFeasiblePlan, UnsupportedModelError
from cluster.domain.hardware import Inventory
from cluster.domain.quantities import format_bytes
from cluster.planner.placement import place
from cluster.planner.plan import Plan, plan


class CheckpointPlanner:
    """Implements ``ModelPlanner``. ``inventory`` tells every node, in use or not; it may block."""

    def __init__(self, inventory: Callable[[], Inventory]) -> None:
        self._inventory = inventory

    async def plan(self, config: ModelConfig, kept: Desired) -> DesiredModel:
        return await asyncio.to_thread(self._plan, config, kept)

    async def explain(self, config: ModelConfig, kept: Desired) -> Explanation:
        try:
            model = await self.plan(config, kept)
        except NoFeasiblePlan as error:
            lines = [str(error), *(f"  {layout}: {reason}" for layout, reason in error.candidates)]
            return Explanation(feasible=False, text="\n".join(lines), json=_json_of_error(error))
        except ClusterError as error:
            return Explanation(feasible=False, text=str(error), json=json.dumps({"reason": str(error)}))
        return Explanation(feasible=True, text=_text(model), json=_json(model))

    def _plan(self, config: ModelConfig, kept: Desired) -> DesiredModel:
        resolved = resolve(config.model, config.revision)
        checkpoint = read_checkpoint(fetch(resolved))
        spec = model_spec(checkpoint.config, checkpoint.generation_config, stored_dtype=stored_dtype(checkpoint))
        require_served(spec)
        check_tensors(checkpoint, spec)
        inventory = free_inventory(self._inventory(), kept)
        found = plan(
            spec, config, inventory, replicas=config.replicas, weights_nbytes_by_name=checkpoint.nbytes_by_name
        )
        _require_one_stage(found)
        return DesiredModel(
            config=config,
            replicas=config.replicas,
            layout=found.layout,
            checkpoint_path=resolved.repo_id or str(checkpoint.path),
            revision=resolved.commit,
            checkpoint_digest=checkpoint.digest,
            dtype=found.dtype,
            device=found.device.kind,
            max_model_len=found.max_model_len,
            kv_blocks=found.kv_blocks,
            weight_bytes_per_rank=tuple(ledger.weight_bytes for ledger in found.ledgers),
            max_concurrent_tokens=found.max_concurrent_tokens,
        )


def free_inventory(inventory: Inventory, kept: Desired) -> Inventory:
    """What models that stay leave free. They are placed afresh, since replicas that are still to start count too."""
    nodes = [replace(node, free_devices=node.devices) for node in inventory.nodes]
    for model in kept:
        fitting = [node for node in nodes if node.device.kind is model.device]
        for placement in place(model.layout, fitting, model.replicas):
            used = [rank.node_id for rank in placement.ranks]
            nodes = [
                replace(node, free_devices=node.free_devices - used.count(node.node_id))
                if node.device.kind is model.device
                else node
                for node in nodes
            ]
            fitting = [node for node in nodes if node.device.kind is model.device]
    return replace(inventory, nodes=tuple(nodes))


def _require_one_stage(found: Plan) -> None:
    if found.layout.pipeline_parallel_size > 1:
        raise UnsupportedModelError(
            f"{found.model} would need {found.layout}, and pipeline stages are planned but not served yet; "
            "choose a tensor_parallel_size with pipeline_parallel_size 1."
        )


def _text(model: DesiredModel) -> str:
    per_rank = ", ".join(format_bytes(n) for n in model.weight_bytes_per_rank)
    return (
        f"{model.name}: {model.layout} in {model.dtype} on {model.device}, weights per rank {per_rank}, "
        f"KV cache for {model.max_concurrent_tokens} tokens"
    )


def _json(model: DesiredModel) -> str:
    return json.dumps(
        {
            "model": model.name,
            "tensor_parallel_size": model.layout.tensor_parallel_size,
            "pipeline_parallel_size": model.layout.pipeline_parallel_size,
            "dtype": model.dtype.value,
            "device": model.device.value,
            "weight_bytes_per_rank": list(model.weight_bytes_per_rank),
            "max_concurrent_tokens": model.max_concurrent_tokens,
            "max_model_len": model.max_model_len,
        }
    )


def _json_of_error(error: NoFeasiblePlan) -> str:
    candidates = [{"layout": layout, "reason": reason} for layout, reason in error.candidates]
    return json.dumps({"reason": str(error), "candidates": candidates, "smallest_change": error.smallest_change})
