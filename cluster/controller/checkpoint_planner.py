"""Checks a model's files and plans it on Ray's nodes: what stands between a wish and the desired state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import replace

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.dummy import dummy_checkpoint
from cluster.checkpoint.layout import Checkpoint, read_config, read_generation_config
from cluster.checkpoint.resolve import ResolvedModel, fetch_config, read_outline, resolve
from cluster.checkpoint.rope_scaling import stretched, stretched_config
from cluster.checkpoint.servable import check_servable
from cluster.config.schema import ModelConfig
from cluster.controller.actuator import Explanation
from cluster.controller.desired import Desired, DesiredModel
from cluster.domain.errors import ClusterError, NoFeasiblePlan
from cluster.domain.hardware import Inventory
from cluster.domain.model_spec import ModelSpec
from cluster.domain.quantities import format_bytes
from cluster.planner.placement import place
from cluster.planner.plan import Plan, plan


class CheckpointPlanner:
    """Implements ``ModelPlanner``. ``inventory`` tells every node with a device as asked for; it may block."""

    def __init__(self, inventory: Callable[[str], Inventory]) -> None:
        self._inventory = inventory

    async def plan(self, config: ModelConfig, kept: Desired) -> DesiredModel:
        return await asyncio.to_thread(self.plan_now, config, kept)

    async def explain(self, config: ModelConfig, kept: Desired) -> Explanation:
        """Of a hub model it fetches the configuration only."""
        try:
            found = await asyncio.to_thread(self._outline, config, kept)
        except NoFeasiblePlan as error:
            lines = [str(error), *(f"  {layout}: {reason}" for layout, reason in error.candidates)]
            return Explanation(feasible=False, text="\n".join(lines), json=_json_of_error(error))
        except ClusterError as error:
            return Explanation(feasible=False, text=str(error), json=json.dumps({"reason": str(error)}))
        return Explanation(feasible=True, text=_text(config.name, found), json=_json(config.name, found))

    def plan_now(self, config: ModelConfig, kept: Desired) -> DesiredModel:
        """As ``plan``; blocks on the model's files."""
        resolved = resolve(config.model, config.revision)
        checkpoint = stretched(read_model(resolved, config), config.rope_scaling)
        found = self._fit(check_servable(checkpoint), config, kept, checkpoint.nbytes_by_name)
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
            weight_bytes_per_rank=_weight_bytes(found),
            max_concurrent_tokens=found.max_concurrent_tokens,
            stages=found.stages,
        )

    def _outline(self, config: ModelConfig, kept: Desired) -> Plan:
        resolved = resolve(config.model, config.revision)
        if resolved.path is not None or config.load_format == "dummy":
            checkpoint = stretched(read_model(resolved, config), config.rope_scaling)
            return self._fit(check_servable(checkpoint), config, kept, checkpoint.nbytes_by_name)
        folder = fetch_config(resolved)
        spec = model_spec(stretched_config(read_config(folder), config.rope_scaling), read_generation_config(folder))
        return self._fit(spec, config, kept, None)

    def _fit(self, spec: ModelSpec, config: ModelConfig, kept: Desired, stored: Mapping[str, int] | None) -> Plan:
        inventory = free_inventory(self._inventory(config.device), kept)
        return plan(spec, config, inventory, replicas=config.replicas, weights_nbytes_by_name=stored)


def read_model(resolved: ResolvedModel, config: ModelConfig) -> Checkpoint:
    """The checkpoint as every rank will see it."""
    if config.load_format == "dummy":
        return dummy_checkpoint(fetch_config(resolved), config.seed)
    return read_outline(resolved)


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


def _weight_bytes(found: Plan) -> tuple[int, ...]:
    return tuple(ledger.weight_bytes for ledger in found.ledgers)


def _text(name: str, found: Plan) -> str:
    per_rank = ", ".join(format_bytes(n) for n in _weight_bytes(found))
    return (
        f"{name}: {found.layout} in {found.dtype} on {found.device.kind}, weights per rank {per_rank}, "
        f"KV cache for {found.max_concurrent_tokens} tokens"
    )


def _json(name: str, found: Plan) -> str:
    return json.dumps(
        {
            "model": name,
            "tensor_parallel_size": found.layout.tensor_parallel_size,
            "pipeline_parallel_size": found.layout.pipeline_parallel_size,
            "dtype": found.dtype.value,
            "device": found.device.kind.value,
            "weight_bytes_per_rank": list(_weight_bytes(found)),
            "max_concurrent_tokens": found.max_concurrent_tokens,
            "max_model_len": found.max_model_len,
        }
    )


def _json_of_error(error: NoFeasiblePlan) -> str:
    candidates = [{"layout": layout, "reason": reason} for layout, reason in error.candidates]
    return json.dumps({"reason": str(error), "candidates": candidates, "smallest_change": error.smallest_change})
