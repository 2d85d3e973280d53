"""One layout on one pool of equal devices: whether it fits, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.config.schema import ModelConfig
from cluster.domain.errors import ConfigError
from cluster.domain.hardware import DeviceKind, DeviceType, Inventory, Node
from cluster.domain.model_spec import Dtype, ModelSpec
from cluster.domain.parallel_layout import ParallelLayout, Placement, StageLayers
from cluster.domain.quantities import format_bytes
from cluster.planner.cost import CostEstimate, estimate
from cluster.planner.layouts import shape_objection
from cluster.planner.memory import Limits, RankLedger, kv_blocks, misfit, rank_ledgers
from cluster.planner.placement import place
from cluster.planner.weights import split_stages

ACCELERATOR_STEP_TOKENS = 2048
CPU_STEP_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Pool:
    """Nodes whose devices are of one type; ``device`` has the least memory among them."""

    device: DeviceType
    nodes: tuple[Node, ...]

    @property
    def devices(self) -> int:
        return sum(node.devices for node in self.nodes)

    @property
    def devices_per_node(self) -> int:
        return max(node.devices for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout that fits."""

    pool: Pool
    layout: ParallelLayout
    dtype: Dtype
    stages: tuple[StageLayers, ...]
    ledgers: tuple[RankLedger, ...]
    placements: tuple[Placement, ...]
    kv_blocks: int
    cost: CostEstimate


def pools(inventory: Inventory, device: str) -> tuple[Pool, ...]:
    """The inventory by device type; ``device``: cpu, cuda, or auto (accelerators where there are any).

    Nodes of one type with less memory than others form a pool with all of them, and again without the smallest:
    a small node never stands in the way of a layout that the larger ones can hold.
    """
    kinds = {node.device.kind for node in inventory.nodes}
    wanted = DeviceKind(device) if device != "auto" else DeviceKind.CUDA if DeviceKind.CUDA in kinds else DeviceKind.CPU
    by_name: dict[str, list[Node]] = {}
    for node in inventory.nodes:
        if node.device.kind is wanted and node.devices:
            by_name.setdefault(node.device.name, []).append(node)
    found = []
    for nodes in by_name.values():
        for least in sorted({node.device.memory_bytes for node in nodes}):
            members = tuple(node for node in nodes if node.device.memory_bytes >= least)
            smallest = min(members, key=lambda node: node.device.memory_bytes)
            found.append(Pool(smallest.device, members))
    return tuple(found)


def serving_dtype(spec: ModelSpec, config: ModelConfig, kind: DeviceKind) -> Dtype:
    """auto: the checkpoint's type on an accelerator, float32 on CPU."""
    if config.dtype != "auto":
        return Dtype(config.dtype)
    return spec.dtype if kind is DeviceKind.CUDA else Dtype.FLOAT32


def step_tokens(config: ModelConfig, kind: DeviceKind) -> int:
    """The token budget of one step where ``config`` leaves it open.

    An accelerator wants many rows at once. A CPU is as fast with 512 rows, whose intermediate results its caches hold,
    and a prompt's first token then waits for fewer others.
    """
    return config.max_num_batched_tokens or (CPU_STEP_TOKENS if kind is DeviceKind.CPU else ACCELERATOR_STEP_TOKENS)


def limits(spec: ModelSpec, config: ModelConfig, kind: DeviceKind) -> Limits:
    """The bounds that ``config`` sets on ``kind`` of device; ConfigError when it asks for more than the model has."""
    check_length(spec, config)
    return Limits(
        max_model_len=config.max_model_len or spec.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=step_tokens(config, kind),
        block_size=config.block_size,
        device_memory_utilization=config.device_memory_utilization,
        kv_cache_bytes=config.kv_cache_bytes,
    )


def check_length(spec: ModelSpec, config: ModelConfig) -> None:
    """ConfigError when ``config`` asks for longer sequences than the model has."""
    if config.max_model_len is not None and config.max_model_len > spec.max_model_len:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the model's {spec.max_model_len}; "
            f"give at most {spec.max_model_len}."
        )


def evaluate(
    spec: ModelSpec,
    config: ModelConfig,
    pool: Pool,
    layout: ParallelLayout,
    replicas: int,
    inter_node_bytes_per_s: float,
) -> Fit | str:
    """The fit of ``layout`` on ``pool``, or the reason against it."""
    objection = shape_objection(spec, layout, pool.devices_per_node)
    if objection is not None:
        return objection
    bounds, dtype = limits(spec, config, pool.device.kind), serving_dtype(spec, config, pool.device.kind)
    stages = split_stages(spec, layout)
    ledgers = rank_ledgers(spec, layout, stages, dtype, pool.device, bounds)
    blocks = kv_blocks(ledgers, pool.device.kind, bounds)
    worst = misfit(ledgers, blocks, bounds)
    if worst is not None:
        return _memory_reason(worst[0], worst[1], bounds)
    placements = place(layout, pool.nodes, replicas)
    if len(placements) < replicas:
        return _placement_reason(layout, pool.nodes, replicas, len(placements))
    ledgers = tuple(replace(x, kv_bytes=blocks * bounds.block_size * x.kv_bytes_per_token) for x in ledgers)
    cost = estimate(spec, layout, ledgers, dtype, pool.device, inter_node_bytes_per_s, bounds.max_model_len)
    return Fit(pool, layout, dtype, stages, ledgers, placements, blocks, cost)


def _memory_reason(ledger: RankLedger, kind: str, bounds: Limits) -> str:
    if kind == "weights":
        return (
            f"rank {ledger.rank} needs {format_bytes(ledger.start_bytes)} ({format_bytes(ledger.weight_bytes)} of "
            f"weights) before any KV cache; {format_bytes(ledger.budget_bytes)} of its device are ours"
        )
    needed = bounds.blocks_per_sequence * bounds.block_size * ledger.kv_bytes_per_token
    room = max(0, ledger.room_bytes)
    if bounds.kv_cache_bytes is not None and bounds.kv_cache_bytes < room:
        limit = f"kv_cache_bytes allows {format_bytes(bounds.kv_cache_bytes)}"
    else:
        limit = f"{format_bytes(room)} are left"
    return (
        f"one sequence of {bounds.max_model_len} tokens needs {format_bytes(needed)} of KV cache on "
        f"rank {ledger.rank}; {limit}"
    )


def _placement_reason(layout: ParallelLayout, nodes: Sequence[Node], replicas: int, placed: int) -> str:
    free = sum(node.free_devices for node in nodes)
    fullest = max(node.free_devices for node in nodes)
    return (
        f"{placed} of {replicas} replicas find room: each takes {layout.pipeline_parallel_size} group(s) of "
        f"{layout.tensor_parallel_size} device(s) of one node; {free} are free on {len(nodes)} node(s), "
        f"at most {fullest} on one"
    )
