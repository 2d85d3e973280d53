"""The planner's one question: how to lay a model out on these machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from cluster.config.schema import ModelConfig
from cluster.domain.errors import NoFeasiblePlan
from cluster.domain.hardware import DeviceType, Inventory, Node
from cluster.domain.model_spec import Dtype, ModelSpec
from cluster.domain.parallel_layout import ParallelLayout, Placement, StageLayers
from cluster.planner.cost import CostEstimate
from cluster.planner.evaluate import ACCELERATOR_STEP_TOKENS, Fit, check_length, evaluate, pools
from cluster.planner.layouts import candidate_layouts, shape_objection
from cluster.planner.memory import RankLedger
from cluster.planner.weights import stored_bytes

# How many more nodes, and fewer tokens, the search for a smallest change tries.
_MOST_NEW_NODES = 64
_LEAST_MODEL_LEN = 256
_LEAST_BATCHED_TOKENS = 256
_MILD_HALVINGS = 4  # a length cut further than this costs more than other changes
_HIGH_UTILIZATION = 0.95


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout that was considered; ``verdict``: "chosen", "fits", or the reason against it."""

    layout: ParallelLayout
    device: str
    fits: bool
    verdict: str
    cost: CostEstimate | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Layout, placement and numbers. ``ledgers``: per rank; ``stages``: each stage's decoder layers.

    ``kv_blocks`` of ``block_size`` tokens on every rank hold ``max_concurrent_tokens`` tokens in all.
    ``reason`` says why this layout and no other.
    """

    model: str
    spec: ModelSpec
    device: DeviceType
    layout: ParallelLayout
    dtype: Dtype
    stages: tuple[StageLayers, ...]
    ledgers: tuple[RankLedger, ...]
    placements: tuple[Placement, ...]
    block_size: int
    kv_blocks: int
    max_model_len: int
    cost: CostEstimate
    candidates: tuple[Candidate, ...]
    reason: str

    @property
    def max_concurrent_tokens(self) -> int:
        return self.kv_blocks * self.block_size


def plan(
    model_spec: ModelSpec,
    model_config: ModelConfig,
    inventory: Inventory,
    *,
    replicas: int = 1,
    weights_nbytes_by_name: Mapping[str, int] | None = None,
) -> Plan:
    """The best layout for ``replicas`` replicas on what ``inventory`` has free.

    Without explicit sizes it is the one on the fewest devices that leaves KV cache for one sequence of full
    length, tensor parallelism alone before pipelines; among equals, the one with the least expected time per
    token. ``weights_nbytes_by_name`` (a
    checkpoint's stored bytes) fills the ledgers' ``read_bytes``. Raises NoFeasiblePlan with every candidate and
    the smallest change that was found to help, ConfigError for a request beyond the model's length.
    """
    assert replicas >= 0, replicas
    check_length(model_spec, model_config)
    fits, candidates = _search(model_spec, model_config, inventory, replicas)
    if not fits:
        raise _no_plan(model_spec, model_config, inventory, replicas, candidates)
    best = min(fits, key=_preference)
    ledgers = best.ledgers
    if weights_nbytes_by_name is not None:
        read = stored_bytes(model_spec, best.layout, best.stages, weights_nbytes_by_name)
        ledgers = tuple(replace(ledger, read_bytes=n) for ledger, n in zip(ledgers, read, strict=True))
    return Plan(
        model=model_config.name,
        spec=model_spec,
        device=best.pool.device,
        layout=best.layout,
        dtype=best.dtype,
        stages=best.stages,
        ledgers=ledgers,
        placements=best.placements,
        block_size=model_config.block_size,
        kv_blocks=best.kv_blocks,
        max_model_len=model_config.max_model_len or model_spec.max_model_len,
        cost=best.cost,
        candidates=tuple(
            replace(c, verdict="chosen")
            if c.fits and c.layout == best.layout and c.device == best.pool.device.name
            else c
            for c in candidates
        ),
        reason=_reason(model_config, best, fits),
    )


def refuse_impossible(spec: ModelSpec, config: ModelConfig) -> None:
    """NoFeasiblePlan for sizes that the model's shape rules out on any machines, ConfigError as ``plan``."""
    check_length(spec, config)
    layout = ParallelLayout(config.tensor_parallel_size or 1, config.pipeline_parallel_size or 1)
    objection = shape_objection(spec, layout, devices_per_node=layout.tensor_parallel_size)
    if objection is not None:
        msg = f"No layout of {config.name} fits on any devices: {objection}."
        raise NoFeasiblePlan(msg, ((str(layout), objection),))


def _preference(fit: Fit) -> tuple[bool, int, float]:
    """Pipelines only where tensor parallelism alone does not fit: stages wait for each other."""
    return (fit.layout.pipeline_parallel_size > 1, fit.layout.world_size, fit.cost.tpot_s)


def _reason(config: ModelConfig, best: Fit, fits: list[Fit]) -> str:
    given = [size for size in (config.tensor_parallel_size, config.pipeline_parallel_size) if size is not None]
    if len(given) == 2:
        return "both sizes were given"
    pipelined = best.layout.pipeline_parallel_size > 1
    world = best.layout.world_size
    text = f"{world} device{'s are' if world > 1 else ' is'} the fewest that hold the model and one full sequence"
    if given:
        text += f" with the {'tensor' if config.tensor_parallel_size else 'pipeline'}-parallel size that was given"
    elif pipelined:
        text += "; one stage alone does not fit"
    equals = sum(_preference(fit)[:2] == _preference(best)[:2] for fit in fits)
    return text if equals == 1 else f"{text}; of {equals} such layouts it has the least expected time per token"


def _search(
    spec: ModelSpec, config: ModelConfig, inventory: Inventory, replicas: int
) -> tuple[list[Fit], tuple[Candidate, ...]]:
    """Everything that fits, and a verdict on every candidate (once per layout and device type)."""
    fits: dict[tuple[str, ParallelLayout], Fit] = {}
    verdicts: dict[tuple[str, ParallelLayout], Candidate] = {}
    for pool in pools(inventory, config.device):
        for layout in candidate_layouts(
            devices=pool.devices,
            devices_per_node=pool.devices_per_node,
            layers=spec.num_layers,
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
        ):
            key = (pool.device.name, layout)
            if key in fits:
                continue
            result = evaluate(spec, config, pool, layout, replicas, inventory.inter_node_bytes_per_s)
            if isinstance(result, Fit):
                fits[key] = result
                verdicts[key] = Candidate(layout, pool.device.name, fits=True, verdict="fits", cost=result.cost)
            else:
                verdicts[key] = Candidate(layout, pool.device.name, fits=False, verdict=result)
    return list(fits.values()), tuple(verdicts.values())


def _no_plan(
    spec: ModelSpec, config: ModelConfig, inventory: Inventory, replicas: int, candidates: tuple[Candidate, ...]
) -> NoFeasiblePlan:
    change = _smallest_change(spec, config, inventory, replicas)
    what = f"{config.name} ({replicas} replicas)" if replicas > 1 else config.name
    if candidates:
        on = " and ".join(dict.fromkeys(c.device for c in candidates))
        text = f"No layout of {what} fits on {inventory.free_devices} free device(s) of type {on}"
        reasons = {candidate.verdict for candidate in candidates}
        text += f": {reasons.pop()}" if len(reasons) == 1 else f" ({len(candidates)} were considered)"
    else:
        text = f"There is no device to put {what} on"
    advice = f"; this would fit: {change}." if change else "."
    return NoFeasiblePlan(
        text + advice, tuple((f"{c.layout} on {c.device}", c.verdict) for c in candidates), smallest_change=change
    )


# A change: what to tell the user, and the question that it makes of the old one.
_Question = tuple[ModelConfig, Inventory, int]


def _smallest_change(spec: ModelSpec, config: ModelConfig, inventory: Inventory, replicas: int) -> str:
    """The first change, in the order of what it costs its user, after which a plan was found."""
    for text, (new_config, new_inventory, new_replicas) in _changes(spec, config, inventory, replicas):
        fits, _ = _search(spec, new_config, new_inventory, new_replicas)
        if fits:
            best = min(fits, key=_preference).layout
            return text.format(tp=best.tensor_parallel_size, pp=best.pipeline_parallel_size)
    nodes = _fewest_new_nodes(spec, config, inventory, replicas)
    if nodes:
        return f"add {nodes} node{'s' if nodes > 1 else ''} like {_largest(inventory).host}"
    return ""


def _changes(
    spec: ModelSpec, config: ModelConfig, inventory: Inventory, replicas: int
) -> Iterator[tuple[str, _Question]]:
    def with_config(**changes: object) -> _Question:
        return config.model_copy(update=changes), inventory, replicas

    if config.tensor_parallel_size or config.pipeline_parallel_size:
        yield (
            "--tensor-parallel-size {tp} --pipeline-parallel-size {pp}",
            with_config(tensor_parallel_size=None, pipeline_parallel_size=None),
        )
    if config.kv_cache_bytes is not None:
        yield "leave out kv_cache_bytes", with_config(kv_cache_bytes=None)
    for tokens in _halves(config.max_num_batched_tokens or ACCELERATOR_STEP_TOKENS, _LEAST_BATCHED_TOKENS):
        yield f"--max-num-batched-tokens {tokens}", with_config(max_num_batched_tokens=tokens)
    lengths = tuple(_halves(config.max_model_len or spec.max_model_len, _LEAST_MODEL_LEN))
    for length in lengths[:_MILD_HALVINGS]:
        yield f"--max-model-len {length}", with_config(max_model_len=length)
    if config.device_memory_utilization < _HIGH_UTILIZATION:
        yield (
            f"--device-memory-utilization {_HIGH_UTILIZATION}",
            with_config(device_memory_utilization=_HIGH_UTILIZATION),
        )
    if Dtype.FLOAT32 in (config.dtype, spec.dtype) or config.dtype == "auto":
        yield "--dtype bfloat16", with_config(dtype="bfloat16")
    for fewer in range(replicas - 1, 0, -1) if replicas <= 16 else _halves(replicas, 1):
        yield f"--replicas {fewer}", (config, inventory, fewer)
    for length in lengths[_MILD_HALVINGS:]:
        yield f"--max-model-len {length}", with_config(max_model_len=length)


def _halves(start: int, least: int) -> Iterator[int]:
    """Powers of two below ``start``, falling."""
    value = 1 << (start - 1).bit_length() - 1 if start > 1 else 0
    while value >= least:
        yield value
        value //= 2


def _largest(inventory: Inventory) -> Node:
    return max(inventory.nodes, key=lambda node: (node.devices, node.device.memory_bytes))


def _fewest_new_nodes(spec: ModelSpec, config: ModelConfig, inventory: Inventory, replicas: int) -> int:
    """How many more nodes like the largest are enough; 0 when none are, up to a bound."""
    if not inventory.nodes:
        return 0
    model = _largest(inventory)

    def enough(count: int) -> bool:
        new = tuple(
            replace(model, node_id=f"new-{i}", host=f"new-{i}", free_devices=model.devices) for i in range(count)
        )
        return bool(_search(spec, config, replace(inventory, nodes=inventory.nodes + new), replicas)[0])

    return _least_true(enough, _MOST_NEW_NODES)


def _least_true(holds: Callable[[int], bool], most: int) -> int:
    """The least number from 1 to ``most`` that ``holds``, which stays true once it is; 0 when none does."""
    high = 1
    while not holds(high):
        if high >= most:
            return 0
        high = min(most, high * 2)
    low = high // 2 + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high
