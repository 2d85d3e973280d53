"""Which TP x PP layouts are worth a look, and which of them the model's shape allows."""

from __future__ import annotations

from cluster.checkpoint.tensors import model_cuts
from cluster.domain.model_spec import ModelSpec
from cluster.domain.parallel_layout import ParallelLayout

# Deeper pipelines than this only add latency; an explicit size may still ask for one.
MAX_PIPELINE_STAGES = 16


def candidate_layouts(
    *,
    devices: int,
    devices_per_node: int,
    layers: int,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int | None = None,
) -> tuple[ParallelLayout, ...]:
    """Layouts of at most ``devices`` devices, smallest first; explicit sizes are taken as they are.

    Tensor-parallel sizes are the powers of two and the divisors of ``devices_per_node`` up to it.
    """
    sizes = {1 << power for power in range(devices_per_node.bit_length())}
    sizes |= {size for size in range(1, devices_per_node + 1) if devices_per_node % size == 0}
    tensor_sizes = {tensor_parallel_size} if tensor_parallel_size else {s for s in sizes if s <= devices_per_node}
    layouts = set()
    for tp in tensor_sizes:
        if pipeline_parallel_size:
            stages = {pipeline_parallel_size}
        else:
            stages = set(range(1, min(MAX_PIPELINE_STAGES, layers, devices // tp) + 1)) or {1}
        layouts |= {ParallelLayout(tp, pp) for pp in stages}
    explicit = tensor_parallel_size is not None or pipeline_parallel_size is not None
    return tuple(
        sorted(
            (layout for layout in layouts if explicit or layout.world_size <= devices),
            key=lambda layout: (layout.world_size, layout.tensor_parallel_size),
        )
    )


# What ranks would find out by a pass on meta (engine.model.pipeline); docs/models.md has the refusals that were seen.
_UNDIVIDED = {"BeamForCausalLM": "they are given more than hidden states (attention_scaling)"}


def shape_objection(spec: ModelSpec, layout: ParallelLayout, devices_per_node: int) -> str | None:
    """Why the model's shape or the nodes' size rules ``layout`` out, None when they allow it."""
    tp, pp = layout.tensor_parallel_size, layout.pipeline_parallel_size
    if tp > devices_per_node:
        return f"a tensor-parallel group stays inside a node, and no node has {tp} devices"
    if tp > 1:
        cuts = model_cuts(spec)
        if cuts.objection:
            return f"{spec.architecture} cannot be cut over several ranks: {cuts.objection}"
        heads = min(heads for heads, _ in filter(None, cuts.heads))
        if tp > heads:
            return f"{tp} ranks are more than the model's {heads} query heads, and no rank may be without one"
        narrowest = min(shape.ffn_size for shape in spec.distinct_layer_shapes)
        if tp > narrowest:
            return f"{tp} ranks are more than the {narrowest} columns of a feed-forward layer"
    if pp > 1 and spec.architecture in _UNDIVIDED:
        return (
            f"the layers of {spec.architecture} cannot be divided into pipeline stages: {_UNDIVIDED[spec.architecture]}"
        )
    if pp > spec.num_layers:
        return f"{pp} stages are more than the model's {spec.num_layers} layers"
    return None
