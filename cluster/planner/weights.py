"""Which weights each rank holds: tensor-parallel shards within pipeline stages, as the engine loads them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.checkpoint.splits import cut_shape, shard_sizes
from cluster.checkpoint.tensors import Part, TensorSpec, expected_tensors, model_cuts
from cluster.domain.model_spec import ModelSpec
from cluster.domain.parallel_layout import ParallelLayout, StageLayers


def tensor_shards(spec: ModelSpec, tensor: TensorSpec, tensor_parallel_size: int) -> tuple[tuple[int, ...], ...]:
    """The shape of one of the model's tensors on each rank of its stage's group."""
    cut = model_cuts(spec).by_name[tensor.name]
    return tuple(cut_shape(tensor.shape, cut, tensor_parallel_size, rank) for rank in range(tensor_parallel_size))


@dataclass(frozen=True, slots=True)
class _PartWeights:
    """Parameters on each tensor rank, and in all: of one layer, or of one part outside of the layers."""

    per_rank: tuple[int, ...]
    total: int
    largest: tuple[int, ...]  # the largest slice that is reordered after loading, on each tensor rank


# Parts with products, whose weights are put into another order on a CPU; a tied head keeps its own.
_REORDERED = frozenset({Part.LAYER, Part.HEAD})


@functools.lru_cache(maxsize=256)
def _weights(
    spec: ModelSpec, tensor_parallel_size: int
) -> tuple[Mapping[Part, _PartWeights], tuple[_PartWeights, ...]]:
    """Parts outside of the layers, and every decoder layer. Layers of one shape are counted once."""
    by_layer: dict[int | None, list[TensorSpec]] = {layer: [] for layer in range(spec.num_layers)}
    by_part: dict[Part, list[TensorSpec]] = {part: [] for part in Part}
    for tensor in expected_tensors(spec):
        by_layer.setdefault(tensor.layer, []).append(tensor)
        by_part[tensor.part].append(tensor)
    known: dict[tuple[object, ...], _PartWeights] = {}
    layers = []
    for layer in range(spec.num_layers):
        key = (spec.layer_shape(layer), tuple(tensor.shape for tensor in by_layer[layer]))
        if key not in known:
            known[key] = _count(spec, by_layer[layer], tensor_parallel_size)
        layers.append(known[key])
    parts = [part for part in Part if part is not Part.LAYER]
    outside: dict[Part, _PartWeights] = {part: _count(spec, by_part[part], tensor_parallel_size) for part in parts}
    return outside, tuple(layers)


def _count(spec: ModelSpec, tensors: Sequence[TensorSpec], tensor_parallel_size: int) -> _PartWeights:
    per_rank, largest = [0] * tensor_parallel_size, [0] * tensor_parallel_size
    for tensor in tensors:
        sizes = [math.prod(shape) for shape in tensor_shards(spec, tensor, tensor_parallel_size)]
        per_rank = [count + size for count, size in zip(per_rank, sizes, strict=True)]
        if tensor.part in _REORDERED:
            largest = [max(pair) for pair in zip(largest, sizes, strict=True)]
    return _PartWeights(tuple(per_rank), sum(tensor.numel for tensor in tensors), tuple(largest))


@functools.lru_cache(maxsize=1024)
def split_stages(spec: ModelSpec, layout: ParallelLayout) -> tuple[StageLayers, ...]:
    """Contiguous layers for each stage: the heaviest stage as light as can be, embedding and head included.

    The weight of a stage is that of its heaviest rank. Among equally good splits the earlier stages take more.
    """
    outside, layers = _weights(spec, layout.tensor_parallel_size)
    stages = layout.pipeline_parallel_size
    assert stages <= len(layers), (stages, len(layers))
    weights = [max(layer.per_rank) for layer in layers]
    embedding = max(outside[Part.EMBEDDING].per_rank)
    first = embedding + max(outside[Part.ENTRY].per_rank)
    last = max(outside[Part.FINAL_NORM].per_rank) + max(outside[Part.HEAD].per_rank)
    if spec.tie_word_embeddings and stages > 1:
        last += max(_tied_head(outside[Part.EMBEDDING], spec, layout.tensor_parallel_size))
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

    The embedding is whole on every rank of the first stage. The head is cut by vocabulary rows over the last stage's
    ranks; tied to the embedding, it is a part of it where both are on one stage, and read again where they are not.
    """
    parts = _stage_parts(spec, layout, stage, layers)
    return tuple(sum(counts) for counts in zip(*(part.per_rank for part in parts), strict=True))


def largest_slices(spec: ModelSpec, layout: ParallelLayout, stage: int, layers: StageLayers) -> tuple[int, ...]:
    """Elements of the largest slice that is reordered on a CPU, on each tensor rank of one stage: no embedding is."""
    parts = _stage_parts(spec, layout, stage, layers)
    return tuple(max(counts) for counts in zip(*(part.largest for part in parts), strict=True))


def _stage_parts(spec: ModelSpec, layout: ParallelLayout, stage: int, layers: StageLayers) -> list[_PartWeights]:
    tp = layout.tensor_parallel_size
    outside, by_layer = _weights(spec, tp)
    parts = list(by_layer[layers.start : layers.stop])
    is_first, is_last = stage == 0, stage == layout.pipeline_parallel_size - 1
    if is_first:
        parts += [outside[Part.EMBEDDING], outside[Part.ENTRY]]
    elif is_last and spec.tie_word_embeddings:
        head = _tied_head(outside[Part.EMBEDDING], spec, tp)
        parts.append(_PartWeights(head, sum(head), (0,) * tp))
    if is_last:
        parts += [outside[Part.FINAL_NORM], outside[Part.HEAD]]
    return parts


def _tied_head(embedding: _PartWeights, spec: ModelSpec, tensor_parallel_size: int) -> tuple[int, ...]:
    """The embedding's rows that each rank of a later stage holds as its head."""
    width = embedding.total // spec.vocab_size
    return tuple(rows * width for rows in shard_sizes(spec.vocab_size, tensor_parallel_size))


def stored_bytes(
    spec: ModelSpec, layout: ParallelLayout, stages: Sequence[StageLayers], nbytes_by_name: Mapping[str, int]
) -> tuple[int, ...]:
    """Bytes that each rank reads from storage, given what the files store for every tensor."""
    tp, last = layout.tensor_parallel_size, layout.pipeline_parallel_size - 1
    per_rank = [0] * layout.world_size
    stage_of_layer = [stage for stage, layers in enumerate(stages) for _ in range(len(layers))]
    for tensor in expected_tensors(spec):
        holder = last
        if tensor.layer is not None:
            holder = stage_of_layer[tensor.layer]
        elif tensor.part in (Part.EMBEDDING, Part.ENTRY):
            holder = 0
        stored = nbytes_by_name.get(tensor.name, 0)
        for index, shape in enumerate(tensor_shards(spec, tensor, tp)):
            per_rank[holder * tp + index] += stored * math.prod(shape) // tensor.numel
        if tensor.part is Part.EMBEDDING and spec.tie_word_embeddings and last > 0:
            for index, rows in enumerate(shard_sizes(tensor.shape[0], tp)):
                per_rank[last * tp + index] += stored * rows // tensor.shape[0]
    return tuple(per_rank)
