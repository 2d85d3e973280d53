"""Which weights each rank holds: tensor-parallel shards within pipeline stages, as the engine loads them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.checkpoint.tensors import Part, TensorSpec, expected_tensors
from cluster.domain.model_spec import LayerShape, ModelSpec
from cluster.domain.parallel_layout import ParallelLayout, grain_size
from cluster.planner.shard_sizes import shard_shapes


@dataclass(frozen=True, slots=True)
class StageLayers:
    """The decoder layers of one pipeline stage: ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def model_grain(spec: ModelSpec, tensor_parallel_size: int) -> int:
    """The grain that the engine passes to AutoTP for this model."""
    ffn_size = min(shape.ffn_size for shape in spec.distinct_layer_shapes)
    return grain_size(ffn_size, tensor_parallel_size)


def tensor_shards(spec: ModelSpec, tensor: TensorSpec, tensor_parallel_size: int) -> tuple[tuple[int, ...], ...]:
    """The shape of one of the model's tensors on each rank of its stage's group."""
    shape = spec.layer_shape(tensor.layer or 0)
    grain = model_grain(spec, tensor_parallel_size)
    return shard_shapes(tensor, tensor_parallel_size, num_kv_heads=shape.num_kv_heads, grain=grain)


@dataclass(frozen=True, slots=True)
class _PartWeights:
    """Parameters on each tensor rank, and in all: of one layer, or of one part outside of the layers."""

    per_rank: tuple[int, ...]
    total: int


@functools.lru_cache(maxsize=256)
def _weights(
    spec: ModelSpec, tensor_parallel_size: int
) -> tuple[Mapping[Part, _PartWeights], tuple[_PartWeights, ...]]:
    """Parts outside of the layers, and every decoder layer. Layers of one shape are counted once."""
    by_layer: dict[int | None, list[TensorSpec]] = {}
    by_part: dict[Part, list[TensorSpec]] = {part: [] for part in Part}
    for tensor in expected_tensors(spec):
        by_layer.setdefault(tensor.layer, []).append(tensor)
        by_part[tensor.part].append(tensor)
    known: dict[LayerShape, _PartWeights] = {}
    layers = []
    for layer in range(spec.num_layers):
        shape = spec.layer_shape(layer)
        if shape not in known:
            known[shape] = _count(spec, by_layer[layer], tensor_parallel_size)
        layers.append(known[shape])
    outside = {
        part: _count(spec, by_part[part], tensor_parallel_size) for part in (Part.EMBEDDING, Part.FINAL_NORM, Part.HEAD)
    }
    return outside, tuple(layers)


def _count(spec: ModelSpec, tensors: Sequence[TensorSpec], tensor_parallel_size: int) -> _PartWeights:
    per_rank = [0] * tensor_parallel_size
    for tensor in tensors:
        shards = tensor_shards(spec, tensor, tensor_parallel_size)
        per_rank = [count + math.prod(shape) for count, shape in zip(per_rank, shards, strict=True)]
    return _PartWeights(tuple(per_rank), sum(tensor.numel for tensor in tensors))


@functools.lru_cache(maxsize=1024)
def split_stages(spec: ModelSpec, layout: ParallelLayout) -> tuple[StageLayers, ...]:
    """Contiguous layers for each stage: the heaviest stage as light as can be, embedding and head included.

    The weight of a stage is that of its heaviest rank. Among equally good splits the earlier stages take more.
    """
    outside, layers = _weights(spec, layout.tensor_parallel_size)
    stages = layout.pipeline_parallel_size
    assert stages <= len(layers), (stages, len(layers))
    weights = [max(layer.per_rank) for layer in layers]
    first = max(outside[Part.EMBEDDING].per_rank)
    last = max(outside[Part.FINAL_NORM].per_rank) + max(outside[Part.HEAD].per_rank)
    if spec.tie_word_embeddings and stages > 1:
        last += first
    low, high = 0, sum(weights) + first + last
    while low < high:  # the least bound under which a greedy split works
        middle = (low + high) // 2
        if _greedy(weights, stages, first, last, middle) is None:
            low = middle + 1
        else:
            high = middle
    split = _greedy(weights, stages, first, last, high)
    assert split is not None, (spec, layout)
    return split


def _greedy(weights: Sequence[int], stages: int, first: int, last: int, bound: int) -> tuple[StageLayers, ...] | None:
    """Fill stage after stage up to ``bound``, leaving one layer at least for each stage to come."""
    split, start = [], 0
    for stage in range(stages):
        room = bound - (first if stage == 0 else 0) - (last if stage == stages - 1 else 0)
        stop = start
        latest = len(weights) - (stages - 1 - stage)
        while stop < latest and weights[stop] <= room:
            room -= weights[stop]
            stop += 1
        if stop == start:
            return None
        split.append(StageLayers(start, stop))
        start = stop
    return tuple(split) if start == len(weights) else None


def stage_parameters(spec: ModelSpec, layout: ParallelLayout, stage: int, layers: StageLayers) -> tuple[int, ...]:
    """Parameters on each tensor rank of one stage.

    The embedding is whole on every rank of the first stage, and of the last one when the head is tied to it;
    an untied head is cut by vocabulary rows over the last stage's ranks.
    """
    outside, by_layer = _weights(spec, layout.tensor_parallel_size)
    parts = [by_layer[layer].per_rank for layer in range(layers.start, layers.stop)]
    is_first, is_last = stage == 0, stage == layout.pipeline_parallel_size - 1
    if is_first or (is_last and spec.tie_word_embeddings):
        parts.append(outside[Part.EMBEDDING].per_rank)
    if is_last:
        parts += [outside[Part.FINAL_NORM].per_rank, outside[Part.HEAD].per_rank]
    return tuple(sum(counts) for counts in zip(*parts, strict=True))


def stored_bytes(
    spec: ModelSpec, layout: ParallelLayout, stages: Sequence[StageLayers], nbytes_by_name: Mapping[str, int]
) -> tuple[int, ...]:
    """Bytes that each rank reads from storage, given what the files store for every tensor."""
    tp, last = layout.tensor_parallel_size, layout.pipeline_parallel_size - 1
    per_rank = [0] * layout.world_size
    stage_of_layer = [stage for stage, layers in enumerate(stages) for _ in range(len(layers))]
    for tensor in expected_tensors(spec):
        holders = [last]
        if tensor.layer is not None:
            holders = [stage_of_layer[tensor.layer]]
        elif tensor.part is Part.EMBEDDING:
            holders = sorted({0, last}) if spec.tie_word_embeddings else [0]
        stored = nbytes_by_name.get(tensor.name, 0)
        for index, shape in enumerate(tensor_shards(spec, tensor, tp)):
            for stage in holders:
                per_rank[stage * tp + index] += stored * math.prod(shape) // tensor.numel
    return tuple(per_rank)
